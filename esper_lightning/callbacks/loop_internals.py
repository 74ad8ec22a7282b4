"""Private attributes of Lightning's loops, of what they log and of their time limit.

Lightning may rename these attributes in any release. The file is beside
``lightning_internals.py``, for the same reason.
"""
# Lightning sets many attributes of its objects where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor

__all__ = [
    "accumulates_gradients",
    "batches_of_epoch",
    "finished_batches",
    "lift_time_limit",
    "metrics_of_step",
    "train_loaders",
]


def finished_batches(trainer: Trainer) -> int:
    """Number of training batches, over all epochs, whose steps have ended.

    ``trainer.global_step`` counts steps of optimizers: several batches may share one, and one batch
    may have several.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def batches_of_epoch(trainer: Trainer) -> int:
    """Number of training batches of the current epoch that have begun."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def accumulates_gradients(trainer: Trainer) -> bool:
    """Whether gradients of the latest training batch wait for a step of the optimizer.

    ``_should_accumulate``: no checkpoint holds such gradients. A module that optimizes by hand may
    do so without Lightning's knowledge.
    """
    by_lightning: bool = trainer.lightning_module.automatic_optimization
    return by_lightning and trainer.fit_loop._should_accumulate()


def metrics_of_step(trainer: Trainer) -> dict[str, Tensor]:
    """Values that the current training step has logged, by name.

    ``_logger_connector.metrics``: ``trainer.callback_metrics`` holds values of earlier epochs and
    of validations as well, which a run that is resumed does not have.
    """
    return dict(trainer._logger_connector.metrics["callback"]) if trainer._results else {}


def lift_time_limit(trainer: Trainer) -> bool:
    """Let a Trainer run without ``max_time``, which is ``_duration`` of its ``Timer``.

    Returns:
        Whether the Trainer had such a limit.
    """
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]
    was_limited = any(timer._duration is not None for timer in timers)
    for timer in timers:
        timer._duration = None
    return was_limited


def train_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of the training data (``_combined_loader``), once the data are there."""
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else list(loader.flattened)
