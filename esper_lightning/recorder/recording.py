"""All that a flight recorder has in place during one run, and what it does when the run dies."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from lightning.pytorch.utilities.exceptions import _TunerExitException

from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.progress import RunProgressBar
from esper_lightning.core.ranks import PeerFailedError
from esper_lightning.forensics import sidecar
from esper_lightning.forensics.asides import keep_latest, set_aside
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.report import (
    read_report,
    release_room,
    reserve_room,
    trim_report,
    write_report,
)
from esper_lightning.recorder.death import Death, in_words
from esper_lightning.recorder.memory_snapshot import forget_memory, watch_memory
from esper_lightning.recorder.peers import Peers, end_of_run, lost_a_peer
from esper_lightning.recorder.profiler_guard import ProfilerGuard
from esper_lightning.recorder.protection import Patch, Protection, recorded, run_depth
from esper_lightning.recorder.rescue import Rescue
from esper_lightning.recorder.signals import SignalExit, dump_stacks, end_by
from esper_lightning.recorder.watchdog import Alarm, Watchdog, awake_s

__all__ = ["Recording", "add_note", "recording_of"]

_log = logging.getLogger(__name__)
_KEPT_EVENT_FILES = 20  # of TensorBoard: each resumed run adds one
_STUCK_GRACE_S, _EXIT_GRACE_S, _PEER_GRACE_S = 2.0, 4.0, 10.0


class Recording:
    """Begins when it is made; ``close`` puts everything back, in any order with other recordings.

    After a death that is on its way through Lightning, what keeps a second signal from interrupting
    it stays until Lightning has shut down (``leave``).

    Args:
        trainer: Of the run.
        layout: Of its directory.
        hang_timeout_s: As for ``FlightRecorder``, like the others.
        print_profile: Whether the table of a rescued window is printed.
        watch: Whether a second process watches this one.
        let_go: Called at the end, when nothing more is written.
        stage: As Lightning calls it; where it is not ``fit`` and all goes well, what was found of
            an earlier run is there again afterwards.
        met: Processes of the ranks, as ``peers.meet`` returns them; empty where they have not met.

    Raises:
        OSError: If the run directory takes no files; nothing is in place then.
    """

    def __init__(
        self,
        trainer: Trainer,
        layout: RunLayout,
        *,
        hang_timeout_s: float | None,
        print_profile: bool,
        watch: bool,
        let_go: Callable[[], None] = lambda: None,
        stage: str = "fit",
        met: Sequence[dict[str, Any]] = (),
    ) -> None:
        self._pid = os.getpid()
        self._let_go = let_go
        self.trainer, self._layout = trainer, layout
        self._files: RankLayout = layout.rank(trainer.global_rank)
        self._print_profile = print_profile
        self._lock = threading.RLock()
        self._rescue: Rescue | None = None
        self._saved = False
        self._dying = False  # the main thread has seen to it
        self._hung = False
        self._closed = False
        self._state = "failed"
        self._stage = stage
        self._asides: dict[Path, Path] = {}
        self._callbacks = list(trainer.callbacks)  # others may take their place
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as leave:
            self._begin_files(undo, met, watch=watch)
            self._begin_watching(undo, leave, hang_timeout_s)
            self._undo, self._leave = undo.pop_all(), leave.pop_all()

    def _begin_files(
        self, undo: contextlib.ExitStack, met: Sequence[dict[str, Any]], *, watch: bool
    ) -> None:
        trainer, files = self.trainer, self._files
        files.directory.mkdir(parents=True, exist_ok=True)
        self._peers = Peers(self._layout, trainer.global_rank, trainer.world_size, met)
        refused: list[OSError] = []

        def attempt(action: Callable[[], object]) -> None:
            try:
                action()
            except OSError as error:  # one file that is impossible is no reason to have no other
                refused.append(error)

        with sidecar.locked(files.directory):
            # The second process of a run dies with its container, and may be late elsewhere.
            attempt(lambda: sidecar.complete_report(files))
            self._found = read_report(files.process)
            attempt(self._set_aside_earlier)
            attempt(self._keep_latest_events)
            self._ring = PhaseRing(files.phases)
            undo.callback(self._ring.close)
            attempt(lambda: reserve_room(files.directory))
            undo.callback(release_room, files.directory)
            attempt(lambda: self._peers.tell("running"))
        refused += [] if self._ring.error is None else [self._ring.error]
        if refused:
            text = "%s does not take every file: %s. At a death, what can be saved will be."
            _log.warning(text, files.directory, in_words(refused[0]))
        running = {**self._peers.process, "state": "running"}
        second = sidecar.start(files.directory, self._pid, running) if watch else None
        if second is not None:
            undo.callback(second.stop)
        undo.callback(self._attempt, self._tell_end)

    def _begin_watching(
        self,
        undo: contextlib.ExitStack,
        leave: contextlib.ExitStack,
        hang_timeout_s: float | None,
    ) -> None:
        trainer = self.trainer
        self._run_stage = Patch(trainer, "_run_stage", self._run_guarded)
        undo.callback(self._run_stage.undo)
        self._protection = Protection(self)
        self._protection.install()
        leave.callback(lambda: self._protection.restore(run_goes_on=self._state == "off"))
        undo.callback(forget_memory, self._files.memory)
        self._profiler = _take_profiler(trainer)
        self._guard = ProfilerGuard(
            self._profiler,
            self._ring,
            self._protection,
            on_batch=self.beat,
            on_described=self._described,
            files=self._files,
        )
        undo.callback(self._guard.release)
        self.watchdog = Watchdog(
            received=self._protection.received,
            caught_s=self._protection.caught_s,
            renew=self._protection.renew,
            peer=self._peers.first_failure,
            act=self._act,
            look=self._ring.note_memory,
            saving_for_s=self.saving_for_s,
            others_saving_for_s=self._protection.others_saving_for_s,
            hang_timeout_s=hang_timeout_s,
            stuck_grace_s=_STUCK_GRACE_S,
            exit_grace_s=_EXIT_GRACE_S,
        )
        leave.callback(self.watchdog.stop)

    @property
    def stacks(self) -> Path:
        """File for the stacks of all threads."""
        return self._files.stacks

    @property
    def ended_well(self) -> bool:
        """Whether the run is over, and did not die."""
        return self._closed and self._state != "failed"

    def _set_aside_earlier(self) -> None:
        """What is found here is not to pass for evidence of this run."""
        files = self._files
        for report in (files.crash, files.process):
            trim_report(report)  # what it does not need may be all the room that there is
        paths = [files.crash, files.stacks, files.bad_minibatch, files.memory, files.profile]
        if self._stage != "fit":
            paths.append(files.phases)
        for path in paths:
            aside = set_aside(path)
            if aside is not None:
                self._asides[path] = aside

    def _keep_latest_events(self) -> None:
        """Write down which event files are the runs' in this directory, and remove the oldest.

        Only of those that are written down is it certain that no one else made them.
        """
        names: list[str] = (self._found or {}).get("event_files") or []
        earlier = [self._layout.directory / name for name in names if _is_event_file(name)]
        if self._stage == "fit":
            keep_latest(earlier, _KEPT_EVENT_FILES)
        files = [*earlier, *_event_files(self.trainer, self._layout.directory)]
        kept = list(dict.fromkeys(path.name for path in files if path.exists()))
        if kept:
            self._peers.process["event_files"] = kept

    def _put_back_earlier(self) -> None:
        for path, aside in self._asides.items():
            if path == self._files.phases or not path.exists():
                aside.rename(path)
        if self._found is not None:
            events = {k: v for k, v in self._peers.process.items() if k == "event_files"}
            write_report(self._files.process, {**self._found, **events})

    def begin_iteration(self, number: int) -> None:
        """Tell ring and watchdog."""
        self.beat()
        if self._rescue is not None:
            self._go_on()
        self._ring.iteration = number

    def beat(self) -> None:
        """The run goes on: an iteration, or a batch of a validation, begins or ended."""
        self._protection.beat()
        self.watchdog.beat()

    def begin_training(self) -> None:
        """Checkpoints are loaded by now, and CUDA is in use if it will be."""
        set_aside(self._files.crash_checkpoint)
        watch_memory(self._files.memory)

    def die(self, error: BaseException, *, lingers: bool) -> None:
        """Save everything in the main thread, wait for other ranks, and close.

        Args:
            error: What the run died of.
            lingers: Whether Lightning is about to shut the run down, and ``leave`` is called then.
        """
        if self._closed or os.getpid() != self._pid:  # done already, closer to the fault
            return
        self._dying = True
        signal_name = _signal_of(error)
        with self._protection.held():
            cause = "exception" if signal_name is None else "signal"
            peer = None
            if isinstance(error, PeerFailedError) or lost_a_peer(error):
                cause, peer = "peer", self._peers.first_failure()
            self._save(Death(cause=cause, error=error, signal=signal_name, peer=peer))
            self._attempt(lambda: self._note(error))
            self._attempt(self._close_ours)
            self._attempt(lambda: self._peers.wait_until_saved(_PEER_GRACE_S))
            self._protection.forget_pending()
        self._protection.end(by_signal=signal_name is not None)
        self._attempt(self._stand_in)
        self._attempt(lambda: self._close("failed"))
        if not lingers:
            self.leave()

    def save_for_launcher(self) -> None:
        """Called by the launcher's thread, which is about to kill this process."""
        peer = self._peers.first_failure() or (-1, "the launcher kills every rank")
        self._save(Death(cause="peer", peer=peer))

    def close(self, state: str) -> None:
        """Put everything back as it was before the run.

        Args:
            state: As other ranks are told: ``finished``, ``failed``, or ``off`` where the run goes
                on without its recorder.
        """
        self._close(state)
        self.leave()

    def _close(self, state: str) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._closed, self._state = True, state
        self.watchdog.rest()
        self._undo.close()
        if state != "off":  # else the history is still written
            self._let_go()
        end_of_run()

    def leave(self) -> None:
        """Take no part any more in what protects the process."""
        if os.getpid() != self._pid:
            return
        self._leave.close()
        self._rescue = None
        number = self.watchdog.ends_by
        if number is not None and not self._protection.others_saving_for_s():
            end_by(number)  # this run, the last one, came to its end before the signal took effect

    def approach_end(self) -> None:
        """The run has reached its end, but for the report of its profiler."""
        if self.trainer.profiler is not self._profiler:  # somebody replaced what we wait for
            self._described()

    # What calls us.

    def _run_guarded(self) -> Any:
        """Round the run itself.

        Launchers that spawn processes never call ``on_exception`` in them, and another callback's
        could raise before ours.
        """
        trainer = self.trainer
        if run_depth(trainer) > 1:  # a run within this one, whose errors somebody may catch
            return self._run_stage.original()
        try:
            self._protection.reinstall()
            return self._run_stage.original()
        except _TunerExitException:
            raise
        except BaseException as error:
            # Lightning sets a handler when it shuts down after Ctrl-C: impossible in other threads.
            fails = isinstance(error, KeyboardInterrupt) and not self._protection.in_main_thread
            self.die(error, lingers=run_depth(trainer) > 0 and not fails)
            raise

    def _act(self, alarm: Alarm) -> None:
        """In the watchdog's thread."""
        if alarm.cause == "hang":
            heading = f"No iteration has ended for {alarm.silent_s:.1f} s"
            self._attempt(lambda: dump_stacks(self._files.stacks, heading))
        self._save(Death(cause=alarm.cause, signal=alarm.signal, peer=alarm.peer))

    def last_gasp(self, signal_name: str) -> None:
        """In a C signal handler, in whichever thread failed."""
        if self._lock.acquire(blocking=False):
            self._save(Death(cause="native", signal=signal_name), bounded=False)

    def at_exit(self) -> None:
        """The interpreter ends, and the run has not."""
        if not self._closed and os.getpid() == self._pid:
            self._save(Death(cause="exit"))
            self._close("failed")
        self.leave()

    def _described(self) -> None:
        """The last act of a run that reached its end."""
        if run_depth(self.trainer) <= 1:
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
        add_note(error, self._layout.directory, details)

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
                self._attempt(lambda: set_aside(self._files.crash))  # it went on, and now it dies
            rescue = Rescue(
                trainer=self.trainer,
                files=self._files,
                ring=self._ring,
                guard=self._guard,
                print_profile=self._print_profile,
                process=self._peers.process,
                bounded=bounded,
            )
            if hangs:
                self._hung = True
                self._attempt(lambda: rescue.run(death))
                return
            self._rescue = rescue
            self._attempt(lambda: self._peers.tell("failed"))
            self._attempt(lambda: rescue.run(death))
            rescue.progress_s, self._saved = awake_s(), True
            self._attempt(lambda: self._peers.tell("failed", saved=rescue.written is not None))

    def _go_on(self) -> None:
        """The signal for which evidence was saved ended nothing; a death will have its own."""
        with self._lock:
            if self._rescue is None or self._protection.caught_s() < self._rescue.begun_s:
                return
            if self._rescue.report.get("cause") == "signal":
                self._rescue, self._saved = None, False
                self._attempt(lambda: set_aside(self._files.crash))
                self._attempt(lambda: self._peers.tell("running"))

    def saving_for_s(self) -> float | None:
        """Since the latest step began; ``None`` before the first.

        Infinite once all is saved and the main thread knows nothing of it.
        """
        rescue = self._rescue
        if rescue is None:
            return None
        stuck = self._saved and not self._dying
        return float("inf") if stuck else awake_s() - rescue.progress_s

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            _log.error("While saving evidence: %s", in_words(error))

    def _tell_end(self) -> None:
        is_lost = self._rescue is not None and self._rescue.written is None
        self._peers.tell(self._state, saved=self._state == "failed" and not is_lost)
        if self._stage != "fit" and self._state == "finished":
            self._put_back_earlier()

    def _stand_in(self) -> None:
        """No hook that follows may start the profiler again; the next run finds it in place."""
        trainer = self.trainer
        trainer.profiler = _StandIn(self._profiler)

        def teardown_and_return() -> None:
            teardown.undo()
            try:
                teardown.original()
            finally:
                _take_profiler(trainer)
                self.leave()

        teardown = Patch(trainer, "_teardown", teardown_and_return)

    def _close_ours(self) -> None:
        """Lightning calls no teardown when a run fails."""
        trainer, module = self.trainer, self.trainer.lightning_module
        added = [callback for callback in trainer.callbacks if callback not in self._callbacks]
        for callback in [*self._callbacks, *added]:
            if isinstance(callback, History | RunProgressBar):
                self._attempt(lambda ours=callback: ours.teardown(trainer, module, "fit"))


class _StandIn(PassThroughProfiler):
    """In place of the profiler of a run that died, until Lightning has taken it down."""

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.kept = profiler


def recording_of(trainer: Trainer) -> Recording | None:
    """The recording of the run that a Trainer is in, until Lightning has shut it down."""
    found = recorded(trainer)
    return found if isinstance(found, Recording) else None


def add_note(error: BaseException, directory: Path, details: str) -> None:
    """Where to look; on stderr too, for errors that Python does not show."""
    error.add_note(f"Run directory: {directory} ({details}). Shown by: esper crash {directory}")
    if isinstance(error, KeyboardInterrupt | SystemExit):
        _log.warning("%s: %s", type(error).__name__, error.__notes__[-1])


def _take_profiler(trainer: Trainer) -> Profiler:
    if isinstance(trainer.profiler, _StandIn):
        trainer.profiler = trainer.profiler.kept
    return trainer.profiler


def _is_event_file(name: str) -> bool:
    return name.startswith("events.out.tfevents.") and "/" not in name


def _event_files(trainer: Trainer, directory: Path) -> list[Path]:
    """Files in a directory that the TensorBoard loggers of a run have begun."""
    files: list[Path] = []
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "_experiment", None)
        if isinstance(logger, TensorBoardLogger) and experiment is not None:
            path = Path(experiment.file_writer.event_writer._file_name).absolute()
            files += [path] if path.parent == directory else []
    return files


def _signal_of(error: BaseException) -> str | None:
    inner = error.__context__  # Lightning exits after Ctrl-C in a fit within this one
    if isinstance(error, SystemExit) and isinstance(inner, KeyboardInterrupt):
        error = inner
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT"
    if isinstance(error, SignalExit):
        return error.signal
    return "SIGTERM" if type(error).__name__ == "SIGTERMException" else None
