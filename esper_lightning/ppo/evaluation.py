"""Deterministic evaluation: the most probable action, the first episodes of every environment.

Axes: ``B`` environment, ``N = B * episodes_each`` episode.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.core.shapes import Float, Int
from esper_lightning.core.types import Observation, StepResult
from esper_lightning.envs.base import BatchedEnv
from esper_lightning.envs.inspector import FirstSteps
from esper_lightning.policies.base import Policy
from esper_lightning.ppo.collect import Normalize
from esper_lightning.ppo.non_finite import refuse_stuck_cause

__all__ = ["DeterministicPlay", "Episodes", "evaluate_policy"]

_STEPS_BETWEEN_CHECKS = 32  # on a GPU, where each check waits for the device


class Episodes(NamedTuple):
    """Finished episodes, sorted by environment and then by time."""

    episode_return: Float[Tensor, " N"]
    episode_length: Int[Tensor, " N"]


class DeterministicPlay:
    """A policy that acts deterministically in environments, step by step.

    Args:
        policy: Policy that acts.
        normalize: Function from the environment's observations to those that the policy sees.
        env: Batch of ``B`` environments, which are reset.

    Attributes:
        action_mask: Mask of the next action; ``None`` where there are no masks.
    """

    def __init__(self, policy: Policy, normalize: Normalize, env: BatchedEnv | FirstSteps) -> None:
        self._policy, self._normalize, self._env = policy, normalize, env
        obs, mask = env.reset()
        self._obs: Observation = obs
        self.action_mask: Tensor | None = mask
        self._memory = policy.initial_memory(obs)

    def step(self) -> StepResult:
        """Act once in every environment."""
        policy = self._policy
        seen, memory = policy.step_memory(self._normalize(self._obs), self._memory)
        action = policy.to_env(policy.act_deterministically(seen, self.action_mask))
        result = self._env.step(action)
        self._obs, self.action_mask = result.obs, result.action_mask
        self._memory = policy.reset_memory(memory, result.terminated | result.truncated)
        return result


@torch.no_grad()
def evaluate_policy(
    policy: Policy,
    normalize: Normalize,
    env: BatchedEnv,
    *,
    first_steps: FirstSteps | None = None,
    episodes_each: int = 1,
    max_steps: int = 100_000,
) -> Episodes:
    """Play the first episodes of every environment to their ends.

    Every environment plays the same number of episodes. (The first episodes to finish anywhere
    would be the short ones.) The end of all episodes is checked after each step on a CPU, and every
    32 steps on other devices.

    Args:
        policy: Policy to evaluate, which acts deterministically.
        normalize: Function from the environment's observations to those that the policy sees.
        env: Batch of ``B`` environments, which are reset first.
        first_steps: Inspector of the first steps of the same environments; ``None`` for no
            inspection.
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
    episode_return = result.episode_return.new_full(shape, math.nan)
    episode_length = result.episode_length.new_zeros(shape)
    finished = torch.zeros_like(result.episode_length)
    between = 1 if episode_length.device.type == "cpu" else _STEPS_BETWEEN_CHECKS
    for number in range(1, max_steps * episodes_each + 1):
        place = finished.clamp(max=episodes_each - 1)[:, None]
        counts = ((result.episode_length > 0) & (finished < episodes_each))[:, None]
        for table, new in (
            (episode_return, result.episode_return),
            (episode_length, result.episode_length),
        ):
            table.scatter_(1, place, torch.where(counts, new[:, None], table.gather(1, place)))
        finished = finished + counts[:, 0]
        is_last = number == max_steps * episodes_each
        if is_last or (number % between == 0 and bool((finished >= episodes_each).all())):
            break
        result = step()
    episode_return, episode_length = episode_return.flatten(), episode_length.flatten()
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
