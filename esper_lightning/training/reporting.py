"""What the host makes of a finished iteration: refuse it, or tell callbacks and progress bars."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer

from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.ranks import PeerFailedError
from esper_lightning.core.spaces import ActionSpace
from esper_lightning.core.types import Rollout, Samples, map_obs
from esper_lightning.envs.base import EnvSpec
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.collect import Fault, first_non_finite, refuse_stuck
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.metrics import shown_in_progress_bar
from esper_lightning.ppo.update import find_fault

__all__ = ["publish", "refuse_gradient", "refuse_rollout"]


def refuse_rollout(
    rollout: Rollout, env: EnvSpec, space: ActionSpace, *, iteration: int
) -> NoReturn:
    """Stop where a number of the rollout is not finite or a mask allows nothing, and say whose.

    Args:
        rollout: Rollout of the iteration.
        env: Environment, for the error.
        space: Actions of the environment.
        iteration: Number of the iteration.

    Raises:
        NonFiniteError: Naming the environment or the policy, with the step in which it appeared.
        ValueError: Naming the environment whose mask allows nothing.
        PeerFailedError: If it was not this rank's.
    """
    fault, name = first_non_finite(rollout), type(env).__name__
    kept = "The weights are those of the previous iteration."
    if fault is None:
        if rollout.action_mask is not None:
            where = f"{kept} (Iteration {iteration}.)"
            refuse_stuck(rollout.action_mask, space, env=name, where=where)
        raise PeerFailedError(f"A rollout of another rank was not sound in iteration {iteration}.")
    if fault.owner == "environment":
        message = f"{name}.step must return finite values, got {fault.text!r}. {kept}"
    else:
        hint = f"It has diverged. Lower PPOConfig.learning_rate. {kept}"
        message = f"PPO.policy must give finite probabilities, got {fault.text!r}. {hint}"
    raise NonFiniteError(
        f"{message} (Iteration {iteration}.)",
        phase="rollout",
        tensors=[fault.name],
        environments=fault.environments,
        minibatch=_step_of(rollout, fault),
    )


def refuse_gradient(
    agent: Agent,
    samples: Samples,
    config: PPOConfig,
    order: Sequence[torch.Tensor],
    *,
    env: str,
    largest_reward: float,
    iteration: int,
    ranks: int,
) -> NoReturn:
    """Stop where a loss or gradient was not finite, or too large, and find the minibatch.

    Args:
        agent: The actor and critic, after the update.
        samples: Samples of the update.
        config: PPO settings of the update.
        order: Samples of each gradient step.
        env: Name of the environment, for the error.
        largest_reward: Magnitude of the largest reward in the rollout.
        iteration: Number of the iteration.
        ranks: Number of ranks.

    Raises:
        NonFiniteError: Naming gradient step and tensors, with the minibatch.
        PeerFailedError: If loss and gradients are sound on this rank, and there are others.
    """
    fault = find_fault(agent, agent.weights, samples, config, order)
    names, size = fault.names, f"{fault.largest_name} of {fault.largest:.1e}"
    if not names:
        if ranks > 1 and fault.largest < _LARGE:
            raise PeerFailedError(
                f"A gradient of another rank was not finite in iteration {iteration}."
            )
        names = [fault.largest_name]
    found = ", ".join(fault.names[:4]) if fault.names else size
    what = "NaN or infinity" if fault.names else "numbers whose squares are infinite"
    got = f"{what} in iteration {iteration}, gradient step {fault.step}: {found}"
    hint = "Lower PPOConfig.learning_rate."
    if largest_reward > _LARGE and not config.normalize_reward:
        hint = f"Rewards of {env} reach {largest_reward:.1e}: set PPOConfig.normalize_reward."
    elif not fault.names and config.max_grad_norm is None:
        hint = "Set PPOConfig.max_grad_norm."
    raise NonFiniteError(
        f"PPO's gradient must be finite, got {got!r}. The weights are those of before it. {hint}",
        phase="update",
        tensors=names,
        minibatch={k: v for k, v in fault.minibatch._asdict().items() if v is not None},
    )


_LARGE = 1e12  # rewards and gradients that are nobody's intention


def _step_of(rollout: Rollout, fault: Fault) -> dict[str, Any]:
    """Everything of the step in which it appeared, of all environments."""

    def row(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[fault.step].clone()

    fields = rollout._asdict().items()
    return {name: map_obs(row, value) for name, value in fields if value is not None}


def publish(trainer: Trainer, row: Mapping[str, float | int | None]) -> None:
    """Show a history row to callbacks and progress bars; unknown figures are NaN there.

    Not by ``self.log``, which costs 0.3 ms for each metric.
    """
    numbers = {k: math.nan if value is None else float(value) for k, value in row.items()}
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in numbers.items()}
    trainer.callback_metrics.update(tensors)
    known = {name: value for name, value in numbers.items() if not math.isnan(value)}
    trainer.progress_bar_metrics.update(shown_in_progress_bar(known))
