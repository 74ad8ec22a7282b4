"""Charts show the values that they are given, whatever these are."""

import colorsys
import json
import math
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.cli.pages.chart import Line, line_chart, thinned
from esper_lightning.forensics.pictures import PALETTE
from tests.cli.pages.browser import Elements

VALUES = st.floats(allow_nan=True, allow_infinity=True, width=64)


def points(chart: str) -> list[tuple[float, float]]:
    """Places of all points of the first line, in units of the drawing."""
    paths = [a["d"] or "" for a in Elements(chart).all("path") if "line" in (a["class"] or "")]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](\S+) (-?[\d.]+)", paths[0])]


@given(st.lists(VALUES, min_size=1, max_size=20))
def test_every_finite_value_lies_within_the_axes(values):
    chart = line_chart("a", [Line(x=range(len(values)), y=values)])
    if not any(map(math.isfinite, values)):
        assert "No value is finite." in chart
        return
    places = points(chart)
    assert len(places) == sum(map(math.isfinite, values))
    assert all(56 <= x <= 448 and 10 <= y <= 204 for x, y in places)


def test_higher_values_are_higher_and_later_ones_further_right():
    (x0, y0), (x1, y1), (x2, y2) = points(line_chart("a", [Line(x=[0, 10, 30], y=[1, 3, 2])]))
    assert x0 < x1 < x2
    assert (x2 - x0) == pytest.approx(3 * (x1 - x0), abs=0.2)
    assert y1 < y2 < y0
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2)


def test_a_value_that_is_not_finite_interrupts_the_line():
    chart = line_chart("a", [Line(x=[0, 1, 2, 3], y=[1, math.nan, 2, 3])])
    path = next(a["d"] for a in Elements(chart).all("path"))
    assert [word[0] for word in re.findall(r"[ML]\S+", path or "")] == ["M", "M", "L"]


def test_the_pointer_finds_the_values_that_were_given():
    chart = line_chart("a", [Line(name="<b>", x=[0, 5], y=[0.5, math.inf])])
    data = json.loads(Elements(chart).all("svg")[0]["data-lines"] or "")
    assert data == [{"name": "<b>", "x": [0, 5], "y": ["0.5", "inf"]}]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=2000))
def test_a_thinned_line_keeps_its_ends_its_mean_and_its_extremes(values):
    line = thinned(range(len(values)), values)
    assert len(line.x) <= 300
    assert line.x[-1] == len(values) - 1
    low, high = line.low or line.y, line.high or line.y
    assert (min(low), max(high)) == (min(values), max(values))
    assert all(a - 1e-6 <= y <= b + 1e-6 for a, y, b in zip(low, line.y, high, strict=True))


def test_lines_with_names_have_a_legend_unless_it_is_elsewhere():
    lines = [Line(name="first", x=[0], y=[1.0]), Line(name="second", x=[0], y=[2.0], colour=1)]
    assert Elements(line_chart("a", lines)).texts.count("first") == 1
    assert "first" not in Elements(line_chart("a", lines, has_legend=False)).texts


def test_ticks_are_few_and_round():
    texts = Elements(line_chart("a", [Line(x=[0, 1_000_000], y=[0.0, 1.0])])).texts
    assert {"0", "200k", "400k", "1M", "0.5", "1"} <= set(texts)


def hue_and_saturation(colour: str) -> tuple[float, float]:
    """Hue in degrees, and saturation from 0 to 1, of a colour like ``#0072B2``."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, _, saturation = colorsys.rgb_to_hls(red, green, blue)
    return 360 * hue, saturation


def test_pages_have_a_light_and_a_dark_tone_of_every_colour_of_the_figures():
    css = resources.files("esper_lightning.cli.pages").joinpath("page.css").read_text()
    tones = re.findall(r"--c(\d): (#[0-9a-f]{6});", css)
    assert [int(number) for number, _ in tones] == [*range(len(PALETTE))] * 2
    for number, tone in tones:
        hue, saturation = hue_and_saturation(tone)
        expected, vivid = hue_and_saturation(PALETTE[int(number)])
        assert (saturation > 0.25) == (vivid > 0.25), tone  # black is the colour of the text
        assert vivid == 0 or abs(hue - expected) < 8, tone
        assert f".c{number} {{ stroke: var(--c{number}); }}" in css
