"""Learning rates over a run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.ppo.optimizer import adaptive_learning_rate, linear_learning_rate


def test_linear_falls_in_a_straight_line_to_zero() -> None:
    rates = [linear_learning_rate(0.4, progress=p / 4) for p in range(5)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert rates[-1] == 0.0


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_progress_outside_the_run_is_refused(progress: float) -> None:
    with pytest.raises(
        ValueError, match=r"^linear_learning_rate.progress must lie in \[0, 1\], got"
    ):
        linear_learning_rate(0.4, progress=progress)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.021, 1e-3 / 1.5),
        (0.019, 1e-3),
        (0.0051, 1e-3),
        (0.0049, 1.5e-3),
        (0.0, 1.5e-3),
        (float("nan"), 1e-3),
        (float("inf"), 1e-3),
    ],
)
def test_adaptive_keeps_the_divergence_near_what_is_desired(kl: float, expected: float) -> None:
    assert adaptive_learning_rate(1e-3, kl=kl, desired_kl=0.01) == pytest.approx(expected)


@given(st.lists(st.floats(0.0, 1.0), max_size=40))
def test_adaptive_stays_within_its_bounds(kls: list[float]) -> None:
    rate = 1e-3
    for kl in kls:
        rate = adaptive_learning_rate(rate, kl=kl, desired_kl=0.01)
        assert 1e-5 <= rate <= 1e-2


@pytest.mark.parametrize(("kl", "bound"), [(1.0, 1e-5), (0.0, 1e-2)])
def test_adaptive_ends_at_its_bound_where_the_policy_always_moves_too_much_or_too_little(
    kl: float, bound: float
) -> None:
    rate = 1e-3
    for _ in range(13):
        rate = adaptive_learning_rate(rate, kl=kl, desired_kl=0.01)
    assert rate == bound
