"""Attempts: the one way in which the recorder calls an action that may fail or hang."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from esper_lightning.recorder.awake import LOOK_EVERY_S, awake_s
from esper_lightning.recorder.death import in_words

__all__ = ["LateError", "Outcome", "attempt"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class LateError(Exception):
    """Raised for an action that has not ended within its time; it may still be under way."""


class Outcome(NamedTuple, Generic[_T]):
    """Outcome of an attempt: a result or an error."""

    result: _T | None
    """Result of the action; ``None`` where the action raised or was late."""
    error: BaseException | None
    """Error of the action, a ``LateError`` if it was late; ``None`` where it succeeded."""


def attempt(
    action: Callable[[], _T],
    what: str | None = "saving evidence",
    *,
    errors: type[BaseException] = Exception,
    seconds: float | None = None,
    level: int = logging.ERROR,
) -> Outcome[_T]:
    """Call an action whose failure must not prevent what follows it.

    Args:
        action: Action to try.
        what: Name of the attempt for the log; ``None`` where the caller reports the failure.
        errors: Errors that are caught; others are raised, unless the action has its own thread.
        seconds: Time limit, in seconds while the process is awake: the action then has a thread of
            its own, which is abandoned when the time is over. ``None`` for the calling thread and
            no limit.
        level: Level of the log entry about an error.

    Returns:
        Outcome with either the result or the error.
    """
    outcome = _call(action, errors) if seconds is None else _call_within(action, seconds)
    if outcome.error is not None and what is not None:
        _log.log(level, "While %s: %s", what, in_words(outcome.error))
    return outcome


def _call(action: Callable[[], _T], errors: type[BaseException]) -> Outcome[_T]:
    try:
        return Outcome(action(), None)
    except errors as error:
        return Outcome(None, error)


def _call_within(action: Callable[[], _T], seconds: float) -> Outcome[_T]:
    outcomes: list[Outcome[_T]] = []

    def call() -> None:
        outcomes.append(_call(action, BaseException))

    thread = threading.Thread(target=call, daemon=True, name="flight-recorder-step")
    try:
        thread.start()
    except RuntimeError:  # no memory for a thread
        return _call(action, BaseException)
    end = awake_s() + seconds
    while thread.is_alive() and awake_s() < end:
        thread.join(LOOK_EVERY_S)
    late = Outcome[_T](None, LateError(f"not done within {seconds:g} s"))
    return outcomes[0] if outcomes else late
