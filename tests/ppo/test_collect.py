"""Reward scaling, and the number of CPU threads."""

import contextlib

import pytest
import torch

from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.core.running_stats import RunningStats
from esper_lightning.core.types import Rollout
from esper_lightning.envs import CartPole
from esper_lightning.ppo.advantages import scale_reward
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.non_finite import first_non_finite, is_healthy
from esper_lightning.training.trainer_rules import few_cpu_threads

STEPS, ENVS = 6, 3


def rollout(generator):
    spaces, device = CartPole().spaces(), torch.device("cpu")
    storage = allocate_rollout(spaces, STEPS, ENVS, device=device)
    storage.reward.normal_(generator=generator)
    ends = torch.rand(2, STEPS, ENVS, generator=generator) < 0.2
    storage.terminated.copy_(ends[0])
    storage.truncated.copy_(ends[1] & ~ends[0])
    return storage


def test_rewards_are_divided_by_the_deviation_of_all_returns_so_far(generator):
    config = PPOConfig(discount=0.9, reward_clip=1.0)
    stats = RunningStats(())
    carried = torch.zeros(ENVS)
    running, returns = [0.0] * ENVS, []
    for _ in range(3):
        collected = rollout(generator)
        scaled, carried, moments = scale_reward(
            collected, carried, stats.moments, config, healthy=torch.tensor(True)
        )
        stats.keep(moments)
        for t in range(STEPS):
            for env in range(ENVS):
                running[env] = 0.9 * running[env] + collected.reward[t, env].item()
                returns.append(running[env])
                if collected.terminated[t, env] or collected.truncated[t, env]:
                    running[env] = 0.0
        deviation = torch.tensor(returns).std(correction=0)
        expected = (collected.reward / deviation).clamp(-1.0, 1.0)
        torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)
        assert (scaled.abs() == 1.0).any()  # the limit is felt


def test_a_broken_rollout_leaves_the_statistics_alone(generator):
    collected, stats = rollout(generator), RunningStats(())
    collected.reward[0, 0] = torch.nan
    no = torch.tensor(False)
    *_, moments = scale_reward(collected, torch.zeros(ENVS), stats.moments, PPOConfig(), healthy=no)
    assert moments == (0, 0, 1)


def test_without_statistics_rewards_stay(generator):
    collected = rollout(generator)
    carried, yes = torch.zeros(ENVS), torch.tensor(True)
    scaled, after, _ = scale_reward(collected, carried, None, PPOConfig(), healthy=yes)
    assert scaled is collected.reward
    assert after is carried


@pytest.mark.parametrize(("samples", "threads"), [(64, 1), (2047, 1), (2048, 2)])
def test_small_batches_get_one_thread_and_restore_the_others(samples, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(RuntimeError), few_cpu_threads(samples):
            assert torch.get_num_threads() == threads
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def healthy() -> Rollout:
    storage = allocate_rollout(CartPole().spaces(), STEPS, ENVS, device=torch.device("cpu"))
    for field in (storage.obs, storage.reached_obs, storage.log_prob, storage.reward):
        field.zero_()
    return storage


@pytest.mark.parametrize(
    ("bad", "owner", "name", "step", "environments"),
    [
        ([("obs", 2, 1), ("log_prob", 2, 1), ("reward", 2, 1)], "environment", "obs", 2, [1]),
        ([("log_prob", 2, 1), ("reward", 2, 0)], "policy", "log_prob", 2, [1]),
        ([("reward", 3, 2), ("reached_obs", 3, 0)], "environment", "reward", 3, [2]),
        ([("reward", 4, 0), ("reached_obs", 1, 2)], "environment", "reached_obs", 1, [2]),
        (
            [("reward", 4, 0), ("reward", 0, 2), ("reward", 0, 1)],
            "environment",
            "reward",
            0,
            [1, 2],
        ),
        ([("log_prob", 5, 0), ("log_prob", 4, 2)], "policy", "log_prob", 4, [2]),
    ],
    ids=str,
)
def test_the_first_value_that_is_not_finite_is_blamed(bad, owner, name, step, environments):
    storage = healthy()
    assert first_non_finite(storage) is None
    space = CartPole().spaces().action
    assert is_healthy(storage, space)
    for field, t, env in bad:
        value = getattr(storage, field)[t]
        value[(env, 3) if value.dim() == 2 else env] = torch.inf
    fault = first_non_finite(storage)
    assert (fault.owner, fault.name, fault.step) == (owner, name, step)
    assert fault.environments == environments
    assert f"rollout step {step}" in fault.text
    assert ("column 3" in fault.text) == ("obs" in name)
    assert not is_healthy(storage, space)
