"""The three stages of an iteration, with all that they act on: rollout, advantages, update.

Axes: ``T`` step, ``B`` environment, ``S`` gradient step or number in a memory. This file knows
nothing of Lightning, and only ``to_host`` waits for the device.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.compiling.loops import CompileMode, compile_function, log_reasons_again
from esper_lightning.compiling.stages import stages_within
from esper_lightning.core.buffer import allocate_rollout, first_steps
from esper_lightning.core.distributions import has_choice
from esper_lightning.core.errors import require
from esper_lightning.core.flat_adam import FlatParameters
from esper_lightning.core.last_obs import with_reached_obs, without_images
from esper_lightning.core.ranks import SINGLE_RANK, Ranks
from esper_lightning.core.running_stats import Moments, RunningStats
from esper_lightning.core.seeding import restore_streams
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import ActionSpace
from esper_lightning.core.tensor_trees import leaves, map_tree
from esper_lightning.core.types import Rollout, Samples
from esper_lightning.envs.base import (
    BatchedEnv,
    EnvSpec,
    MeasuringEnv,
    RunProgress,
    close_env,
    reseed_env,
    spec_name,
)
from esper_lightning.envs.inspector import FirstSteps, refuse_unsavable
from esper_lightning.ppo.advantages import Critic, prepare_samples, scale_reward
from esper_lightning.ppo.agent import Agent, Values
from esper_lightning.ppo.collect import ActingState, Collector
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.extension import FINITE, Prepared
from esper_lightning.ppo.metrics import EpisodeSums, mean_env_metrics, sum_episodes, to_host
from esper_lightning.ppo.non_finite import (
    is_healthy,
    refuse_extension,
    refuse_gradient,
    refuse_rollout,
)
from esper_lightning.ppo.update import UpdateMetrics, Updater

__all__ = ["ITERATION_METRICS", "Learner", "Targets"]


class Targets(NamedTuple):
    """Results of the stage between rollout and update."""

    samples: Samples
    discounted_return: Float[Tensor, " B"]
    moments: Moments | None  # of discounted returns
    healthy: Bool[Tensor, ""]  # every number is finite, every mask allows something, on every rank
    episodes: EpisodeSums  # of all ranks
    explained_variance: Float[Tensor, ""]
    added: Mapping[str, Float[Tensor, ""]] = {}  # metrics of extensions


_METRICS: dict[str, Callable[[Targets, UpdateMetrics], Tensor]] = {
    "healthy": lambda targets, _: targets.healthy,
    "return_sum": lambda targets, _: targets.episodes.episode_return,
    "length_sum": lambda targets, _: targets.episodes.episode_length,
    "episodes": lambda targets, _: targets.episodes.episodes,
    "policy/explained_variance": lambda targets, _: targets.explained_variance,
    "loss/policy": lambda _, update: update.own.policy_loss,
    "loss/value": lambda _, update: update.own.value_loss,
    "loss/entropy": lambda _, update: update.own.entropy,
    "policy/approx_kl": lambda _, update: update.own.approx_kl,
    "policy/clip_fraction": lambda _, update: update.own.clip_fraction,
    "optim/grad_norm": lambda _, update: update.grad_norm,
    "gradient_steps": lambda _, update: update.gradient_steps,
    "gradients_finite": lambda _, update: update.finite,
}
"""Every metric of an iteration by its name, but for those of extensions and environments.

Metrics with a ``/`` in their name are columns of the history.
"""

ITERATION_METRICS = tuple(name for name in _METRICS if "/" in name)
"""Columns of the history that every iteration has from the learner."""


class Learner:
    """Environments, rollout storage and random streams of one run on one device.

    Args:
        spec: Spec of the environments.
        env: Environments that the spec built.
        agent: Agent that acts and is trained.
        config: PPO settings.
        return_stats: Statistics of discounted returns; ``None`` leaves rewards as they are.
        exploration: Random stream of actions, on the device.
        sample_order: Random stream of minibatches, on the device.
        mode: Compile mode of the stages.
        device: Device of environments, agent and storage.
        ranks: All ranks of the run. Each has environments of its own, and all train the same
            weights.

    Attributes:
        agent: Agent that acts and is trained.
        collector: Collector that fills rollouts.
        stages: Stages that are compiled, by name.
        order: Indices of the samples of each gradient step of the latest update.
    """

    def __init__(
        self,
        spec: EnvSpec,
        env: BatchedEnv,
        agent: Agent,
        config: PPOConfig,
        return_stats: RunningStats | None,
        *,
        exploration: torch.Generator,
        sample_order: torch.Generator,
        mode: CompileMode,
        device: torch.device,
        ranks: Ranks = SINGLE_RANK,
    ) -> None:
        log_reasons_again()
        self._spec, self._env, self.agent, self._config = spec, env, agent, config
        self._closed = False
        self._curriculum = getattr(env, "begin_iteration", None)
        self._return_stats, self._device, self._ranks = return_stats, device, ranks
        self._exploration, self._sample_order = exploration, sample_order
        spaces = spec.spaces()
        self._first_steps = FirstSteps(spec, spaces, env, device)
        self._storage = allocate_rollout(spaces, config.rollout_steps, spec.num_envs, device=device)
        self.collector = Collector(env, agent, self._first_steps, mode=mode, device=device)
        self._critic = Critic(agent, mode=mode, device=device)
        alone = mode if ranks.size == 1 else "off"  # several ranks communicate half-way
        prepare = partial(_targets_of, config, ranks, spaces.action)
        self._prepare = compile_function("advantages", prepare, mode=alone, device=device)
        self._updater = Updater(agent, config, mode=mode, device=device, ranks=ranks)
        self.stages = stages_within(self.collector, self._critic, self, self._updater)
        self._acting: ActingState | None = None
        self._parameters: FlatParameters | None = None
        self._learning_rate, self._action_space = torch.zeros((), device=device), spaces.action
        self._first_memory: Tensor | None = None  # at the beginning of the latest rollout
        self.order: Sequence[Tensor] = ()

    def start(self, optimizer: torch.optim.Adam, state: dict[str, Any] | None) -> bool:
        """Start training, with new episodes or with those of a checkpoint.

        Args:
            optimizer: Adam over the policy; where a run is resumed, with its state restored.
            state: Result of ``state_dict`` from a checkpoint; ``None`` starts new episodes.

        Returns:
            Whether the episodes of ``state`` are resumed; not those of another kind of device.

        Raises:
            ValueError: If ``state`` belongs to other environments; or if new environments have a
                state that no checkpoint could hold.
        """
        self._parameters = self.agent.bind(optimizer)
        self._drop_metrics()
        streams = (self._exploration, self._sample_order)
        resumed = state is not None and restore_streams(streams, state["generators"])
        if state is None or state["env"] is None or not resumed:
            obs, mask = self._first_steps.reset()
            zeros = torch.zeros(self._storage.reward.shape[1], device=self._device)
            self._acting = ActingState(obs, mask, zeros, self.agent.policy.initial_memory(obs))
            self._first_memory = self._acting.memory
            refuse_unsavable(self._env)
            return False
        self._env.load_state_dict(state["env"])
        acting = ActingState(**state["acting"]).to(self._device)
        expected = self._storage.obs, self._storage.action_mask, self._storage.reward
        shapes = [leaf.shape[1:] for leaf in leaves(expected)]
        got = [leaf.shape for leaf in leaves(acting[:3])]
        require(got == shapes, "acting", f"have shapes {[*map(list, shapes)]}", [*map(list, got)])
        self._acting = acting
        self._first_memory = self._acting.memory
        return True

    def state_dict(self) -> dict[str, Any] | None:
        """Environments, running episodes and random streams; ``None`` before ``start``."""
        if self._acting is None:
            return None
        return {
            "acting": map_tree(torch.clone, self._acting)._asdict(),  # it is changed in place
            "env": self._env.state_dict(),
            "generators": [g.get_state() for g in (self._exploration, self._sample_order)],
        }

    def begin_iteration(self, progress: RunProgress) -> None:
        """Tell the environments how far the run is, if they have a curriculum."""
        if self._curriculum is not None:
            self._curriculum(progress)

    def rollout(self, steps: int) -> Rollout:
        """Act for ``steps`` steps in every environment."""
        assert self._acting is not None and self._parameters is not None  # noqa: PT018
        self._parameters.refresh()
        self.agent.refresh()
        storage = self._storage
        if steps < len(storage.reward):  # the last rollout of a run with a budget
            storage = first_steps(storage, steps)
        memory = self._acting.memory  # it is changed in place
        self._first_memory = None if memory is None else memory.clone()
        rollout, self._acting = self.collector.collect(
            self._acting, storage, generator=self._exploration
        )
        self._storage = self._storage._replace(last_obs=rollout.last_obs)  # which may have grown
        return rollout

    def metrics(self, targets: Targets, update: UpdateMetrics) -> dict[str, Float[Tensor, ""]]:
        """Every metric of an iteration by its name, as scalars on the device.

        Args:
            targets: Result of ``compute_targets``.
            update: Result of ``update``.
        """
        return {
            **{name: metric(targets, update) for name, metric in _METRICS.items()},
            **{f"loss/{name}": term for name, term in update.added.items()},
            **targets.added,
            **{f"env/{name}": metric for name, metric in self.env_metrics().items()},
        }

    def to_host(
        self, rollout: Rollout, targets: Targets, update: UpdateMetrics, *, iteration: int
    ) -> dict[str, float]:
        """Copy the metrics of an iteration to the host, in the one transfer of an iteration.

        Args:
            rollout: Rollout of the iteration.
            targets: Result of ``compute_targets``.
            update: Result of ``update``.
            iteration: Number of the iteration, for errors.

        Raises:
            NonFiniteError: If a number of the rollout or of the update was not finite. The error
                says which weights the agent has then.
            ValueError: If an action mask allowed nothing.
            PeerFailedError: If the fault was on another rank.
        """
        host = to_host(self.metrics(targets, update))
        for name in [name for name in host if name.startswith(FINITE)]:
            if host.pop(name) < 1.0:
                refuse_extension(name.removeprefix(FINITE), iteration=iteration)
        if not host["healthy"]:
            refuse_rollout(rollout, self._spec, self._action_space, iteration=iteration)
        if not host["gradients_finite"]:
            refuse_gradient(
                self.agent,
                targets.samples,
                self._config,
                self.order,
                env=spec_name(self._spec),
                largest_reward=rollout.reward.abs().max().item(),
                iteration=iteration,
                ranks=self._ranks.size,
            )
        return host

    def env_metrics(self) -> dict[str, Float[Tensor, ""]]:
        """Metrics of the environments over the latest rollout, averaged over ranks."""
        return mean_env_metrics(self._env, self._ranks, device=self._device)

    def _drop_metrics(self) -> None:
        """Forget what a shared simulator has logged in an evaluation."""
        if getattr(self._spec, "shared", False) and hasattr(self._env, "metrics"):
            cast(MeasuringEnv, self._env).metrics()

    def begin_episodes(self, seed: int) -> None:
        """Start new episodes in all environments, after something else has stepped the simulator.

        Args:
            seed: Seed of the environments, for those that can be seeded.
        """
        assert self._acting is not None
        reseed_env(self._env, seed)
        obs, mask = self._env.reset()
        self._drop_metrics()
        zeros = torch.zeros_like(self._acting.discounted_return)
        self._acting = ActingState(obs, mask, zeros, self.agent.policy.initial_memory(obs))

    def acting_alone(self) -> Callable[[], object]:
        """A function that acts once more on the observations of the latest rollout."""
        memory = None if self._first_memory is None else self._first_memory.clone()
        return self.collector.acting_alone(self._storage, memory)

    def close(self) -> None:
        """Release the processes, windows and other resources of the environments, once."""
        if not self._closed:
            self._closed = True
            close_env(self._spec, self._env)

    def compute_targets(self, rollout: Rollout) -> Targets:
        """Scale rewards, add those of extensions, and estimate the advantages of a rollout."""
        assert self._acting is not None
        extended = len(self.agent.extensions) > 0
        added = self._prepare_extensions(rollout) if extended else Prepared()
        stats = self._return_stats
        moments = None if stats is None else stats.moments
        with torch.no_grad():
            begun = self._first_memory
            values = self._critic.values(self.agent.weights, rollout, begun)
            images = rollout.last_obs is not None
            targets: Targets = self._prepare(
                values._replace(obs={}) if images else values,
                without_images(rollout),
                begun,
                self._acting.discounted_return,
                moments,
                added.reward,
            )
            if images:
                targets = targets._replace(samples=targets.samples._replace(obs=values.obs))
        if extended:
            samples = targets.samples._replace(kept=added.kept)
            metrics, sound = dict(added.metrics), targets.healthy
            for name in [name for name in metrics if name.startswith(FINITE)]:
                # Rewards for a rollout that is not finite are nobody's fault but the rollout's.
                metrics[name] = torch.where(targets.healthy, metrics[name], 1.0)
                sound = sound & (metrics[name] == 1.0)  # of all ranks
            targets = targets._replace(samples=samples, added=metrics, healthy=sound)
        if stats is not None and targets.moments is not None:
            stats.keep(targets.moments)
        carried = targets.discounted_return
        if carried is not self._acting.discounted_return:
            self._acting = self._acting._replace(discounted_return=carried.clone())
        return targets

    def update(self, targets: Targets, *, learning_rate: float) -> UpdateMetrics:
        """Take every gradient step of an iteration.

        Args:
            targets: Result of ``compute_targets``.
            learning_rate: Learning rate of all steps.
        """
        assert self._parameters is not None
        samples = targets.samples
        self.order = self._updater.order(samples.units, self._sample_order)
        adam, metrics = self._updater.update(
            self._parameters.state,
            self.agent.weights,
            samples,
            self.order,
            learning_rate=self._learning_rate.fill_(learning_rate),
            healthy=targets.healthy,
        )
        self._parameters.keep(adam)
        return metrics

    def _prepare_extensions(self, rollout: Rollout) -> Prepared:
        rollout, ranks = with_reached_obs(rollout), self._ranks
        healthy = torch.stack(ranks.gather(is_healthy(rollout, self._action_space))).all()
        extensions, stream = self.agent.extensions, self._sample_order
        prepared = extensions.prepare(rollout, healthy=healthy, ranks=ranks, generator=stream)
        self.agent.refresh()  # ``prepare`` may have replaced a buffer
        return prepared


def _targets_of(
    config: PPOConfig,
    ranks: Ranks,
    action_space: ActionSpace,
    values: Values,
    rollout: Rollout,
    memory: Float[Tensor, "B S"] | None,
    discounted_return: Float[Tensor, " B"],
    moments: Moments | None,
    added: Float[Tensor, "T B"] | None,
) -> Targets:
    everywhere = ranks.gather((is_healthy(rollout, action_space), sum_episodes(rollout)))
    healthy = torch.stack([one for one, _ in everywhere]).all()
    totals = {
        name: torch.stack([getattr(sums, name) for _, sums in everywhere]).sum()
        for name in EpisodeSums._fields
    }
    episodes = EpisodeSums(**totals)
    reward, discounted_return, moments = scale_reward(
        rollout, discounted_return, moments, config, healthy=healthy, ranks=ranks
    )
    reward = reward if added is None else reward + added
    mask = rollout.action_mask
    choice = None if mask is None else has_choice(action_space, mask.flatten(0, 1))
    samples, variance = prepare_samples(
        values, rollout, reward, config, ranks, memory=memory, choice=choice
    )
    return Targets(samples, discounted_return, moments, healthy, episodes, variance)
