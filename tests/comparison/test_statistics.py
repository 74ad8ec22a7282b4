"""Statistics, against rliable (by the authors of the paper), SciPy and enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import mannwhitneyu

from esper_lightning.comparison.statistics import (
    estimate,
    estimate_crossed,
    interquartile_mean,
    interval,
    mean,
    probability_of_improvement,
)

X = np.array([480.0, 500.0, 470.0, 490.0, 500.0])
Y = np.array([450.0, 500.0, 500.0, 430.0, 460.0])


def test_statistics_agree_with_rliable():
    # rliable 1.2.0 with arch 7.2.0: get_interval_estimates, 20,000 resamples (P: 3,000)
    assert estimate((X,), interquartile_mean) == pytest.approx((490.0, 473.3333333, 500.0))
    assert estimate((Y,), interquartile_mean) == pytest.approx((470.0, 436.6666667, 500.0))
    improvement = estimate((X, Y), probability_of_improvement)
    assert improvement == pytest.approx((0.68, 0.28, 1.0))


@given(arrays(float, 6, elements=st.integers(-5, 5)), arrays(float, 4, elements=st.integers(-5, 5)))
def test_the_probability_of_improvement_is_mann_whitneys_u(x, y):
    u = mannwhitneyu(x, y, method="asymptotic").statistic if np.ptp([*x, *y]) else 12.0
    assert probability_of_improvement(x, y) == pytest.approx(u / 24)
    assert probability_of_improvement(x, y) == pytest.approx(1 - probability_of_improvement(y, x))


def test_the_interquartile_mean_omits_whole_seeds():
    assert interquartile_mean(np.array([9.0, 1.0, 2.0])) == 4.0  # of three seeds none is trimmed
    assert interquartile_mean(np.array([-99.0, 1.0, 3.0, 99.0])) == 2.0
    assert interquartile_mean(np.array([7.0, -9.0, 2.0, 3.0, 99.0, 4.0, 6.0, 5.0])) == 4.5


@pytest.mark.parametrize("score", [[0.0, 1.0, 10.0], [3.0, 1.0, 4.0, 1.5]])
def test_an_interval_is_that_of_all_resamples(score):
    resamples = np.array(list(itertools.product(score, repeat=len(score))))
    exact = np.quantile(interquartile_mean(resamples), [0.025, 0.975])
    found = estimate((np.array(score),), interquartile_mean)
    distinct = np.unique(interquartile_mean(resamples))
    near = [np.abs(distinct - end).argmin() for end in (*exact, found.low, found.high)]
    assert abs(near[0] - near[2]) <= 1  # a neighbour at most, among the possible values
    assert abs(near[1] - near[3]) <= 1


def test_equal_scores_have_an_interval_of_no_width():
    same = np.full(5, 500.0)
    assert estimate((same,), interquartile_mean) == (500.0, 500.0, 500.0)
    assert estimate((same, same), probability_of_improvement) == (0.5, 0.5, 0.5)


def test_one_seed_has_no_interval():
    assert estimate((X[:1],), interquartile_mean) == (480.0, None, None)
    assert estimate((X, Y[:1]), probability_of_improvement).low is None


def test_a_curve_equals_its_places_one_by_one():
    curve = np.stack([X, Y, X + 1])  # [place, seed]
    ends = interval((curve,), interquartile_mean)
    assert ends is not None
    for k, score in enumerate(curve):
        one = estimate((score,), interquartile_mean)
        assert (ends[0][k], ends[1][k]) == pytest.approx(one[1:])


@pytest.mark.parametrize(
    "score",
    [[[0.0, 1.0, 10.0, 2.0]], [[0.0, 3.0, 4.0], [7.0, 1.0, 12.0]], [[2.0, 2.0], [5.0, 5.0]]],
)
def test_crossed_intervals_are_those_of_all_rows_with_all_columns(score):
    score = np.array(score)
    chosen = [list(itertools.product(range(n), repeat=n)) for n in score.shape]
    means = [
        interquartile_mean(score[np.ix_(rows, columns)].ravel())
        for rows, columns in itertools.product(*chosen)
    ]
    found, distinct = estimate_crossed(score), np.unique(means)
    assert found.value == interquartile_mean(score.ravel())
    exact = np.quantile(means, [0.025, 0.975])
    near = [np.abs(distinct - end).argmin() for end in (*exact, found.low, found.high)]
    assert abs(near[0] - near[2]) <= 1
    assert abs(near[1] - near[3]) <= 1


def test_one_column_has_no_crossed_interval():
    assert estimate_crossed(np.array([[3.0], [5.0]])) == (4.0, None, None)


def test_a_crossed_interval_of_one_policy_is_that_of_its_tasks():
    """Between 90 % and 95 % lies a third of a deviation: many times the noise of resampling."""
    score = np.random.default_rng(0).normal(size=(1, 60))
    crossed, plain = estimate_crossed(score), estimate((score[0],), interquartile_mean)
    width = plain.high - plain.low
    assert (crossed.low, crossed.high) == pytest.approx((plain.low, plain.high), abs=0.03 * width)


def test_a_crossed_mean_counts_the_extremes_that_an_interquartile_mean_drops():
    score = np.random.default_rng(2).normal(size=(4, 300))
    score[:, ::4] += 100.0
    found = estimate_crossed(score, mean)
    assert found.value == pytest.approx(score.mean())
    assert estimate_crossed(score).value < 1.0
    deviation = 100 * (0.25 * 0.75 / 300) ** 0.5  # of the share of columns that are 100 higher
    assert found.low == pytest.approx(found.value - 1.96 * deviation, abs=0.3 * deviation)
    assert found.high == pytest.approx(found.value + 1.96 * deviation, abs=0.3 * deviation)


def test_equal_scores_have_equal_intervals_each_time():
    score = np.random.default_rng(1).normal(size=(3, 20))
    assert estimate_crossed(score) == estimate_crossed(score)
    assert estimate((score[0],), interquartile_mean) == estimate((score[0],), interquartile_mean)
