"""Comparison of variants: at which env steps, over which seeds, and with which scores.

A run that did not reach its budget has no score there, and no score is invented for such a run. So
variants are compared at up to two places: the *end*, over the seeds whose runs reached the end in
every variant, and the last place that *every run reached*, over all seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esper_lightning.comparison.runs import Point, Run, Score
from esper_lightning.comparison.statistics import (
    Estimate,
    Scores,
    estimate,
    interquartile_mean,
    interval,
    probability_of_improvement,
)
from esper_lightning.comparison.variants import Variant
from esper_lightning.core.errors import require

__all__ = ["Comparison", "Curve", "Place", "Row", "compare"]

_MOST_PLACES = 200  # points of a curve


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of a variant at a place; ``improvement`` is ``None`` for the baseline itself."""

    name: str  # of the variant
    score: list[float]  # in the order of the seeds of the place
    interquartile_mean: Estimate
    improvement: Estimate | None


@dataclass(frozen=True)
class Place:
    """Environment steps at which variants are compared, and the seeds of the comparison."""

    env_steps: int
    is_end: bool
    seeds: list[int]
    rows: list[Row]
    left_out: list[str]  # seeds and variants, with the reason


@dataclass(frozen=True)
class Curve:
    """Interquartile mean by environment steps, over the same seeds at every point."""

    seeds: list[int]
    env_steps: list[int]
    value: list[float]
    low: list[float] | None
    high: list[float] | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the text and the figure of a comparison show.

    Attributes:
        variants: Variants in the order given, the baseline among them.
        baseline: Name of the variant that others are compared with.
        score: Kind of score of all runs.
        places: Places of the comparison; the end first, where a run reached it.
        curves: Learning curves by name of the variant, for variants that are at one of the places.
        notes: Sentences that a reader must know: budgets that differ, runs without evaluations, ...
    """

    variants: list[Variant]
    baseline: str
    score: Score
    places: list[Place]
    curves: dict[str, Curve]
    notes: list[str]


def compare(
    variants: Sequence[Variant],
    *,
    baseline: str | None = None,
    score: Score | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare variants.

    Args:
        variants: Variants in the order in which to show them.
        baseline: Name of the variant that others are compared with; ``None`` for the first.
        score: Kind of score; ``None`` for evaluations if every run that has returns has
            evaluations, else rollouts.
        notes: Notes that come before those of the comparison.

    Raises:
        ValueError: If no variant has the name of the baseline, or no run has a return.
    """
    by_name = {variant.name: variant for variant in variants}
    if baseline is None:
        baseline = variants[0].name
    require(baseline in by_name, "--baseline", f"be one of {'; '.join(by_name)}", baseline)
    runs = [run for variant in variants for run in variant.runs.values()]
    remarks = [*notes, *_budgets(variants)]
    remarks += [f"{run.directory}: {remark}" for run in runs for remark in run.remarks]
    if score is None:
        score, remark = _choose(runs)
        remarks += remark
    measured = [run for run in runs if run.measured(score)]
    got = f"none in {', '.join(str(run.directory) for run in runs)}"
    require(bool(measured), "Runs", f"have a return of {score}s to be compared", got)
    everywhere = min(run.measured(score) for run in measured)
    known = [run for run in measured if math.isfinite(run.points[score][-1].value)]
    ended = [run for run in known if run.ended == "finished"]
    ended = ended or [run for run in known if run.ended == "stopped"]
    end = min((run.measured(score) for run in ended), default=everywhere)
    budgets = {variant.budget for variant in variants}
    own_ends = {run.measured(score) for run in ended if run.ended == "finished"}
    if len(budgets) > 1 or None in budgets or len(own_ends) < 2:
        own_ends.clear()
    if own_ends:
        each = ", ".join(f"{env_steps:,}" for env_steps in sorted(own_ends))
        text = "Finished runs of one budget end where the last whole step of all environments does"
        remarks.append(f"{text}, each compared at its own: {each} env steps.")
    places = [_place(variants, end, score, baseline, own_ends=own_ends)] if ended else []
    if everywhere < end or not ended:
        places.append(_place(variants, everywhere, score, baseline, own_ends=None))
    curves: dict[str, Curve] = {}
    for place in reversed(places):  # the end comes last and replaces the other place
        for row in place.rows:
            members = {seed: by_name[row.name].runs[seed] for seed in place.seeds}
            curves[row.name] = _curve(members, place.env_steps, score)
    return Comparison(
        variants=list(variants),
        baseline=baseline,
        score=score,
        places=places,
        curves=curves,
        notes=remarks,
    )


def _budgets(variants: Sequence[Variant]) -> list[str]:
    if len({variant.budget for variant in variants}) < 2:
        return []
    each = "; ".join(f"{v.name}: {v.budget or 'no'} env steps" for v in variants)
    text = "Budgets differ, and a schedule is not at its end where a longer run is compared"
    return [f"{text}: {each}."]


def _choose(runs: Sequence[Run]) -> tuple[Score, list[str]]:
    without = [run for run in runs if not run.points["evaluation"] and run.measured("rollout")]
    if not without:
        return "evaluation", []
    if len(without) == len(runs):
        return "rollout", ["No run has evaluations: returns are those of rollouts, with noise."]
    named = ", ".join(str(run.directory) for run in without)
    text = "Returns are those of rollouts, with noise, for every run: no evaluations of"
    return "rollout", [f"{text} {named}."]


def _place(
    variants: Sequence[Variant],
    env_steps: int,
    score: Score,
    baseline: str,
    *,
    own_ends: set[int] | None,
) -> Place:
    """Scores at ``env_steps``; ``own_ends`` are ends of finished runs (``None``: not the end)."""

    def place_of(run: Run) -> int:
        own = run.measured(score)
        return own if own_ends and own in own_ends and run.ended == "finished" else env_steps

    known: dict[str, dict[int, float]] = {}
    left_out: list[str] = []
    for variant in variants:
        values = {seed: run.at(place_of(run), score) for seed, run in variant.runs.items()}
        known[variant.name] = {seed: value for seed, value in values.items() if value is not None}
        if not known[variant.name]:
            left_out.append(f"{variant.name}: none of its runs has a return there")
    present = [variant for variant in variants if known[variant.name]]
    paired = set[int].intersection(*(set(known[v.name]) for v in present or variants))
    for seed in sorted({seed for variant in present for seed in variant.runs} - paired):
        why = [_lack(v, seed, score) for v in present if seed not in known[v.name]]
        left_out.append(f"seed {seed}: {', '.join(why)}")
    seeds = sorted(paired)
    array = {v.name: np.array([known[v.name][seed] for seed in seeds]) for v in present}
    rows = [_row(v, array[v.name], array.get(baseline), baseline) for v in present if seeds]
    return Place(env_steps, own_ends is not None, seeds, rows, left_out)


def _lack(variant: Variant, seed: int, score: Score) -> str:
    run = variant.runs.get(seed)
    if run is None:
        return f"missing in {variant.name}"
    return f"known up to {run.measured(score):,} in {variant.name}"


def _row(variant: Variant, score: Scores, baseline: Scores | None, baseline_name: str) -> Row:
    improvement = None
    if baseline is not None and variant.name != baseline_name:
        improvement = estimate((score, baseline), probability_of_improvement)
    return Row(
        name=variant.name,
        score=score.tolist(),
        interquartile_mean=estimate((score,), interquartile_mean),
        improvement=improvement,
    )


def _curve(runs: dict[int, Run], end: int, score: Score) -> Curve:
    """The curve of runs from where all have a return; each point takes the latest returns."""
    points = [[p for p in run.points[score] if p.env_steps <= end] for run in runs.values()]
    start = max(run[0].env_steps for run in points)
    places = sorted({p.env_steps for run in points for p in run if p.env_steps >= start})
    if len(places) > _MOST_PLACES:
        last = len(places) - 1
        places = [places[k * last // (_MOST_PLACES - 1)] for k in range(_MOST_PLACES)]
    value = np.stack([_latest(run, places) for run in points], axis=-1)  # [place, seed]
    ends = interval((value,), interquartile_mean)
    return Curve(
        seeds=list(runs),
        env_steps=places,
        value=interquartile_mean(value).tolist(),
        low=None if ends is None else ends[0].tolist(),
        high=None if ends is None else ends[1].tolist(),
    )


def _latest(points: list[Point], places: list[int]) -> Scores:
    at = np.array([env_steps for env_steps, _ in points])
    value = np.array([value for _, value in points])
    return value[np.searchsorted(at, places, side="right") - 1]
