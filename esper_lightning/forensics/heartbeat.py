"""Signs of life of a process that cannot be seen from here: on another host, or in a container.

A process that records a run touches its ``process.json`` every few seconds. The times of the file
are compared with each other, and not with the clock of the reader: clocks of hosts differ.
Standard library only.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["BEAT_S", "GONE_S", "SILENT_S", "Pulse", "beat", "last_sign_s", "silent"]

BEAT_S = 1.0
"""Seconds from one sign of life to the next."""
SILENT_S = 4.0
"""Seconds without a sign of life after which nobody waits for a process any more."""
GONE_S = 8.0
"""Seconds without a sign of life after which a process that gives signs counts as dead."""

_LONG_AGO_S = 600.0  # more than clocks of hosts differ
_LOOK_S = 0.1


def beat(path: Path) -> None:
    """Give a sign of life, by touching a file that exists; a disk that refuses is ignored."""
    with contextlib.suppress(OSError):
        os.utime(path)


def last_sign_s(path: Path) -> float | None:
    """Time of the latest sign of life, by the clock of the file's disk or of the other host.

    Returns:
        Seconds since the epoch; ``None`` where the file cannot be read.
    """
    try:  # an open file has the present time; other times may be from the cache of a network disk
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_mtime
    except OSError:
        return None
    finally:
        os.close(descriptor)


class Pulse:
    """The signs of life of one process, as seen since the construction.

    Args:
        path: File that the process touches.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sign_s, self._seen_s = last_sign_s(path), time.monotonic()

    def silent_s(self) -> float:
        """Seconds since this reader has seen the latest sign, or began to look."""
        sign_s, now_s = last_sign_s(self._path), time.monotonic()
        if sign_s != self._sign_s:
            self._sign_s, self._seen_s = sign_s, now_s
        return now_s - self._seen_s


def silent(paths: Iterable[Path], *, wait_s: float | None = None) -> set[Path]:
    """The files that nobody touches while this function looks.

    Args:
        paths: Files that processes touch. A file whose latest sign is long ago is not waited for.
        wait_s: Longest time to wait, in seconds; ``None`` for ``GONE_S``.
    """
    signs = {path: last_sign_s(path) for path in paths}
    oldest_s = time.time() - _LONG_AGO_S
    end_s = time.monotonic() + (GONE_S if wait_s is None else wait_s)
    quiet = set(signs)
    recent = {path: sign for path, sign in signs.items() if sign is not None and sign > oldest_s}
    while quiet & recent.keys() and time.monotonic() < end_s:
        time.sleep(_LOOK_S)
        quiet -= {path for path, sign in recent.items() if last_sign_s(path) not in (sign, None)}
    return quiet
