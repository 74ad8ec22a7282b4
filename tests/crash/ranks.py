"""Two gloo ranks, one of which dies: ``python ranks.py FAULT STRATEGY DIRECTORY RANK``."""

import os
import signal
import sys
import time

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PyTorchProfiler
from torch.utils.data import DataLoader

from esper_lightning import FlightRecorder

HANGS = {"hang_timeout_s": 2.0, "hang_ends": True}
FAULT, STRATEGY, DIRECTORY, RANK = sys.argv[1:5]


def raises():
    raise RuntimeError("injected")


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(50)


def hangs():
    """Let this rank die while its peer waits in a collective."""
    time.sleep(3)
    raises()


FAULTS = {
    "raises": raises,
    "hangs": hangs,
    "stuck": lambda: time.sleep(600),
    "terminated": terminated,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        if batch_idx == 6 and self.global_rank == int(RANK):
            torch.special.erfcx(torch.ones(3))
            FAULTS[FAULT]()
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


if __name__ == "__main__":
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGY,
        max_epochs=1,
        profiler=PyTorchProfiler(schedule=None),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=DIRECTORY,
        callbacks=[FlightRecorder(**(HANGS if FAULT == "stuck" else {}))],
    )
    trainer.fit(Plain(), DataLoader(torch.randn(60, 4)))
