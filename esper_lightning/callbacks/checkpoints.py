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

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from esper_lightning.callbacks.lightning_internals import version_of
from esper_lightning.callbacks.run_directory import open_run_directory
from esper_lightning.core.errors import check_arguments, require_name
from esper_lightning.forensics.asides import replace_keeping, set_aside
from esper_lightning.forensics.layout import RunLayout

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
        """Write into the run directory. That it is not empty is no surprise."""
        directory = open_run_directory(trainer)
        if self.dirpath is None and directory is not None:
            self.dirpath = str(RunLayout(directory).checkpoints)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
            super().setup(trainer, pl_module, stage)

    @override
    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """None where the run will have a new directory: to look for it would choose its number."""
        logger = trainer.loggers[0] if trainer.loggers else None
        is_new = self.dirpath is None and version_of(logger) is None
        return set() if is_new else super()._find_last_checkpoints(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is found here is not to pass for a checkpoint of this run."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero and not self._is_own(trainer.ckpt_path):
            set_aside(self.path)

    def _is_own(self, resumed: str | Path | None) -> bool:
        """Whether the file that is there, if any, belongs to the run that begins or goes on."""
        del resumed
        return bool(self.best_model_path)

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

    @override
    def _is_own(self, resumed: str | Path | None) -> bool:
        """Also where the run goes on from a checkpoint in its own directory.

        Until the next one is written, that is all there is to go on from.
        """
        directory = self.path.parents[1].resolve()
        goes_on = resumed is not None and directory in Path(resumed).resolve().parents
        return goes_on or super()._is_own(resumed)


class BestCheckpoint(_OneFile):
    """``best.ckpt``: the policy with the greatest ``monitor``, written as soon as that is known.

    Of equals the later; what is not finite never counts. A run that goes on in another directory
    takes the best checkpoint so far along.

    Args:
        monitor: Name of the metric, logged by an evaluation.

    Raises:
        ValueError: If ``monitor`` is empty, or holds a NUL byte.
    """

    @check_arguments
    def __init__(self, monitor: str) -> None:
        require_name("BestCheckpoint.monitor", monitor, "a metric")
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
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first rank's copy. Not while loading, which not every rank may do."""
        super().on_fit_start(trainer, pl_module)
        trainer.strategy.barrier("best checkpoint")

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the best so far along. Without its file, its score would stand for nothing."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        score = state.get("best_model_score")
        if score is None or trainer.state.fn != TrainerFn.FITTING:
            return
        loaded = Path(trainer.ckpt_path or "").resolve()  # of a rank's folder, if it is crash.ckpt
        folders = (loaded.parent, loaded.parent.parent / "checkpoints")
        found = next((f / self.path.name for f in folders if (f / self.path.name).is_file()), None)
        # Its own word counts: it may have been written after the checkpoint that was loaded.
        score = None if found is None else _score_of(found, self.state_key)
        if found is None or score is None:
            lost = "No %s beside %s: which checkpoint is the best is found out anew."
            _log.warning(lost, self.path.name, loaded)
            return
        if trainer.is_global_zero and found.resolve() != self.path.resolve():
            replace_keeping(self.path, found.read_bytes())
        self.best_model_path = self.kth_best_model_path = str(self.path)
        self.best_model_score = self.kth_value = score
        self.best_k_models = {str(self.path): score}


def _score_of(path: Path, state_key: str) -> Tensor | None:
    """What a best checkpoint says that it scored; ``None`` if it cannot be read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint["callbacks"][state_key]["best_model_score"]
    except Exception as error:  # a file may be damaged in every way there is
        _log.warning("%s cannot be read: %s", path, error)
        return None
