"""A callback for configs that ends a run in one iteration, in each attempt or in the first."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Dies(Callback):
    """Ends the run as an iteration begins.

    Args:
        at: Number of the iteration, from 1.
        how: ``raise``, ``kill`` (SIGKILL), ``container`` (SIGKILL of all processes that this one
            has started, too), ``nan`` (in the weights, on every rank), or ``hang``.
        rank: Global rank that dies.
        once: File that is made at the first death, and prevents further ones.
    """

    def __init__(self, at: int, how: str, rank: int = 0, once: str | None = None) -> None:
        self.at, self.how, self.rank = at, how, rank
        self.once = None if once is None else Path(once)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.iteration + 1 != self.at or (self.once is not None and self.once.exists()):
            return
        if self.how == "nan":
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))
        elif trainer.global_rank == self.rank:
            if self.once is not None:
                self.once.touch()
            if self.how == "container":
                for child in _children():
                    os.kill(child, signal.SIGKILL)
            if self.how in ("kill", "container"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "hang":
                time.sleep(600)
            raise RuntimeError("injected")


def _children() -> list[int]:
    """Processes that this process has started."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found += [int(entry.name)] if int(fields[1]) == os.getpid() else []
    return found
