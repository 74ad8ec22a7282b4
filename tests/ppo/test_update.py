"""The update against Stable-Baselines3's PPO, and which of its steps leave a trace."""

import copy
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from gymnasium import spaces as gym_spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor

from esper_lightning.compiling.loops import autocast_without_cache
from esper_lightning.core.buffer import allocate_rollout
from esper_lightning.core.spaces import ActionSpace, Box, Discrete, EnvSpaces, MultiDiscrete
from esper_lightning.core.types import Rollout, Samples
from esper_lightning.policies import MLP, Policy
from esper_lightning.ppo.advantages import Critic, prepare_samples
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.optimizer import build_optimizer
from esper_lightning.ppo.update import UpdateMetrics, Updater

STEPS, ENVS, FEATURES = 16, 4, 5
CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)

ACTIONS = {
    "Discrete": (Discrete(3), gym_spaces.Discrete(3)),
    "MultiDiscrete": (MultiDiscrete((2, 3)), gym_spaces.MultiDiscrete([2, 3])),
    "Box": (Box((2,), low=-1.0, high=1.0), gym_spaces.Box(-1.0, 1.0, (2,))),
}
each_action = pytest.mark.parametrize("kind", ACTIONS)

# Ours -> theirs; the names of the layers within are the same.
PARTS = {
    "actor": "mlp_extractor.policy_net",
    "critic": "mlp_extractor.value_net",
    "action_head.logits": "action_net",
    "action_head.mean": "action_net",
    "action_head.log_std": "log_std",
    "value_head": "value_net",
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_policy(space: ActionSpace) -> Policy:
    return MLP().build(EnvSpaces(obs=Box((FEATURES,)), action=space), seeded(0))


def new_rollout(
    policy: Policy, space: ActionSpace, *, reward: float = 0.0, spread: float = 1.0
) -> Rollout:
    """Random states, what the policy does there, and episodes that end in both ways."""
    generator = seeded(1)
    spaces = EnvSpaces(obs=Box((FEATURES,)), action=space)
    rollout = allocate_rollout(spaces, STEPS, ENVS, device=CPU)
    rollout.obs.normal_(std=spread, generator=generator)
    with torch.no_grad():
        noise = policy.noise((STEPS * ENVS,), generator)
        acted = policy.act(rollout.obs.flatten(0, 1), None, noise)
    rollout.action.copy_(acted.action.view_as(rollout.action))
    rollout.log_prob.copy_(acted.log_prob.view(STEPS, ENVS))
    rollout.reward.normal_(generator=generator).add_(reward)
    rollout.terminated.copy_(torch.rand(STEPS, ENVS, generator=generator) < 0.15)
    rollout.truncated.copy_(torch.rand(STEPS, ENVS, generator=generator) < 0.15)
    rollout.truncated.logical_and_(~rollout.terminated)
    rollout.truncated[-1, 0] = rollout.terminated[-1, 1] = True
    rollout.truncated[-1, 1:] = rollout.terminated[-1, [0, 2, 3]] = False
    rollout.reached_obs.normal_(std=spread, generator=generator)
    goes_on = ~(rollout.terminated | rollout.truncated)[:-1]
    rollout.reached_obs[:-1][goes_on] = rollout.obs[1:][goes_on]
    return rollout


class Step(NamedTuple):
    loss: float
    gradient: dict[str, Tensor]  # of each parameter, before clipping


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Loss and gradients of our gradient steps."""
    steps: list[Step] = []
    add_up = Updater._sum

    def recording(updater: Updater, *args: Any) -> Any:
        sums = add_up(updater, *args)
        config, samples = updater._config, sums.samples
        loss = sums.own.policy_loss + config.value_coef * sums.own.value_loss
        loss = (loss - config.entropy_coef * sums.own.entropy) / samples
        steps.append(Step(loss.item(), updater._agent.named(sums.gradient / samples)))
        return sums

    monkeypatch.setattr(Updater, "_sum", recording)
    return steps


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Loss and gradients of SB3's, by the number of the parameter."""
    losses: list[float] = []
    steps: list[Step] = []
    backward, clip = torch.Tensor.backward, torch.nn.utils.clip_grad_norm_

    def recording_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss.item())
        backward(loss, *args, **kwargs)

    def recording_clip(parameters: Any, max_norm: float, **kwargs: Any) -> Tensor:
        parameters = list(parameters)
        steps.append(Step(losses[-1], {str(i): p.grad.clone() for i, p in enumerate(parameters)}))
        return clip(parameters, max_norm, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", recording_backward)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recording_clip)
    return steps


class Spaces(gymnasium.Env):
    """Nothing but spaces: the rollout is written by hand."""

    def __init__(self, action: gym_spaces.Space) -> None:
        self.observation_space = gym_spaces.Box(-np.inf, np.inf, (FEATURES,))
        self.action_space = action


def theirs_of(name: str) -> str:
    part = max((part for part in PARTS if name.startswith(part)), key=len)
    return PARTS[part] + name.removeprefix(part)


def new_sb3(policy: Policy, action: gym_spaces.Space, config: PPOConfig) -> stable_baselines3.PPO:
    model = stable_baselines3.PPO(
        "MlpPolicy",
        DummyVecEnv([lambda: Spaces(action)] * ENVS),
        device="cpu",
        n_steps=STEPS,
        batch_size=STEPS * ENVS // config.minibatches,
        n_epochs=config.epochs,
        learning_rate=config.learning_rate,
        gamma=config.discount,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip,
        clip_range_vf=config.value_clip,
        normalize_advantage=config.normalize_advantage,
        ent_coef=config.entropy_coef,
        vf_coef=config.value_coef,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
    )
    weights = {theirs_of(name): value for name, value in policy.state_dict().items()}
    model.policy.load_state_dict(weights)
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


@torch.no_grad()
def fill(model: stable_baselines3.PPO, rollout: Rollout) -> None:
    """Write the rollout as ``collect_rollouts`` would.

    A truncation adds the value beyond to the reward.
    """
    buffer, policy = model.rollout_buffer, model.policy
    obs = rollout.obs.flatten(0, 1)
    value, log_prob, _ = policy.evaluate_actions(obs, rollout.action.flatten(0, 1))
    beyond = policy.predict_values(rollout.reached_obs.flatten(0, 1)).view(STEPS, ENVS)
    ended = rollout.terminated | rollout.truncated
    buffer.reset()
    buffer.observations[:] = rollout.obs
    buffer.actions[:] = rollout.action.view(STEPS, ENVS, -1)
    buffer.rewards[:] = rollout.reward + rollout.truncated * model.gamma * beyond
    buffer.episode_starts[1:] = ended[:-1]
    buffer.values[:] = value.view(STEPS, ENVS)
    buffer.log_probs[:] = log_prob.view(STEPS, ENVS)
    buffer.compute_returns_and_advantage(beyond[-1], ended[-1].numpy())
    buffer.pos, buffer.full = STEPS, True


def share_the_order(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Let SB3, whose rows are sorted by environment, take the same samples in the same order."""

    def permutation(size: int) -> np.ndarray:
        t, b = np.divmod(torch.randperm(size, generator=generator).numpy(), ENVS)
        return b * STEPS + t

    monkeypatch.setattr(np.random, "permutation", permutation)


CONFIG = PPOConfig(
    epochs=3,
    minibatches=4,
    entropy_coef=0.02,
    learning_rate=3e-3,
    normalize_advantage=False,
)


@each_action
@pytest.mark.parametrize(
    ("changes", "world"),
    [
        pytest.param({}, {}, id="plain"),
        # SB3 leaves the unclipped error out of its loss. Where states are alike and targets far
        # above their values, every value moves towards its target: the two losses are the same.
        pytest.param({"value_clip": 0.05}, {"reward": 5.0, "spread": 0.1}, id="value clip"),
        pytest.param(
            {"epochs": 12, "minibatches": 1, "normalize_advantage": True}, {}, id="normalised"
        ),
        pytest.param({"max_grad_norm": 1e9, "value_coef": 0.1}, {}, id="no gradient clip"),
        pytest.param({"epochs": 1, "learning_rate": 1e-2}, {}, id="one pass"),
    ],
)
def test_an_update_is_that_of_stable_baselines3(
    kind: str,
    changes: dict[str, Any],
    world: dict[str, float],
    ours: list[Step],
    theirs: list[Step],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space, gym_space = ACTIONS[kind]
    config = PPOConfig(**{**vars(CONFIG), **changes})
    policy = new_policy(space)
    rollout = new_rollout(policy, space, **world)
    model = new_sb3(policy, gym_space, config)
    before = copy.deepcopy(policy.state_dict())

    fill(model, rollout)
    raw = PPOConfig(**{**vars(config), "normalize_advantage": False})
    learner = Learner(space, policy, rollout, config)
    advantage = learner.prepare(rollout, raw).advantage
    np.testing.assert_allclose(
        advantage.view(STEPS, ENVS), model.rollout_buffer.advantages, rtol=1e-5, atol=1e-5
    )

    share_the_order(monkeypatch, seeded(7))
    model.train()
    metrics = learner.update()

    assert len(ours) == len(theirs) == config.epochs * config.minibatches
    names = {name: theirs_of(name) for name, _ in policy.named_parameters()}
    ours_by_name = dict(policy.named_parameters())
    theirs_by_name = dict(model.policy.named_parameters())
    assert set(names.values()) == set(theirs_by_name)
    number = {name: str(i) for i, name in enumerate(theirs_by_name)}
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-5)
        for name, their_name in names.items():
            got, expected = mine.gradient[name], other.gradient[number[their_name]]
            torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-5, msg=name)
    for name, their_name in names.items():
        got, expected = ours_by_name[name], theirs_by_name[their_name]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(got, before[name])

    logged = model.logger.name_to_value
    for value, key, sign in (
        (metrics.own.policy_loss, "train/policy_gradient_loss", 1),
        (metrics.own.value_loss, "train/value_loss", 1),
        (metrics.own.entropy, "train/entropy_loss", -1),
        (metrics.own.clip_fraction, "train/clip_fraction", 1),
    ):
        assert value.item() == pytest.approx(sign * logged[key], rel=1e-4, abs=1e-5), key
    if config.epochs == 1:  # SB3 tells the divergence of the last pass only
        assert metrics.own.approx_kl.item() == pytest.approx(logged["train/approx_kl"], rel=1e-3)
    assert metrics.own.clip_fraction > 0.0 or config.value_clip is not None


# --- steps that are left out, and what is said of the others ---

Weights = dict[str, Tensor]


class Learner:
    """A policy, its optimizer and samples to learn from."""

    def __init__(
        self,
        space: ActionSpace = ACTIONS["Box"][0],
        policy: Policy | None = None,
        rollout: Rollout | None = None,
        config: PPOConfig = CONFIG,
    ) -> None:
        self.policy = policy or new_policy(space)
        self.config = config
        self.optimizer = build_optimizer(self.policy, config)
        self.agent = Agent(self.policy, None)
        self.parameters = self.agent.bind(self.optimizer)
        self.samples = self.prepare(rollout or new_rollout(self.policy, space), config)
        self.order = seeded(7)

    def prepare(self, rollout: Rollout, config: PPOConfig) -> Samples:
        values = Critic(self.agent, mode="off", device=CPU).values(self.agent.weights, rollout)
        return prepare_samples(values, rollout, rollout.reward, config)[0]

    def update(
        self,
        *,
        healthy: Tensor = YES,
        samples: Samples | None = None,
        **changes: Any,
    ) -> UpdateMetrics:
        config = PPOConfig(**{**vars(self.config), **changes})
        updater = Updater(self.agent, config, mode="off", device=CPU)
        adam, metrics = updater.update(
            self.parameters.state,
            self.agent.weights,
            samples or self.samples,
            updater.order(STEPS * ENVS, self.order),
            learning_rate=torch.tensor(config.learning_rate),
            healthy=healthy,
        )
        self.parameters.keep(adam)
        return metrics

    def state(self) -> Weights:
        """Weights, moments and step counts, copied."""
        found = dict(self.policy.state_dict())
        for index, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"{index}.{name}": value for name, value in moments.items()}
        return copy.deepcopy(found)


def same_bits(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("bad", [0.0, torch.nan])
@pytest.mark.parametrize("target_kl", [None, 1e3])
def test_an_unhealthy_rollout_leaves_every_bit_alone(bad: float, target_kl: float | None) -> None:
    learner = Learner()
    learner.update()
    before = learner.state()
    samples = learner.samples._replace(advantage=learner.samples.advantage + bad)
    metrics = learner.update(healthy=NO, samples=samples, target_kl=target_kl)
    assert same_bits(learner.state(), before)
    assert metrics.gradient_steps == 0
    learner.update()  # and learning goes on
    assert not same_bits(learner.state(), before)


def test_an_unhealthy_first_rollout_counts_no_step() -> None:
    learner, fresh = Learner(), Learner()
    learner.update(healthy=NO)
    assert same_bits(dict(learner.policy.state_dict()), dict(fresh.policy.state_dict()))
    moments = learner.optimizer.state_dict()["state"].values()
    assert all(not value.any() for moment in moments for value in moment.values())


def divergence_of_each_pass(passes: int) -> list[float]:
    """Mean divergence within each pass, from the means over 1, 2, ... of them."""
    sums = [0.0] + [
        k * Learner().update(epochs=k).own.approx_kl.item() for k in range(1, passes + 1)
    ]
    return [after - before for before, after in pairwise(sums)]


@pytest.mark.parametrize("passes", [1, 2])
def test_updates_stop_after_the_pass_whose_divergence_was_too_large(passes: int) -> None:
    kl = divergence_of_each_pass(3)
    assert 0.0 < kl[0] < kl[1] < kl[2]
    target = kl[0] / 2 if passes == 1 else (kl[0] + kl[1]) / 2
    stopped, plain = Learner(), Learner()
    got = stopped.update(epochs=5, target_kl=target)
    expected = plain.update(epochs=passes)
    assert got.gradient_steps == passes * CONFIG.minibatches
    assert same_bits(stopped.state(), plain.state())
    for name, value, other in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_each_pass_is_judged_by_its_own_divergence() -> None:
    kl = divergence_of_each_pass(5)
    target = 1.01 * max(kl)
    assert target < sum(kl[:4])  # as if the passes were one
    got = Learner().update(epochs=5, target_kl=target)
    assert got.gradient_steps == 5 * CONFIG.minibatches


def test_a_divergence_that_stays_small_stops_nothing() -> None:
    limited, free = Learner(), Learner()
    got = limited.update(target_kl=1e3)
    free.update()
    assert got.gradient_steps == CONFIG.epochs * CONFIG.minibatches
    assert same_bits(limited.state(), free.state())


def test_metrics_are_means_over_the_gradient_steps(ours: list[Step]) -> None:
    metrics = Learner().update()
    loss = (
        metrics.own.policy_loss
        + CONFIG.value_coef * metrics.own.value_loss
        - CONFIG.entropy_coef * metrics.own.entropy
    )
    assert loss.item() == pytest.approx(np.mean([step.loss for step in ours]), rel=1e-4)
    norms = [torch.cat([g.flatten() for g in s.gradient.values()]).norm() for s in ours]
    assert metrics.grad_norm.item() == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)
    assert metrics.gradient_steps == len(ours)


def test_gradients_are_scaled_down_to_the_greatest_norm() -> None:
    def moments(max_grad_norm: float | None) -> tuple[float, float]:
        learner = Learner()
        metrics = learner.update(epochs=1, minibatches=1, max_grad_norm=max_grad_norm)
        momentum = [s["exp_avg"].flatten() for s in learner.optimizer.state.values()]
        return metrics.grad_norm.item(), torch.cat(momentum).norm().item() / (1 - 0.9)

    norm, applied = moments(None)
    assert applied == pytest.approx(norm, rel=1e-4)
    assert moments(1e-3 * norm) == pytest.approx((norm, 1e-3 * norm), rel=1e-4)


def half_precision() -> AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


def test_under_autocast_the_policy_has_its_weights_of_now() -> None:
    learner = Learner()
    with half_precision(), autocast_without_cache(CPU):
        before = learner.policy.value(learner.samples.obs)
        learner.update(epochs=1, minibatches=1)
        after = learner.policy.value(learner.samples.obs)
    with half_precision():
        assert torch.equal(after, learner.policy.value(learner.samples.obs))
    assert not torch.equal(after, before)


def test_under_autocast_every_step_uses_the_weights_of_the_step_before(
    ours: list[Step],
) -> None:
    def two_passes(contexts: list[AbstractContextManager[object]]) -> Weights:
        learner = Learner()
        for context in contexts:
            with context, autocast_without_cache(CPU):
                with torch.no_grad():  # casts weights without gradient, as acting does
                    learner.policy.value(learner.samples.obs)
                learner.update(epochs=2 // len(contexts), minibatches=1)
        return learner.state()

    together = two_passes([half_precision()])
    for step in ours:
        assert all(gradient.abs().sum() > 0 for gradient in step.gradient.values())
    assert ours[0].loss != ours[1].loss
    apart = two_passes([half_precision(), half_precision()])
    # The order of a full batch only decides about rounding.
    for name, value in together.items():
        torch.testing.assert_close(value, apart[name], rtol=1e-3, atol=1e-5, msg=name)
    assert not same_bits(together, two_passes([nullcontext()]))
