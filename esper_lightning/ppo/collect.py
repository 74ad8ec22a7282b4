"""The rollout: act, step, write, ``T`` times. Axes: ``T`` step, ``B`` environment.

No gradient, no host synchronisation; it knows nothing of Lightning.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.compiling.loops import CompileMode, compile_loop
from esper_lightning.core.buffer import write_step
from esper_lightning.core.distributions import allows_choice
from esper_lightning.core.errors import Words, require
from esper_lightning.core.gae import discounted_returns
from esper_lightning.core.ranks import ALONE, Ranks
from esper_lightning.core.running_stats import Moments
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import ActionSpace
from esper_lightning.core.tensor_trees import map_tree
from esper_lightning.core.types import Observation, Rollout, StepResult, map_obs
from esper_lightning.envs.base import BatchedEnv, FunctionalEnv, is_functional
from esper_lightning.envs.inspector import FirstSteps
from esper_lightning.policies.base import SampledAction, forget
from esper_lightning.ppo.agent import Agent, Weights
from esper_lightning.ppo.config import PPOConfig

__all__ = [
    "ActingState",
    "Collector",
    "Fault",
    "Normalize",
    "as_row",
    "first_non_finite",
    "is_healthy",
    "refuse_stuck",
    "refuse_stuck_cause",
    "scale_reward",
]

_log = logging.getLogger(__name__)

Normalize = Callable[[Observation], Observation]


class ActingState(NamedTuple):
    """Where acting goes on.

    Between two rollouts nothing else of an episode is kept outside the environment.
    """

    obs: Observation  # [B, *O]
    action_mask: Bool[Tensor, "B K"] | None
    discounted_return: Float[Tensor, " B"]  # of the running episodes so far, for reward scaling
    memory: Float[Tensor, "B S"] | None = None  # before obs

    def to(self, device: torch.device) -> "ActingState":
        """The same on another device."""
        return map_tree(lambda tensor: tensor.to(device), self)


class _Running(NamedTuple):
    """What one step of a rollout hands to the next."""

    episodes: Any
    obs: Observation
    action_mask: Bool[Tensor, "B K"] | None
    memory: Float[Tensor, "B S"] | None


class Collector:
    """Fills rollouts by acting in ``env``.

    Environments that are pure functions are stepped as ``mode`` says; others by calling ``step``.

    Args:
        env: ``B`` environments.
        agent: Acts in them.
        first_steps: The same environments, while their steps are inspected.
        mode: How rollouts run.
        device: Of environments and agent.
    """

    def __init__(
        self,
        env: BatchedEnv,
        agent: Agent,
        first_steps: FirstSteps,
        *,
        mode: CompileMode,
        device: torch.device,
    ) -> None:
        self._env, self._agent, self._first_steps = env, agent, first_steps
        self._functional = cast(FunctionalEnv, env) if is_functional(env) else None
        if self._functional is None and mode != "off":
            reason = "its step is no pure function (FunctionalEnv)"
            _log.warning("Rollouts of %s are not compiled: %s.", first_steps.owner, reason)
        self._loop = compile_loop("rollout", self._step, mode=mode, device=device)

    @torch.no_grad()
    def collect(
        self,
        state: ActingState,
        rollout: Rollout,
        *,
        generator: torch.Generator,
    ) -> tuple[Rollout, ActingState]:
        """Act for as many steps as ``rollout`` has.

        Args:
            state: Where the previous rollout ended.
            rollout: ``T`` steps that may be overwritten.
            generator: Source of exploration noise, on the device.

        Returns:
            The rollout, maybe not in the storage that was given, and where the next one begins.
        """
        steps, num_envs = rollout.reward.shape
        weights = self._agent.weights
        noise = self._agent.noise((steps, num_envs), generator)
        if self._functional is None:
            return rollout, self._call_env(state, rollout, weights, noise)
        env = self._functional
        running = _Running(env.episodes(), state.obs, state.action_mask, state.memory)
        xs = (noise, env.draw(steps))
        if self._first_steps.left > 0:
            self._rehearse(running, xs, weights)
        running, rollout = self._loop(running, xs, None, weights, rollout)
        env.keep(running.episodes)
        _, obs, action_mask, memory = running
        return rollout, state._replace(obs=obs, action_mask=action_mask, memory=memory)

    def _step(
        self, running: _Running, x: tuple[Tensor, Any], weights: Weights
    ) -> tuple[_Running, Rollout]:
        """One step of an environment that is a pure function."""
        assert self._functional is not None
        noise, drawn = x
        before, obs, action_mask, memory = running
        acted = self._agent.act(weights, obs, action_mask, noise, memory)
        episodes, result = self._functional.transition(before, acted.action, drawn)
        row = as_row(obs, action_mask, acted.sampled, result)
        memory = forget(acted.memory, result.terminated | result.truncated)
        return _Running(episodes, result.obs, result.action_mask, memory), row

    def _rehearse(self, running: _Running, xs: tuple[Tensor, Any], weights: Weights) -> None:
        """Inspect the steps that a rollout begins with, before a loop takes them."""
        for t in range(min(self._first_steps.left, len(xs[0]))):
            noise, drawn = map_tree(lambda rows, t=t: rows[t], xs)
            episodes, obs, action_mask, memory = running
            acted = self._agent.act(weights, obs, action_mask, noise, memory)
            episodes, result = self._first_steps.rehearse(episodes, acted.action, drawn)
            memory = forget(acted.memory, result.terminated | result.truncated)
            running = _Running(episodes, result.obs, result.action_mask, memory)

    def _call_env(
        self, state: ActingState, rollout: Rollout, weights: Weights, noise: Tensor
    ) -> ActingState:
        """Any other environment."""
        first_steps = self._first_steps
        env = first_steps if first_steps.left > 0 else self._env
        obs, action_mask, memory = state.obs, state.action_mask, state.memory
        for t in range(rollout.reward.shape[0]):
            acted = self._agent.act(weights, obs, action_mask, noise[t], memory)
            try:
                result = env.step(acted.action)
            except Exception as error:
                refuse_stuck_cause(error, action_mask, first_steps)
                raise
            write_step(rollout, t, as_row(obs, action_mask, acted.sampled, result))
            obs, action_mask = result.obs, result.action_mask
            if acted.memory is not None:
                memory = forget(acted.memory, result.terminated | result.truncated)
        return state._replace(obs=obs, action_mask=action_mask, memory=memory)


def as_row(
    obs: Observation,
    action_mask: Bool[Tensor, "B K"] | None,
    sampled: SampledAction,
    result: StepResult,
) -> Rollout:
    """One step as a row of a rollout: what was seen and done, and what came of it."""
    action = sampled.action
    return Rollout(
        obs=map_obs(Tensor.float, obs),
        reached_obs=map_obs(Tensor.float, result.reached_obs),
        action=action.float() if action.is_floating_point() else action.long(),
        log_prob=sampled.log_prob.float(),
        action_mask=action_mask,
        reward=result.reward.float(),
        terminated=result.terminated,
        truncated=result.truncated,
        episode_return=result.episode_return.float(),
        episode_length=result.episode_length.long(),
    )


def scale_reward(
    rollout: Rollout,
    discounted_return: Float[Tensor, " B"],
    moments: Moments | None,
    config: PPOConfig,
    *,
    healthy: Bool[Tensor, ""],
    ranks: Ranks = ALONE,
) -> tuple[Float[Tensor, "T B"], Float[Tensor, " B"], Moments | None]:
    """Rewards as the learner sees them: one scale for a whole rollout, which it helps to set.

    Args:
        rollout: What was collected.
        discounted_return: Of the running episodes, before the rollout.
        moments: Of discounted returns; ``None`` leaves rewards as they are.
        config: Discount and limit.
        healthy: Where False, the moments stay as they are.
        ranks: Whose returns count, too.

    Returns:
        The rewards, the discounted returns after the rollout, and the moments.
    """
    if moments is None:
        return rollout.reward, discounted_return, None
    ended = rollout.terminated | rollout.truncated
    returns, carried = discounted_returns(
        rollout.reward, ended, discounted_return, discount=config.discount
    )
    moments = moments.merged(*ranks.gather(Moments.of(returns)), where=healthy)
    return moments.scale(rollout.reward, clip=config.reward_clip), carried, moments


def is_healthy(rollout: Rollout, space: ActionSpace) -> Bool[Tensor, ""]:
    """Whether every number is finite and every mask allows something; stays on the device."""
    sound = [value.isfinite().all() for _, value in _watched(rollout)]
    if rollout.action_mask is not None:
        sound.append(allows_choice(space, rollout.action_mask.flatten(0, 1)).all())
    return torch.stack(sound).all()


def refuse_stuck_cause(error: Exception, mask: Bool[Tensor, "B K"] | None, env: FirstSteps) -> None:
    """Refuse a mask that allows nothing where a step failed after it.

    Raises:
        ValueError: From ``error``, which is then what became of an action that no mask allowed.
    """
    if mask is None:
        return
    try:
        stuck = not bool(allows_choice(env.spaces.action, mask).all())
    except RuntimeError:  # the device may have failed, too
        return
    if stuck:
        try:
            refuse_stuck(mask, env.spaces.action, env=env.owner)
        except ValueError as cause:
            raise cause from error


def refuse_stuck(
    mask: Bool[Tensor, "... K"], space: ActionSpace, *, env: str, where: str = ""
) -> None:
    """Refuse masks of which a part allows nothing; synchronises.

    Args:
        mask: Of environments ``[B, K]``, or of the steps of a rollout ``[T, B, K]``.
        space: Of their actions.
        env: Name of the environment.
        where: What is to be said after the place.

    Raises:
        ValueError: Naming environment and component, and of a rollout the first step.
    """
    allowed = allows_choice(space, mask.flatten(0, -2))  # [..., K] -> [N, A]
    stuck = (~allowed).reshape(*mask.shape[:-1], -1)
    places = cast(list[list[int]], stuck.nonzero()[:1].tolist())
    for *step, environment, component in places:
        got = f"none in environment {environment}, component {component}"
        got += "".join(f" at rollout step {t}" for t in step)
        field = f"{env}.step().action_mask"
        require(False, field, "allow a choice for every component", Words(got), where)


class Fault(NamedTuple):
    """The first value of a rollout that is not finite."""

    owner: str  # "policy" or "environment"
    text: str
    name: str  # of the field
    environments: list[int]
    step: int


def first_non_finite(rollout: Rollout) -> Fault | None:
    """Say what was not finite first: whose it is, and field, step, environments, columns.

    ``None`` if everything is finite.

    Within a step an observation comes before the policy's answer to it, and that before what the
    environment makes of it. Synchronises.

    """
    steps = [(_first_step(value), name, value) for name, value in _watched(rollout)]
    faults = [fault for fault in steps if fault[0] >= 0]
    if not faults:
        return None
    step, name, value = min(faults, key=lambda fault: fault[0])
    bad = ~value[step].isfinite()
    where = bad.flatten(1) if bad.dim() > 1 else bad[:, None]
    envs = cast(list[int], where.any(1).nonzero()[:, 0].tolist())
    columns = cast(list[int], where.any(0).nonzero()[:, 0].tolist())
    of = "" if bad.dim() == 1 else f", column {_some(columns)}"
    found = f"{value[step][bad][0].item()} in {name} of environment {_some(envs)}{of}"
    owner = "policy" if name == "log_prob" else "environment"
    return Fault(owner, f"{found} at rollout step {step}", name, envs, step)


def _first_step(value: Tensor) -> int:
    """First step of ``[T, ...]`` at which not everything is finite; -1 if there is none."""
    bad = (~value.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if bad.numel() else -1


def _watched(rollout: Rollout) -> list[tuple[str, Tensor]]:
    """In the order in which they come about within a step."""
    return [
        *_groups("obs", rollout.obs),
        ("log_prob", rollout.log_prob),
        ("reward", rollout.reward),
        *_groups("reached_obs", rollout.reached_obs),
    ]


def _groups(name: str, obs: Observation) -> list[tuple[str, Tensor]]:
    if isinstance(obs, Tensor):
        return [(name, obs)]
    return [(f"{name}[{group!r}]", value) for group, value in obs.items()]


def _some(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (
        f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    )
