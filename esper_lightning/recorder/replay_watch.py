"""The callback of a replay: it compares rows, stores the state before the fault, and ends it."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from esper_lightning.callbacks.directory_choice import WritesRun
from esper_lightning.callbacks.history import finished_iterations
from esper_lightning.callbacks.lightning_internals import TunerExit
from esper_lightning.callbacks.run_directory import close_run_directory, open_run_directory
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import RowReader, open_file, parse_json
from esper_lightning.forensics.replay import ReplayRecord, row_differences

__all__ = ["ReplayWatch"]

_log = logging.getLogger(__name__)
_MOST_COLUMNS = 4


class ReplayWatch(WritesRun):
    """Compares the rows of a replay as they come, stores ``before.ckpt``, and ends the replay.

    The replay ends before the iteration that follows the failing one begins: evaluations and
    callbacks after the failing iteration are part of the replay. Every ``ModelCheckpoint`` writes
    into the run directory of the replay, wherever it was told to. A progress bar shows nothing: the
    limits of the run that died are not those of the replay.

    Args:
        run_dir: Run directory of the run that died, in which nothing is written.
        more_dirs: Copies of that directory on other hosts, where they share no disk.
        started_s: Begin of that run's recording on the rank that failed first.
        rank: Rank that failed first.
        iteration: Number of the iteration that failed; 0 for a death before the first.
        begins: Number of finished iterations at the start of the replay.
        start: Checkpoint that the replay starts from; ``None`` for the beginning.
        deep: Whether the replay runs eagerly.
        finds_anomalies: Whether autograd looks for the operation that made the first NaN, in the
            failing iteration.
    """

    def __init__(
        self,
        run_dir: str,
        iteration: int,
        *,
        more_dirs: Sequence[str] = (),
        started_s: float | None = None,
        rank: int = 0,
        begins: int = 0,
        start: str | None = None,
        deep: bool = False,
        finds_anomalies: bool = False,
    ) -> None:
        super().__init__()
        self.record = ReplayRecord(
            run_dir=run_dir,
            more_dirs=tuple(more_dirs),
            started_s=started_s,
            rank=rank,
            iteration=iteration,
            begins=begins,
            start=start,
            deep=deep,
        )
        self.iteration, self.finds_anomalies = iteration, finds_anomalies
        self.directory: Path | None = None
        self._recorded: dict[int, dict[str, Any]] = {}
        self._new: Path | None = None
        self._offset, self._differs, self._restores = 0, False, False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say in the run directory what is replayed, and have checkpoints written there."""
        bar = trainer.progress_bar_callback
        with contextlib.suppress(NotImplementedError):  # a bar of the user's may lack the method
            if bar is not None:
                bar.disable()
        self.directory = open_run_directory(trainer, self)
        if self.directory is None or stage != "fit":
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):  # newer files of the user's may be elsewhere
                callback.dirpath = str(RunLayout(self.directory).checkpoints)
        own, rank = self.record, trainer.global_rank
        self._new = RunLayout(self.directory).rank(rank).history
        if trainer.is_global_zero:
            own.write(self.directory)
            if own.start is not None and own.begins == self.iteration - 1:
                before = RunLayout(self.directory).before_fault
                before.parent.mkdir(exist_ok=True)
                shutil.copyfile(own.start, before)
        histories = (RunLayout(place).rank(rank).history for place in own.directories)
        history = next((path for path in histories if path.exists()), None)
        begins, last = own.begins or 0, self.iteration - int(own.deep)
        if history is not None:
            rows = {row.get("iteration", 0): row for row in RowReader(history)}
            self._recorded = {k: row for k, row in rows.items() if begins < k <= last}

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the replay after the failing iteration, and look for anomalies within it."""
        following = finished_iterations(trainer, pl_module) + 1
        if following > self.iteration:
            raise TunerExit  # which Lightning takes for the end of a run
        if following == self.iteration and self.finds_anomalies:
            self._restores = not torch.is_anomaly_enabled()
            torch.autograd.set_detect_anomaly(True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the row of the iteration, and store the state before the failing iteration."""
        self._keep(trainer, pl_module)
        self._look()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the state before the failing iteration anew: an evaluation may change it."""
        if not trainer.sanity_checking:
            self._keep(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the state before the failing iteration anew: the end of an epoch may change it."""
        self._keep(trainer, pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave autograd as it was."""
        self._leave_autograd()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave autograd as it was, and release the run directory."""
        self._leave_autograd()
        close_run_directory(trainer, self)

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        finished = finished_iterations(trainer, module)
        if self.directory is not None and finished == self.iteration - 1 > 0:
            trainer.save_checkpoint(RunLayout(self.directory).before_fault)

    def _look(self) -> None:
        """Compare the rows since the last look, and warn of the first one that differs."""
        if self._new is None or self._differs or not self._new.exists():
            return
        with open_file(self._new) as file:
            file.seek(self._offset)
            for line in file:
                self._offset += len(line)
                row: dict[str, Any] = parse_json(line)
                number = row["iteration"]
                what = row_differences(self._recorded.get(number, row), row)
                if what:
                    self._differs = True
                    text = "Different from iteration %d on: %s"
                    _log.warning(text, number, ", ".join(what[:_MOST_COLUMNS]))
                    return

    def _leave_autograd(self) -> None:
        if self._restores:
            self._restores = False
            torch.autograd.set_detect_anomaly(False)
