"""Settings of PPO: what depends on the environments."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning import PPO, PPOConfig
from esper_lightning.envs import CartPole
from esper_lightning.ppo.config import _divisors


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_divisors_are_those_that_trying_every_number_finds(number, most):
    assert _divisors(number, most=most) == [
        n for n in range(1, min(number, most) + 1) if number % n == 0
    ]


@pytest.mark.parametrize(
    ("rollout_steps", "num_envs", "minibatches"),
    [
        (65_536, 1_024, 4),
        (65_536, 1_024, 5),
        (10**6, 10**5, 4),
        (10**6, 10**5, 7),
        (10**9 + 7, 10**9 + 9, 4),
        (2**62, 2**62, 3),
        (720_720 * 10**6, 720_720, 11 * 10**9 + 1),
    ],
)
def test_absurd_sizes_are_accepted_or_refused_in_a_moment(rollout_steps, num_envs, minibatches):
    config = PPOConfig(rollout_steps=rollout_steps, minibatches=minibatches)
    started = time.process_time()
    if rollout_steps * num_envs % minibatches == 0:
        PPO(CartPole(num_envs=num_envs), ppo=config)
    else:
        with pytest.raises(ValueError, match=r"minibatches must divide .* Near values that do: \d"):
            PPO(CartPole(num_envs=num_envs), ppo=config)
    assert time.process_time() - started < 0.5


def test_a_learning_rate_beyond_float32_is_refused():
    with pytest.raises(ValueError, match=r"^PPOConfig.learning_rate must be held by float32"):
        PPOConfig(learning_rate=1e308)
