"""The two checkpoints of a run: ``last.ckpt`` to resume from, and ``best.ckpt`` to use.

Neither checkpoint replaces the other.
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

from esper_lightning.callbacks.directory_choice import known_directory
from esper_lightning.callbacks.mirror import place_of
from esper_lightning.callbacks.run_directory import open_run_directory
from esper_lightning.core.errors import check_arguments, require_name
from esper_lightning.forensics.asides import rename_aside, replace_keeping
from esper_lightning.forensics.layout import RunLayout

__all__ = ["BestCheckpoint", "LastCheckpoint"]

_log = logging.getLogger(__name__)


class _OneFile(ModelCheckpoint):
    """A checkpoint that always has the same file; an earlier run may have written that file."""

    _begins = False

    @property
    def path(self) -> Path:
        """Path of the checkpoint, known from ``setup`` on."""
        assert self.dirpath is not None
        return Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write into the run directory, without Lightning's warning that it is not empty."""
        directory = open_run_directory(trainer)
        if self.dirpath is None and directory is not None:
            self.dirpath = str(RunLayout(directory).checkpoints)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
            super().setup(trainer, pl_module, stage)

    @override
    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Checkpoints of the run; empty if its directory is new.

        Lightning would ask the logger for a folder: that would fix the number of the directory, or
        begin a run of a service.
        """
        if self.dirpath is not None:
            return super()._find_last_checkpoints(trainer)
        known = known_directory(trainer)
        last = None if known is None else RunLayout(place_of(known)[0]).last_checkpoint
        return set() if last is None or not last.exists() else {str(last)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a run begins."""
        super().on_train_start(trainer, pl_module)
        self._begins = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Rename the checkpoint of an earlier run, so that it does not pass for one of this run.

        A run whose start is refused, the last thing in ``on_train_start``, has renamed nothing.
        """
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._begins and trainer.is_global_zero and not self._is_own(trainer.ckpt_path):
            rename_aside(self.path)
        self._begins = False

    def _is_own(self, resumed: str | Path | None) -> bool:
        """Whether an existing checkpoint file belongs to the run that begins or is resumed."""
        del resumed
        return bool(self.best_model_path)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the stored state: checkpoints of another run are in a directory of their own."""


class LastCheckpoint(_OneFile):
    """``last.ckpt``: the state of training at the end of every epoch, to resume from.

    ``ModelCheckpoint(monitor=..., save_last=True)`` would write the file only where the monitored
    metric improves.
    """

    def __init__(self) -> None:
        super().__init__(
            filename="last", enable_version_counter=False, save_on_train_epoch_end=True
        )

    @override
    def _is_own(self, resumed: str | Path | None) -> bool:
        """Whether the file belongs to this run, or the run resumes from its own directory.

        Until the next checkpoint is written, the file is all there is to resume from.
        """
        directory = self.path.parents[1].resolve()
        resumes = resumed is not None and directory in Path(resumed).resolve().parents
        return resumes or super()._is_own(resumed)


class BestCheckpoint(_OneFile):
    """``best.ckpt``: the policy with the greatest ``monitor``, written as soon as that is known.

    Of equal values the later one counts, and a value that is not finite never does. A run that is
    resumed in another directory copies the best checkpoint so far into it.

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
        """Whether ``current`` is the best value so far, decided alike on every rank."""
        best = self.best_model_score
        better = (
            current is not None
            and bool(current.isfinite())
            and (best is None or bool(current >= best))
        )
        return trainer.strategy.reduce_boolean_decision(better)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until the first rank has copied the file; not every rank may load a checkpoint."""
        super().on_fit_start(trainer, pl_module)
        trainer.strategy.barrier("best checkpoint")

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Copy the best checkpoint so far. Without its file, its score would be meaningless."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        score = state.get("best_model_score")
        if score is None or trainer.state.fn != TrainerFn.FITTING:
            return
        loaded = Path(trainer.ckpt_path or "").resolve()  # crash.ckpt is in a rank's folder
        folders = (loaded.parent, loaded.parent.parent / "checkpoints")
        found = next((f / self.path.name for f in folders if (f / self.path.name).is_file()), None)
        # The score in the file counts: it may be newer than the checkpoint that was loaded.
        score = None if found is None else _score_of(found, self.state_key)
        if found is None or score is None:
            if not trainer.is_global_zero:  # which alone decides, and may have the file
                return
            lost = "No %s beside %s: the search for the best checkpoint begins anew."
            _log.warning(lost, self.path.name, loaded)
            return
        if trainer.is_global_zero and found.resolve() != self.path.resolve():
            replace_keeping(self.path, found.read_bytes())
        self.best_model_path = self.kth_best_model_path = str(self.path)
        self.best_model_score = self.kth_value = score
        self.best_k_models = {str(self.path): score}


def _score_of(path: Path, state_key: str) -> Tensor | None:
    """The score that a best checkpoint stores; ``None`` if the file cannot be read."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint["callbacks"][state_key]["best_model_score"]
    except Exception as error:  # a file may be damaged in any way
        _log.warning("%s cannot be read: %s", path, error)
        return None
