"""Steps at which there is no choice teach the critic alone."""

import copy
import dataclasses
import math

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import one_hot

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.core.distributions import has_choice
from esper_lightning.core.running_stats import Moments
from esper_lightning.core.spaces import Box, EnvSpaces, FactoredDiscrete, Head, mask_size
from esper_lightning.core.tensor_trees import leaves
from esper_lightning.core.types import Rollout, Samples, StepResult
from esper_lightning.envs.base import EnvSpec
from esper_lightning.ppo.advantages import Critic, prepare_samples
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.optimizer import build_optimizer
from esper_lightning.ppo.update import UpdateMetrics, Updater

STEPS, ENVS, CPU = 12, 5, torch.device("cpu")
WAITS, CHOOSES = [1, 0, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]
ACTION = FactoredDiscrete(
    (Head("op", 2), Head("slot", 2, used_by=(1,), conditioned=True), Head("kind", 2, used_by=(1,)))
)
SPACES = EnvSpaces(obs=Box((3,)), action=ACTION, masked=True)
CONFIG = PPOConfig(epochs=1, minibatches=1, entropy_coef=0.1, max_grad_norm=None)
RANDOM = torch.rand(STEPS, ENVS, generator=torch.Generator().manual_seed(7)) < 0.5
EVERYWHERE, NOWHERE = torch.ones_like(RANDOM), torch.zeros_like(RANDOM)


class Learner:
    """A policy, and a rollout with a choice where ``chooses`` says so."""

    def __init__(self, chooses: Tensor, config: PPOConfig = CONFIG) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config, self.policy = config, MLP().build(SPACES, generator)
        self.agent = Agent(self.policy, None)
        self.parameters = self.agent.bind(build_optimizer(self.policy, config))
        self.rollout = self.new_rollout(chooses, generator)
        weights, mask = self.agent.weights, self.rollout.action_mask
        self.choice = has_choice(ACTION, mask.flatten(0, 1))
        assert torch.equal(self.choice, chooses.flatten())
        values = Critic(self.agent, mode="off", device=CPU).values(weights, self.rollout)
        prepared = [values, self.rollout, self.rollout.reward]
        self.samples, _ = prepare_samples(*prepared, config, choice=self.choice)
        plain = PPOConfig(**{**vars(config), "normalize_advantage": False})
        self.unweighted, _ = prepare_samples(*prepared, plain)

    def new_rollout(self, chooses: Tensor, generator: torch.Generator) -> Rollout:
        rollout = allocate_rollout(SPACES, STEPS, ENVS, device=CPU)
        for field in (rollout.obs, rollout.reached_obs, rollout.reward):
            field.normal_(generator=generator)
        masks = torch.tensor([WAITS, CHOOSES]).bool()
        assert masks.shape[1] == mask_size(ACTION)
        rollout.action_mask.copy_(masks[chooses.long()])
        with torch.no_grad():
            noise = self.policy.noise((STEPS * ENVS,), generator)
            mask = rollout.action_mask.flatten(0, 1)
            acted = self.policy.act(rollout.obs.flatten(0, 1), mask, noise)
        rollout.action.copy_(acted.action.view_as(rollout.action))
        rollout.log_prob.copy_(acted.log_prob.view(STEPS, ENVS))
        rollout.log_prob[chooses] -= 0.1  # as if an earlier policy had acted
        rollout.terminated.fill_(False)
        rollout.truncated.fill_(False)
        return rollout

    def update(self, samples: Samples) -> UpdateMetrics:
        updater = Updater(self.agent, self.config, mode="off", device=CPU)
        adam, metrics = updater.update(
            self.parameters.state,
            self.agent.weights,
            samples,
            updater.order(samples.units, torch.Generator().manual_seed(1)),
            learning_rate=torch.tensor(1e-3),
            healthy=torch.tensor(True),
        )
        self.parameters.keep(adam)
        return metrics

    def weights(self) -> dict[str, Tensor]:
        return copy.deepcopy(dict(self.policy.state_dict()))


def test_the_actor_learns_from_the_steps_with_a_choice_and_the_critic_from_all() -> None:
    learner = Learner(RANDOM)
    batch, chosen = learner.unweighted, learner.choice
    advantage = batch.advantage[chosen]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    torch.testing.assert_close(learner.samples.advantage[chosen], advantage)

    evaluation = learner.policy.evaluate(batch.obs, batch.action, batch.action_mask)
    ratio = (evaluation.log_prob - batch.log_prob)[chosen].exp()
    clip = CONFIG.clip
    policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    entropy = evaluation.entropy[chosen].mean()
    value = (evaluation.value - batch.value_target).square().mean()
    loss = policy + CONFIG.value_coef * value - CONFIG.entropy_coef * entropy
    names, parameters = zip(*learner.policy.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    updater = Updater(learner.agent, CONFIG, mode="off", device=CPU)
    (index,) = updater.order(learner.samples.units, torch.Generator().manual_seed(1))
    adam, weights = learner.parameters.state, learner.agent.weights
    progress = type("Progress", (), {"adam": adam})
    constants = type("Constants", (), {"samples": learner.samples, "buffers": weights.buffers})
    sums = updater._sum(progress, index, constants)
    for name, got in learner.agent.named(sums.gradient / sums.samples).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    metrics = learner.update(learner.samples)
    kl = ((ratio - 1.0) - ratio.log()).mean()
    means = (
        metrics.own.policy_loss,
        metrics.own.value_loss,
        metrics.own.entropy,
        metrics.own.approx_kl,
    )
    for got, wanted in zip(means, (policy, value, entropy, kl), strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-6)


def test_the_clip_fraction_is_that_of_the_steps_with_a_choice() -> None:
    learner = Learner(RANDOM)
    assert 0 < learner.choice.sum() < len(learner.choice)
    learner.config = dataclasses.replace(CONFIG, clip=0.05)  # where they have a ratio of exp(0.1)
    assert learner.update(learner.samples).own.clip_fraction == 1.0


def test_a_choice_at_every_step_is_as_no_mask_at_all() -> None:
    learner, other = Learner(EVERYWHERE), Learner(EVERYWHERE)
    assert torch.equal(learner.samples.actor_weight, torch.ones(STEPS * ENVS))
    learner.update(learner.samples)
    other.update(other.samples._replace(actor_weight=None))
    for name, value in learner.weights().items():
        assert torch.equal(value, other.weights()[name]), name


@pytest.mark.parametrize("minibatches", [1, 4])
def test_without_any_choice_the_critic_learns_and_the_actor_stays(minibatches) -> None:
    learner = Learner(NOWHERE, PPOConfig(**{**vars(CONFIG), "minibatches": minibatches}))
    before = learner.weights()
    metrics = learner.update(learner.samples)
    assert all(value.isfinite() for value in leaves(metrics))
    assert (metrics.own.policy_loss, metrics.own.entropy, metrics.own.approx_kl) == (0.0, 0.0, 0.0)
    assert metrics.gradient_steps == minibatches
    for name, value in learner.weights().items():
        assert torch.equal(value, before[name]) == name.startswith(("actor", "action")), name


def test_moments_of_some_numbers_are_those_of_them_alone() -> None:
    numbers = torch.randn(20, generator=torch.Generator().manual_seed(0))
    some = numbers > 0.3
    got, expected = Moments.of(numbers, where=some), Moments.of(numbers[some])
    torch.testing.assert_close(got, expected)
    nothing = Moments.of(numbers.fill_(torch.nan), where=some & False)
    assert nothing == nothing.merged(nothing) == (0.0, 0.0, 0.0)
    assert nothing.merged(expected) == expected


GROWTH = FactoredDiscrete(
    (
        Head("op", 3),
        Head("slot", 3, used_by=(1, 2), conditioned=True),
        Head("kind", 2, used_by=(1,)),
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Garden(EnvSpec):
    """Shows a slot and a kind: 1 for planting them, after a step in which one can only wait."""

    num_envs: int = 32
    time_limit: int = 2

    def spaces(self) -> EnvSpaces:
        return EnvSpaces(obs=Box((5,)), action=GROWTH, masked=True)

    def build(self, device, seed) -> "GardenEnv":
        return GardenEnv(self.num_envs, seed)


class GardenEnv:
    """The environments of ``Garden``, which run on the CPU alone."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.wanted, self.step_number = torch.zeros(2, num_envs, dtype=torch.int64), 0

    def seen(self) -> tuple[Tensor, Tensor]:
        slot, kind = (one_hot(w, n) for w, n in zip(self.wanted, (3, 2), strict=True))
        mask = torch.ones(len(slot), mask_size(GROWTH), dtype=torch.bool)
        if self.step_number == 0:
            mask[:, 1:3] = False
        mask[:, 2] = False  # what would pull it out again is never allowed
        return torch.cat([slot, kind], -1).float(), mask

    def reset(self) -> tuple[Tensor, Tensor]:
        sizes = ((0, 3), (1, 2))
        for row, size in sizes:
            self.wanted[row].random_(size, generator=self.generator)
        self.step_number = 0
        return self.seen()

    def step(self, action: Tensor) -> StepResult:
        planted = (action[:, 0] == 1) & (self.wanted == action[:, 1:].T).all(0)
        reward, ended = planted.float(), torch.full_like(planted, self.step_number == 1)
        self.step_number += 1
        reached, mask = self.seen()
        obs = reached
        if ended[0]:
            obs, mask = self.reset()
        nothing = torch.full_like(reward, torch.nan)
        return StepResult(
            obs=obs,
            reward=reward,
            terminated=ended,
            truncated=torch.zeros_like(ended),
            reached_obs=reached,
            action_mask=mask,
            episode_return=torch.where(ended, reward, nothing),
            episode_length=torch.where(ended, 2, 0),
        )

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        raise AssertionError


def test_a_factored_choice_is_learnt(make_trainer) -> None:
    """Random play earns 1/12 in each step: one of two actions, of three slots and of two kinds."""
    ppo = PPOConfig(rollout_steps=16, learning_rate=5e-3, minibatches=2, entropy_coef=0.05)
    model = PPO(Garden(), Recurrent(encoder_sizes=()), ppo, total_env_steps=16 * 32 * 32)
    rows = []

    class Rows(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rows.append(outputs["row"])

    make_trainer(callbacks=[Rows()]).fit(model)
    start = rows[0]
    assert start["rollout/episode_return_mean"] < 0.25
    # The entropy of a step with a choice; over all steps it would be half of it.
    assert start["loss/entropy"] == pytest.approx(math.log(2) + 0.5 * math.log(6), rel=0.1)
    # Eight seeds of eight reach 0.99 of 1.
    assert rows[-1]["rollout/episode_return_mean"] > 0.9
    (metrics,) = make_trainer(limit_val_batches=1.0).validate(model, verbose=False)
    assert metrics["eval/episode_return_mean"] > 0.9
