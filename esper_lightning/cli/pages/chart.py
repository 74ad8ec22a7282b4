"""Line charts as SVG: axes, lines, bands and marks, with the values at a place for the pointer.

A chart follows the colours of the page (light or dark) and its width. The script of the page shows
the values under the pointer from the attribute ``data-lines``.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from esper_lightning.cli.pages.elements import Markup, element
from esper_lightning.comparison.section import number
from esper_lightning.forensics.pictures import PALETTE

__all__ = ["Line", "legend", "line_chart", "thinned"]

_COLOURS = len(PALETTE)  # of which page.css has a tone each
_DASHES = (None, "6 3", "2 2", "8 3 2 3")  # of lines beyond the colours
_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 10, 36  # margins for the texts of the axes
_MOST_POINTS = 300  # of a line; a chart has no more pixels to show
_TICKS = 5
_FEW = 25  # points of a line that are also drawn as dots


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart, by environment steps.

    Attributes:
        name: Name of the line; empty where a chart has only one.
        x: Environment steps, increasing.
        y: A value for each; a value that is not finite interrupts the line.
        low: Lower end of a band round the line, if there is one.
        high: Upper end of the band.
        colour: Index of the colour.
        ended_early: Whether the last point gets a cross.
    """

    name: str = ""
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    ended_early: bool = False


def thinned(x: Sequence[float], y: Sequence[float], *, name: str = "", colour: int = 0) -> Line:
    """A line of at most 300 points: means of neighbours, with a band between least and greatest.

    Args:
        x: Environment steps, increasing.
        y: A value for each.
        name: Name of the line.
        colour: Index of the colour.
    """
    size = math.ceil(len(x) / _MOST_POINTS)
    if size <= 1:
        return Line(name=name, x=x, y=y, colour=colour)
    groups = [y[k : k + size] for k in range(0, len(y), size)]
    return Line(
        name=name,
        x=[x[min(k + size, len(x)) - 1] for k in range(0, len(x), size)],
        y=[sum(group) / len(group) for group in groups],
        low=[min(group) for group in groups],
        high=[max(group) for group in groups],
        colour=colour,
    )


def line_chart(title: str, lines: Sequence[Line], *, has_legend: bool = True) -> Markup:
    """A figure of lines over environment steps.

    A chart of which no value is finite has a sentence in place of lines.

    Args:
        title: Title above the chart.
        lines: Lines, in the order in which they are drawn.
        has_legend: Whether lines that have names are named below the chart.
    """
    heading = element("figcaption", title)
    x_all = [x for line in lines for x in line.x]
    bands = (values for line in lines for values in (line.y, line.low or (), line.high or ()))
    y_all = [value for values in bands for value in values if math.isfinite(value)]
    if not y_all:
        return element("figure", heading, element("p", "No value is finite."))
    x_range, y_range = _range(x_all, margin=0.0), _range(y_all, margin=0.05)
    scale = _Scale(x_range, y_range)
    parts = _axes(scale)
    for line in lines:
        parts += _drawn(line, scale)
    cursor = element("line", class_="cursor", y1=_TOP, y2=_HEIGHT - _BOTTOM, x1=-9, x2=-9)
    data = [{"name": line.name, "x": [*line.x], "y": [number(y) for y in line.y]} for line in lines]
    drawing = element(
        "svg",
        *parts,
        cursor,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=title,
        data_lines=json.dumps(data, allow_nan=False),
        data_x=json.dumps([*x_range, _LEFT, _WIDTH - _RIGHT]),
    )
    named = {line.name: line.colour for line in lines if line.name} if has_legend else {}
    keys = [legend(named)] if named else []
    return element("figure", heading, drawing, *keys, element("output", class_="values"))


def legend(colours: Mapping[str, int]) -> Markup:
    """The names of lines beside their colours.

    Args:
        colours: Index of the colour of each name.
    """
    keys = [
        element("span", element("i", class_=f"c{colour % _COLOURS}"), name)
        for name, colour in colours.items()
    ]
    return element("div", *keys, class_="legend")


class _Scale:
    """Places in the drawing, in its own units, of values."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        return _LEFT + _share(value, *self.x_range) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - _share(value, *self.y_range) * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, x: Iterable[float], y: Iterable[float]) -> str:
        """A path through the points; one whose value is not finite interrupts it."""
        words: list[str] = []
        pen = "M"
        for a, b in zip(x, y, strict=True):
            if not math.isfinite(b):
                pen = "M"
                continue
            words.append(f"{pen}{self.x(a):.1f} {self.y(b):.1f}")
            pen = "L"
        return "".join(words)


def _share(value: float, low: float, high: float) -> float:
    """Place of a value between two others; of halves, since a difference may overflow."""
    return (value / 2 - low / 2) / (high / 2 - low / 2)


def _drawn(line: Line, scale: _Scale) -> list[Markup]:
    colour = f"c{line.colour % _COLOURS}"
    drawn: list[Markup] = []
    if line.low is not None and line.high is not None:
        band = zip(line.x, line.low, line.high, strict=True)
        known = [(x, a, b) for x, a, b in band if math.isfinite(a) and math.isfinite(b)]
        there = scale.path([x for x, _, _ in known], [b for _, _, b in known])
        back = scale.path([x for x, _, _ in known[::-1]], [a for _, a, _ in known[::-1]])
        drawn.append(element("path", d=f"{there}L{back[1:]}Z", class_=f"band {colour}"))
    dashes = _DASHES[line.colour // _COLOURS % len(_DASHES)]
    d = scale.path(line.x, line.y)
    drawn.append(element("path", d=d, class_=f"line {colour}", stroke_dasharray=dashes))
    finite = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if len(line.x) < _FEW:
        drawn += [
            element("circle", cx=f"{scale.x(x):.1f}", cy=f"{scale.y(y):.1f}", r=2.5, class_=colour)
            for x, y in finite
        ]
    if line.ended_early and finite:
        x, y = scale.x(finite[-1][0]), scale.y(finite[-1][1])
        cross = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
        drawn.append(element("path", d=cross, class_=f"line cross {colour}"))
    return drawn


def _axes(scale: _Scale) -> list[Markup]:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts: list[Markup] = []
    for value in _ticks(*scale.y_range):
        y = f"{scale.y(value):.1f}"
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        text = _compact(value)
        parts.append(element("text", text, x=left - 6, y=y, class_="y"))
    for value in _ticks(*scale.x_range):
        x = f"{scale.x(value):.1f}"
        parts.append(element("text", _compact(value), x=x, y=bottom + 14, class_="x"))
    parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    middle = (left + right) / 2
    return [*parts, element("text", "environment steps", x=middle, y=_HEIGHT - 4, class_="x name")]


def _range(values: Sequence[float], *, margin: float) -> tuple[float, float]:
    """The range of an axis; it has an extent, and no end of it is infinite."""
    low, high = min(values), max(values)
    extent = high / 2 - low / 2
    if extent <= max(abs(low), abs(high)) * 1e-12 + 1e-300:
        extent = abs(high) / 4 or 0.5
        margin = 1.0
    most = sys.float_info.max
    return max(-most, low - 2 * margin * extent), min(most, high + 2 * margin * extent)


def _ticks(low: float, high: float) -> list[float]:
    """Round values within a range, about five, at distances of 1, 2 or 5 times a power of ten."""
    rough = high / _TICKS - low / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _compact(value: float) -> str:
    """A value of an axis in a few characters: 50k, 1.5M, 0.002, 1e-07."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.4g}{letter}"
    return f"{value:.3g}"
