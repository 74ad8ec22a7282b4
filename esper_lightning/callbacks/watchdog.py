"""A thread that looks after a run whose main thread cannot: stuck in C, or in a collective."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Alarm", "Watchdog"]

_PERIOD_S = 0.1
_PEERS_EVERY, _LOOKS_EVERY = 3, 5
_PEER_GRACE_S = 0.5
_STALLED_S = 60.0  # more than any step of saving is given


class Alarm(NamedTuple):
    """What the watchdog noticed: ``signal``, ``peer`` or ``hang``."""

    cause: str
    signal: str | None = None
    peer: tuple[int, str] | None = None
    silent_s: float = 0.0


class Watchdog:
    """Polls ten times a second, and hands what it notices to ``act`` once the main thread had time.

    Args:
        received: Numbers of the signals that came in since the last call.
        peer: A rank that failed, with the reason.
        look: Called twice a second.
        act: Saves evidence; for ``signal`` and ``peer`` the first time only.
        saving_for_s: Seconds since the latest step of saving evidence began: ``None`` before the
            first, infinite after the last.
        hang_timeout_s: An iteration that takes longer hangs; ``None`` for never.
        stuck_grace_s: Time that the main thread has to react to a signal.
        exit_grace_s: Time after which a process that was told to end, and does not, is ended; not
            while it saves evidence.
    """

    def __init__(
        self,
        *,
        received: Callable[[], list[int]],
        peer: Callable[[], tuple[int, str] | None],
        act: Callable[[Alarm], None],
        look: Callable[[], None] = lambda: None,
        saving_for_s: Callable[[], float | None],
        hang_timeout_s: float | None,
        stuck_grace_s: float,
        exit_grace_s: float,
    ) -> None:
        self._received, self._peer, self._act, self._look = received, peer, act, look
        self._saving_for_s = saving_for_s
        self._hang_timeout_s = hang_timeout_s
        self._stuck_grace_s, self._exit_grace_s = stuck_grace_s, exit_grace_s
        self._beat_s: float | None = None
        self._alive_s = -float("inf")
        self._hung = False
        self._due: tuple[float, Alarm] | None = None
        self._exit: tuple[float, int] | None = None
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="flight-recorder")
        self._thread.start()

    def beat(self) -> None:
        """The main thread is alive: an iteration, or a batch of a validation, begins or ended.

        A signal that came before this ended nothing: somebody caught what it raised.
        """
        self._beat_s = self._alive_s = time.monotonic()
        self._hung = False

    def rest(self) -> None:
        """No iteration is running: silence is no hang."""
        self._beat_s = None

    def stop(self) -> None:
        """End the thread; from the thread itself it ends soon after."""
        self._ended.set()
        if threading.current_thread() is not self._thread and self._pid == os.getpid():
            self._thread.join(timeout=2.0)

    def _watch(self) -> None:
        turn = 0
        while not self._ended.wait(_PERIOD_S):
            turn += 1
            now = time.monotonic()
            self._look_for_signals(now)
            if turn % _PEERS_EVERY == 0:
                self._look_for_peers(now)
            if turn % _LOOKS_EVERY == 0:
                self._look()
            self._look_for_a_hang(now)
            self._forget_what_was_caught()
            saving_for_s = self._saving_for_s()
            if self._due is not None and now >= self._due[0] and saving_for_s is None:
                self._act_on(self._due[1])
            elif self._exit is not None and now >= self._exit[0]:
                self._leave(saving_for_s)

    def _forget_what_was_caught(self) -> None:
        due, leaves = self._due, self._exit
        if due is not None and due[1].cause == "signal":
            self._due = due if due[0] - self._stuck_grace_s >= self._alive_s else None
        if leaves is not None and leaves[0] - self._exit_grace_s < self._alive_s:
            self._exit = None

    def _act_on(self, alarm: Alarm) -> None:
        if alarm.cause == "peer" and self._peer() is None:  # it was starting, or is back
            self._due = None
        else:
            self._act(alarm)

    def _leave(self, saving_for_s: float | None) -> None:
        if saving_for_s is not None and saving_for_s > _STALLED_S:
            with contextlib.suppress(Exception):  # nobody may be reading any more
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(self._exit[1] if self._exit else 1)

    def _look_for_peers(self, now: float) -> None:
        if self._due is None and self._saving_for_s() is None:
            failed = self._peer()
            if failed is not None:
                self._due = (now + _PEER_GRACE_S, Alarm("peer", peer=failed))

    def _look_for_signals(self, now: float) -> None:
        for number in self._received():
            if self._due is None or self._due[1].cause == "peer":
                alarm = Alarm("signal", signal=signal.Signals(number).name)
                self._due = (now + self._stuck_grace_s, alarm)
            if self._exit is None and number != signal.SIGINT:
                self._exit = (now + self._exit_grace_s, 128 + number)

    def _look_for_a_hang(self, now: float) -> None:
        beat = self._beat_s
        if self._hang_timeout_s is None or beat is None or self._hung:
            return
        if now - beat > self._hang_timeout_s:
            self._hung = True
            self._act(Alarm("hang", silent_s=now - beat))
