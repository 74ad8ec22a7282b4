"""What callbacks and progress bars are shown of a finished iteration."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

from esper_lightning.ppo.metrics import shown_in_progress_bar

__all__ = ["publish"]


def publish(trainer: Trainer, row: Mapping[str, float | int | None]) -> None:
    """Show a history row to callbacks and progress bars; unknown figures are NaN there.

    Not by ``self.log``, which costs 0.3 ms for each metric.
    """
    numbers = {k: math.nan if value is None else float(value) for k, value in row.items()}
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in numbers.items()}
    trainer.callback_metrics.update(tensors)
    known = {name: value for name, value in numbers.items() if not math.isnan(value)}
    trainer.progress_bar_metrics.update(shown_in_progress_bar(known))
