"""Interquartile mean and probability of improvement, with bootstrap intervals over seeds.

As Agarwal et al. 2021 (arXiv 2108.13264) define them, for one task: variants are the strata,
resampled apart from each other. Axis: ``N`` seeds, the last one.
"""

# SciPy has no annotations.
# pyright: reportUnknownVariableType=false, reportMissingTypeStubs=false

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, trim_mean

__all__ = ["Estimate", "interquartile_mean", "interval", "probability_of_improvement"]

Scores = NDArray[np.float64]
_LEVEL = 0.95
_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1_000  # of a whole curve: memory


class Estimate(NamedTuple):
    """A figure and its 95 % interval; ``None`` where there is one seed only."""

    value: float
    low: float | None
    high: float | None


def interquartile_mean(score: Scores, axis: int = -1) -> Scores:
    """Mean without the lowest and the highest quarter, each rounded down to whole seeds."""
    return cast(Scores, trim_mean(score, 0.25, axis=axis))


def probability_of_improvement(score: Scores, baseline: Scores, axis: int = -1) -> Scores:
    """How often a run of one variant beats one of the other, over all pairs; half for a draw.

    The Mann-Whitney statistic U over the number of pairs.
    """
    assert axis == -1
    wins = np.heaviside(score[..., :, None] - baseline[..., None, :], 0.5)
    return wins.mean(axis=(-2, -1))


def interval(
    samples: tuple[Scores, ...], statistic: Callable[..., Scores]
) -> tuple[Scores, Scores] | None:
    """Percentile bootstrap at 95 %: seeds of each sample are drawn anew, apart from the others'.

    Args:
        samples: ``[..., N]`` each; seeds are drawn alike at every place of the leading axes.
        statistic: Of the samples, over their last axis.

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


def estimate_crossed(score: Scores) -> Estimate:
    """Interquartile mean over all of ``[R, N]`` scores, with its interval.

    Rows (policies) and columns (tasks that all of them met) are both drawn anew, apart from each
    other: the pigeonhole bootstrap (Owen 2007, arXiv 0712.1111). With one row, the interval is that
    of ``estimate``, and says nothing of other rows.
    """
    value = float(interquartile_mean(score.ravel()))
    rows, columns = score.shape
    if columns < 2:
        return Estimate(value, None, None)
    rng = np.random.default_rng(0)
    means = [
        interquartile_mean(score[row[:, :, None], column[:, None, :]].reshape(len(row), -1))
        for row, column in (
            (rng.integers(rows, size=(count, rows)), rng.integers(columns, size=(count, columns)))
            for count in [_RESAMPLES_AT_ONCE] * (_RESAMPLES // _RESAMPLES_AT_ONCE)
        )
    ]
    tail = 50 * (1 - _LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Estimate(value, float(low), float(high))
