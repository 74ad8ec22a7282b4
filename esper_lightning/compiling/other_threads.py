"""Threads of users, which may change what a function holds while it is called or traced."""

import sys
import threading
from types import FrameType

__all__ = ["other_threads_run"]

# Their threads touch nothing of a user's: those of loggers, of progress bars, and of test runners.
_KNOWN = {"esper_lightning", "lightning", "torch", "tensorboard", "tqdm", "execnet"}
_KNOWN_WHERE_IDLE = {"fsspecIO"}  # by name: between two transfers such a thread is within asyncio


def other_threads_run() -> bool:
    """Whether threads run beside the present one that may be a user's."""
    own = threading.get_ident()
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - it is documented
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    others = ((names.get(number), frame) for number, frame in frames.items() if number != own)
    return any(_may_be_users(name, frame) for name, frame in others)


def _may_be_users(name: str | None, frame: FrameType) -> bool:
    """Whether the outermost function of a thread that is not Python's own is a user's.

    A thread that waits for work within Python's own functions may get work of a user.
    """
    outermost, place = "", frame
    while place is not None:
        package = str(place.f_globals.get("__name__")).split(".")[0]
        outermost = outermost if package in sys.stdlib_module_names else package
        place = place.f_back
    return outermost not in _KNOWN and not (outermost == "" and name in _KNOWN_WHERE_IDLE)
