"""Early notice of signals, also while the main thread is stuck in C and runs no handler."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

__all__ = ["Wakeup"]


class Wakeup:
    """The descriptor to which C writes the number of each signal, and a thread that reads it.

    Each number is passed on to the previous descriptor, such as the descriptor of an asyncio loop.

    Args:
        arrive: Function that the thread calls with the number of each signal.
    """

    def __init__(self, arrive: Callable[[int], None]) -> None:
        self._arrive = arrive
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        self._installed = False
        self._previous, self._file = -1, _file_of(-1)
        self.thread = threading.Thread(
            target=self._pass_on, daemon=True, name="flight-recorder-signals"
        )
        self.thread.start()

    def install(self) -> None:
        """Make C write to this descriptor; only the main thread may call this, and ``close``.

        A descriptor that somebody set over ours stays. If there is none at all, ours is set again:
        an asyncio loop leaves none when the loop removes its last handler.
        """
        current = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if current == self._write:
            return
        if self._installed and current != -1:
            signal.set_wakeup_fd(current)
            return
        self._previous, self._file, self._installed = current, _file_of(current), True

    def close(self) -> None:
        """Restore the previous descriptor, unless ours was replaced."""
        if self._installed:
            self._restore(self._previous if _file_of(self._previous) == self._file else -1)
        os.write(self._write, b"\0")  # ends the thread

    def leave_in_child(self) -> None:
        """Close the descriptor in a forked child, which is not the run."""
        if self._installed:
            self._restore(-1)
        self._close_files()

    def _restore(self, previous: int) -> None:
        current = signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError, ValueError):  # the previous one was just closed
            signal.set_wakeup_fd(previous if current == self._write else current)

    def _close_files(self) -> None:
        for descriptor in (self._read, self._write):
            os.close(descriptor)

    def _pass_on(self) -> None:
        while True:
            numbers = os.read(self._read, 64)
            sent = numbers.rstrip(b"\0")
            for number in sent:
                self._arrive(number)
            if sent and self._file is not None and _file_of(self._previous) == self._file:
                with contextlib.suppress(OSError):
                    os.write(self._previous, sent)
            if len(sent) < len(numbers):
                self._close_files()
                return


def _file_of(descriptor: int) -> tuple[int, int] | None:
    """Identity of a descriptor's file, whose number another file may get; ``None`` if closed."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino
