"""The evidence of a process that dies inside C, saved by the handler of the fault."""

import contextlib
import os
import signal
import threading
from collections.abc import Sequence

from esper_lightning.recorder.member import Member
from esper_lightning.recorder.signal_handlers import SignalHandlers
from esper_lightning.recorder.signals import (
    alarm,
    dump_stacks,
    raise_in_this_thread,
    set_c_handler,
    signal_name,
)

__all__ = ["LastWords"]

_LAST_GASP_S = 10


class LastWords:
    """Saves stacks and evidence of every living recording, then lets the process die as it would.

    The handler is not async-signal-safe, and yet no worse than an immediate death: the default
    action is restored first, so that a second fault kills, and ``alarm`` ends a step that hangs.

    Args:
        members: Living recordings; the registry's own list.
        handlers: Handlers of signals that the recorder has set. A handler that was there before,
            such as the handler of ``PYTHONFAULTHANDLER``, is called last.

    Attributes:
        pid: Process of the recordings: in a forked child there is nothing to save.
    """

    def __init__(self, members: Sequence[Member], handlers: SignalHandlers) -> None:
        self._members, self._handlers = members, handlers
        self.pid = os.getpid()
        self._faulting: set[int] = set()

    def fault(self, number: int) -> None:
        """Save all evidence in the thread that failed, and raise the same signal again."""
        set_c_handler(number, 0)
        again = number in self._faulting  # the handler that was called last has returned
        self._faulting.add(number)
        try:
            if not again and os.getpid() == self.pid:
                self._save(number)
        finally:
            if not again:
                self._handlers.restore_fault(number)
            raise_in_this_thread(number)

    def _save(self, number: int) -> None:
        name = signal_name(number)
        here = threading.get_ident()
        living = sorted(
            (member for member in self._members if not member.ended),
            key=lambda member: member.thread != here,
        )
        alarm(_LAST_GASP_S)
        for member in living:
            with contextlib.suppress(OSError):
                text = f"Fatal Python error: {signal.strsignal(number)} ({name})"
                dump_stacks(member.of.stacks, text)
        for member in living:
            alarm(_LAST_GASP_S)
            member.of.last_gasp(name)
        alarm(0)
