"""The terms of the objective have the gradients and bounds of their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_lightning.core.losses import clipped_surrogate, normalize_advantage, value_loss
from esper_lightning.core.running_stats import Moments

CLIP = 0.2
seeds = st.integers(0, 10_000)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def surrogate_and_slope(ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each sample, and its derivative by the log-probability."""
    log_prob = ratio.log().requires_grad_()
    loss = clipped_surrogate(log_prob, torch.zeros_like(ratio), advantage, clip=CLIP)
    (slope,) = torch.autograd.grad(loss.sum(), log_prob)
    return loss.detach(), slope


@given(seeds)
def test_at_ratio_1_the_gradient_is_that_of_plain_policy_gradient(seed: int) -> None:
    logits = randn(seed, 12, 3).requires_grad_()
    action = torch.arange(12)[:, None] % 3
    log_prob = logits.log_softmax(-1).gather(-1, action)[:, 0]
    advantage = randn(seed + 1, 12)
    ours = clipped_surrogate(log_prob, log_prob.detach(), advantage, clip=CLIP).mean()
    plain = -(log_prob * advantage).mean()
    (got,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(plain, logits)
    torch.testing.assert_close(got, expected)


@given(st.floats(0.01, 5.0), st.floats(0.01, 10.0))
def test_the_gradient_is_zero_where_the_ratio_has_moved_far_enough(
    ratio: float, size: float
) -> None:
    r, a = torch.tensor([ratio]), torch.tensor([size])
    for advantage, gone_too_far in ((a, ratio > 1 + CLIP), (-a, ratio < 1 - CLIP)):
        _, slope = surrogate_and_slope(r, advantage)
        expected = torch.zeros(1) if gone_too_far else -r * advantage
        torch.testing.assert_close(slope, expected)


@given(seeds)
def test_the_loss_is_never_below_that_without_clipping(seed: int) -> None:
    ratio, advantage = randn(seed, 64).exp(), randn(seed + 1, 64)
    loss, _ = surrogate_and_slope(ratio, advantage)
    unclipped = -ratio * advantage
    assert (loss >= unclipped - 1e-6).all()
    assert (loss >= -(1 + CLIP) * advantage.abs() - 1e-6).all()  # the promised gain is bounded
    near = (ratio - 1).abs() < CLIP
    torch.testing.assert_close(loss[near], unclipped[near])


@given(seeds)
def test_without_a_clip_the_value_loss_is_the_squared_error(seed: int) -> None:
    value, old, target = (randn(seed + k, 8) for k in range(3))
    got = value_loss(value, old, target, clip=None)
    expected = torch.nn.functional.mse_loss(value, target, reduction="none")
    torch.testing.assert_close(got, expected)


@given(seeds)
def test_a_value_clip_raises_the_loss_only_beyond_the_clip(seed: int) -> None:
    old, move, target = (randn(seed + k, 64) for k in range(3))
    clipped = value_loss(old + move, old, target, clip=0.5)
    plain = value_loss(old + move, old, target, clip=None)
    assert (clipped >= plain).all()
    near = move.abs() < 0.49
    torch.testing.assert_close(clipped[near], plain[near])


@pytest.mark.parametrize(
    ("value", "slope"),
    [
        pytest.param(1.4, -2 * (3.0 - 1.4), id="within"),
        pytest.param(1.8, 0.0, id="beyond, towards the target"),
        pytest.param(0.2, -2 * (3.0 - 0.2), id="beyond, away from the target"),
        pytest.param(9.0, 2 * (9.0 - 3.0), id="beyond, and past the target"),
    ],
)
def test_a_value_that_moved_far_enough_towards_its_target_has_no_gradient(
    value: float, slope: float
) -> None:
    for sign in (1.0, -1.0):
        new = torch.tensor([sign * value], requires_grad=True)
        old, target = torch.tensor([sign * 1.0]), torch.tensor([sign * 3.0])
        value_loss(new, old, target, clip=0.5).sum().backward()
        torch.testing.assert_close(new.grad, torch.tensor([sign * slope]))


def normalized(advantage: Tensor) -> Tensor:
    return normalize_advantage(advantage, Moments.of(advantage))


@given(seeds, st.integers(2, 300), st.floats(0.01, 100.0), st.floats(-100.0, 100.0))
def test_normalised_advantages_have_mean_0_and_deviation_1(
    seed: int, size: int, scale: float, shift: float
) -> None:
    raw = randn(seed, size).double()
    got = normalized(raw * scale + shift)
    assert got.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert got.std().item() == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(got.argsort(), raw.argsort())
    torch.testing.assert_close(got, normalized(raw), rtol=1e-4, atol=1e-4)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 300))
def test_equal_advantages_become_zero(constant: float, size: int) -> None:
    assert torch.equal(normalized(torch.full((size,), constant)), torch.zeros(size))


def test_advantages_of_any_shape_are_normalised_together() -> None:
    advantage = randn(0, 4, 6)
    torch.testing.assert_close(normalized(advantage).flatten(), normalized(advantage.flatten()))
