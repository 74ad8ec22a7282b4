"""No death of a run loses its evidence.

``FlightRecorder`` watches a run of ``Trainer.fit`` (or ``validate``, ``test``, ``predict``) and,
whatever ends it, leaves the profiler's trace, the history and a report in the run directory.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import atexit
import logging
import multiprocessing.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.utilities.exceptions import _TunerExitException
from typing_extensions import override

from esper_lightning.callbacks.death import Death, in_words
from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.memory_snapshot import forget_memory, watch_memory
from esper_lightning.callbacks.peers import Peers, keep_launcher_from_killing
from esper_lightning.callbacks.profiler_rescue import ProfilerGuard
from esper_lightning.callbacks.progress import RunProgressBar
from esper_lightning.callbacks.rescue import Rescue
from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.callbacks.signals import NativeFaults, SignalExit, Signals, dump_stacks
from esper_lightning.callbacks.watchdog import Alarm, Watchdog
from esper_lightning.core.validate import require
from esper_lightning.forensics import sidecar
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.report import set_aside

__all__ = ["FlightRecorder"]

_log = logging.getLogger(__name__)
_STUCK_GRACE_S, _EXIT_GRACE_S, _PEER_GRACE_S = 2.0, 4.0, 10.0


class FlightRecorder(Callback):
    """Save what a dying run knows, then let it die of what it died of.

    Works with any LightningModule, with any of Lightning's profilers or none. A history is kept
    even if there is no ``History`` among the callbacks. Errors and exit statuses stay the user's;
    an error gets a note that names the run directory. Nothing is done under ``fast_dev_run``.

    Args:
        dirpath: Run directory; ``None`` for where the Trainer's first logger writes.
        hang_timeout_s: Seconds after which an iteration counts as hanging: stacks and evidence are
            saved and the run goes on, without its profiler. ``None`` for never.
        print_profile: Whether the table of a rescued profiler window is printed on rank 0.
        watch: Whether a second process of a few megabytes completes the report if this one vanishes
            (SIGKILL, the kernel's OOM killer, ``os._exit``).

    Raises:
        ValueError: If ``hang_timeout_s`` is not positive.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        hang_timeout_s: float | None = None,
        print_profile: bool = True,
        watch: bool = True,
    ) -> None:
        positive = hang_timeout_s is None or hang_timeout_s > 0
        require(positive, "FlightRecorder.hang_timeout_s", "be positive", hang_timeout_s)
        self.dirpath = dirpath
        self.hang_timeout_s = hang_timeout_s
        self.print_profile = print_profile
        self.watch = watch
        self._recording: _Recording | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Launchers that spawn processes pickle callbacks; a recording is of one process."""
        return {**self.__dict__, "_recording": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to record, before anything of the run can fail."""
        if self._recording is not None:
            self._recording.close("failed")
            self._recording = None
        directory = None if trainer.fast_dev_run else self.dirpath or run_directory(trainer)
        if directory is None:
            return
        others = [callback for callback in trainer.callbacks if callback is not self]
        if stage == "fit" and not any(isinstance(callback, History) for callback in others):
            others.insert(0, History(directory))
        # First, before anything that may raise in its own on_exception. A new list: the old one is
        # being walked through.
        trainer.callbacks = [self, *others]
        self._recording = _Recording(self, trainer, RunLayout(Path(directory)))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's launcher is running by now, and CUDA is in use if it will be."""
        if self._recording is not None:
            keep_launcher_from_killing(self._recording.save_for_launcher)
            self._recording.watch_memory()

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Another iteration begins."""
        if self._recording is not None:
            done: int = getattr(pl_module, "iteration", trainer.global_step)
            self._recording.begin_iteration(done + 1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The iteration is done."""
        if self._recording is not None:
            self._recording.watchdog.beat()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows is no iteration."""
        if self._recording is not None:
            self._recording.watchdog.rest()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save everything, unless that was done closer to the fault."""
        if self._recording is not None:
            self._recording.die(exception)
            self._recording = None
            return
        directory = None if trainer.fast_dev_run else self.dirpath or run_directory(trainer)
        if directory is not None and any(Path(directory).glob("rank*/process.json")):
            # A process that the launcher spawned died, and saved its own.
            _note(exception, Path(directory), "every rank has a folder of its own")


class _Recording:
    """All that is in place during one run; gone after ``close``."""

    def __init__(self, recorder: FlightRecorder, trainer: Trainer, layout: RunLayout) -> None:
        self._pid = os.getpid()
        self._trainer, self._layout = trainer, layout
        self._files: RankLayout = layout.rank(trainer.global_rank)
        self._print_profile = recorder.print_profile
        self._lock = threading.RLock()
        self._rescue: Rescue | None = None
        self._hung = False
        self._closed = False
        files = self._files
        for path in (files.crash, files.stacks, files.bad_minibatch, files.memory):
            set_aside(path)
        self._ring = PhaseRing(self._files.phases)
        self._peers = Peers(layout, trainer.global_rank, trainer.world_size)
        self._peers.tell("running")
        self._signals = Signals(trainer)
        self._profiler = _take_profiler(trainer)
        self._guard = ProfilerGuard(self._profiler, self._ring, self._signals, self._described)
        self._run_stage = trainer._run_stage
        trainer._run_stage = self._run_guarded
        self._faults = NativeFaults(self._files.stacks, self._last_gasp)
        self._faults.install()
        self._signals.install()
        self._sidecar = sidecar.start(self._files.directory, self._pid) if recorder.watch else None
        atexit.register(self._at_exit)
        # Worker processes of multiprocessing leave without atexit.
        self._finalizer = multiprocessing.util.Finalize(self, self._at_exit, exitpriority=50)
        self.watchdog = Watchdog(
            received=self._signals.received,
            peer=self._peers.first_failure,
            act=self._act,
            is_saved=lambda: self._rescue is not None,
            hang_timeout_s=recorder.hang_timeout_s,
            stuck_grace_s=_STUCK_GRACE_S,
            exit_grace_s=_EXIT_GRACE_S,
        )

    def begin_iteration(self, number: int) -> None:
        """Tell ring and watchdog."""
        self._ring.iteration = number
        self.watchdog.beat()

    def watch_memory(self) -> None:
        """See to it that memory that runs out is looked at."""
        watch_memory(self._files.memory)

    def die(self, error: BaseException) -> None:
        """Save everything in the main thread, wait for other ranks, and leave nothing behind."""
        if self._closed:  # done already, closer to the fault
            return
        with self._signals.held():
            signal_name = _signal_of(error)
            cause = "exception" if signal_name is None else "signal"
            self._save(Death(cause=cause, error=error, signal=signal_name))
            self._note(error)
            self._close_ours()
            self._peers.wait_until_saved(_PEER_GRACE_S)
            self._signals.forget_pending()
        self._stand_in()
        self.close("failed", ignoring_interrupts=isinstance(error, KeyboardInterrupt))

    def save_for_launcher(self) -> None:
        """Called by the launcher's thread, which is about to kill this process."""
        peer = self._peers.first_failure() or (-1, "the launcher kills every rank")
        self._save(Death(cause="peer", peer=peer))

    def close(self, state: str, *, ignoring_interrupts: bool = False) -> None:
        """Put everything back as it was before the run."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self.watchdog.stop()
        self._guard.release()
        forget_memory(self._files.memory)
        self._faults.restore()
        self._signals.restore(ignoring_interrupts=ignoring_interrupts)
        self._trainer.__dict__.pop("_run_stage", None)
        atexit.unregister(self._at_exit)
        self._finalizer.cancel()
        try:
            self._peers.tell(state, saved=state == "failed")
        except OSError as error:
            _log.warning("The state of the run cannot be written: %s", error)
        if self._sidecar is not None:
            self._sidecar.stop()
        self._ring.close()

    # What calls us.

    def _run_guarded(self) -> Any:
        """Round the run itself.

        Launchers that spawn processes never call ``on_exception`` in them, and another callback's
        could raise before ours.
        """
        try:
            self._signals.reinstall()
            return self._run_stage()
        except _TunerExitException:
            raise
        except BaseException as error:
            self.die(error)
            raise

    def _act(self, alarm: Alarm) -> None:
        """In the watchdog's thread."""
        if alarm.cause == "hang":
            dump_stacks(self._files.stacks, f"No iteration has ended for {alarm.silent_s:.1f} s")
        self._save(Death(cause=alarm.cause, signal=alarm.signal, peer=alarm.peer))

    def _last_gasp(self, signal_name: str) -> None:
        """In a C signal handler, in whichever thread failed."""
        if self._lock.acquire(blocking=False):
            self._save(Death(cause="native", signal=signal_name), bounded=False)

    def _at_exit(self) -> None:
        if not self._closed and os.getpid() == self._pid:
            self._save(Death(cause="exit"))
            self.close("failed")

    def _described(self) -> None:
        """The last act of a run that reached its end."""
        self.close("finished")

    # What is done.

    def _note(self, error: BaseException) -> None:
        if self._rescue is None:  # saving failed altogether, and was logged
            return
        report, written = self._rescue.report, self._rescue.written
        trace = report.get("evidence", {}).get("trace", {})
        where = f"no trace: {trace.get('detail')}"
        if trace.get("state") == "saved":
            where = f"trace in {self._files.directory / trace['path']}"
        there = "nowhere: no place took it" if written is None else f"in {written}"
        details = f"history in {self._files.history}; report {there}; {where}"
        _note(error, self._layout.directory, details)

    def _save(self, death: Death, *, bounded: bool = True) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        with self._lock:
            if self._rescue is not None:
                if death.error is not None:
                    self._rescue.amend(death.error)
                return
            hangs = death.cause == "hang"
            if self._hung:
                if hangs:  # once is enough: the profiler is off, and the run is slow
                    return
                set_aside(self._files.crash)  # the run went on, and now it dies
            rescue = Rescue(
                trainer=self._trainer,
                files=self._files,
                ring=self._ring,
                guard=self._guard,
                print_profile=self._print_profile,
                bounded=bounded,
            )
            steps: tuple[Callable[[], object], ...] = (lambda: rescue.run(death),)
            if hangs:
                self._hung = True
            else:
                self._rescue = rescue
                tell = self._peers.tell
                steps = (lambda: tell("failed"), *steps, lambda: tell("failed", saved=True))
            for action in steps:
                try:
                    action()
                except Exception as error:
                    _log.error("While saving evidence: %s", in_words(error))

    def _stand_in(self) -> None:
        """No hook that follows may start the profiler again; the next run finds it in place."""
        trainer, profiler = self._trainer, self._profiler
        trainer.profiler = _StandIn(profiler)
        teardown = trainer._teardown

        def teardown_and_return() -> None:
            trainer.__dict__.pop("_teardown", None)
            try:
                teardown()
            finally:
                _take_profiler(trainer)

        trainer._teardown = teardown_and_return

    def _close_ours(self) -> None:
        """Lightning calls no teardown when a run fails."""
        for callback in self._trainer.callbacks:
            if isinstance(callback, History | RunProgressBar):
                try:
                    callback.teardown(self._trainer, self._trainer.lightning_module, "fit")
                except OSError as error:
                    _log.warning("%s: %r", type(callback).__name__, error)


class _StandIn(PassThroughProfiler):
    """In place of the profiler of a run that died, until Lightning has taken it down."""

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.kept = profiler


def _take_profiler(trainer: Trainer) -> Profiler:
    if isinstance(trainer.profiler, _StandIn):
        trainer.profiler = trainer.profiler.kept
    return trainer.profiler


def _signal_of(error: BaseException) -> str | None:
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT"
    if isinstance(error, SignalExit):
        return error.signal
    return "SIGTERM" if type(error).__name__ == "SIGTERMException" else None


def _note(error: BaseException, directory: Path, details: str) -> None:
    """Where to look; on stderr too, for errors that Python does not show."""
    error.add_note(f"Run directory: {directory} ({details}). Shown by: esper crash {directory}")
    if isinstance(error, KeyboardInterrupt | SystemExit):
        _log.warning("%s: %s", type(error).__name__, error.__notes__[-1])
