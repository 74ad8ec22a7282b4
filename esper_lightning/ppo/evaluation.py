"""Deterministic evaluation: the most probable action, the first episodes of every environment.

Axes: ``B`` environment, ``N = B * episodes_each`` episode.
"""

import math
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.compiling.loops import CompileMode, compile_loop
from esper_lightning.core.errors import require
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.shapes import Bool, Float, Int, Shaped
from esper_lightning.core.types import Observation, StepResult
from esper_lightning.envs.base import BatchedEnv, FunctionalEnv
from esper_lightning.envs.inspector import FirstSteps
from esper_lightning.policies.base import Policy
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.ppo.collect import Normalize
from esper_lightning.ppo.non_finite import refuse_stuck_cause

__all__ = ["DeterministicPlay", "Episodes", "Stride", "evaluate_policy"]

_STEPS_BETWEEN_CHECKS = 32  # in one stride, and on a GPU, where each check waits for the device


class Episodes(NamedTuple):
    """Finished episodes, sorted by environment and then by time."""

    episode_return: Float[Tensor, " N"]
    episode_length: Int[Tensor, " N"]


class _Played(NamedTuple):
    """What is known of the first ``E`` episodes of each environment."""

    episode_return: Float[Tensor, "B E"]
    episode_length: Int[Tensor, "B E"]  # 0 while the episode has not ended
    number: Int[Tensor, " B"]  # number of the episodes that have ended

    def add(self, result: StepResult) -> "_Played":
        """This and the episodes that a step has ended."""
        each = self.episode_return.shape[1]
        ended = result.episode_length > 0
        place = torch.arange(each, device=ended.device) == self.number[:, None]
        here = place & ended[:, None]
        return _Played(
            torch.where(here, result.episode_return[:, None], self.episode_return),
            torch.where(here, result.episode_length[:, None], self.episode_length),
            self.number + ended,
        )


class _Running(NamedTuple):
    """State that one step passes to the next one."""

    episodes: Any
    obs: Observation
    action_mask: Bool[Tensor, "B K"] | None
    memory: Float[Tensor, "B S"] | None
    played: _Played


class DeterministicPlay:
    """A policy that acts deterministically in environments, step by step.

    Args:
        policy: Policy that acts.
        normalize: Function from the environment's observations to those that the policy sees.
        env: Batch of ``B`` environments, which are reset.

    Attributes:
        obs: Observations on which the policy acts next.
        action_mask: Mask of the next action; ``None`` where there are no masks.
        memory: Memory of the policy before ``obs``.
    """

    def __init__(self, policy: Policy, normalize: Normalize, env: BatchedEnv | FirstSteps) -> None:
        self._policy, self._normalize, self._env = policy, normalize, env
        self.obs, self.action_mask = env.reset()
        self.memory = policy.initial_memory(self.obs)

    def step(self) -> StepResult:
        """Act once in every environment."""
        policy = self._policy
        action, memory = _act(policy, self._normalize(self.obs), self.action_mask, self.memory)
        result = self._env.step(action)
        self.obs, self.action_mask = result.obs, result.action_mask
        self.memory = policy.reset_memory(memory, result.terminated | result.truncated)
        return result


def _act(
    policy: Policy,
    obs: Observation,
    mask: Bool[Tensor, "B K"] | None,
    memory: Float[Tensor, "B S"] | None,
) -> tuple[Shaped[Tensor, "B ..."], Float[Tensor, "B S"] | None]:
    """The most probable actions in the environment's form, and the memory after ``obs``."""
    seen, memory = policy.step_memory(obs, memory)
    return policy.to_env(policy.act_deterministically(seen, mask)), memory


class Stride:
    """Many steps of an evaluation at once, in environments whose step is a pure function.

    On a CPU they are native code, as rollouts are.

    Args:
        policy: Policy that acts.
        normalizer: Statistics of observations; ``None`` for no normalisation.
        env: Batch of ``B`` environments.
        mode: Compile mode of the run; what a GPU would compile runs eagerly.
        device: Device of environments and policy.
    """

    def __init__(
        self,
        policy: Policy,
        normalizer: ObsNormalizer | None,
        env: FunctionalEnv,
        *,
        mode: CompileMode,
        device: torch.device,
    ) -> None:
        self._policy, self._normalizer, self._env = policy, normalizer, env
        mode = "off" if mode == "off" else "auto"
        self._loop = compile_loop("evaluation", self._step, mode=mode, device=device)

    def is_of(self, policy: Policy, normalizer: ObsNormalizer | None, env: FunctionalEnv) -> bool:
        """Whether the stride is of these."""
        own = (self._policy, self._normalizer, self._env)
        return all(map(is_, own, (policy, normalizer, env)))

    def take(self, play: DeterministicPlay, played: _Played, steps: int) -> _Played:
        """Let a play continue.

        Args:
            play: Play of the same policy in the same environments.
            played: Episodes that have ended so far.
            steps: Number of steps.

        Returns:
            Episodes that have ended by now. Their memory is used again by the next call but one.
        """
        env = self._env
        running = _Running(env.episodes(), play.obs, play.action_mask, play.memory, played)
        xs = (torch.zeros(steps, device=played.number.device), env.draw(steps))
        running, _ = self._loop(running, xs, None, None, None)
        env.keep(running.episodes)
        play.obs, play.action_mask, play.memory = running[1:4]
        return running.played

    def _step(
        self, running: _Running, x: tuple[Tensor, Any], constants: None
    ) -> tuple[_Running, Float[Tensor, " B"]]:
        del constants  # native code reads the weights in place, wherever they lie by then
        _, drawn = x  # the first is there for environments that draw nothing
        obs = prepare_obs(running.obs, self._normalizer)
        action, memory = _act(self._policy, obs, running.action_mask, running.memory)
        episodes, result = self._env.transition(running.episodes, action, drawn)
        memory = self._policy.reset_memory(memory, result.terminated | result.truncated)
        played = running.played.add(result)
        return _Running(episodes, result.obs, result.action_mask, memory, played), result.reward


@torch.no_grad()
def evaluate_policy(
    policy: Policy,
    normalize: Normalize,
    env: BatchedEnv,
    *,
    first_steps: FirstSteps | None = None,
    stride: Stride | None = None,
    episodes_each: int = 1,
    max_steps: int = 100_000,
) -> Episodes:
    """Play the first episodes of every environment to their ends.

    Every environment plays the same number of episodes. (The first episodes to finish anywhere
    would be the short ones.) The end of all episodes is checked after each step on a CPU, and every
    32 steps on other devices and with a stride.

    Args:
        policy: Policy to evaluate, which acts deterministically.
        normalize: Function from the environment's observations to those that the policy sees.
        env: Batch of ``B`` environments, which are reset first.
        first_steps: Inspector of the first steps of the same environments; ``None`` for no
            inspection.
        stride: Many steps at once, of the same policy in the same environments; ``None`` to take
            every step by itself.
        episodes_each: Number of episodes of each environment.
        max_steps: Greatest mean length of the episodes of an environment.

    Raises:
        ValueError: If an environment needs more steps than that, or a return is not finite.
    """
    play = DeterministicPlay(policy, normalize, first_steps or env)

    def step() -> StepResult:
        try:
            return play.step()
        except Exception as error:
            if first_steps is not None:
                refuse_stuck_cause(error, play.action_mask, first_steps)
            raise

    result = step()
    shape = (len(result.reward), episodes_each)
    played = _Played(
        result.episode_return.new_full(shape, math.nan),
        result.episode_length.new_zeros(shape),
        torch.zeros_like(result.episode_length),
    ).add(result)
    number, taken, limit = 1, 1, max_steps * episodes_each
    waits = played.number.device.type != "cpu"
    while number < limit:
        is_due = not waits or taken > 1 or number % _STEPS_BETWEEN_CHECKS == 0
        if is_due and bool((played.number >= episodes_each).all()):
            break
        if stride is None or (first_steps is not None and first_steps.left > 0):
            played, taken = played.add(step()), 1
        else:
            taken = min(_STEPS_BETWEEN_CHECKS, limit - number)
            played = stride.take(play, played, taken)
        number += taken
    episode_return = played.episode_return.flatten().clone()
    episode_length = played.episode_length.flatten().clone()
    name = type(env).__name__ if first_steps is None else first_steps.owner
    unfinished = int((episode_length == 0).sum())
    hint = "Give the environment a time limit, or set Trainer(limit_val_batches=0)."
    rule = f"end every episode within {max_steps} steps to be evaluated"
    require(unfinished == 0, name, rule, f"{unfinished} running", hint)
    bad_rows = (~episode_return.isfinite()).nonzero()[:, 0] // episodes_each
    bad = cast(list[int], bad_rows.unique().tolist())
    owner, got = f"{name}.step", f"non-finite returns of environments {bad[:8]}"
    require(not bad, owner, "return finite rewards in evaluation", got)
    return Episodes(episode_return, episode_length)
