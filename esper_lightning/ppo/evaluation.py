"""Deterministic evaluation: the most probable action, the first episode of every environment.

Axis: ``B`` environment.
"""

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

__all__ = ["Episodes", "evaluate_policy"]

_STEPS_BETWEEN_CHECKS = 32  # where to look is to wait for the device


class Episodes(NamedTuple):
    """One finished episode of each environment."""

    episode_return: Float[Tensor, " B"]
    episode_length: Int[Tensor, " B"]


@torch.no_grad()
def evaluate_policy(
    policy: Policy,
    normalize: Normalize,
    env: BatchedEnv,
    *,
    first_steps: FirstSteps | None = None,
    max_steps: int = 100_000,
) -> Episodes:
    """Play the first episode of every environment to its end.

    One episode of each environment, and not the first ``B`` to finish, which would be the short
    ones. Whether all have ended is looked at after each step on a CPU, else every 32 steps.

    Args:
        policy: Acts deterministically.
        normalize: The observation statistics that training used.
        env: ``B`` environments, which are reset.
        first_steps: The same environments, whose first steps are inspected; ``None`` for no
            inspection.
        max_steps: Bound on the length of an episode.

    Raises:
        ValueError: If an episode has not ended after ``max_steps`` steps.
    """
    played = first_steps or env
    obs, action_mask = played.reset()
    memory = policy.initial_memory(obs)

    def step(
        obs: Observation, action_mask: Tensor | None, memory: Tensor | None
    ) -> tuple[StepResult, Tensor | None]:
        seen, memory = policy.step_memory(normalize(obs), memory)
        action = policy.to_env(policy.act_deterministically(seen, action_mask))
        try:
            result = played.step(action)
        except Exception as error:
            if first_steps is not None:
                refuse_stuck_cause(error, action_mask, first_steps)
            raise
        return result, policy.reset_memory(memory, result.terminated | result.truncated)

    result, memory = step(obs, action_mask, memory)
    episode_return, episode_length = result.episode_return, result.episode_length
    between = 1 if episode_length.device.type == "cpu" else _STEPS_BETWEEN_CHECKS
    for number in range(1, max_steps):
        if number % between == 0 and bool((episode_length > 0).all()):
            break
        result, memory = step(result.obs, result.action_mask, memory)
        running = episode_length == 0
        episode_return = torch.where(running, result.episode_return, episode_return)
        episode_length = torch.where(running, result.episode_length, episode_length)
    name = type(env).__name__ if first_steps is None else first_steps.owner
    unfinished = int((episode_length == 0).sum())
    hint = "Give it a time limit, or switch evaluation off: Trainer(limit_val_batches=0)."
    rule = f"end every episode within {max_steps} steps to be evaluated"
    require(unfinished == 0, name, rule, f"{unfinished} running", hint)
    bad = cast(list[int], (~episode_return.isfinite()).nonzero()[:, 0].tolist())
    owner, got = f"{name}.step", f"non-finite returns of environments {bad[:8]}"
    require(not bad, owner, "return finite rewards in evaluation", got)
    return Episodes(episode_return, episode_length)
