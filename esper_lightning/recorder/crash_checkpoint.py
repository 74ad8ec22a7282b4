"""A checkpoint of the moment of death, to inspect, to evaluate, or to warm-start from."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from esper_lightning.callbacks.checkpoint_internals import dump_checkpoint
from esper_lightning.core.seeding import global_random_states
from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.forensics.files import replacing

__all__ = ["CRASH_KEY", "save_crash_checkpoint", "saves_by_own_code", "saving_alone"]

CRASH_KEY = "crash"


def save_crash_checkpoint(trainer: Trainer, path: Path, reason: str) -> str:
    """Write Lightning's checkpoint of this rank, with random states and names of non-finite values.

    No collective is called: the attribute ``saves_alone`` is set on a module that has it, so that
    its ``on_save_checkpoint`` calls none. Under ``"crash"`` the file holds ``reason``, the names of
    weights and optimizer states that are not finite, and the states of the global random
    generators.

    Args:
        trainer: Trainer of the run that dies.
        path: File of the crash checkpoint, which is replaced whole.
        reason: Reason of the death, in one line.

    Returns:
        A phrase for the report: whether all weights are finite.

    Raises:
        ValueError: If the strategy shards the weights: saving them would need the other ranks.
        OSError, RuntimeError: If the disk takes no more.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        name = type(strategy).__name__
        raise ValueError(f"{name} may shard the weights; collecting them would need every rank")
    with saving_alone(trainer.lightning_module):
        checkpoint = dump_checkpoint(trainer)
    state = {"weights": checkpoint["state_dict"], "optimizer": checkpoint["optimizer_states"]}
    bad = [name for name, value in named_tensors(state) if not _finite(value)]
    checkpoint[CRASH_KEY] = {
        "reason": reason,
        "finite": not bad,
        "non_finite": bad,
        "random": global_random_states(),
    }
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)
    return f"NOT FINITE: {', '.join(bad[:8])}" if bad else "all weights finite"


@contextlib.contextmanager
def saving_alone(module: LightningModule) -> Generator[None]:
    """A context in which a module that has ``saves_alone`` calls no collective when it is saved."""
    if not hasattr(module, "saves_alone"):
        yield
        return
    asked: Any = module
    asked.saves_alone = True
    try:
        yield
    finally:
        asked.saves_alone = False


def saves_by_own_code(owner: LightningModule | Callback) -> bool:
    """Whether ``on_save_checkpoint`` is neither Lightning's nor of this package.

    Such a hook may do anything when a checkpoint is collected, as count the checkpoints. It may be
    an attribute of the object alone.
    """
    source = str(owner.on_save_checkpoint.__module__).partition(".")[0]
    return source not in ("lightning", "esper_lightning")


def _finite(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())
