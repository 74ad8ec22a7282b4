"""The rollout: act, step and write, ``T`` times. Axes: ``T`` step, ``B`` environment.

Nothing here computes gradients or synchronises with the host, and this file knows nothing of
Lightning.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.compiling.loops import CompileMode, compile_loop, compile_map
from esper_lightning.core.buffer import stored_obs, write_step
from esper_lightning.core.last_obs import LastObsWriter
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import ObsSpace
from esper_lightning.core.tensor_trees import map_obs, map_tree
from esper_lightning.core.types import Observation, Rollout, StepResult
from esper_lightning.envs.base import BatchedEnv, FunctionalEnv, is_functional
from esper_lightning.envs.inspector import FirstSteps
from esper_lightning.policies.base import SampledAction
from esper_lightning.ppo.agent import Acted, Agent, Weights
from esper_lightning.ppo.non_finite import refuse_stuck_cause

__all__ = ["ActingState", "Collector", "Normalize", "as_row"]

_PIECES = 32  # number of pieces in which rollouts of images are compiled, if it divides the steps

Normalize = Callable[[Observation], Observation]


class ActingState(NamedTuple):
    """The state in which the next rollout continues to act.

    Between two rollouts, nothing else of a running episode is stored outside the environment.
    """

    obs: Observation  # [B, *O]
    action_mask: Bool[Tensor, "B K"] | None
    discounted_return: Float[Tensor, " B"]  # of the running episodes so far, for reward scaling
    memory: Float[Tensor, "B S"] | None = None  # memory before obs

    def to(self, device: torch.device) -> "ActingState":
        """This state on another device."""
        return map_tree(lambda tensor: tensor.to(device), self)


class _Running(NamedTuple):
    """State that one step of a rollout passes to the next step."""

    episodes: Any
    obs: Observation
    action_mask: Bool[Tensor, "B K"] | None
    memory: Float[Tensor, "B S"] | None


class Collector:
    """Fills rollouts by acting in environments.

    Environments whose step is a pure function run in a loop that is compiled as ``mode`` says.
    Other environments are stepped from Python, by their method ``step``; acting is compiled.

    Args:
        env: Batch of ``B`` environments.
        agent: Agent that chooses the actions.
        first_steps: Inspector of the environments' first steps.
        mode: Compile mode of rollouts.
        device: Device of environments and agent.
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
        self._agent, self._first_steps = agent, first_steps
        self._mode: CompileMode = mode
        self._device = device
        self._call_step = first_steps.step
        self._functional = cast(FunctionalEnv, env) if is_functional(env) else None
        self._obs_space = first_steps.spaces.obs
        self._loop = compile_loop("rollout", self._step, mode=mode, device=device)
        # Only the agent is held: what a simulator does meanwhile is not the business of the watch
        # over compiled functions.
        rows = partial(_act_rows, agent)
        self._act_compiled = compile_map("acting", rows, mode=mode, device=device)

    def time_environment(self, add: Callable[[float], None]) -> None:
        """Measure every step of the environments that Python asks for.

        Args:
            add: Function that gets the seconds of each step.
        """
        if self._functional is not None:  # its loop must hold nothing that changes
            return
        step = self._call_step

        def timed(action: Tensor) -> StepResult:
            started = time.perf_counter()
            result = step(action)
            add(time.perf_counter() - started)
            return result

        self._call_step = timed

    def acting_alone(
        self, rollout: Rollout, memory: Float[Tensor, "B S"] | None
    ) -> Callable[[], object]:
        """A function that acts as in a rollout, on the observations that the rollout holds.

        The environments take no step, and the rollout is not written. Acting runs as it does in
        ``collect``: in one loop, or called from Python for each step.

        Args:
            rollout: Rollout of ``T`` steps.
            memory: Memory of the policy before the first step, which may be overwritten.
        """
        agent, (steps, num_envs) = self._agent, rollout.reward.shape
        generator = torch.Generator(self._device).manual_seed(0)
        noise = agent.policy.noise((steps, num_envs), generator)
        xs = (rollout.obs, rollout.action_mask, noise)
        body = partial(_act_alone, agent)
        loop = compile_loop("acting", body, mode=self._mode, device=self._device)

        def call() -> None:
            before = memory
            for t in range(steps):
                obs, mask, one = map_tree(lambda rows, t=t: rows[t], xs)
                before = self._act_compiled((obs, mask, one, before), agent.weights).memory

        def run() -> None:
            loop(memory, xs, None, agent.weights)

        return torch.no_grad()(call if self._functional is None else run)

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
            state: State in which the previous rollout ended.
            rollout: Storage for ``T`` steps, which may be overwritten.
            generator: Source of exploration noise, on the device.

        Returns:
            The rollout, which may lie in other storage than was given, and the state in which the
            next rollout begins.
        """
        steps, num_envs = rollout.reward.shape
        weights = self._agent.weights
        noise = self._agent.policy.noise((steps, num_envs), generator)
        writer = None if rollout.last_obs is None else LastObsWriter(rollout)
        if self._functional is None:
            after = self._call_env(state, rollout, writer, weights, noise)
            return _finish(rollout, writer), after
        env = self._functional
        running = _Running(env.episodes(), state.obs, state.action_mask, state.memory)
        xs = (noise, env.draw(steps))
        if self._first_steps.left > 0:
            self._rehearse(running, xs, weights)
        if writer is None:
            running, rollout = self._loop(running, xs, None, weights, rollout)
        else:
            running = self._run_pieces(running, xs, weights, rollout, writer)
        rollout = _finish(rollout, writer)
        env.keep(running.episodes)
        _, obs, action_mask, memory = running
        return rollout, state._replace(obs=obs, action_mask=action_mask, memory=memory)

    def _run_pieces(
        self,
        running: _Running,
        xs: tuple[Tensor, Any],
        weights: Weights,
        rollout: Rollout,
        writer: LastObsWriter,
    ) -> _Running:
        """Fill a rollout of images a few steps at a time, since the loop returns all it reached."""
        steps = rollout.reward.shape[0]
        most = -(-steps // _PIECES)
        size = next(size for size in range(most, 0, -1) if steps % size == 0)
        for t in range(0, steps, size):
            piece = slice(t, t + size)
            some = map_tree(lambda rows, piece=piece: rows[piece], xs)
            running, rows = cast(
                tuple[_Running, Rollout], self._loop(running, some, None, weights, None)
            )
            write_step(rollout, piece, rows)
            writer.write(t, rows.terminated | rows.truncated, rows.reached_obs)
        return running

    def _step(
        self, running: _Running, x: tuple[Tensor, Any], weights: Weights
    ) -> tuple[_Running, Rollout]:
        """One step of an environment whose step is a pure function."""
        assert self._functional is not None
        policy = self._agent.policy
        noise, drawn = x
        before, obs, action_mask, memory = running
        acted = self._act(weights, obs, action_mask, noise, memory)
        episodes, result = self._functional.transition(before, acted.action, drawn)
        row = as_row(self._obs_space, obs, action_mask, acted.sampled, result)
        memory = policy.reset_memory(acted.memory, result.terminated | result.truncated)
        return _Running(episodes, result.obs, result.action_mask, memory), row

    def _act(
        self,
        weights: Weights,
        obs: Observation,
        action_mask: Tensor | None,
        noise: Tensor,
        memory: Tensor | None,
    ) -> Acted:
        agent = self._agent
        return agent.with_weights(weights, agent.act, obs, action_mask, noise, memory)

    def _rehearse(self, running: _Running, xs: tuple[Tensor, Any], weights: Weights) -> None:
        """Inspect the first steps of a rollout, before the compiled loop takes the same steps."""
        policy = self._agent.policy
        for t in range(min(self._first_steps.left, len(xs[0]))):
            noise, drawn = map_tree(lambda rows, t=t: rows[t], xs)
            episodes, obs, action_mask, memory = running
            acted = self._act(weights, obs, action_mask, noise, memory)
            episodes, result = self._first_steps.rehearse(episodes, acted.action, drawn)
            memory = policy.reset_memory(acted.memory, result.terminated | result.truncated)
            running = _Running(episodes, result.obs, result.action_mask, memory)

    def _call_env(
        self,
        state: ActingState,
        rollout: Rollout,
        writer: LastObsWriter | None,
        weights: Weights,
        noise: Tensor,
    ) -> ActingState:
        """Fill a rollout by calling the ``step`` of an environment that is no pure function."""
        policy = self._agent.policy
        obs, action_mask, memory = state.obs, state.action_mask, state.memory
        for t in range(rollout.reward.shape[0]):
            acted = self._act_compiled((obs, action_mask, noise[t], memory), weights)
            try:
                # Environments may keep actions, and compiled code reuses the memory of its results.
                result = self._call_step(acted.action.clone())
            except Exception as error:
                refuse_stuck_cause(error, action_mask, self._first_steps)
                raise
            row = as_row(self._obs_space, obs, action_mask, acted.sampled, result)
            write_step(rollout, t, row)
            if writer is not None:
                ended = (result.terminated | result.truncated)[None]
                writer.write(t, ended, map_obs(_one_step, row.reached_obs))
            obs, action_mask = result.obs, result.action_mask
            memory = policy.reset_memory(acted.memory, result.terminated | result.truncated)
        return state._replace(obs=obs, action_mask=action_mask, memory=memory)


def _act_rows(
    agent: Agent, rows: tuple[Observation, Tensor | None, Tensor, Tensor | None], weights: Weights
) -> Acted:
    return agent.with_weights(weights, agent.act, *rows)


def _act_alone(
    agent: Agent,
    memory: Tensor | None,
    x: tuple[Observation, Tensor | None, Tensor],
    weights: Weights,
) -> tuple[Tensor | None, Acted]:
    """A step of a rollout without its environments."""
    acted = _act_rows(agent, (*x, memory), weights)
    return acted.memory, acted._replace(memory=None)


def _finish(rollout: Rollout, writer: LastObsWriter | None) -> Rollout:
    return rollout if writer is None else rollout._replace(last_obs=writer.last_obs)


def _one_step(value: Tensor) -> Tensor:
    return value[None]  # [B, ...] -> [1, B, ...]


def as_row(
    space: ObsSpace,
    obs: Observation,
    action_mask: Bool[Tensor, "B K"] | None,
    sampled: SampledAction,
    result: StepResult,
) -> Rollout:
    """One step as a row of a rollout, in the kinds of numbers that a rollout stores.

    Args:
        space: Observation space, which says how observations are stored.
        obs: Observations on which the policy acted.
        action_mask: Choices that were allowed.
        sampled: Actions that the policy sampled.
        result: Result of the environment's step.
    """
    action = sampled.action
    return Rollout(
        obs=stored_obs(space, obs),
        reached_obs=stored_obs(space, result.reached_obs),
        action=action.float() if action.is_floating_point() else action.long(),
        log_prob=sampled.log_prob.float(),
        action_mask=action_mask,
        reward=result.reward.float(),
        terminated=result.terminated,
        truncated=result.truncated,
        episode_return=result.episode_return.float(),
        episode_length=result.episode_length.long(),
    )
