"""The recording of one run: all that watches the run, and what saves its evidence at a death."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from esper_lightning.callbacks.history import History
from esper_lightning.callbacks.lightning_internals import RUN_STAGE, TunerExit, run_depth
from esper_lightning.callbacks.progress import RunProgressBar
from esper_lightning.core.ranks import PeerFailedError, noting_collectives
from esper_lightning.forensics.asides import rename_aside
from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.death import Death
from esper_lightning.recorder.memory_snapshot import forget_memory, watch_memory
from esper_lightning.recorder.note import add_note, where_evidence_is
from esper_lightning.recorder.patch import Patch
from esper_lightning.recorder.peers import end_of_run, lost_a_peer
from esper_lightning.recorder.profiler_guard import ProfilerGuard
from esper_lightning.recorder.protection import Protection, recorded
from esper_lightning.recorder.rank_files import open_rank_files
from esper_lightning.recorder.rescue import Rescue
from esper_lightning.recorder.saving import Saving
from esper_lightning.recorder.signals import dump_stacks, end_at_once, end_by, signal_behind
from esper_lightning.recorder.stand_in import own_profiler, stand_in
from esper_lightning.recorder.state import LifeCycle, State
from esper_lightning.recorder.watchdog import Alarm, Watchdog

__all__ = ["Recording", "recording_of"]

_log = logging.getLogger(__name__)
_FAILED = 1  # exit status of a run that hung
_STUCK_GRACE_S, _EXIT_GRACE_S, _PEER_GRACE_S = 2.0, 4.0, 10.0


class Recording:
    """The recording of one run, from its construction to ``close``.

    ``close`` restores everything, in any order with other recordings. After an error that Lightning
    still handles, the protection from a second signal stays until Lightning has shut down the run
    (``leave``).

    Args:
        trainer: Trainer of the run.
        layout: Run directory.
        hang_timeout_s: Seconds after which an iteration counts as hanging; ``None`` for never.
        hang_ends: Whether a hang ends the process, once its evidence is saved.
        print_profile: Whether the table of a rescued window is printed.
        watch: Whether a second process watches this one.
        on_end: Function called at the end, when nothing more is written.
        stage: Stage of the run as Lightning names it. After a stage other than ``fit`` that ends
            well, the evidence of an earlier run is restored.
        met: Processes of the ranks, as ``peers.meet`` returns them; empty where they have not met.

    Raises:
        OSError: If the run directory takes no files; the process is unchanged then.
    """

    def __init__(
        self,
        trainer: Trainer,
        layout: RunLayout,
        *,
        hang_timeout_s: float | None,
        hang_ends: bool = False,
        print_profile: bool,
        watch: bool,
        on_end: Callable[[], None] = lambda: None,
        stage: str = "fit",
        met: Sequence[ProcessRecord] = (),
    ) -> None:
        self._pid = os.getpid()
        self._on_end = on_end
        self.trainer, self._layout = trainer, layout
        self._files: RankLayout = layout.rank(trainer.global_rank)
        self._print_profile = print_profile
        self._trains = stage == "fit"
        self._hang_ends = hang_ends
        self._life = LifeCycle()
        self._callbacks = list(trainer.callbacks)  # the Trainer's list may be replaced
        # A signal takes effect once all that the recording changes is also restored by it.
        with (
            Protection.held(),
            contextlib.ExitStack() as undo,
            contextlib.ExitStack() as leave,
        ):
            self._peers, self._ring, self._earlier = open_rank_files(
                trainer, layout, undo, met=met, watch=watch, trains=self._trains
            )
            self._saving = Saving(self._files, self._peers, self._make_rescue, hangs_end=hang_ends)
            undo.callback(attempt, self._report_end)
            undo.callback(noting_collectives(self._ring.collective))
            try:
                self._begin_watching(undo, leave, hang_timeout_s)
            except Exception:  # of the recorder: the run continues, and other ranks with it
                self._advance(State.OFF)
                raise
            self._undo, self._leave = undo.pop_all(), leave.pop_all()

    def _make_rescue(self, bounded: bool) -> Rescue:
        return Rescue(
            trainer=self.trainer,
            files=self._files,
            ring=self._ring,
            guard=self._guard,
            print_profile=self._print_profile,
            process=self._peers.process,
            callbacks=self._all_callbacks,
            bounded=bounded,
        )

    def _begin_watching(
        self,
        undo: contextlib.ExitStack,
        leave: contextlib.ExitStack,
        hang_timeout_s: float | None,
    ) -> None:
        trainer = self.trainer
        self._run_stage = Patch(trainer, RUN_STAGE, self._run_guarded)
        undo.callback(self._run_stage.undo)
        self._protection = Protection(self)
        leave.callback(lambda: self._protection.restore(run_continues=self._state is State.OFF))
        self._protection.install()
        undo.callback(forget_memory, self._files)
        self._profiler = own_profiler(trainer)
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
            look=self._look,
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
    def _state(self) -> State:
        return self._life.state

    def _advance(self, state: State) -> bool:
        """Enter another state, unless the recording has ended, or this is a forked child.

        Returns:
            Whether the state was entered.
        """
        return os.getpid() == self._pid and self._life.enter(state)

    def begin_iteration(self, number: int) -> None:
        """Note that an iteration begins, in the ring and for the watchdog."""
        self.beat()
        self._saving.forget_caught_signal(self._protection.caught_s())
        self._ring.iteration = number

    @property
    def fingerprint(self) -> Fingerprint | None:
        """All that decides what the run does, besides its state; ``None`` if it is not known."""
        return self._peers.process.fingerprint

    def note_resumption(self, before: Fingerprint) -> tuple[str, ...]:
        """Note the fingerprint of the run that is resumed, and return what differs from it."""
        if self.fingerprint is not None:
            self._peers.note_fingerprint(self.fingerprint, before)
            attempt(lambda: self._peers.report(self._state.value), what=None)
        return self._peers.process.differences

    def beat(self) -> None:
        """Tell the watchdog that an iteration, or a batch of a validation, has begun or ended."""
        self._protection.beat()
        self.watchdog.beat()

    def begin_training(self) -> None:
        """Note that training begins: checkpoints are loaded, and CUDA is in use if at all."""
        rename_aside(self._files.crash_checkpoint)
        watch_memory(self._files)

    def die(self, error: BaseException, *, lingers: bool) -> None:
        """Save all evidence in the thread of the fit, wait for other ranks, and close.

        Args:
            error: Error that the run died of.
            lingers: Whether Lightning will shut down the run, and ``leave`` is called afterwards.
        """
        self._protection.set_status(error)
        # Without the lock: another thread may hold it for as long as it saves.
        if not self._advance(State.DYING):  # the evidence was saved closer to the fault
            return
        signal_name = signal_behind(error)
        with self._protection.held():
            self._save_error(error, signal_name)
            attempt(self._close_ours)
            attempt(lambda: self._peers.wait_until_saved(_PEER_GRACE_S))
            self._protection.forget_pending()
        self._protection.end(by_signal=signal_name is not None)
        attempt(lambda: stand_in(self.trainer, self._profiler, on_return=self.leave))
        attempt(lambda: self._close(State.FAILED))
        if not lingers:
            self.leave()

    def _save_error(self, error: BaseException, signal_name: str | None) -> None:
        death = Death(cause="exception", error=error)
        if isinstance(error, PeerFailedError) or lost_a_peer(error):
            death = Death(cause="peer", error=error, peer=self._peers.first_failure())
        elif signal_name is not None:
            death = self._death_by_signal(signal_name, error)
        self._save(death)
        attempt(lambda: self._note(error))

    def _death_by_signal(self, name: str, error: BaseException | None = None) -> Death:
        """A death by a signal; launchers send SIGTERM to the ranks that are left when one is gone.

        A launcher may be faster than this rank's own look at the others.
        """
        vanished = self._peers.first_vanished() if name == "SIGTERM" else None
        cause = "signal" if vanished is None else "peer"
        return Death(cause=cause, error=error, signal=name, peer=vanished)

    def save_for_launcher(self) -> None:
        """Save all evidence in the launcher's thread, which is about to kill this process."""
        peer = self._peers.first_failure() or (-1, "the launcher kills every rank")
        self._save(Death(cause="peer", peer=peer))

    def close(self, state: State) -> None:
        """Restore everything as it was before the run.

        Args:
            state: Final state of the recording, which other ranks read.
        """
        self._close(state)
        self.leave()

    def _close(self, state: State) -> None:
        if not self._advance(state):
            return
        self.watchdog.rest()
        if state is State.FINISHED and self.watchdog.ends_by is None:
            attempt(self._saving.finish)
        self._undo.close()
        if state is not State.OFF:  # else the history is still written
            self._on_end()
        end_of_run()

    def leave(self) -> None:
        """End the recording's protection of the process."""
        if os.getpid() != self._pid:
            return
        self._leave.close()
        self._saving.rescue = None
        number = self.watchdog.ends_by
        if number is not None and not self._protection.others_saving_for_s():
            end_by(number)  # the last run ended before the signal took effect

    def approach_end(self) -> None:
        """Note that the run has reached its end, but for the report of its profiler."""
        if self.trainer.profiler is not self._profiler:  # nobody will call ``describe`` of ours
            self._described()

    # Entry points of a death.

    def _run_guarded(self) -> Any:
        """Run the Trainer's stage, and save all evidence when an error leaves it.

        In processes that a launcher spawned ``on_exception`` is never called, and the
        ``on_exception`` of another callback could raise before the recorder's.
        """
        trainer = self.trainer
        if run_depth(trainer) > 1:  # a run within this one, whose errors somebody may catch
            return self._run_stage.original()
        try:
            self._protection.reinstall()
            return self._run_stage.original()
        except TunerExit:
            raise
        except BaseException as error:
            # After Ctrl-C Lightning's shutdown sets a handler, which fails outside the main thread.
            fails = isinstance(error, KeyboardInterrupt) and not self._protection.in_main_thread
            self.die(error, lingers=run_depth(trainer) > 0 and not fails)
            raise

    def _act(self, alarm: Alarm) -> None:
        """Save all evidence in the watchdog's thread."""
        if alarm.cause == "hang":
            heading = f"No iteration has ended for {alarm.silent_s:.1f} s"
            attempt(lambda: dump_stacks(self._files.stacks, heading))
        if alarm.signal is None:
            self._save(Death(cause=alarm.cause, peer=alarm.peer))
        else:
            self._save(self._death_by_signal(alarm.signal))
        if alarm.cause == "hang" and self._hang_ends and not self._has_left:
            # The other ranks hang, too: a launcher kills them once this process has ended.
            attempt(lambda: self._peers.wait_until_saved(_PEER_GRACE_S))
            directory, silent_s = self._layout.directory, alarm.silent_s
            _log.error("A hang of %.0f s ends the run. Run directory: %s", silent_s, directory)
            end_at_once(_FAILED)

    def _look(self) -> None:
        """Note the memory of the process; give and note signs of life of ranks on other hosts."""
        self._ring.note_memory()
        if not self._has_left:
            self._peers.beat()
            self._peers.listen()

    def last_gasp(self, signal_name: str) -> None:
        """Save the evidence that a C signal handler can save, in the thread that failed."""
        if not self._has_left:
            self._saving.save_in_c(Death(cause="native", signal=signal_name))

    def at_exit(self) -> None:
        """Save all evidence: the interpreter ends before the run does."""
        self._save(Death(cause="exit"))
        self._close(State.FAILED)
        self.leave()

    def _described(self) -> None:
        """Close after ``describe`` of the profiler, the last action of a run that ended well."""
        if run_depth(self.trainer) <= 1:
            self.close(State.FINISHED)

    # Actions at a death and at the end.

    def _note(self, error: BaseException) -> None:
        rescue = self._saving.rescue
        if rescue is None:  # saving failed altogether, and was logged
            return
        details = where_evidence_is(self._files, rescue)
        add_note(error, self._layout.directory, details)

    @property
    def _has_left(self) -> bool:
        """Whether nothing is left to save: the recording has ended, or this is a forked child."""
        return self._state.has_ended or os.getpid() != self._pid

    def _save(self, death: Death) -> None:
        if self._has_left:
            return
        self._saving.save(death)

    def saving_for_s(self) -> float | None:
        """Seconds since the latest step of saving began; ``None`` before the first.

        Infinite once all is saved and the thread of the fit has not noticed the death.
        """
        is_known = self._state in (State.DYING, State.FAILED)
        return self._saving.going_for_s(is_known=is_known)

    def _report_end(self) -> None:
        began = self._state.has_ended  # else the run dies before its recording has begun
        state = self._state if began else State.FAILED
        saved = began and state is State.FAILED and not self._saving.is_lost
        self._peers.report(state.value, saved=saved)
        if state is State.FINISHED and not self._trains:
            self._earlier.restore(self._peers.process)

    def _all_callbacks(self) -> list[Callback]:
        """Callbacks that the run began with, and callbacks that were added later."""
        callbacks: list[Callback] = self.trainer.callbacks
        return [*self._callbacks, *(each for each in callbacks if each not in self._callbacks)]

    def _close_ours(self) -> None:
        """Tear down our callbacks with files or bars: Lightning does not after an error."""
        trainer, module = self.trainer, self.trainer.lightning_module
        for callback in self._all_callbacks():
            if isinstance(callback, History | RunProgressBar):
                attempt(partial(callback.teardown, trainer, module, "fit"))


def recording_of(trainer: Trainer) -> Recording | None:
    """The recording of a Trainer's current run, until Lightning has shut down the run."""
    found = recorded(trainer)
    return found if isinstance(found, Recording) else None
