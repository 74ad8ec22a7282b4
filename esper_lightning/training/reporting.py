"""What the host makes of a finished iteration: refuse it, or tell callbacks and progress bars."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

from esper_lightning.core.types import Rollout
from esper_lightning.core.validate import require
from esper_lightning.training.collect import first_non_finite
from esper_lightning.training.metrics import shown_in_progress_bar

__all__ = ["publish", "refuse_non_finite"]


def refuse_non_finite(
    host: Mapping[str, float], rollout: Rollout, *, env: str, iteration: int
) -> None:
    """Stop where a number is not finite, and say whose it is.

    Args:
        host: From ``to_host``.
        rollout: Of the iteration.
        env: Name of the environment, for the error.
        iteration: Number of the iteration, likewise.

    Raises:
        ValueError: Naming the environment, the policy, or the gradient.
    """
    kept = "The weights are those of the previous iteration."
    slower = "Lower PPOConfig.learning_rate."
    if not host["healthy"]:
        whose, found = first_non_finite(rollout)
        if whose == "environment":
            require(False, f"{env}.step", "return finite values", found, kept)
        hint = f"It has diverged. {slower} {kept}"
        require(False, "PPO.policy", "give finite probabilities", found, hint)
    found = f"NaN or infinity in iteration {iteration}"
    hint = f"The weights are those of before it. {slower}"
    require(host["learner_finite"] == 1.0, "PPO's gradient", "be finite", found, hint)


def publish(trainer: Trainer, row: Mapping[str, float | int | None]) -> None:
    """Show a history row to callbacks and progress bars; unknown figures are NaN there.

    Not by ``self.log``, which costs 0.3 ms for each metric.
    """
    numbers = {k: math.nan if value is None else float(value) for k, value in row.items()}
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in numbers.items()}
    trainer.callback_metrics.update(tensors)
    known = {name: value for name, value in numbers.items() if not math.isnan(value)}
    trainer.progress_bar_metrics.update(shown_in_progress_bar(known))
