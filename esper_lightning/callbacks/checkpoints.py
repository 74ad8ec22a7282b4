"""The two checkpoints of a run, ``last.ckpt`` to go on from and ``best.ckpt`` to use.

Neither replaces the other.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.report import set_aside

__all__ = ["BestCheckpoint", "LastCheckpoint"]

_log = logging.getLogger(__name__)


class _OneFile(ModelCheckpoint):
    """A checkpoint that is always in the same file, which an earlier run may have written, too."""

    @property
    def path(self) -> Path:
        """Of the file; known from ``setup`` on."""
        assert self.dirpath is not None
        return Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the directory. That it is not empty is no surprise."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
            super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is found here is not to pass for a checkpoint of this run."""
        super().on_train_start(trainer, pl_module)
        resumed = Path(trainer.ckpt_path or "").absolute()
        if trainer.is_global_zero and not self.best_model_path and self.path.absolute() != resumed:
            set_aside(self.path)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing: what another run wrote is in its own directory."""


class LastCheckpoint(_OneFile):
    """``last.ckpt``: the state of training at the end of every epoch, to go on from.

    ``ModelCheckpoint(monitor=..., save_last=True)`` would write it only where the monitored figure
    improves.
    """

    def __init__(self) -> None:
        super().__init__(
            filename="last", enable_version_counter=False, save_on_train_epoch_end=True
        )


class BestCheckpoint(_OneFile):
    """``best.ckpt``: the policy with the greatest ``monitor``, written as soon as that is known.

    Of equals the later; what is not finite never counts. A run that goes on in another directory
    takes the best checkpoint so far along.

    Args:
        monitor: Name of the figure, logged by an evaluation.
    """

    def __init__(self, monitor: str) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    @override
    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether it is the best so far, decided alike on every rank."""
        best = self.best_model_score
        better = (
            current is not None
            and bool(current.isfinite())
            and (best is None or bool(current >= best))
        )
        return trainer.strategy.reduce_boolean_decision(better)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the best so far along. Without its file, its score would stand for nothing."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        score = state.get("best_model_score")
        if score is None or trainer.state.fn != TrainerFn.FITTING:
            return
        saved = Path(state["best_model_path"])
        beside = Path(trainer.ckpt_path or "").parent / saved.name  # all of it may have been moved
        found = next((path for path in (saved, beside) if self.file_exists(path, trainer)), None)
        if found is None:
            lost = "%s is not there any more: which checkpoint is the best is found out anew."
            _log.warning(lost, saved)
            return
        if trainer.is_global_zero and found.resolve() != self.path.resolve():
            set_aside(self.path)
            write_atomically(self.path, found.read_bytes())
        trainer.strategy.barrier("best checkpoint")
        self.best_model_path = self.kth_best_model_path = str(self.path)
        self.best_model_score = self.kth_value = score
        self.best_k_models = {str(self.path): score}
