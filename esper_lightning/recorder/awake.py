"""A clock that stands still while the process is suspended (SIGSTOP, Ctrl-Z, a debugger).

The system's clocks skip the time of a closed laptop, and count that of a suspended process.
"""

import contextlib
import os
import threading
import time
from collections.abc import Generator

__all__ = ["LOOK_EVERY_S", "awake_s"]

LOOK_EVERY_S = 0.1
"""Seconds between two looks at the clock, by everyone who relies on it."""
_LONGEST_GAP_S = 0.5  # between two looks of a process that is not suspended
_MOST_CPU_S = 0.3  # of the main thread in a gap, before it was suspended and after
_CPU_EVERY_S = 0.05  # it is slow to ask how long a thread has computed: tens of microseconds


class _AwakeClock:
    """Time that does not pass while the process is suspended.

    Every watchdog reads the clock ten times a second: in a longer gap the process was suspended,
    or a thread did not release the GIL.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # handlers of signals read the clock too
        self._read_s = self._asked_s = time.monotonic()
        self._cpu_s = _cpu_of_main_thread_s()
        self._suspended_s = self._certain_s = 0.0
        self._watchers = 0
        os.register_at_fork(after_in_child=self._renew)

    def __call__(self) -> float:
        """Seconds that count for time limits: in doubt, a gap does not count."""
        with self._lock:
            return self._look() - self._suspended_s

    def measured(self) -> float:
        """Seconds that count for metrics: in doubt, a gap counts.

        A gap does not count if the clock was watched, and the main thread was not computing.
        """
        with self._lock:
            return self._look() - self._certain_s

    @contextlib.contextmanager
    def watched(self) -> Generator[None]:
        """Context in which somebody reads the clock ten times a second."""
        self._watch(1)
        try:
            yield
        finally:
            self._watch(-1)

    def _watch(self, more: int) -> None:
        with self._lock:
            self._look()
            self._watchers += more

    def _look(self) -> float:
        now = time.monotonic()
        gap_s, self._read_s = now - self._read_s, now
        if now - self._asked_s < _CPU_EVERY_S:
            return now
        self._asked_s = now
        cpu_s, former_cpu_s = _cpu_of_main_thread_s(), self._cpu_s
        self._cpu_s = cpu_s
        if gap_s > _LONGEST_GAP_S:
            self._suspended_s += gap_s - LOOK_EVERY_S
            if self._watchers > 0 and cpu_s - former_cpu_s < _MOST_CPU_S:
                self._certain_s += gap_s - LOOK_EVERY_S
        return now

    def _renew(self) -> None:
        self._lock, self._watchers = threading.RLock(), 0


def _cpu_of_main_thread_s() -> float:
    """Seconds in which the main thread has computed; of all threads where a system has no more."""
    main = threading.main_thread()
    identity = main.ident if main.is_alive() else None
    if identity is not None and hasattr(time, "pthread_getcpuclockid"):
        with contextlib.suppress(OSError):  # a fork outside the main thread has made it another
            return time.clock_gettime(time.pthread_getcpuclockid(identity))
    return time.process_time()


awake_s = _AwakeClock()
"""Seconds that this process was awake, from an arbitrary start."""
