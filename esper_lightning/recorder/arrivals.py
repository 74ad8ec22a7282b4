"""Arriving signals: the recordings that a signal concerns, and the exception that it raises."""

import os
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from esper_lightning.callbacks.lightning_internals import note_sigterm
from esper_lightning.recorder.awake import awake_s
from esper_lightning.recorder.member import Member
from esper_lightning.recorder.signal_handlers import SignalHandlers
from esper_lightning.recorder.signals import SignalExit, end_by, in_main_thread
from esper_lightning.recorder.watchdog import Arrival

__all__ = ["Arrivals"]

_HANDLED_S = 1.0  # after our handler was called, the wakeup thread repeats no signal


class Arrivals:
    """Signals that arrive in the process: by Python's handler, in C, or by the wakeup descriptor.

    Args:
        members: Living recordings; the registry's own list.
        handlers: Handlers of signals that the recorder has set.

    Attributes:
        raised: Exception that the latest signal raised in the main thread; it may still unwind.
        caught_s: When a run of the main thread was last seen to continue (``awake_s``).
    """

    def __init__(self, members: Sequence[Member], handlers: SignalHandlers) -> None:
        self._members, self._handlers = members, handlers
        self._held = 0
        self._pending: list[int] = []
        self.raised: BaseException | None = None
        self.caught_s = -float("inf")
        self._handled_s: dict[int, float] = {}  # last call of our handler, by signal

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold signals back until the end of the block; the first signal then takes effect.

        Only the main thread holds signals back, because Python calls handlers there.
        """
        if not in_main_thread():
            yield
            return
        pid = os.getpid()
        self._held += 1
        try:
            yield
        finally:
            if os.getpid() == pid:  # a child that was forked in the block has left already
                self._held -= 1
                if not self._held and self._pending:
                    number, self._pending = self._pending[0], []
                    os.kill(pid, number)

    def forget_pending(self) -> None:
        """Drop the signals that arrived while the calling thread held them back."""
        if in_main_thread():
            self._pending = []

    def leave_in_child(self) -> None:
        """Hold nothing back in a forked child."""
        self._held, self._pending = 0, []

    def run_continues(self) -> None:
        """Note that a run of the main thread continues: the exception of a signal was caught."""
        self.caught_s = awake_s()
        self.raised = None

    def arrive(self, number: int) -> None:
        """Pass a signal to each watchdog whose run it ends; also called from within C."""
        unwinds = any(member.unwinds for member in self._members)
        ours = number in self._handlers.replaced or self._handlers.is_ours_in_c(number)
        if unwinds and not ours:
            return
        if not unwinds and not self._handlers.ends_process(number):
            return
        arrival = Arrival(number, awake_s(), unwinds)
        for member in list(self._members):
            # Ctrl-C ends only the main thread's work; Python lets other threads run.
            if member.in_main_thread or not arrival.interrupts:
                member.arrived.append(arrival)

    def arrive_early(self, number: int) -> None:
        """Pass on a signal of the wakeup descriptor: the main thread may be stuck in C."""
        if awake_s() - self._handled_s.get(number, -float("inf")) > _HANDLED_S:
            self.arrive(number)

    def _arrive_handled(self, number: int) -> None:
        self._handled_s[number] = awake_s()
        self.arrive(number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; Python calls this in the main thread."""
        mains = [member for member in self._members if member.in_main_thread]
        living = [member for member in mains if not member.ended]
        if self._held:
            self._pending.append(number)
        elif any(member.ended_by_signal for member in mains) or self._unwinds():
            pass  # the exception of the first signal is still unwinding
        elif living:
            self._arrive_handled(number)
            self._raise(number, frame, living[-1].of.trainer)
        elif any(not each.ended for each in self._members) and self._handlers.ends_process(number):
            self._arrive_handled(number)  # the watchdogs save evidence, and end the process
        else:
            self._do_as_before(number, frame)

    def _unwinds(self) -> bool:
        """Whether the exception of the latest signal is still unwinding, as in a ``finally``."""
        error = sys.exc_info()[1]
        seen = set[int]()  # a chain of contexts may be a circle
        while error is not None and id(error) not in seen:
            if error is self.raised:
                return True
            seen.add(id(error))
            error = error.__context__
        return False

    def _raise(self, number: int, frame: FrameType | None, trainer: Trainer) -> None:
        try:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            if number != signal.SIGTERM:
                raise SignalExit(number)
            replaced = self._handlers.replaced.get(number)
            if callable(replaced):
                replaced(number, frame)
            note_sigterm(trainer)
            launcher = trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(number)
            error = SIGTERMException()
            error.code = 128 + number  # Lightning leaves None: status 0
            raise error
        except BaseException as raised:
            self.raised = raised
            raise

    def _do_as_before(self, number: int, frame: FrameType | None) -> None:
        """Call the handler before ours: no recording lives, but somebody restored our handler."""
        original = self._handlers.original(number)
        if callable(original):
            original(number, frame)
        elif original is not signal.SIG_IGN:
            end_by(number)
