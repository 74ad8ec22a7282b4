"""The callback that saves the evidence of a run at its death.

``FlightRecorder`` watches a run of ``Trainer.fit`` (or ``validate``, ``test``, ``predict``) and,
whatever ends it, leaves the profiler's trace, the history and a report in the run directory.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, cast

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from esper_lightning.callbacks.checkpoint_internals import checkpoint_to_load
from esper_lightning.callbacks.directory_choice import WritesRun
from esper_lightning.callbacks.history import History, finished_iterations
from esper_lightning.callbacks.lightning_internals import run_depth
from esper_lightning.callbacks.loggers import guard_loggers
from esper_lightning.callbacks.run_directory import (
    close_run_directory,
    copy_run_directory,
    open_run_directory,
    run_layout,
)
from esper_lightning.callbacks.tracking import upload_results
from esper_lightning.core.errors import check_arguments, positive, require
from esper_lightning.core.ranks import RanksDisagreeError
from esper_lightning.forensics.claims import DirectoryRefusedError
from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.recorder.crash_checkpoint import saves_by_own_code
from esper_lightning.recorder.death import in_words
from esper_lightning.recorder.fingerprint import FINGERPRINT_KEY
from esper_lightning.recorder.note import add_note
from esper_lightning.recorder.peers import (
    end_of_run,
    is_of_this_run,
    keep_launcher_from_killing,
    meet,
)
from esper_lightning.recorder.recording import Recording, recording_of
from esper_lightning.recorder.state import State
from esper_lightning.recorder.state_keeper import StateKeeper, load_later_state

__all__ = ["FlightRecorder"]

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_REFUSED = (DirectoryRefusedError, RanksDisagreeError)  # of a run that has not begun


def _guarded(
    hook: Callable[Concatenate["FlightRecorder", _P], None],
) -> Callable[Concatenate["FlightRecorder", _P], None]:
    """Wrap a hook so that an error turns the recorder off, and the run does not fail by it."""

    @functools.wraps(hook)
    def call(self: "FlightRecorder", *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            hook(self, *args, **kwargs)
        except DirectoryRefusedError:  # the recorder never writes where others have files
            raise
        except Exception as error:
            self.give_up(cast(Trainer, args[0]), error)

    return call


class FlightRecorder(WritesRun):
    """Saves the evidence of a dying run, and never changes the error that the run dies of.

    Works with any LightningModule, with any of Lightning's profilers or none. A history is written
    even if there is no ``History`` among the callbacks. Errors and exit statuses stay the user's;
    an error gets a note that names the run directory. Loggers cannot end the run: an error of a
    logger is a warning, and metrics that the logger did not take are logged when it takes them
    again. Nothing is recorded under ``fast_dev_run``.

    Args:
        dirpath: Run directory; ``None`` for the Trainer's (``callbacks.run_directory``).
        hang_timeout_s: Seconds after which an iteration, or a batch of a validation, counts as
            hanging: stacks and evidence are saved and the run continues, without its profiler.
            ``None`` for no limit.
        hang_ends: Whether a hang ends the process with status 1, once its evidence is saved. A rank
            that waits for another one in a collective would wait for half an hour or for ever.
        print_profile: Whether the table of a rescued profiler window is printed on rank 0.
        watch: Whether a second process of a few megabytes completes the report if this one vanishes
            (SIGKILL, the kernel's OOM killer, ``os._exit``).
        keeps_state: Whether the state after the latest iteration is on disk for ``esper replay``
            and ``--ckpt_path last``, also after SIGKILL. A state is a checkpoint, for which the
            hooks ``on_save_checkpoint`` of all callbacks are called: a run could not be resumed
            without what they add. ``None`` stores states of PPO of at most 64 MB, as often as takes
            less than 0.5 % of the time, and none where such a hook is a user's own.

    Raises:
        ValueError: If an argument has another type, ``hang_timeout_s`` is not positive, is missing
            with ``hang_ends``, or ``dirpath`` is empty.
    """

    @check_arguments
    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        hang_timeout_s: float | None = None,
        hang_ends: bool = False,
        print_profile: bool = True,
        watch: bool = True,
        keeps_state: bool | None = None,
    ) -> None:
        positive("FlightRecorder.hang_timeout_s", hang_timeout_s)
        ok, rule = hang_timeout_s is not None or not hang_ends, "be false without hang_timeout_s"
        require(ok, "FlightRecorder.hang_ends", rule, hang_ends)
        super().__init__(dirpath)
        self.hang_timeout_s, self.hang_ends = hang_timeout_s, hang_ends
        self.print_profile = print_profile
        self.watch = watch
        self.keeps_state = keeps_state
        self._keeper: StateKeeper | None = None
        self._has_saved = False  # whether a checkpoint followed the latest copy

    @override
    @_guarded
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to record, before anything of the run can fail."""
        if run_depth(trainer) > 1 and recording_of(trainer) is not None:
            return  # a run within a run of the same Trainer belongs to the outer run
        _close_earlier(trainer)
        if not trainer.fast_dev_run:  # which has dummies as loggers
            guard_loggers(trainer.loggers)
        open_run_directory(trainer, self)
        layout = run_layout(trainer)
        if layout is not None and stage == "fit" and not _is_ppo(pl_module):
            load_later_state(trainer, layout)
        if layout is not None and trainer.is_global_zero:
            resumed = stage == "fit" and checkpoint_to_load(trainer) is not None
            guard_loggers(
                trainer.loggers,
                at_end=lambda logger, died: upload_results(
                    layout.directory, logger, died=died, resumed=resumed
                ),
            )
        met = meet(trainer.world_size)
        if layout is None:
            return
        others = [
            callback
            for callback in trainer.callbacks
            if callback is not self and not isinstance(callback, StateKeeper)
        ]
        if stage == "fit" and not any(isinstance(callback, History) for callback in others):
            others.insert(0, History())
        # Then comes the history: it has the row of an iteration in which another callback raises.
        histories = [callback for callback in others if isinstance(callback, History)]
        others = [*histories, *(each for each in others if not isinstance(each, History))]
        # The recorder comes first, before callbacks whose on_exception may raise. The list is new:
        # Lightning is iterating over the old list.
        self._keeper = self._make_keeper(trainer, pl_module, layout) if stage == "fit" else None
        trainer.callbacks = [self, *others, *([self._keeper] if self._keeper else [])]
        self._record(trainer, layout, stage, watch=self.watch, met=met)

    @override
    @_guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch Lightning's launcher, which runs by now, and CUDA, if it is in use."""
        recording = recording_of(trainer)
        if recording is not None:
            keep_launcher_from_killing(recording.save_for_launcher)
            recording.begin_training()

    @override
    @_guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that an iteration begins; copy the directory if the last one saved a checkpoint."""
        if self._keeper is not None:
            self._keeper.begin(trainer)
        if self._has_saved:
            self._has_saved = False
            copy_run_directory(trainer)
        recording = recording_of(trainer)
        if recording is not None:
            recording.begin_iteration(finished_iterations(trainer, pl_module) + 1)

    @override
    @_guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that the iteration has ended."""
        recording = recording_of(trainer)
        if recording is not None:
            recording.beat()

    @override
    @_guarded
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note that a batch of a validation begins: it may hang as an iteration may."""
        self._beat(trainer)

    @override
    @_guarded
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note that a batch of a validation has ended."""
        self._beat(trainer)

    @override
    @_guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that training continues after a validation."""
        self._beat(trainer)

    @override
    @_guarded
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note that a checkpoint is about to be written, and add the run's fingerprint to it."""
        if self._keeper is None or not self._keeper.is_storing:
            self._has_saved = True
        recording = recording_of(trainer)
        if recording is not None and recording.fingerprint is not None:
            checkpoint[FINGERPRINT_KEY] = recording.fingerprint.to_dict()

    @override
    @_guarded
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say in one line what differs from the run that wrote the checkpoint."""
        recording, before = recording_of(trainer), checkpoint.get(FINGERPRINT_KEY)
        if recording is None or not isinstance(before, dict) or trainer.state.fn != "fit":
            return
        changed = recording.note_resumption(Fingerprint.from_dict(before))
        if changed and trainer.is_global_zero:
            _log.warning("Resumed under other conditions: %s.", ", ".join(changed))

    @override
    @_guarded
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop looking for hangs: what follows is no iteration."""
        recording = recording_of(trainer)
        if recording is not None:
            recording.watchdog.rest()

    @override
    @_guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note that the run ended well; only the profiler's ``describe`` is still to come."""
        recording = recording_of(trainer)
        if recording is not None:
            recording.approach_end()

    @override
    @_guarded
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save all evidence, unless it was saved closer to the fault."""
        # A recording saves the evidence of a death before any callback is called.
        if recording_of(trainer) is not None or isinstance(exception, _REFUSED):
            return
        layout = None
        with contextlib.suppress(DirectoryRefusedError):
            open_run_directory(trainer, self, alone=True)
            layout = run_layout(trainer)
        if layout is None:
            return
        if _saved_by_its_processes(layout):
            add_note(exception, layout.directory, "every rank has a folder of its own")
            end_of_run()
            close_run_directory(trainer, self)
            return
        # The run died before ``setup`` was called.
        self._record(trainer, layout, "fit", watch=False).die(exception, lingers=False)

    def _make_keeper(
        self, trainer: Trainer, module: LightningModule, layout: RunLayout
    ) -> StateKeeper | None:
        """What stores the state after iterations, as the last callback; ``None`` where none is."""
        wanted = self.keeps_state
        if wanted is None:  # hooks of others may do anything when a checkpoint is collected
            hooks = (module, *trainer.callbacks)
            wanted = _is_ppo(module) and not any(map(saves_by_own_code, hooks))
        if not wanted:
            return None
        return StateKeeper(layout, trainer.global_rank, always=self.keeps_state is True)

    def _beat(self, trainer: Trainer) -> None:
        recording = recording_of(trainer)
        if recording is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            recording.beat()

    def give_up(self, trainer: Trainer, error: Exception) -> None:
        """Turn the recorder off after an error of its own.

        Args:
            trainer: Trainer of the run, which continues.
            error: Error that a hook of the recorder raised.
        """
        _log.warning("FlightRecorder is off: %s. The run continues without it.", in_words(error))
        recording = recording_of(trainer)
        with contextlib.suppress(Exception):  # one warning is enough
            if recording is not None:
                recording.close(State.OFF)
            else:  # the directory may have been claimed
                close_run_directory(trainer, self)

    def _record(
        self,
        trainer: Trainer,
        layout: RunLayout,
        stage: str,
        *,
        watch: bool,
        met: Sequence[ProcessRecord] = (),
    ) -> Recording:
        return Recording(
            trainer,
            layout,
            hang_timeout_s=self.hang_timeout_s,
            hang_ends=self.hang_ends,
            print_profile=self.print_profile,
            watch=watch,
            on_end=functools.partial(close_run_directory, trainer, self),
            stage=stage,
            met=met,
        )


def _is_ppo(module: LightningModule) -> bool:
    return hasattr(module, "saves_alone")


def _close_earlier(trainer: Trainer) -> None:
    """Close the recording of an earlier run whose end was not seen."""
    earlier = recording_of(trainer)
    if earlier is not None:
        earlier.close(State.FAILED)


def _saved_by_its_processes(layout: RunLayout) -> bool:
    """Whether processes that a launcher spawned recorded the run, so that this process need not.

    A record of this process is of a recording that the death has prevented from beginning.
    """
    processes = [ProcessRecord.read(path) for path in layout.directory.glob("rank*/process.json")]
    return any(
        process is not None
        and process.state != "finished"
        and process.pid != os.getpid()
        and is_of_this_run(process)
        for process in processes
    )
