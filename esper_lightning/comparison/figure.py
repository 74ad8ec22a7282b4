"""A comparison as a figure: learning curves, and the scores where variants are compared."""
# The annotations of matplotlib are incomplete.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import warnings
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from esper_lightning.comparison.runs import SCORES
from esper_lightning.comparison.scores import Comparison, Place
from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.pictures import PALETTE, PICTURE_METADATA
from esper_lightning.forensics.reading import printable

__all__ = ["draw"]

_STYLES = ("-", "--", ":", "-.")  # of lines beyond the colours


def draw(comparison: Comparison, path: Path) -> None:
    """Write the figure of a comparison as a PNG file.

    Raises:
        OSError: If the file cannot be written.
    """
    places = [place for place in comparison.places if place.rows]
    height = 3.4 + 0.3 * len(comparison.variants)
    figure = Figure(figsize=(5.6 + 3.4 * len(places), height), dpi=150, layout="constrained")
    ratios = [5.0, *[2.6] * len(places)]
    curves, *panels = figure.subplots(1, 1 + len(places), width_ratios=ratios, squeeze=False)[0]
    _curves(curves, comparison)
    for axes, place in zip(panels, places, strict=True):
        _scores(axes, place, comparison)
    figure.legend(loc="outside lower center", ncols=2 if len(comparison.variants) > 1 else 1)
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(temporary, format="png", metadata=PICTURE_METADATA)


def _look(comparison: Comparison, name: str) -> tuple[str, str]:
    k = [variant.name for variant in comparison.variants].index(name)
    return PALETTE[k % len(PALETTE)], _STYLES[k // len(PALETTE) % len(_STYLES)]


def _curves(axes: Axes, comparison: Comparison) -> None:
    for variant in comparison.variants:
        colour, style = _look(comparison, variant.name)
        curve = comparison.curves.get(variant.name)
        if curve is not None:
            many = len(curve.seeds)
            name = printable(variant.name).replace("$", r"\$")  # a name is no formula
            label = f"{name} ({many} seed{'s' * (many > 1)})"
            marker = "o" if len(curve.env_steps) < 20 else ""
            axes.plot(
                curve.env_steps, curve.value, style, color=colour, label=label, marker=marker, ms=3
            )
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    curve.env_steps, curve.low, curve.high, color=colour, alpha=0.2, lw=0
                )
        for run in variant.runs.values():
            points = [p for p in run.points[comparison.score] if math.isfinite(p.value)]
            if run.ended == "finished" or not points:
                continue
            axes.plot(*zip(*points, strict=True), "-", color=colour, lw=0.7, alpha=0.7)
            last = points[-1]
            axes.plot(last.env_steps, last.value, "X", color=colour, ms=7, mec="white", mew=0.7)
    runs = [run for variant in comparison.variants for run in variant.runs.values()]
    if any(run.ended != "finished" for run in runs):
        label = "a run that ended before its budget"
        axes.plot([], [], "-X", color="0.4", lw=0.7, ms=7, mec="white", label=label)
    axes.set_title("Interquartile mean, 95 % intervals", fontsize=10)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(SCORES[comparison.score])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _scores(axes: Axes, place: Place, comparison: Comparison) -> None:
    for k, row in enumerate(place.rows):
        colour, _ = _look(comparison, row.name)
        estimate = row.interquartile_mean
        axes.plot(row.score, [k] * len(row.score), "|", color=colour, alpha=0.6, ms=9)
        if estimate.low is not None and estimate.high is not None:
            width = estimate.high - estimate.low
            axes.barh(k, width, height=0.2, left=estimate.low, color=colour, alpha=0.3)
        axes.plot(estimate.value, k, "o", color=colour, ms=7, mec="white")
    which = "end" if place.is_end else "reached by every run"
    axes.set_title(
        f"{place.env_steps:,} env steps\n({which}, {len(place.seeds)} seeds)", fontsize=10
    )
    axes.use_sticky_edges = False  # else bars would touch the edges of the plot
    axes.margins(x=0.08)
    axes.set_ylim(len(place.rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlabel("return")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
