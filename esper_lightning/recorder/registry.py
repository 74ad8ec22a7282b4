"""What recordings change in their process: one registry, in which they come and go in any order.

A process has one handler for a signal, one wakeup descriptor, one ``lightning...call._interrupt``.
They are ours from the beginning of the first living recording to the end of the last, whichever
threads those run in. What somebody else puts over ours stays where it is, and reaches through ours
what was there before.

Python sets handlers of signals and the wakeup descriptor in the main thread only. A recording that
begins in another thread catches signals in C at once, and has the main thread do the rest as soon
as it runs.
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
    """The recordings of this process; there is one registry, ``registry``.

    Args:
        address: Address of our handler in C.

    Attributes:
        members: Recordings that live, in the order in which they began.
        handlers: Handlers of signals that are ours.
        arrivals: Signals as they arrive.
        last_words: Evidence of faults in C.
    """

    def __init__(self, address: int) -> None:
        self._lock = threading.RLock()
        self._busy = False  # the main thread is within ``add`` or ``remove``
        self.members: list[Member] = []
        self.handlers = SignalHandlers(self._handle, address)
        self.arrivals = Arrivals(self.members, self.handlers)
        self.last_words = LastWords(self.members, self.handlers)
        self._wakeup: Wakeup | None = None
        self._interrupt: Patch | None = None
        self._undo = contextlib.ExitStack()  # what any thread may undo

    # Recordings come and go.

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
        """Take again what somebody has set to its default action; not for the main thread."""
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
        """Change the registry alone; then the main thread sets and restores what it alone may."""
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
        """Do what any thread may do for the first recording."""
        self.last_words.pid = os.getpid()
        self._interrupt = Patch(*INTERRUPT, self._interrupted)
        self._undo.callback(self._interrupt.undo)
        atexit.register(self._at_exit)
        self._undo.callback(atexit.unregister, self._at_exit)
        # Worker processes of multiprocessing leave without atexit.
        finalizer = multiprocessing.util.Finalize(self, self._at_exit, exitpriority=50)
        self._undo.callback(finalizer.cancel)
        self._wakeup = self._wakeup or Wakeup(self.arrivals.arrive_early)
        self._undo.callback(self.handlers.restore_in_c)
        self.handlers.catch_faults()
        _register_at_fork()

    def _wanted(self) -> list[int]:
        """Signals that end a process and are not Lightning's to handle."""
        left = set[int]().union(*(member.left_to_lightning for member in self.members))
        return [number for number in ENDING if number not in left]

    # What the main thread alone may do.

    def _sync_later(self) -> None:
        """Called between two instructions of whatever the main thread does.

        That may hold any lock, so that nothing here waits for one, or starts a thread. The thread
        that has our lock asks for this again.
        """
        if not self._busy and self._lock.acquire(blocking=False):
            try:
                self._sync()
            finally:
                self._lock.release()

    def _sync(self) -> threading.Thread | None:
        """Bring Python's handlers and the wakeup descriptor to what the living recordings need.

        Returns:
            The thread of the wakeup descriptor where that is no longer needed; it ends by itself.
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

    # What others call.

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.arrivals.handle(number, frame)

    def _interrupted(self, trainer: Trainer, error: BaseException) -> None:
        """In place of Lightning's function that every error of a run comes to.

        Callbacks and loops may have been replaced since ``setup``, and the ``on_exception`` of
        another callback may raise before ours.
        """
        assert self._interrupt is not None
        member = self.member_of(trainer)
        if member is not None and run_depth(trainer) > 1:
            member = None  # a run within a run: the outer one may continue
        if member is not None:
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            if ignored and signal.SIGINT in self.handlers.replaced and in_main_thread():
                self.handlers.take_again(signal.SIGINT)  # Lightning might ignore it for good
            member.of.die(error, lingers=True)
        try:
            self._interrupt.original(trainer, error)
        except BaseException:  # Lightning does not shut down what raises now
            listen_to_interrupts(trainer)
            if member is not None:
                member.of.leave()
            raise

    def _at_exit(self) -> None:
        for member in reversed(list(self.members)):
            member.of.at_exit()

    def leave_in_child(self) -> None:
        """Leave a forked child, which is not the run: it has one thread, and Python's handlers."""
        self._lock = threading.RLock()
        self.members.clear()
        self.arrivals.leave_in_child()
        self._busy = False
        self._undo.close()
        self.handlers.restore(all_of_them=True, unwinds=False)
        if self._wakeup is not None:
            self._wakeup.leave_in_child()
            self._wakeup = None


# One for all recordings: C may hold it for ever, and is to hold no run by it.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_signal(number: int) -> None:
    if number in FAULTS:
        registry.last_words.fault(number)
    else:
        registry.arrivals.arrive(number)


registry = _Registry(ctypes.cast(_on_signal, ctypes.c_void_p).value or 0)
"""The registry of this process."""


@functools.cache
def _register_at_fork() -> None:  # there is no way to take such a function back
    os.register_at_fork(after_in_child=registry.leave_in_child)
