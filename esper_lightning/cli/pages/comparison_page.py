"""The page of a comparison: curves and scores of variants, what differs, and all metrics."""

import math
from collections.abc import Sequence

from esper_lightning.cli.pages.chart import Line, legend, line_chart, thinned
from esper_lightning.cli.pages.elements import Markup, element, page, table
from esper_lightning.cli.pages.run_page import environment_name
from esper_lightning.comparison.runs import SCORES, Run, identity, read_metrics
from esper_lightning.comparison.scores import Comparison
from esper_lightning.comparison.section import Section
from esper_lightning.comparison.text import sections
from esper_lightning.forensics.layout import RunLayout

__all__ = ["comparison_page"]

_MOST_RUNS = 40  # whose metrics are drawn one by one
_ABSENT = "(absent)"


def comparison_page(comparison: Comparison) -> str:
    """The page of a comparison, as one HTML file that needs no network.

    Raises:
        ValueError: If a history cannot be read.
    """
    runs = [run for variant in comparison.variants for run in variant.runs.values()]
    colours = {variant.name: k for k, variant in enumerate(comparison.variants)}
    title = f"{environment_name(runs[0])}: {len(comparison.variants)} variants, {len(runs)} runs"
    if len(comparison.variants) == 1:
        title = f"{environment_name(runs[0])}: {len(runs)} runs"
    legend = (
        "Interquartile mean of the return with 95 % intervals; a cross is where a run ended early"
    )
    parts = [
        element("h2", "Learning"),
        element("div", line_chart(legend, _curves(comparison, colours)), class_="charts large"),
        *(markup for section in sections(comparison) for markup in _section(section)),
        *_settings(runs),
        *_metrics(comparison, colours),
    ]
    return page(title, *parts)


def _curves(comparison: Comparison, colours: dict[str, int]) -> list[Line]:
    lines: list[Line] = []
    for variant in comparison.variants:
        colour, curve = colours[variant.name], comparison.curves.get(variant.name)
        if curve is not None:
            lines.append(
                Line(
                    name=variant.name,
                    x=curve.env_steps,
                    y=curve.value,
                    low=curve.low,
                    high=curve.high,
                    colour=colour,
                )
            )
        for seed, run in variant.runs.items():
            points = [p for p in run.points[comparison.score] if math.isfinite(p.value)]
            if run.ended != "finished" and points:
                x, y = [p.env_steps for p in points], [p.value for p in points]
                name = f"{variant.name}, seed {seed}, {run.ended}"
                lines.append(Line(name=name, x=x, y=y, colour=colour, ended_early=True))
    return lines


def _section(section: Section) -> list[Markup]:
    content = [table(section.head, section.rows)] if section.rows else []
    remarks = [element("p", remark, class_="quiet") for remark in section.remarks]
    return [element("h2", section.title), *content, *remarks]


def _settings(runs: Sequence[Run]) -> list[Markup]:
    """Settings that are not the same in all runs, a column for each run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [
        [name, *(str(run.settings.get(name, _ABSENT)) for run in runs)]
        for name in names
        if len({identity(run.settings.get(name, _ABSENT)) for run in runs}) > 1
    ]
    heading = element("h2", "Settings that differ")
    if not rows:
        return [heading, element("p", "Only the seeds differ.")]
    return [heading, table(["setting", *(str(run.directory) for run in runs)], rows)]


def _metrics(comparison: Comparison, colours: dict[str, int]) -> list[Markup]:
    """A chart for each metric of the histories, with a line for each run."""
    runs = [(v.name, seed, run) for v in comparison.variants for seed, run in v.runs.items()]
    lines: dict[str, list[Line]] = {}
    for name, seed, run in runs[:_MOST_RUNS]:
        rank = RunLayout(run.directory).rank(0)
        for metric, points in (read_metrics(rank.history) | read_metrics(rank.evaluations)).items():
            x, y = [p.env_steps for p in points], [p.value for p in points]
            label = f"{name}, seed {seed}"
            line = thinned(x, y, name=label, colour=colours[name])
            lines.setdefault(metric, []).append(line)
    first = [*SCORES.values()]
    order = sorted(lines, key=lambda metric: first.index(metric) if metric in first else len(first))
    charts = [line_chart(metric, lines[metric], has_legend=False) for metric in order]
    heading = element("h2", "Every metric, run by run")
    left = len(runs) - _MOST_RUNS
    remark = [element("p", f"{left} more runs are not drawn.", class_="quiet")] if left > 0 else []
    return [heading, *remark, legend(colours), element("div", *charts, class_="charts")]
