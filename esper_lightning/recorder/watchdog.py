"""A thread that watches a run whose main thread may be stuck in C, or in a collective."""

import os
import signal
import threading
from collections.abc import Callable
from typing import NamedTuple

from esper_lightning.recorder.awake import LOOK_EVERY_S, awake_s
from esper_lightning.recorder.signals import end_by, flush_output, signal_name

__all__ = ["Alarm", "Arrival", "Watchdog"]

_PEERS_EVERY, _LOOKS_EVERY, _RENEWED_EVERY = 3, 5, 10  # polls
_PEER_GRACE_S = 0.5
_STALLED_S = 60.0  # longer than the time limit of any step of saving


class Alarm(NamedTuple):
    """An event that the watchdog noticed; ``cause`` is ``signal``, ``peer`` or ``hang``."""

    cause: str
    signal: str | None = None
    peer: tuple[int, str] | None = None
    silent_s: float = 0.0


class Arrival(NamedTuple):
    """A signal that arrived: its number, and the time (``awake_s``).

    ``unwinds`` states whether the main thread runs a recorded fit, which a Python handler ends by
    an exception. Otherwise the process dies as it would without its recorder, once evidence is
    saved.
    """

    number: int
    time_s: float
    unwinds: bool = True

    @property
    def interrupts(self) -> bool:
        """Whether the signal raises ``KeyboardInterrupt``, whose unwinding has no time limit."""
        return self.unwinds and self.number == signal.SIGINT


class Watchdog:
    """Polls ten times a second, and passes each event to ``act`` after a time for the main thread.

    All times are those of ``awake_s``.

    Args:
        received: Returns the signals that arrived since the last call.
        caught_s: Returns the time at which the main thread was last seen to continue. A signal
            that arrived earlier ended nothing: its exception was caught.
        renew: Sets handlers again that others may have removed; called once a second.
        peer: Returns a rank that failed, with the reason, or ``None``.
        act: Saves evidence; for ``signal`` and ``peer`` the first time only.
        look: Measures the process; called twice a second.
        saving_for_s: Returns the seconds since the latest step of saving evidence began: ``None``
            before the first step, infinite after the last.
        others_saving_for_s: Returns the values of ``saving_for_s`` of all recordings of the
            process.
        hang_timeout_s: Seconds after which an iteration hangs; ``None`` for no limit.
        stuck_grace_s: Seconds that the main thread has to react to a signal.
        exit_grace_s: Seconds after which a process that a signal should have ended is ended, unless
            it is saving evidence.
    """

    def __init__(
        self,
        *,
        received: Callable[[], list[Arrival]],
        caught_s: Callable[[], float],
        renew: Callable[[], None],
        peer: Callable[[], tuple[int, str] | None],
        act: Callable[[Alarm], None],
        look: Callable[[], None] = lambda: None,
        saving_for_s: Callable[[], float | None],
        others_saving_for_s: Callable[[], list[float | None]],
        hang_timeout_s: float | None,
        stuck_grace_s: float,
        exit_grace_s: float,
    ) -> None:
        self._received, self._caught_s, self._renew = received, caught_s, renew
        self._peer, self._act, self._look = peer, act, look
        self._saving_for_s, self._others_saving_for_s = saving_for_s, others_saving_for_s
        self._hang_timeout_s = hang_timeout_s
        self._stuck_grace_s, self._exit_grace_s = stuck_grace_s, exit_grace_s
        self._beat_s: float | None = None
        self._hung = False
        self._arrival: Arrival | None = None  # the signal that must end the process
        self._peer_due: tuple[float, Alarm] | None = None
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="flight-recorder")
        self._thread.start()

    @property
    def ends_by(self) -> int | None:
        """The signal that ends the process even if this run ends well; ``None`` without one."""
        arrivals = [*filter(None, [self._arrival]), *self._received()]
        for arrival in arrivals:
            if not arrival.unwinds:
                self._arrival = arrival  # nobody receives it again
                return arrival.number
        return None

    def beat(self) -> None:
        """Note that the run continues: an iteration, or a batch of a validation, begins or ends."""
        self._beat_s = awake_s()
        self._hung = False

    def rest(self) -> None:
        """Note that no iteration is running: silence is no hang."""
        self._beat_s = None

    def stop(self) -> None:
        """End the thread, and wait for its end unless the thread itself calls this."""
        self._ended.set()
        if threading.current_thread() is not self._thread and self._pid == os.getpid():
            self._thread.join(timeout=2.0)

    def _watch(self) -> None:
        with awake_s.watched():
            self._poll()

    def _poll(self) -> None:
        turn = 0
        while not self._ended.wait(LOOK_EVERY_S):
            turn += 1
            now = awake_s()
            self._look_for_signals(now)
            if turn % _PEERS_EVERY == 0 or self._peer_due is not None:
                self._look_for_peers(now)
            if turn % _LOOKS_EVERY == 0:
                self._look()
            self._look_for_a_hang(now)
            if turn % _RENEWED_EVERY == 0:
                self._renew()

    def _look_for_signals(self, now: float) -> None:
        for arrival in self._received():
            if self._arrival is None or self._arrival.interrupts:
                self._arrival = arrival
        arrival = self._arrival
        if arrival is None:
            return
        if arrival.unwinds and arrival.time_s < self._caught_s():
            self._arrival = None
            return
        waited_s = now - arrival.time_s if arrival.unwinds else float("inf")
        if waited_s >= self._stuck_grace_s and self._saving_for_s() is None:
            self._act(Alarm("signal", signal=signal_name(arrival.number)))
        if waited_s >= self._exit_grace_s and not arrival.interrupts:
            self._leave(arrival)

    def _leave(self, arrival: Arrival) -> None:
        saving_for_s = [self._saving_for_s(), *self._others_saving_for_s()]
        if any(seconds is None or seconds <= _STALLED_S for seconds in saving_for_s):
            return
        flush_output()
        if not arrival.unwinds:
            end_by(arrival.number)
        os._exit(128 + arrival.number)

    def _look_for_peers(self, now: float) -> None:
        if self._arrival is not None or self._saving_for_s() is not None:
            return
        failed = self._peer()
        if failed is None:  # a rank was starting, or has returned
            self._peer_due = None
        elif self._peer_due is None:
            self._peer_due = (now + _PEER_GRACE_S, Alarm("peer", peer=failed))
        elif now >= self._peer_due[0]:
            self._act(self._peer_due[1])

    def _look_for_a_hang(self, now: float) -> None:
        beat = self._beat_s
        if self._hang_timeout_s is None or beat is None or self._hung:
            return
        if now - beat > self._hang_timeout_s:
            self._hung = True
            self._act(Alarm("hang", silent_s=now - beat))
