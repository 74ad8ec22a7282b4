"""A rollout is what acting, stepping and writing one step after the other would give."""

import logging

import pytest
import torch

from esper_lightning import MLP, PPOConfig, Recurrent
from esper_lightning.compiling.holders import find_holders
from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.tensor_trees import map_tree
from esper_lightning.envs import CartPole
from esper_lightning.envs.inspector import FirstSteps
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.collect import ActingState, Collector
from esper_lightning.ppo.optimizer import build_optimizer

CPU = torch.device("cpu")
STEPS, ENVS = 7, 3
SPEC = CartPole(num_envs=ENVS, time_limit=4)


class Stepped:
    """The environments without their pure function, so that they are stepped from Python."""

    def __init__(self, env):
        self.env = env
        self.reset, self.step = env.reset, env.step
        self.state_dict, self.load_state_dict = env.state_dict, env.load_state_dict


def make_agent(policy):
    generator = torch.Generator().manual_seed(0)
    normalizer = ObsNormalizer(SPEC.spaces().obs, clip=10.0)
    normalizer.update(3.0 + torch.randn(4, 5, 4, generator=generator))
    agent = Agent(policy.build(SPEC.spaces(), generator), normalizer)
    agent.bind(build_optimizer(agent.policy, PPOConfig()))
    return agent


def collect(agent, wrap, rollouts=2):
    env = wrap(SPEC.build(CPU, 1))
    first = FirstSteps(SPEC, SPEC.spaces(), env, CPU)
    collector = Collector(env, agent, first, mode="off", device=CPU)
    generator = torch.Generator().manual_seed(2)
    obs, mask = first.reset()
    state = ActingState(obs, mask, torch.zeros(ENVS), agent.policy.initial_memory(obs))
    storage = allocate_rollout(SPEC.spaces(), STEPS, ENVS, device=CPU)
    found = []
    for _ in range(rollouts):
        rollout, state = collector.collect(state, storage, generator=generator)
        found.append(map_tree(torch.clone, rollout))
    return found, state


@pytest.mark.parametrize("policy", [MLP(hidden_sizes=(8,)), Recurrent(encoder_sizes=(8,))])
@pytest.mark.parametrize("wrap", [lambda env: env, Stepped], ids=["functional", "stepped"])
@torch.no_grad()
def test_a_rollout_is_acting_stepping_and_writing_step_after_step(policy, wrap):
    agent = make_agent(policy)
    found, state = collect(agent, wrap)
    env, generator = SPEC.build(CPU, 1), torch.Generator().manual_seed(2)
    obs, _ = env.reset()
    memory = agent.policy.initial_memory(obs)
    for rollout in found:
        noise = agent.policy.noise((STEPS, ENVS), generator)
        for t in range(STEPS):
            acted = agent.act(obs, None, noise[t], memory)
            result = env.step(acted.action)
            expected = {
                "obs": obs,
                "action": acted.sampled.action,
                "log_prob": acted.sampled.log_prob,
                "reward": result.reward,
                "terminated": result.terminated,
                "truncated": result.truncated,
                "reached_obs": result.reached_obs,
                "episode_return": result.episode_return,
                "episode_length": result.episode_length,
            }
            for name, value in expected.items():
                got = getattr(rollout, name)[t].double()
                torch.testing.assert_close(got, value.double(), rtol=0, atol=1e-6, equal_nan=True)
            obs = result.obs
            ended = result.terminated | result.truncated
            memory = agent.policy.reset_memory(acted.memory, ended)
        assert rollout.truncated.any()
    torch.testing.assert_close(state.obs, obs)
    torch.testing.assert_close(state.memory, memory)


@pytest.mark.parametrize("mode", ["off", "auto"])
@pytest.mark.parametrize("policy", [MLP(hidden_sizes=(8,)), Recurrent(encoder_sizes=(8,))])
@pytest.mark.parametrize("wrap", [lambda env: env, Stepped], ids=["functional", "stepped"])
def test_a_policy_acts_alone_on_the_observations_of_a_rollout(
    policy, wrap, mode, monkeypatch, caplog
):
    caplog.set_level(logging.WARNING)
    agent = make_agent(policy)
    env = wrap(SPEC.build(CPU, 1))
    first = FirstSteps(SPEC, SPEC.spaces(), env, CPU)
    collector = Collector(env, agent, first, mode=mode, device=CPU)
    obs, _ = first.reset()
    storage = allocate_rollout(SPEC.spaces(), STEPS, ENVS, device=CPU)
    storage.obs.normal_()
    before, state = map_tree(torch.clone, storage), env.state_dict()
    memory = agent.policy.initial_memory(obs)
    seen, act = [], agent.act
    if mode == "off":
        monkeypatch.setattr(agent, "act", lambda obs, *rest: seen.append(obs) or act(obs, *rest))
    collector.acting_alone(storage, memory)()
    assert mode == "auto" or torch.equal(torch.stack(seen), storage.obs)
    assert caplog.text == ""  # native code has no reason to be given up
    torch.testing.assert_close(storage, before, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(env.state_dict(), state, rtol=0, atol=0, equal_nan=True)


class Clock:
    def __init__(self):
        self.seconds = []

    def add(self, seconds):
        self.seconds.append(seconds)


def test_the_loop_of_pure_steps_does_not_hold_what_measures_them():
    """Native code would be refused: a clock changes at every step."""
    agent = make_agent(MLP(hidden_sizes=(4,)))
    env, clock = SPEC.build(CPU, 1), Clock()
    first = FirstSteps(SPEC, SPEC.spaces(), env, CPU)
    collector = Collector(env, agent, first, mode="off", device=CPU)
    collector.time_environment(clock.add)
    assert not any(each.held is clock.seconds for each in find_holders(collector._step))
