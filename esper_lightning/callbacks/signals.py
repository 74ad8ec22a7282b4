"""Signals that end a run, turned into exceptions: so that they unwind, and evidence can be saved.

Three levels. Python handlers raise in the main thread. The C-level wakeup descriptor tells the
watchdog of a signal at once, even while the main thread is stuck in C. Faults inside C (SIGSEGV,
SIGABRT, ...) reach a C handler that runs Python once more, bounded by ``alarm``.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import ctypes
import faulthandler
import functools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

__all__ = [
    "ENDING",
    "NativeFaults",
    "SignalExit",
    "Signals",
    "dump_stacks",
    "ignore_interrupts_while_ending",
]

ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGQUIT")
    if hasattr(signal, name)
)
_FAULTS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL")
_UNWINDING_S = 2.0
_LAST_GASP_S = 10
_Handler = Any
_libc = ctypes.CDLL(None)
_libc.signal.restype = ctypes.c_void_p
_libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]


class SignalExit(SystemExit):
    """Raised in the main thread by a signal that would have killed the process; code 128 + n."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


class Signals:
    """Handlers of one run: installed where nobody else listens, put back by ``restore``.

    A signal that somebody ignores or handles is left alone, but for SIGTERM, whose handler is
    called first. Where Lightning requeues a SLURM job, its own handlers stay.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._pid = os.getpid()
        self._trainer = trainer
        self._originals: dict[int, _Handler] = {}
        self._held = 0
        self._pending: list[int] = []
        self._raised_s = -float("inf")
        self._wakeup: tuple[int, int] | None = None
        self._active = False
        self.ignoring_interrupts = False  # afterwards, as Lightning has it while it shuts down

    def install(self) -> None:
        """Take over. Outside the main thread, where Python forbids it, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._active = True
        kept = _requeue_signals(self._trainer)
        for number in ENDING:
            current = signal.getsignal(number)
            ours = current is signal.SIG_DFL or current is signal.default_int_handler
            if number not in kept and (ours or (number == signal.SIGTERM and callable(current))):
                self._originals[number] = current
                signal.signal(number, self._handle)
        read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._wakeup = (read, write)
        _watch_forks(self)

    def reinstall(self) -> None:
        """After Lightning put its own SIGTERM handler over ours.

        Its handler waits for the end of the batch and, in ``ddp``, broadcasts from within.
        """
        connector = self._trainer._signal_connector
        for number, original in self._originals.items():
            signal.signal(number, self._handle)
            connector._original_handlers[number] = original

    def received(self) -> list[int]:
        """Ending signals since the last call, also while the main thread is stuck."""
        try:
            content = os.read(self._wakeup[0], 64) if self._wakeup else b""
        except (BlockingIOError, OSError):
            return []
        return [number for number in content if number in self._originals]

    @contextmanager
    def held(self) -> Generator[None]:
        """Signals that arrive within wait until its end; the first of them then takes effect."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held and self._pending:
                number, self._pending = self._pending[0], []
                if self._active:
                    os.kill(self._pid, number)

    def forget_pending(self) -> None:
        """Drop what arrived while evidence was being saved: the run is ending anyway."""
        self._pending = []

    def restore(self) -> None:
        """Put everything back."""
        if not self._active or os.getpid() != self._pid:
            return
        self._active = False
        for number, original in self._originals.items():
            mine = signal.getsignal(number) == self._handle
            if self.ignoring_interrupts and number == signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)
                self._trainer._signal_connector._original_handlers[number] = original
            elif mine:
                signal.signal(number, original)
        self._close_wakeup()

    def leave_in_child(self) -> None:
        """In a forked child, which is not the run."""
        if self._active:
            self._active = False
            for number, original in self._originals.items():
                signal.signal(number, original)
            self._close_wakeup(previous=-1)

    def _close_wakeup(self, previous: int | None = None) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._previous_wakeup if previous is None else previous)
            for descriptor in self._wakeup:
                os.close(descriptor)
            self._wakeup = None

    def _handle(self, number: int, frame: object) -> None:
        if self._held:
            self._pending.append(number)
            return
        now = time.monotonic()
        if now - self._raised_s < _UNWINDING_S:  # the first one is still unwinding
            return
        self._raised_s = now
        original = self._originals.get(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if number != signal.SIGTERM:
            raise SignalExit(number)
        if callable(original):
            original(number, frame)
        self._trainer._signal_connector.received_sigterm = True
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(number)
        error = SIGTERMException()
        error.code = 128 + number  # Lightning leaves None: status 0
        raise error


def ignore_interrupts_while_ending(trainer: Trainer) -> None:
    """Have Ctrl-C ignored until Lightning has shut down, and not for good.

    Lightning ignores it from an interrupt on, and for good where another callback then raises.
    """
    original: Any = trainer._signal_connector._original_handlers.get(signal.SIGINT)
    if original is None or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        return

    def handle(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "_call_and_handle_interrupt":  # Lightning's
                return
            frame = frame.f_back
        signal.signal(number, original)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, handle)


class NativeFaults:
    """Last words of a process that dies inside C: stacks, then ``rescue``, then the same death.

    Not async-signal-safe, and no worse than dying at once: the default action is restored first, so
    that a second fault kills, and ``alarm`` ends what hangs. A handler that was there before, such
    as that of ``PYTHONFAULTHANDLER``, has the last word.
    """

    _latest: "NativeFaults | None" = None

    def __init__(self, stacks: Path, rescue: Callable[[str], None]) -> None:
        self._pid = os.getpid()
        self._stacks = stacks
        self._rescue = rescue
        self._previous: dict[int, Any] = {}
        self._outer: NativeFaults | None = None

    def install(self) -> None:
        """Take over."""
        self._outer, NativeFaults._latest = NativeFaults._latest, self
        for name in _FAULTS:
            number = getattr(signal, name)
            self._previous[number] = _libc.signal(number, ctypes.cast(_on_fault, ctypes.c_void_p))
        _watch_forks(self)

    def restore(self) -> None:
        """Put the previous handlers back."""
        previous, self._previous = self._previous, {}
        for number, handler in previous.items():
            _libc.signal(number, handler)
        if NativeFaults._latest is self:
            NativeFaults._latest = self._outer
        self._outer = None

    def leave_in_child(self) -> None:
        """In a forked child, which is not the run."""
        self.restore()

    def die(self, number: int) -> None:
        """Called in the C handler, in whichever thread failed."""
        if os.getpid() == self._pid:
            _libc.signal(signal.SIGALRM, None)
            _libc.alarm(_LAST_GASP_S)
            name = signal.Signals(number).name
            dump_stacks(self._stacks, f"Fatal Python error: {signal.strsignal(number)} ({name})")
            self._rescue(name)
            _libc.alarm(0)
        _libc.signal(number, self._previous.get(number))


# One for all runs: C may hold it for ever, and is to hold no run by it.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_fault(number: int) -> None:
    _libc.signal(number, None)
    try:
        if NativeFaults._latest is not None:
            NativeFaults._latest.die(number)
    finally:
        getattr(_libc, "raise")(number)  # takes effect when this handler has returned


def dump_stacks(path: Path, heading: str) -> None:
    """Append the Python stacks of all threads to a file.

    Raises:
        OSError: If it cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        file.write(f"{heading}\n\n".encode())
        faulthandler.dump_traceback(file, all_threads=True)
        file.write(b"\n")


_in_runs: "weakref.WeakSet[Signals | NativeFaults]" = weakref.WeakSet()


@functools.cache
def _register_at_fork() -> None:  # there is no way to take such a function back
    def leave() -> None:
        for handlers in list(_in_runs):
            handlers.leave_in_child()

    os.register_at_fork(after_in_child=leave)


def _watch_forks(handlers: Signals | NativeFaults) -> None:
    _register_at_fork()
    _in_runs.add(handlers)


def _requeue_signals(trainer: Trainer) -> set[int]:
    """Signals that Lightning handles to requeue a SLURM job.

    With several ranks its SIGTERM handler broadcasts from within, wherever the others are: they
    would wait for each other for ever.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return set()
    requeue: int = environment.requeue_signal or signal.SIGUSR1
    return {requeue, signal.SIGTERM} if trainer.world_size == 1 else {requeue}
