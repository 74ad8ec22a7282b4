"""Interquartile mean and probability of improvement, with bootstrap intervals over seeds.

The statistics are those of Agarwal et al. 2021 (arXiv 2108.13264) for one task: variants are the
strata, and are resampled independently of each other. Axis: ``N`` seeds, the last axis.
"""

# SciPy has no type annotations.
# pyright: reportUnknownVariableType=false, reportMissingTypeStubs=false

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, trim_mean

__all__ = ["Estimate", "interquartile_mean", "interval", "mean", "probability_of_improvement"]

Scores = NDArray[np.float64]
_LEVEL = 0.95
_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1_000  # a bound on the memory for a whole curve


class Estimate(NamedTuple):
    """A statistic and its 95 % interval, whose ends are ``None`` where there is one seed only."""

    value: float
    low: float | None
    high: float | None


def interquartile_mean(score: Scores, axis: int = -1) -> Scores:
    """Mean without the lowest and the highest quarter, each rounded down to whole seeds."""
    return cast(Scores, trim_mean(score, 0.25, axis=axis))


def probability_of_improvement(score: Scores, baseline: Scores, axis: int = -1) -> Scores:
    """Share of pairs in which the run beats the run of the baseline; half for equal scores.

    The share is the Mann-Whitney statistic U over the number of pairs.
    """
    assert axis == -1
    wins = np.heaviside(score[..., :, None] - baseline[..., None, :], 0.5)
    return wins.mean(axis=(-2, -1))


def interval(
    samples: tuple[Scores, ...], statistic: Callable[..., Scores]
) -> tuple[Scores, Scores] | None:
    """Percentile bootstrap at 95 %, which resamples the seeds of each sample independently.

    Args:
        samples: Scores ``[..., N]``; seeds are resampled alike at every place of the leading axes.
        statistic: Statistic of the samples, over their last axis.

    Returns:
        Lower and upper ends, the same for the same scores; ``None`` with one seed.
    """
    if min(sample.shape[-1] for sample in samples) < 2:
        return None
    result: Any = bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        batch=_RESAMPLES_AT_ONCE,
        vectorized=True,
        axis=-1,
        confidence_level=_LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def estimate(samples: tuple[Scores, ...], statistic: Callable[..., Scores]) -> Estimate:
    """A statistic of ``[N]`` scores with its interval."""
    value, ends = float(statistic(*samples)), interval(samples, statistic)
    return Estimate(value, *(None, None) if ends is None else map(float, ends))


def mean(score: Scores, axis: int = -1) -> Scores:
    """Mean of all scores, for scores whose extremes count: those of tasks that differ."""
    return cast(Scores, score.mean(axis=axis))


def estimate_crossed(
    score: Scores, statistic: Callable[[Scores], Scores] = interquartile_mean
) -> Estimate:
    """Interquartile mean over all of ``[R, N]`` scores, or another statistic, with its interval.

    Rows (policies) and columns (tasks that all policies met) are both resampled, independently of
    each other: the pigeonhole bootstrap (Owen 2007, arXiv 0712.1111). With one row, the interval is
    that of ``estimate``, and says nothing about other rows.
    """
    value = float(statistic(score.ravel()))
    rows, columns = score.shape
    if columns < 2:
        return Estimate(value, None, None)
    rng = np.random.default_rng(0)
    means = [
        statistic(score[row[:, :, None], column[:, None, :]].reshape(len(row), -1))
        for row, column in (
            (rng.integers(rows, size=(count, rows)), rng.integers(columns, size=(count, columns)))
            for count in [_RESAMPLES_AT_ONCE] * (_RESAMPLES // _RESAMPLES_AT_ONCE)
        )
    ]
    tail = 50 * (1 - _LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
