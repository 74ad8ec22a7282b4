"""Advantages, against walks along episodes and against Stable-Baselines3."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import assume, given
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from esper_lightning.core.gae import compute_gae, discounted_returns

DISCOUNT = 0.97


class Columns(NamedTuple):
    reward: Tensor
    value: Tensor
    next_value: Tensor
    terminated: Tensor
    truncated: Tensor


@st.composite
def columns(draw: st.DrawFn, *, truncate: bool = True) -> Columns:
    """Several episodes in each column; the value reached is the next value within an episode."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shape = draw(st.integers(1, 10)), draw(st.integers(1, 4))
    reward, value, reached = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    ended = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    cut = torch.rand(shape, generator=generator) < 0.5 if truncate else torch.zeros_like(ended)
    shifted = torch.cat([value[1:], reached[-1:]])
    next_value = torch.where(ended, reached, shifted)
    # A state beyond a termination has no value, so the number that stands there must not be read.
    nothing = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e6], dtype=torch.float64)
    chosen = nothing[torch.randint(len(nothing), shape, generator=generator)]
    next_value = torch.where(ended & ~cut, chosen, next_value)
    return Columns(reward, value, next_value, ended & ~cut, ended & cut)


def n_step_advantages(data: Columns, t: int, b: int) -> list[float]:
    """Discounted reward of 1, 2, ... steps from ``t`` to the end of the episode.

    Each with the value reached, less the value at ``t``.
    """
    found: list[float] = []
    total, weight = 0.0, 1.0
    for k in range(t, data.reward.shape[0]):
        total += weight * data.reward[k, b].item()
        weight *= DISCOUNT
        beyond = 0.0 if data.terminated[k, b] else weight * data.next_value[k, b].item()
        found.append(total + beyond - data.value[t, b].item())
        if data.terminated[k, b] or data.truncated[k, b]:
            break
    return found


def each_step(data: Columns, advantage_of: Callable[[list[float]], float]) -> Tensor:
    """``advantage_of(n_step_advantages)`` at every step of every column."""
    steps, envs = data.reward.shape
    rows = [
        [advantage_of(n_step_advantages(data, t, b)) for b in range(envs)] for t in range(steps)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@given(columns())
def test_with_lambda_0_the_advantage_is_the_td_error(data: Columns) -> None:
    got = compute_gae(*data, discount=DISCOUNT, lambda_=0.0)
    torch.testing.assert_close(got.advantage, each_step(data, lambda n_step: n_step[0]))


@given(columns())
def test_with_lambda_1_the_advantage_is_the_return_less_the_value(data: Columns) -> None:
    got = compute_gae(*data, discount=DISCOUNT, lambda_=1.0)
    torch.testing.assert_close(got.advantage, each_step(data, lambda n_step: n_step[-1]))


@given(columns(), st.floats(0.0, 1.0))
def test_with_any_lambda_the_advantage_is_the_weighted_mean_of_n_step_advantages(
    data: Columns, lambda_: float
) -> None:
    def weighted(n_step: list[float]) -> float:
        *inner, last = n_step
        weights = [(1.0 - lambda_) * lambda_**n for n in range(len(inner))]
        return (
            sum(w * x for w, x in zip(weights, inner, strict=True)) + lambda_ ** len(inner) * last
        )

    got = compute_gae(*data, discount=DISCOUNT, lambda_=lambda_)
    torch.testing.assert_close(got.advantage, each_step(data, weighted), rtol=1e-12, atol=1e-12)


@given(columns())
def test_the_value_target_is_value_plus_advantage(data: Columns) -> None:
    got = compute_gae(*data, discount=DISCOUNT, lambda_=0.9)
    torch.testing.assert_close(got.value_target - data.value, got.advantage)


@given(columns(), st.integers(0, 10_000))
def test_steps_after_the_end_of_an_episode_do_not_matter(data: Columns, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    t, b = (torch.randint(size, (), generator=generator).item() for size in data.reward.shape)
    data.terminated[t, b] |= ~data.truncated[t, b]
    before = compute_gae(*data, discount=DISCOUNT, lambda_=0.95).advantage
    changed = Columns(*(field.clone() for field in data))
    for field in changed[:3]:
        field[t + 1 :, b] = 1e3 * torch.randn(field[t + 1 :, b].shape, generator=generator)
    changed.terminated[t + 1 :, b] ^= True
    after = compute_gae(*changed, discount=DISCOUNT, lambda_=0.95).advantage
    assert torch.equal(before[: t + 1, b], after[: t + 1, b])
    others = torch.arange(data.reward.shape[1]) != b
    assert torch.equal(before[:, others], after[:, others])


@given(columns(truncate=False), st.floats(0.0, 1.0))
def test_without_truncation_advantages_equal_those_of_stable_baselines3(
    data: Columns, lambda_: float
) -> None:
    steps, envs = data.reward.shape
    space = spaces.Discrete(2)
    buffer = RolloutBuffer(steps, space, space, "cpu", lambda_, DISCOUNT, envs)
    buffer.rewards[:] = data.reward.numpy()
    buffer.values[:] = data.value.numpy()
    buffer.episode_starts[1:] = data.terminated[:-1].numpy()
    last = data.next_value[-1].masked_fill(
        data.terminated[-1], 0.0
    )  # a finite number, as SB3 needs
    buffer.compute_returns_and_advantage(last.float(), data.terminated[-1].numpy())

    single = (field.float() for field in data[:3])
    got = compute_gae(*single, *data[3:], discount=DISCOUNT, lambda_=lambda_)
    np.testing.assert_allclose(got.advantage, buffer.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.value_target, buffer.returns, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_reward(dtype: torch.dtype) -> None:
    floats, flags = torch.ones(3, 2, dtype=dtype), torch.zeros(3, 2, dtype=torch.bool)
    got = compute_gae(floats, floats, floats, flags, flags, discount=DISCOUNT, lambda_=0.95)
    assert {got.advantage.dtype, got.value_target.dtype} == {dtype}


@given(columns(), st.data())
def test_returns_carried_over_two_calls_equal_those_of_one_call(
    data: Columns, draw: st.DataObject
) -> None:
    ended = data.terminated | data.truncated
    carried = torch.randn(data.reward.shape[1], dtype=torch.float64)
    whole, end = discounted_returns(data.reward, ended, carried, discount=DISCOUNT)
    assume(data.reward.shape[0] > 1)
    cut = draw.draw(st.integers(1, data.reward.shape[0] - 1))
    first, middle = discounted_returns(data.reward[:cut], ended[:cut], carried, discount=DISCOUNT)
    second, last = discounted_returns(data.reward[cut:], ended[cut:], middle, discount=DISCOUNT)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(last, end)


@given(columns())
def test_the_return_so_far_looks_back_to_the_start_of_its_episode(data: Columns) -> None:
    ended = data.terminated | data.truncated
    steps, envs = data.reward.shape
    got, _ = discounted_returns(
        data.reward, ended, torch.zeros(envs, dtype=torch.float64), discount=DISCOUNT
    )
    for t in range(steps):
        for b in range(envs):
            ends = [k + 1 for k in range(t) if ended[k, b]]
            start = max(ends, default=0)
            expected = sum(
                DISCOUNT ** (t - k) * data.reward[k, b].item() for k in range(start, t + 1)
            )
            assert got[t, b].item() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_do_not_pass_the_end_of_an_episode(bad: float) -> None:
    """They affect neither the episode before nor the episode after."""
    reward, value = torch.zeros(2, 6, 1, dtype=torch.float64)
    ended = torch.tensor([False, False, True, False, True, False])[:, None]
    reward[3] = bad
    got = compute_gae(reward, value, value, ended, ended & False, discount=1.0, lambda_=1.0)
    assert got.advantage.isfinite()[:, 0].tolist() == [True, True, True, False, True, True]
    returns, carried = discounted_returns(reward, ended, torch.zeros(1).double(), discount=1.0)
    assert returns.isfinite()[:, 0].tolist() == [True, True, True, False, False, True]
    assert carried.isfinite().all()
