"""The recorder's handlers of signals, in Python and in C, and the handlers before them."""

import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

from esper_lightning.callbacks.lightning_internals import handlers_to_restore, is_handler_of
from esper_lightning.recorder.signals import (
    ENDING,
    FAULTS,
    Action,
    c_handler,
    read_action,
    set_c_handler,
    write_action,
)

__all__ = ["Handler", "SignalHandlers", "listen_to_interrupts"]

Handler = Any
"""A handler of Python's: a function, ``SIG_DFL``, ``SIG_IGN``, or ``None`` for one set in C."""


class SignalHandlers:
    """Sets the recorder's handlers where a signal has no other, and restores the previous ones.

    "Our handler" is the recorder's. Python sets handlers in the main thread only; any thread may
    set a handler in C, behind Python's back.

    Args:
        handle: Our handler in Python.
        address: Address of our handler in C.

    Attributes:
        replaced: Handlers of Python's that ours have replaced, by signal.
    """

    def __init__(self, handle: Callable[[int, FrameType | None], None], address: int) -> None:
        self._handle, self._address = handle, address
        self.replaced: dict[int, Handler] = {}
        self._replaced_earlier: dict[int, Handler] = {}  # ``replaced`` of earlier recordings
        self._pythons_address: int | None = None  # address of Python's own handler in C
        self._faults_before: dict[int, Action] = {}

    # State of the handlers.

    def is_ours(self, number: int) -> bool:
        """Whether Python calls our handler for a signal."""
        return signal.getsignal(number) == self._handle

    def is_ours_in_c(self, number: int) -> bool:
        """Whether C calls our handler for a signal, behind Python's back."""
        return c_handler(number) == self._address

    def all_ours(self) -> set[int]:
        """Signals for which a handler of ours, in Python or in C, has replaced another."""
        in_c = {number for number in (*FAULTS, *ENDING) if self.is_ours_in_c(number)}
        return in_c.union(self.replaced)

    def ends_process(self, number: int) -> bool:
        """Whether a signal would have ended the process if our handlers were not there."""
        by_python = self.is_ours(number) and self.replaced.get(number) is signal.SIG_DFL
        return by_python or self.is_ours_in_c(number)

    def original(self, number: int) -> Handler:
        """Python's handler of a signal before ours, also where ours was restored after its end."""
        earlier = self._replaced_earlier.get(number, signal.SIG_DFL)
        return self.replaced.get(number, earlier)

    # Handlers in C, which any thread may set.

    def catch_faults(self) -> None:
        """Set our handler in C for faults that have no handler."""
        for number in FAULTS:
            ours = self.is_ours_in_c(number)
            if not ours and signal.getsignal(number) in (signal.SIG_DFL, None):
                self._faults_before[number] = read_action(number)
                set_c_handler(number, self._address)

    def catch_faults_again(self) -> None:
        """Set our handler for faults again where the default action was set since."""
        for number in self._faults_before:
            if c_handler(number) == 0 and signal.getsignal(number) is signal.SIG_DFL:
                set_c_handler(number, self._address)

    def restore_fault(self, number: int) -> None:
        """Restore the previous action of C at a fault, so that its handler is called last."""
        if number in self._faults_before:
            write_action(number, self._faults_before[number])

    def catch_in_c(self, numbers: Iterable[int]) -> None:
        """Set our handler in C for signals that would end the process."""
        for number in numbers:
            pythons = signal.getsignal(number)
            if c_handler(number) == 0 and (pythons is signal.SIG_DFL or pythons == self._handle):
                set_c_handler(number, self._address)

    def restore_in_c(self) -> None:
        """Restore the actions in C of faults and other signals where our handler is still set."""
        for number, action in self._faults_before.items():
            if self.is_ours_in_c(number):
                write_action(number, action)
        for number in ENDING:
            address = c_handler(number)
            by_python = address == self._pythons_address and self.is_ours(number)
            was_default = self.replaced.get(number, signal.SIG_DFL) is signal.SIG_DFL
            if was_default and (address == self._address or by_python):
                set_c_handler(number, 0)

    # Handlers in Python, which the main thread alone may set.

    def take(self, number: int, *, unwinds: bool) -> None:
        """Set our handler for a signal that has no other.

        A signal that is ignored or handled stays as it is, until Lightning replaces it. While the
        main thread runs a fit, there are two exceptions: Python's default handler of Ctrl-C, and
        any handler of SIGTERM, which Lightning replaces too; our handler calls the previous one
        first.

        Args:
            number: Number of the signal.
            unwinds: Whether the main thread runs a recorded fit.
        """
        pythons, address = signal.getsignal(number), c_handler(number)
        default = pythons is signal.SIG_DFL and address in (0, self._address)
        ends_fit = pythons is signal.default_int_handler or (
            number == signal.SIGTERM and callable(pythons) and number not in self.replaced
        )
        if pythons == self._handle:
            if number not in self.replaced:  # ours was restored after its end
                self.replaced[number] = self._replaced_earlier.get(number, signal.SIG_DFL)
        elif default or (unwinds and ends_fit):
            self.replaced[number] = pythons
        else:
            return
        self.take_again(number)
        self._pythons_address = c_handler(number)

    def take_again(self, number: int) -> None:
        """Set our handler over any that was set since ``take``."""
        signal.signal(number, self._handle)

    def restore(self, *, all_of_them: bool, unwinds: bool) -> None:
        """Restore Python's handlers that need not be replaced any more.

        Args:
            all_of_them: Whether no recording lives any more.
            unwinds: Whether the main thread runs a recorded fit; otherwise our handler stays only
                for signals that would have ended the process.
        """
        for number in list(self.replaced):
            was_default = self.replaced[number] is signal.SIG_DFL
            if all_of_them or not (unwinds or was_default):
                self._restore(number)

    def _restore(self, number: int) -> None:
        original = self._replaced_earlier[number] = self.replaced.pop(number)
        known = (0, self._address, self._pythons_address)
        if self.is_ours(number) and c_handler(number) in known:
            signal.signal(number, original)

    def replace_handler_of_lightning(self, trainer: Trainer) -> Handler:
        """Set our SIGTERM handler over Lightning's, which may call a handler of somebody else.

        Lightning's replaces whatever was there, also what kept ours away: a signal that is ignored,
        or a handler that a library has set in C.

        Returns:
            Lightning's handler; ``None`` if Lightning has set none.
        """
        lightnings: Any = signal.getsignal(signal.SIGTERM)
        composed = getattr(lightnings, "signal_handlers", None)
        if composed is None:
            return None
        before = handlers_to_restore(trainer).get(signal.SIGTERM)
        self.replaced.setdefault(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        for handler in composed:
            is_known = is_handler_of(trainer, handler) or handler == self._handle
            if callable(handler) and not is_known:
                self.replaced[signal.SIGTERM] = handler
        self.take_again(signal.SIGTERM)
        self._pythons_address = c_handler(signal.SIGTERM)
        return lightnings


def listen_to_interrupts(trainer: Trainer) -> None:
    """Restore the handler of Ctrl-C, which Lightning's shutdown ignores if a callback raises."""
    original: Any = handlers_to_restore(trainer).get(signal.SIGINT)
    if original is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, original)
