"""What the host makes of a finished iteration: refuse it, or tell callbacks and progress bars."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer

from esper_lightning.core.ranks import PeerFailedError
from esper_lightning.core.types import Rollout, Samples, map_obs
from esper_lightning.core.validate import NonFiniteError
from esper_lightning.training.agent import Agent
from esper_lightning.training.collect import Fault, first_non_finite
from esper_lightning.training.config import PPOConfig
from esper_lightning.training.metrics import shown_in_progress_bar
from esper_lightning.training.update import find_non_finite

__all__ = ["publish", "refuse_gradient", "refuse_rollout"]


def refuse_rollout(rollout: Rollout, *, env: str, iteration: int) -> NoReturn:
    """Stop where a number of the rollout is not finite, and say whose it is.

    Args:
        rollout: Of the iteration.
        env: Name of the environment, for the error.
        iteration: Number of the iteration.

    Raises:
        NonFiniteError: Naming the environment or the policy, with the step in which it appeared.
        PeerFailedError: If it was not this rank's.
    """
    fault = first_non_finite(rollout)
    if fault is None:
        raise PeerFailedError(f"A rollout of another rank was not finite in iteration {iteration}.")
    kept = "The weights are those of the previous iteration."
    if fault.owner == "environment":
        message = f"{env}.step must return finite values, got {fault.text!r}. {kept}"
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
    iteration: int,
    ranks: int,
) -> NoReturn:
    """Stop where a loss or gradient was not finite, and find the minibatch.

    Args:
        agent: After the update.
        samples: Of the update.
        config: Likewise.
        order: Likewise.
        iteration: Number of the iteration.
        ranks: Number of ranks.

    Raises:
        NonFiniteError: Naming gradient step and tensors, with the minibatch.
        PeerFailedError: If they are finite on this rank, and there are others.
    """
    found = find_non_finite(agent, agent.weights, samples, config, order)
    if found is None and ranks > 1:
        raise PeerFailedError(
            f"A gradient of another rank was not finite in iteration {iteration}."
        )
    where, names, minibatch = "", list[str](), None
    if found is not None:
        step, names, batch = found
        where = f", gradient step {step}: {', '.join(names[:4])}"
        minibatch = {k: v for k, v in batch._asdict().items() if v is not None}
    got = f"NaN or infinity in iteration {iteration}{where}"
    hint = "The weights are those of before it. Lower PPOConfig.learning_rate."
    raise NonFiniteError(
        f"PPO's gradient must be finite, got {got!r}. {hint}",
        phase="update",
        tensors=names,
        minibatch=minibatch,
    )


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
