"""Signals: those that end a process, their names, and their handlers in C."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "ENDING",
    "FAULTS",
    "Action",
    "SignalExit",
    "alarm",
    "c_handler",
    "dump_stacks",
    "end_at_once",
    "end_by",
    "flush_output",
    "in_main_thread",
    "raise_in_this_thread",
    "read_action",
    "run_in_main_thread",
    "set_c_handler",
    "signal_behind",
    "signal_name",
    "write_action",
]

_HARMLESS = ("SIGCHLD", "SIGURG", "SIGWINCH", "SIGCONT", "SIGINFO")  # ignored by default
_STOPPING = ("SIGTSTP", "SIGTTIN", "SIGTTOU")
_NOBODY_HANDLES = ("SIGKILL", "SIGSTOP")
_FAULTS = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS", "SIGEMT")
_ACTION_BYTES = 256  # more than any system's struct sigaction; the handler comes first in it

_libc = ctypes.CDLL(None)
_libc.signal.restype = ctypes.c_void_p
_libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
_libc.sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

Action = ctypes.Array[ctypes.c_char]


def _numbers(*names: str) -> tuple[int, ...]:
    return tuple(int(getattr(signal, name)) for name in names if hasattr(signal, name))


FAULTS = _numbers(*_FAULTS)
"""Signals that faults in C code raise; no handler of Python's would be called in time."""
ENDING = tuple(
    sorted(
        {int(number) for number in signal.valid_signals()}
        - {*FAULTS, *_numbers(*_HARMLESS, *_STOPPING, *_NOBODY_HANDLES)}
    )
)
"""The other signals whose default action ends a process, the real-time signals among them."""


class SignalExit(SystemExit):
    """Raised in the main thread by a signal that would have killed the process; code 128 + n."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal_name(number)


def signal_behind(error: BaseException) -> str | None:
    """Name of the signal that raised an error in the main thread; ``None`` without a signal."""
    inner = error.__context__  # Lightning exits after Ctrl-C in a fit within this fit
    if isinstance(error, SystemExit) and isinstance(inner, KeyboardInterrupt):
        error = inner
    if isinstance(error, KeyboardInterrupt):
        return "SIGINT"
    if isinstance(error, SignalExit):
        return error.signal
    return "SIGTERM" if type(error).__name__ == "SIGTERMException" else None


def signal_name(number: int) -> str:
    """The name of a signal; most real-time signals have none in Python: ``SIGRTMIN+3``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def dump_stacks(path: Path, heading: str) -> None:
    """Append the Python stacks of all threads to a file.

    Args:
        path: Path of the file.
        heading: Line above the stacks.

    Raises:
        OSError: If the file cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        file.write(f"{heading}\n\n".encode())
        faulthandler.dump_traceback(file, all_threads=True)
        file.write(b"\n")


def read_action(number: int) -> Action:
    """What the C library does at a signal, with all flags.

    Args:
        number: Number of the signal.
    """
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    _libc.sigaction(number, None, action)
    return action


def write_action(number: int, action: Action) -> None:
    """Restore what the C library does at a signal; any thread may call this function.

    Args:
        number: Number of the signal.
        action: Result of ``read_action``.
    """
    _libc.sigaction(number, action, None)


def c_handler(number: int) -> int:
    """Address of a signal's handler in C; 0 for the default action, 1 for an ignored signal."""
    return ctypes.c_void_p.from_buffer(read_action(number)).value or 0


def set_c_handler(number: int, address: int) -> None:
    """Set a signal's handler in C, of which Python does not know; any thread may call this.

    Args:
        number: Number of the signal.
        address: Address of the handler; 0 for the default action, 1 to ignore the signal.
    """
    _libc.signal(number, address)


def alarm(seconds: int) -> None:
    """Make the kernel end this process by SIGALRM in some seconds; 0 cancels that."""
    _libc.signal(signal.SIGALRM, None)
    _libc.alarm(seconds)


def raise_in_this_thread(number: int) -> None:
    """Send a signal to the calling thread; it takes effect once a running handler returns."""
    getattr(_libc, "raise")(number)


def end_by(number: int) -> None:
    """End this process as the default action of a signal does; any thread may call this."""
    set_c_handler(number, 0)
    os.kill(os.getpid(), number)


def end_at_once(status: int) -> None:
    """End this process with an exit status, whatever its threads do; any thread may call this."""
    flush_output()
    os._exit(status)


def flush_output() -> None:
    """Write what is printed so far, if somebody still reads it."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()


def in_main_thread() -> bool:
    """Whether the caller runs in the main thread, where Python calls handlers of signals."""
    return threading.current_thread() is threading.main_thread()


_jobs: deque[Callable[[], None]] = deque()


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
def _run_jobs(_: object) -> int:
    while _jobs:
        _jobs.popleft()()
    return 0


def run_in_main_thread(function: Callable[[], None]) -> None:
    """Call a function in the main thread: at once from there, else before its next instruction.

    If the main thread waits in C, as in ``Thread.join``, the call follows after the wait.
    """
    if in_main_thread():
        function()
    else:
        if function not in _jobs:
            _jobs.append(function)
        ctypes.pythonapi.Py_AddPendingCall(_run_jobs, None)
