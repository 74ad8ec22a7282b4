"""The registry of all recordings of a process, which begin and end in any order.

A process has one handler for each signal, one wakeup descriptor, and one function
``lightning...call._interrupt``. All three are the recorder's from the beginning of the first living
recording to the end of the last, whichever threads the recordings run in. A handler or function
that somebody else sets over the recorder's stays in place, and calls through the recorder's the one
that was there before.

Python sets handlers of signals and the wakeup descriptor in the main thread only. A recording that
begins in another thread catches signals in C at once; the main thread sets the rest as soon as the
main thread runs Python code.
"""

import atexit
import contextlib
import ctypes
import functools
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Trainer

from esper_lightning.callbacks.lightning_internals import INTERRUPT, run_depth
from esper_lightning.recorder.arrivals import Arrivals
from esper_lightning.recorder.last_words import LastWords
from esper_lightning.recorder.member import Member
from esper_lightning.recorder.patch import Patch
from esper_lightning.recorder.signal_handlers import SignalHandlers, listen_to_interrupts
from esper_lightning.recorder.signals import ENDING, FAULTS, in_main_thread, run_in_main_thread
from esper_lightning.recorder.wakeup import Wakeup

__all__ = ["registry"]


class _Registry:
    """All recordings of this process; the only instance is ``registry``.

    Args:
        address: Address of our handler in C.

    Attributes:
        members: Living recordings, in the order in which they began.
        handlers: Handlers of signals that the recorder has set.
        arrivals: Signals that arrive in the process.
        last_words: Evidence at faults in C.
    """

    def __init__(self, address: int) -> None:
        self._lock = threading.RLock()
        self._busy = False  # whether the main thread is in ``add`` or ``remove``
        self.members: list[Member] = []
        self.handlers = SignalHandlers(self._handle, address)
        self.arrivals = Arrivals(self.members, self.handlers)
        self.last_words = LastWords(self.members, self.handlers)
        self._wakeup: Wakeup | None = None
        self._interrupt: Patch | None = None
        self._undo = contextlib.ExitStack()  # changes that any thread may undo

    # Recordings begin and end.

    def add(self, member: Member) -> None:
        """Begin to protect a recording."""
        with self._changing():
            self.members.append(member)
            try:
                if len(self.members) == 1:
                    self._begin()
                if member.in_main_thread:
                    self.arrivals.raised = None
                else:
                    self.handlers.catch_in_c(self._wanted())
            except BaseException:
                self._remove(member)
                raise

    def remove(self, member: Member) -> None:
        """End the protection of a recording."""
        with self._changing():
            if member in self.members:
                self._remove(member)

    def member_of(self, trainer: Trainer) -> Member | None:
        """The latest recording of a Trainer, up to the end of Lightning's shutdown."""
        found = [member for member in self.members if member.of.trainer is trainer]
        return found[-1] if found else None

    def renew(self) -> None:
        """Set our handlers again where the default action was set; not for the main thread."""
        with self._lock:
            if not self.members:
                return
            self.handlers.catch_faults_again()
            if not any(member.in_main_thread for member in self.members):
                self.handlers.catch_in_c(self._wanted())
        run_in_main_thread(self._sync_later)

    def _remove(self, member: Member) -> None:
        self.members.remove(member)
        if not any(other.in_main_thread for other in self.members):
            self.arrivals.raised = None
        if not self.members:
            self._undo.close()

    @contextmanager
    def _changing(self) -> Generator[None]:
        """Context in which the registry is changed under its lock.

        When the context ends, the main thread updates Python's handlers of signals.
        """
        if not in_main_thread():
            try:
                with self._lock:
                    yield
            finally:
                run_in_main_thread(self._sync_later)
            return
        with self._lock, self.arrivals.held():
            outer, self._busy = self._busy, True
            try:
                yield
            finally:
                ended = self._sync()
                self._busy = outer
        if ended is not None:
            ended.join()

    def _begin(self) -> None:
        """Make the changes for the first recording that any thread may make."""
        self.last_words.pid = os.getpid()
        self._interrupt = Patch(*INTERRUPT, self._interrupted)
        self._undo.callback(self._interrupt.undo)
        atexit.register(self._at_exit)
        self._undo.callback(atexit.unregister, self._at_exit)
        # Worker processes of multiprocessing end without atexit.
        finalizer = multiprocessing.util.Finalize(self, self._at_exit, exitpriority=50)
        self._undo.callback(finalizer.cancel)
        self._wakeup = self._wakeup or Wakeup(self.arrivals.arrive_early)
        self._undo.callback(self.handlers.restore_in_c)
        self.handlers.catch_faults()
        _register_at_fork()

    def _wanted(self) -> list[int]:
        """Signals that end a process and that Lightning does not handle for SLURM."""
        left = set[int]().union(*(member.left_to_lightning for member in self.members))
        return [number for number in ENDING if number not in left]

    # Changes that the main thread alone may make.

    def _sync_later(self) -> None:
        """Update Python's handlers, between two instructions of the main thread's code.

        That code may hold any lock. Therefore this function waits for no lock, and starts no
        thread. The thread that holds the registry's lock requests another call afterwards.
        """
        if not self._busy and self._lock.acquire(blocking=False):
            try:
                self._sync()
            finally:
                self._lock.release()

    def _sync(self) -> threading.Thread | None:
        """Set or restore Python's handlers and the wakeup descriptor as recordings need.

        Returns:
            Thread of a wakeup descriptor that is no longer needed, which ends by itself; else
            ``None``.
        """
        unwinds = any(member.in_main_thread for member in self.members)
        self.handlers.restore(all_of_them=not self.members, unwinds=unwinds)
        wakeup = self._wakeup
        if self.members:
            for number in self._wanted():
                self.handlers.take(number, unwinds=unwinds)
            if wakeup is not None:
                wakeup.install()
        elif wakeup is not None:
            self._wakeup = None
            wakeup.close()
            return wakeup.thread
        return None

    # Functions that Python, Lightning and the system call.

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.arrivals.handle(number, frame)

    def _interrupted(self, trainer: Trainer, error: BaseException) -> None:
        """Replace Lightning's function that every error of a run reaches.

        Callbacks and loops may have been replaced since ``setup``, and the ``on_exception`` of
        another callback may raise before the recorder's.
        """
        assert self._interrupt is not None
        member = self.member_of(trainer)
        if member is not None and run_depth(trainer) > 1:
            member = None  # a run within a run: the outer run may continue
        if member is not None:
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            if ignored and signal.SIGINT in self.handlers.replaced and in_main_thread():
                self.handlers.take_again(signal.SIGINT)  # else it may be ignored for good
            member.of.die(error, lingers=True)
        try:
            self._interrupt.original(trainer, error)
        except BaseException:  # Lightning does not shut down this run
            listen_to_interrupts(trainer)
            if member is not None:
                member.of.leave()
            raise

    def _at_exit(self) -> None:
        for member in reversed(list(self.members)):
            member.of.at_exit()

    def leave_in_child(self) -> None:
        """Restore handlers in a forked child, which is not the run and has one thread only."""
        self._lock = threading.RLock()
        self.members.clear()
        self.arrivals.leave_in_child()
        self._busy = False
        self._undo.close()
        self.handlers.restore(all_of_them=True, unwinds=False)
        if self._wakeup is not None:
            self._wakeup.leave_in_child()
            self._wakeup = None


# One function for all recordings: C may hold it for ever, and must not hold a run by it.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_signal(number: int) -> None:
    if number in FAULTS:
        registry.last_words.fault(number)
    else:
        registry.arrivals.arrive(number)


registry = _Registry(ctypes.cast(_on_signal, ctypes.c_void_p).value or 0)
"""The registry of this process."""


@functools.cache
def _register_at_fork() -> None:  # such a function cannot be removed again
    os.register_at_fork(after_in_child=registry.leave_in_child)
