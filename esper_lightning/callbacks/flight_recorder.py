"""No death of a run loses its evidence.

``FlightRecorder`` watches a run of ``Trainer.fit`` (or ``validate``, ``test``, ``predict``) and,
whatever ends it, leaves the profiler's trace, the history and a report in the run directory.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from esper_lightning.callbacks.death import in_words
from esper_lightning.callbacks.history import History, finished_iterations
from esper_lightning.callbacks.peers import (
    end_of_run,
    is_of_this_run,
    keep_launcher_from_killing,
)
from esper_lightning.callbacks.recording import Recording, add_note
from esper_lightning.callbacks.run_directory import agree_on_run_directory, run_directory
from esper_lightning.callbacks.signals import ignore_interrupts_while_ending
from esper_lightning.core.validate import check_arguments, require
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.report import read_report

__all__ = ["FlightRecorder"]

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")


def _guarded(
    hook: Callable[Concatenate["FlightRecorder", _P], None],
) -> Callable[Concatenate["FlightRecorder", _P], None]:
    """A run does not fail because of its recorder, which is off from its first error on."""

    @functools.wraps(hook)
    def call(self: "FlightRecorder", *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self.give_up(error)

    return call


class FlightRecorder(Callback):
    """Save what a dying run knows, then let it die of what it died of.

    Works with any LightningModule, with any of Lightning's profilers or none. A history is kept
    even if there is no ``History`` among the callbacks. Errors and exit statuses stay the user's;
    an error gets a note that names the run directory. Nothing is done under ``fast_dev_run``.

    Args:
        dirpath: Run directory; ``None`` for where the Trainer's first logger writes.
        hang_timeout_s: Seconds after which an iteration, or a batch of a validation, counts as
            hanging: stacks and evidence are saved and the run goes on, without its profiler.
            ``None`` for never.
        print_profile: Whether the table of a rescued profiler window is printed on rank 0.
        watch: Whether a second process of a few megabytes completes the report if this one vanishes
            (SIGKILL, the kernel's OOM killer, ``os._exit``).

    Raises:
        ValueError: If an argument has another type, or ``hang_timeout_s`` is not positive.
    """

    @check_arguments
    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        hang_timeout_s: float | None = None,
        print_profile: bool = True,
        watch: bool = True,
    ) -> None:
        positive = hang_timeout_s is None or 0 < hang_timeout_s < math.inf
        require(positive, "FlightRecorder.hang_timeout_s", "be positive", hang_timeout_s)
        self.dirpath = dirpath
        self.hang_timeout_s = hang_timeout_s
        self.print_profile = print_profile
        self.watch = watch
        self._recording: Recording | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Launchers that spawn processes pickle callbacks; a recording is of one process."""
        return {**self.__dict__, "_recording": None}

    @override
    @_guarded
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to record, before anything of the run can fail."""
        if self._recording is not None:
            self._recording.close("failed")
            self._recording = None
        agree_on_run_directory(trainer)
        layout = self._layout(trainer)
        if layout is None:
            return
        others = [callback for callback in trainer.callbacks if callback is not self]
        if stage == "fit" and not any(isinstance(callback, History) for callback in others):
            others.insert(0, History(layout.directory))
        # First, before anything that may raise in its own on_exception. A new list: the old one is
        # being walked through.
        trainer.callbacks = [self, *others]
        self._recording = self._record(trainer, layout, stage, watch=self.watch)

    @override
    @_guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's launcher is running by now, and CUDA is in use if it will be."""
        if self._recording is not None:
            keep_launcher_from_killing(self._recording.save_for_launcher)
            self._recording.begin_training()

    @override
    @_guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Another iteration begins."""
        if self._recording is not None:
            self._recording.begin_iteration(finished_iterations(trainer, pl_module) + 1)

    @override
    @_guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The iteration is done."""
        if self._recording is not None:
            self._recording.watchdog.beat()

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
        """A validation may take long; a batch of it counts as an iteration does."""
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
        """It is done."""
        self._beat(trainer)

    @override
    @_guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        self._beat(trainer)

    @override
    @_guarded
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is no iteration."""
        if self._recording is not None:
            self._recording.watchdog.rest()

    @override
    @_guarded
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save everything, unless that was done closer to the fault."""
        recording, self._recording = self._recording, None
        if recording is not None and recording.ended_well:
            recording = None
        layout = self._layout(trainer)
        if recording is None and layout is not None:
            if _saved_by_its_processes(layout):
                add_note(exception, layout.directory, "every rank has a folder of its own")
                end_of_run()
                return
            # It died before ``setup`` was called.
            recording = self._record(trainer, layout, "fit", watch=False)
        if recording is not None:
            recording.die(exception)
        if isinstance(exception, KeyboardInterrupt):
            ignore_interrupts_while_ending(trainer)

    def _beat(self, trainer: Trainer) -> None:
        if (
            self._recording is not None
            and trainer.state.fn == "fit"
            and not trainer.sanity_checking
        ):
            self._recording.watchdog.beat()

    def give_up(self, error: Exception) -> None:
        """Leave the run alone from here on."""
        _log.warning("FlightRecorder is off: %s. The run goes on without it.", in_words(error))
        recording, self._recording = self._recording, None
        if recording is not None:
            with contextlib.suppress(Exception):  # one warning is enough
                recording.close("off")

    def _layout(self, trainer: Trainer) -> RunLayout | None:
        directory = None if trainer.fast_dev_run else self.dirpath or run_directory(trainer)
        return None if directory is None else RunLayout(Path(directory).absolute())

    def _record(self, trainer: Trainer, layout: RunLayout, stage: str, *, watch: bool) -> Recording:
        return Recording(
            trainer,
            layout,
            hang_timeout_s=self.hang_timeout_s,
            print_profile=self.print_profile,
            watch=watch,
            stage=stage,
        )


def _saved_by_its_processes(layout: RunLayout) -> bool:
    """Whether processes that a launcher spawned recorded this run; in theirs, ours has no setup."""
    processes = [read_report(path) for path in layout.directory.glob("rank*/process.json")]
    return any(
        process is not None and process.get("state") != "finished" and is_of_this_run(process)
        for process in processes
    )
