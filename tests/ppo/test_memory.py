"""Policies with memory in training: what they store, what they learn, and what they can do."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.minibatches import take
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.envs import CartPole
from esper_lightning.envs.autoreset import AutoresetEnv, Transition
from esper_lightning.envs.base import EnvSpec
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.evaluation import evaluate_policy
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import build_optimizer

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cue(EnvSpec):
    """Shows a sign, then nothing for a while, then asks for it: +1 or -1.

    To who has no memory the question looks the same whatever the sign was, so that every answer
    earns 0 in the mean.
    """

    num_envs: int = 32
    delay: int = 3  # steps
    time_limit: int = 100

    def spaces(self) -> EnvSpaces:
        return EnvSpaces(obs=Box((2,)), action=Discrete(2))

    def build(self, device, seed) -> AutoresetEnv:
        return AutoresetEnv(self, device=device, seed=seed)

    def sample_states(self, steps, generator, device) -> Tensor:
        sign = torch.randint(2, (steps, self.num_envs), generator=generator, device=device)
        return torch.stack([2.0 * sign - 1.0, torch.zeros_like(sign)], -1)

    def observe(self, state: Tensor) -> Tensor:
        sign, elapsed = state.unbind(-1)
        asks = elapsed == self.delay
        return torch.stack([torch.where(elapsed == 0, sign, 0.0), asks.float()], -1)

    def advance(self, state: Tensor, action: Tensor) -> Transition:
        sign, elapsed = state.unbind(-1)
        asks = elapsed == self.delay
        right = (action == 1) == (sign > 0)
        reward = torch.where(asks, torch.where(right, 1.0, -1.0), 0.0)
        return Transition(torch.stack([sign, elapsed + 1.0], -1), reward, asks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uneven(Cue):
    """Ends after the question where the sign was +1, else three times as late."""

    def advance(self, state: Tensor, action: Tensor) -> Transition:
        sign, elapsed = state.unbind(-1)
        ends = elapsed == torch.where(sign > 0, self.delay, 3 * self.delay)
        return super().advance(state, action)._replace(terminated=ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenVelocities(CartPole):
    """CartPole that shows where cart and pole are, not where they go."""

    def spaces(self) -> EnvSpaces:
        return EnvSpaces(obs=Box((2,)), action=Discrete(2))

    def observe(self, state: Tensor) -> Tensor:
        return state[:, ::2]


# --- what is kept and what is taught ---

STEPS, ENVS = 9, 6


def make_learner(cell="lstm", *, plain=False, **config) -> tuple[Learner, PPOConfig]:
    """A learner whose episodes end in both ways, with a pure or a ``plain`` step."""
    config = PPOConfig(**{"rollout_steps": STEPS, "minibatches": 3, "epochs": 1, **config})
    spec = Uneven(num_envs=ENVS, delay=2, time_limit=5)
    policy = Recurrent(cell=cell, memory_size=8).build(
        spec.spaces(), torch.Generator().manual_seed(0)
    )
    env = spec.build(CPU, 1)
    if plain:
        env.step = env.step
    learner = Learner(
        spec,
        env,
        Agent(policy, None),
        config,
        None,
        exploration=torch.Generator().manual_seed(2),
        sample_order=torch.Generator().manual_seed(3),
        mode="off",
        device=CPU,
    )
    learner.start(build_optimizer(policy, config), None)
    return learner, config


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_learning_sees_what_acting_saw(cell, plain):
    learner, _ = make_learner(cell, plain=plain)
    policy = learner.agent.policy
    memory = torch.zeros(ENVS, policy.memory_size)
    for _ in range(3):  # memory goes on from rollout to rollout
        rollout = learner.rollout(STEPS)
        begun, ended = memory, rollout.terminated | rollout.truncated
        assert ended[:-1].any(0).all()
        assert rollout.terminated[:-1].any()
        assert rollout.truncated[:-1].any()
        log_probs, values, next_values = [], [], []
        with torch.no_grad():
            for t in range(STEPS):
                seen, after = policy.step_memory(rollout.obs[t], memory)
                log_probs.append(policy.evaluate(seen, rollout.action[t], None).log_prob)
                values.append(policy.value(seen))
                reached, _ = policy.step_memory(rollout.reached_obs[t], after)
                next_values.append(policy.value(reached))
                memory = policy.reset_memory(after, ended[t])
        torch.testing.assert_close(learner._acting.memory, memory)
        torch.testing.assert_close(rollout.log_prob, torch.stack(log_probs))

        with torch.no_grad():
            found = learner._critic.values(learner.agent.weights, rollout, learner._first_memory)
        torch.testing.assert_close(found.value.view(STEPS, ENVS), torch.stack(values))
        torch.testing.assert_close(found.next_value.view(STEPS, ENVS), torch.stack(next_values))
        samples = learner.compute_targets(rollout).samples
        torch.testing.assert_close(samples.memory, begun)
        assert samples.units == ENVS

        rows = torch.arange(STEPS * ENVS).view(STEPS, ENVS)
        order = learner._updater.order(samples.units, torch.Generator().manual_seed(4))
        assert sorted(torch.cat(list(order)).tolist()) == list(range(ENVS))
        for index in order:
            batch = take(samples, index)
            evaluation = learner.agent.evaluate(batch)
            torch.testing.assert_close(evaluation.log_prob, batch.log_prob)
            torch.testing.assert_close(evaluation.value, batch.value)
            assert torch.equal(batch.log_prob, samples.log_prob[rows[:, index].flatten()])


def test_before_the_first_gradient_step_nothing_has_moved():
    learner, _ = make_learner(minibatches=1)
    targets = learner.compute_targets(learner.rollout(STEPS))
    metrics = learner.update(targets, learning_rate=1e-3)
    assert metrics.own.approx_kl.abs() < 1e-10
    assert metrics.own.clip_fraction == 0.0
    learner.update(targets, learning_rate=1e-3)
    assert learner.update(targets, learning_rate=0.0).own.approx_kl > 1e-9


def test_an_evaluation_carries_memory_until_the_episode_ends():
    spec = Uneven(num_envs=8, delay=2)
    policy = Recurrent(memory_size=8).build(spec.spaces(), torch.Generator().manual_seed(0))
    seen = []
    act = policy.act_deterministically
    policy.act_deterministically = lambda memory, mask: seen.append(memory) or act(memory, mask)
    env = spec.build(CPU, 3)
    evaluate_policy(policy, lambda obs: obs, env)
    memory, ended = torch.zeros(8, policy.memory_size), torch.zeros(8, 1, dtype=torch.bool)
    other = spec.build(CPU, 3)
    obs, _ = other.reset()
    for got in seen:
        expected, memory = policy.step_memory(obs, memory.masked_fill(ended, 0.0))
        assert torch.equal(got, expected)
        result = other.step(act(expected, None))
        obs, ended = result.obs, result.terminated.unsqueeze(1)
    assert len(seen) == 7  # the longest first episode, in which others began anew


def test_a_minibatch_that_is_not_finite_is_found_with_its_memory(make_trainer, monkeypatch):
    ppo = PPOConfig(rollout_steps=8, minibatches=2, epochs=2)
    model = PPO(Cue(num_envs=4), Recurrent(), ppo, total_env_steps=4 * 8 * 4)
    rate = "esper_lightning.training.module.schedule_learning_rate"
    monkeypatch.setattr(rate, lambda *_, **__: math.nan)
    with pytest.raises(NonFiniteError, match="in iteration 1, gradient step 1: ") as caught:
        make_trainer().fit(model)
    assert caught.value.minibatch["memory"].shape == (2, 64)
    assert caught.value.minibatch["begins"].shape == (2 * 8,)


# --- what they can do ---

LEARNS = PPOConfig(rollout_steps=16, minibatches=1, learning_rate=1e-2)
SMALL = {"memory_size": 16, "encoder_sizes": (), "hidden_sizes": (16,)}


def answers(make_trainer, policy) -> float:
    """Mean return of episodes after training: 1 if every answer is right."""
    model = PPO(Cue(), policy, LEARNS, total_env_steps=16 * 32 * 24, eval_episodes=400)
    make_trainer().fit(model)
    (metrics,) = make_trainer(limit_val_batches=1.0).validate(model, verbose=False)
    return metrics["eval/episode_return_mean"]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_sign_is_remembered(make_trainer, cell):
    assert answers(make_trainer, Recurrent(cell=cell, **SMALL)) > 0.99


def test_without_memory_every_answer_is_a_guess(make_trainer):
    """400 answers, each right with probability 1/2: a deviation of the mean of 0.05."""
    assert abs(answers(make_trainer, MLP())) < 0.2


@pytest.mark.slow
def test_velocities_are_made_of_positions(make_trainer):
    def trained(policy):
        scaled = {"normalize_obs": True, "normalize_reward": True}
        ppo = PPOConfig(rollout_steps=64, learning_rate=3e-3, **scaled)
        model = PPO(HiddenVelocities(num_envs=32), policy, ppo, total_env_steps=100_000)
        make_trainer().fit(model)
        (metrics,) = make_trainer(limit_val_batches=1.0).validate(model, verbose=False)
        return metrics["eval/episode_return_mean"]

    assert trained(Recurrent()) > 200
    assert trained(MLP()) < 100
