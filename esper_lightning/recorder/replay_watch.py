"""The callback of a replay: it compares rows, stores the state before the fault, and ends it."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from esper_lightning.callbacks.checkpoint_internals import dump_checkpoint
from esper_lightning.callbacks.directory_choice import WritesRun
from esper_lightning.callbacks.history import History, counts_iterations, finished_iterations
from esper_lightning.callbacks.lightning_internals import TunerExit, evaluates_next
from esper_lightning.callbacks.loop_internals import (
    accumulates_gradients,
    batches_of_epoch,
    lift_time_limit,
    train_loaders,
)
from esper_lightning.callbacks.run_directory import close_run_directory, open_run_directory
from esper_lightning.core.seeding import global_random_states
from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import numbered_rows, open_file, parse_json
from esper_lightning.forensics.remains import examine, first_failure
from esper_lightning.forensics.replay import ReplayRecord, row_differences
from esper_lightning.recorder.crash_checkpoint import saves_by_own_code, saving_alone
from esper_lightning.recorder.death import in_words

__all__ = ["ReplayWatch", "is_seeded", "record_left", "shuffles"]

_log = logging.getLogger(__name__)
_MOST_COLUMNS = 4


class ReplayWatch(WritesRun):
    """Compares the rows of a replay as they come, stores ``before.ckpt``, and ends the replay.

    The replay ends before the iteration that follows the failing one begins: evaluations and
    callbacks after the failing iteration are part of the replay. Every ``ModelCheckpoint`` writes
    into the run directory of the replay, wherever it was told to. A progress bar shows nothing: the
    limits of the run that died are not those of the replay. No hook of the run is called for
    ``before.ckpt``, which is not written where ``on_save_checkpoint`` is a user's own. A limit of
    time (``max_time``) is lifted, because a replay may be slower than the run was; where the run
    died of what followed its end by that limit, the replay ends training at the same iteration.

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
        died_after: Where the run died once the failing iteration was over: after ``training``, or
            ``iteration`` for an evaluation or the end of an epoch. ``None`` for anywhere else.
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
        died_after: Literal["training", "iteration"] | None = None,
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
        self.died_after, self._had_time_limit = died_after, False
        self.directory: Path | None = None
        self._recorded: dict[int, dict[str, Any]] = {}
        self._new: Path | None = None
        self._offset, self._differs, self._restores, self._begun = 0, False, False, False
        self._has_failed = False  # whether ``before.ckpt`` could not be written
        self._random: list[Any] | None = None  # of the first batch, until that has ended

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
        self._had_time_limit = lift_time_limit(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):  # newer files of the user's may be elsewhere
                callback.dirpath = str(RunLayout(self.directory).checkpoints)
        self.record = dataclasses.replace(self.record, whole_rows=counts_iterations(pl_module))
        own, rank = self.record, trainer.global_rank
        self._new = RunLayout(self.directory).rank(rank).history
        if trainer.is_global_zero:
            own.write(self.directory)
            if own.start is not None and self._is_before_fault(trainer, own.begins or 0):
                before = RunLayout(self.directory).before_fault
                before.parent.mkdir(exist_ok=True)
                shutil.copyfile(own.start, before)
        histories = (RunLayout(place).rank(rank).history for place in own.directories)
        history = next((path for path in histories if path.exists()), None)
        begins, last = own.begins or 0, self.iteration - int(own.deep)
        if history is not None:
            rows = numbered_rows(history)
            self._recorded = {k: row for k, row in rows if begins < k <= last}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have rows hold what their own step has logged: a checkpoint restores no other values."""
        for callback in trainer.callbacks:
            if isinstance(callback, History):
                callback.only_of_step = True

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End the replay after the failing iteration, and look for anomalies within it."""
        if not self._begun:
            self._begun = True
            if not counts_iterations(pl_module):
                self._note_what_is_absent(self._absent(trainer), trainer)
                self._random = tree_leaves(global_random_states())
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
        if self._random is not None:
            self._compare_random_states(trainer)
        if self._had_time_limit and finished_iterations(trainer, pl_module) == self.iteration:
            self._stop_as_the_run_did(trainer)
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

    def _stop_as_the_run_did(self, trainer: Trainer) -> None:
        """End training after the failing iteration, if the run died of what only an end brings."""
        ends = 0 <= trainer.max_steps <= trainer.global_step  # and needs no limit of time to do so
        if self.died_after == "training":
            trainer.should_stop = trainer.should_stop or not ends
        elif self.died_after == "iteration" and not (ends or trainer.is_last_batch):
            trainer.should_stop = trainer.should_stop or not evaluates_next(trainer)

    def _keep(self, trainer: Trainer, module: LightningModule) -> None:
        finished = finished_iterations(trainer, module)
        if self.directory is None or finished < 1 or accumulates_gradients(trainer):
            return
        if not self._is_before_fault(trainer, finished):
            return
        try:
            failure = self._save(trainer, module, RunLayout(self.directory).before_fault)
        except Exception as error:  # of a user's object or a disk: the run has saved nothing here
            failure = in_words(error)
        if failure is not None and not self._has_failed:
            self._has_failed = True
            _log.warning("before.ckpt is not written: %s.", failure)

    def _save(self, trainer: Trainer, module: LightningModule, path: Path) -> str | None:
        """Write a checkpoint that the run has not written, so that its code notices nothing.

        This is a collective. Returns why no checkpoint can be collected; ``None`` if one is.

        Raises:
            Exception: The error of a disk, or of a strategy that shards the weights.
        """
        checkpoint, failure = None, None
        own = next(filter(saves_by_own_code, (module, *trainer.callbacks)), None)
        if own is not None:
            failure = f"on_save_checkpoint of {type(own).__name__} may do anything"
        elif not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            trainer.save_checkpoint(path)
            return None
        else:
            try:
                with saving_alone(module):
                    checkpoint = dump_checkpoint(trainer)
            except Exception as error:  # of a user's object, on this rank alone
                failure = in_words(error)
        if trainer.world_size > 1:
            if trainer.strategy.reduce_boolean_decision(failure is None):
                checkpoint = dump_checkpoint(trainer)  # with the states of all ranks
            else:
                failure = failure or "another rank could not be saved"
        if failure is None and trainer.is_global_zero:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
        return failure

    def _is_before_fault(self, trainer: Trainer, finished: int) -> bool:
        """Whether the optimizer steps once at most before the failing iteration."""
        return 0 < self.iteration - finished <= trainer.accumulate_grad_batches

    def _note_what_is_absent(self, lacks: str | None, trainer: Trainer) -> None:
        """Note in the run directory what the start of the replay does not restore."""
        if lacks is None:
            return
        self.record = dataclasses.replace(self.record, lacks=lacks)
        if self.directory is not None and trainer.is_global_zero:
            self.record.write(self.directory)

    def _compare_random_states(self, trainer: Trainer) -> None:
        """Note that random numbers are absent, if the first batch has drawn any."""
        before, self._random = self._random, None
        now = tree_leaves(global_random_states())
        is_same = all(map(_equal, before or (), now))
        if is_same or self.record.lacks or (self.record.start is None and is_seeded()):
            return
        unseeded = ", because seed_everything was not called" if self.record.start is None else ""
        self._note_what_is_absent(f"the random numbers of the run{unseeded}", trainer)

    def _absent(self, trainer: Trainer) -> str | None:
        """What the start of a replay of a module that trains on data does not restore."""
        loaders, done = train_loaders(trainer), batches_of_epoch(trainer) - 1
        if self.record.start is None:
            if any(map(shuffles, loaders)) and not is_seeded():
                return "the order of the data, because seed_everything was not called"
            return None
        by_lightning: bool = trainer.lightning_module.automatic_optimization
        if by_lightning and done % trainer.accumulate_grad_batches:
            return "the gradients that were summed"
        # A loader without a state begins anew, also in the middle of an epoch.
        if all(_has_state(each) or (not done and _is_in_order(each)) for each in loaders):
            return None
        return "the order of the data"

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
                recorded = self._recorded.get(number, row)
                what = row_differences(recorded, row, whole=self.record.whole_rows)
                if what:
                    self._differs = True
                    text = "Different from iteration %d on: %s"
                    _log.warning(text, number, ", ".join(what[:_MOST_COLUMNS]))
                    return

    def _leave_autograd(self) -> None:
        if self._restores:
            self._restores = False
            torch.autograd.set_detect_anomaly(False)


def record_left(directory: Path, planned: ReplayRecord) -> ReplayRecord | None:
    """What a directory is the replay of; ``None`` if the replay has left nothing to judge.

    A callback of the user's may die in its ``setup``, before the record is written. It is written
    then.

    Args:
        directory: Run directory of the replay.
        planned: Record that the replay was to write.
    """
    record = ReplayRecord.read(directory)
    with contextlib.suppress(ValueError):  # the directory holds no run
        if record is None and first_failure(examine(directory)) is not None:
            record = planned
            record.write(directory)
    return record


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def _has_state(loader: Any) -> bool:
    """Whether Lightning stores the position of a loader in a checkpoint."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def _is_in_order(loader: Any) -> bool:
    """Whether a loader is known to have the same order in an epoch whenever that begins."""
    if not isinstance(loader, DataLoader):
        return isinstance(loader, list | tuple | range)
    # Derived classes may do anything.
    is_plain = type(loader.batch_sampler) in (BatchSampler, type(None))
    return is_plain and type(loader.sampler) in (SequentialSampler, DistributedSampler)


def is_seeded() -> bool:
    """Whether ``seed_everything`` was called in this process, or in the one that started it."""
    return "PL_GLOBAL_SEED" in os.environ


def shuffles(loader: Any) -> bool:
    """Whether the order of a loader comes from the global random generator."""
    sampler = getattr(loader, "sampler", None)
    return isinstance(sampler, RandomSampler) and sampler.generator is None
