"""Metrics of an update, against the exact quantities that they estimate."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from esper_lightning.core.diagnostics import approx_kl, clip_fraction, explained_variance
from esper_lightning.core.running_stats import Moments

seeds = st.integers(0, 10_000)


@given(seeds, st.floats(0.01, 3.0))
def test_the_mean_of_approx_kl_over_all_choices_is_the_kl_divergence(
    seed: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, 5, generator=generator, dtype=torch.float64)
    old, new = (Categorical(logits=row) for row in logits)
    estimate = (old.probs * approx_kl(new.logits, old.logits)).sum()
    torch.testing.assert_close(estimate, kl_divergence(old, new))


@given(st.floats(-20.0, 20.0, width=32))
def test_approx_kl_is_zero_only_without_change_and_never_negative(change: float) -> None:
    got = approx_kl(torch.tensor([change]), torch.zeros(1)).item()
    assert got >= 0.0
    assert got > 0.0 or abs(change) < 1e-3  # its square is lost in rounding


def test_clip_fraction_counts_both_sides() -> None:
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0])
    got = clip_fraction(ratio.log() - 2.0, torch.full((7,), -2.0), clip=0.2)
    assert got.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def explained(value: Tensor, target: Tensor) -> Tensor:
    return explained_variance(Moments.of(target), Moments.of(target - value))


@given(seeds)
def test_explained_variance_is_that_of_stable_baselines3(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value, target = torch.randn(2, 50, generator=generator)
    got = explained(value, target)
    expected = sb3_explained_variance(value.numpy(), target.numpy())
    assert got.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_explained_variance_of_known_cases() -> None:
    target = torch.linspace(-1.0, 3.0, 20)
    assert explained(target, target).item() == 1.0
    assert explained(target + 7.0, target).item() == pytest.approx(1.0)
    assert explained(torch.zeros(20), target).item() == pytest.approx(0.0, abs=1e-6)
    assert explained(-target, target).item() == pytest.approx(-3.0)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 300))
def test_explained_variance_of_a_constant_target_is_not_a_number(
    constant: float, size: int
) -> None:
    target = torch.full((size,), constant)
    value = torch.arange(size, dtype=torch.float32)
    assert np.isnan(explained(value, target).item())
