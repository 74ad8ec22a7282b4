"""Scaled rewards, advantages and value targets of a rollout, and the explained variance."""

import pytest
import torch

from esper_lightning import MLP, PPOConfig, Recurrent
from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.core.running_stats import RunningStats
from esper_lightning.envs import CartPole
from esper_lightning.ppo.advantages import Critic, prepare_samples, scale_reward
from esper_lightning.ppo.agent import Agent, Values
from esper_lightning.ppo.optimizer import build_optimizer

STEPS, ENVS = 5, 4
MYOPIC = PPOConfig(discount=0.0, gae_lambda=0.0, normalize_advantage=False)


@pytest.mark.parametrize(
    ("share", "explained"), [(1.0, 1.0), (0.5, 0.75), (0.0, 0.0), (-1.0, -3.0)]
)
def test_a_critic_without_a_horizon_regresses_on_rewards(share, explained, generator):
    rollout = allocate_rollout(CartPole().spaces(), STEPS, ENVS, device=torch.device("cpu"))
    rollout.reward.normal_(generator=generator)
    rollout.terminated.fill_(False)
    rollout.truncated.fill_(False)
    reward, elsewhere = rollout.reward.flatten(), torch.randn(STEPS * ENVS, generator=generator)
    values = Values(rollout.obs.flatten(0, 1), share * reward, elsewhere)
    samples, found = prepare_samples(values, rollout, rollout.reward, MYOPIC)
    torch.testing.assert_close(samples.value_target, reward)
    torch.testing.assert_close(samples.advantage, (1.0 - share) * reward)
    assert torch.equal(samples.value, share * reward)
    assert found.item() == pytest.approx(explained, abs=1e-5)


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


def step_by_step(rollout, value, next_value, config):
    """Advantages of each step, from the sum of all later errors within the episode."""
    advantage = torch.zeros(STEPS, ENVS, dtype=torch.float64)
    for env in range(ENVS):
        for start in range(STEPS):
            weight = 1.0
            for t in range(start, STEPS):
                bootstrap = 0.0 if rollout.terminated[t, env] else next_value[t, env].item()
                error = rollout.reward[t, env] + config.discount * bootstrap - value[t, env]
                advantage[start, env] += weight * error
                if rollout.terminated[t, env] or rollout.truncated[t, env]:
                    break
                weight *= config.discount * config.gae_lambda
    return advantage.flatten()


def test_advantages_are_discounted_sums_of_errors_within_an_episode(generator):
    config = PPOConfig(discount=0.9, gae_lambda=0.8, normalize_advantage=False)
    collected = rollout(generator)
    assert (collected.terminated | collected.truncated).any()
    value, following = torch.randn(2, STEPS * ENVS, generator=generator)
    values = Values(collected.obs.flatten(0, 1), value, following)
    samples, _ = prepare_samples(values, collected, collected.reward, config)
    shape = (STEPS, ENVS)
    expected = step_by_step(collected, value.view(shape), following.view(shape), config)
    torch.testing.assert_close(samples.advantage.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(samples.value_target, samples.advantage + value)


def test_normalised_advantages_of_steps_with_a_choice_have_mean_0_and_deviation_1(generator):
    collected = rollout(generator)
    value = torch.randn(STEPS * ENVS, generator=generator)
    values, choice = Values(collected.obs.flatten(0, 1), value, value), value > 0.3
    samples, _ = prepare_samples(values, collected, collected.reward, PPOConfig(), choice=choice)
    chosen = samples.advantage[choice]
    assert chosen.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert chosen.std().item() == pytest.approx(1.0, abs=1e-4)
    # The mean of weighted terms over all samples is that of the terms of steps with a choice.
    term = torch.randn(STEPS * ENVS, generator=generator)
    weighted = (term * samples.actor_weight).mean()
    torch.testing.assert_close(weighted, term[choice].mean())
    assert (samples.actor_weight[~choice] == 0.0).all()


@pytest.mark.parametrize("policy", [MLP(hidden_sizes=(8,)), Recurrent(encoder_sizes=(8,))])
def test_values_are_those_of_the_states_of_each_step_one_after_the_other(policy, generator):
    spaces, device = CartPole().spaces(), torch.device("cpu")
    agent = Agent(policy.build(spaces, generator), None)
    agent.bind(build_optimizer(agent.policy, PPOConfig()))
    collected = rollout(generator)
    collected.obs.normal_(generator=generator)
    collected.reached_obs.normal_(generator=generator)
    critic = Critic(agent, mode="off", device=device)
    memory = agent.policy.initial_memory(collected.obs[0])
    values = critic.values(agent.weights, collected, memory)
    for t in range(STEPS):
        seen, memory = agent.policy.step_memory(collected.obs[t], memory)
        reached, _ = agent.policy.step_memory(collected.reached_obs[t], memory)
        rows = slice(t * ENVS, (t + 1) * ENVS)
        torch.testing.assert_close(values.value[rows], agent.policy.value(seen))
        torch.testing.assert_close(values.next_value[rows], agent.policy.value(reached))
        ended = collected.terminated[t] | collected.truncated[t]
        memory = agent.policy.reset_memory(memory, ended)
