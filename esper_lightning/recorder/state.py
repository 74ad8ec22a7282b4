"""The states of a recording, and the transitions between them."""

import logging
import threading
from enum import Enum

__all__ = ["LifeCycle", "State"]

_log = logging.getLogger(__name__)


class State(Enum):
    """A recording's state as the thread of its fit knows it; ``process.json`` has the values.

    ``LifeCycle`` has the transitions. How far evidence is saved is no part of the state: other
    threads may save at any time, and ``Saving`` stores the progress.
    """

    RUNNING = "running"
    """No death is known."""
    DYING = "dying"
    """The thread of the fit has noticed the death, and saves evidence or waits for others."""
    FINISHED = "finished"
    """The run has reached its end."""
    FAILED = "failed"
    """The run has died, and its evidence is saved."""
    OFF = "off"
    """The run continues without its recorder."""

    @property
    def has_ended(self) -> bool:
        """Whether the recording is closed."""
        return self in (State.FINISHED, State.FAILED, State.OFF)


_NEXT: dict[State, frozenset[State]] = {
    State.RUNNING: frozenset(State) - {State.RUNNING},
    # An error may be seen twice, and a hook may fail while its run dies.
    State.DYING: frozenset({State.DYING, State.FAILED, State.OFF}),
}
"""The states that may follow each state in which a recording has not ended."""


class LifeCycle:
    """The state of one recording, which several threads may change.

    Attributes:
        state: State of the recording, at first ``RUNNING``.
    """

    def __init__(self) -> None:
        self.state = State.RUNNING
        self._lock = threading.RLock()  # a handler of a signal may come in between

    def enter(self, state: State) -> bool:
        """Enter a state, unless the recording has ended: the first end is the end.

        A state that must not follow the present one is not entered either. The error is logged and
        not raised: it is the recorder's own, and the run must not die of it.

        Returns:
            Whether the state was entered.
        """
        with self._lock:
            if self.state.has_ended:
                return False
            if state not in _NEXT[self.state]:
                was = self.state.value
                _log.error("A recording must not become %s after %s.", state.value, was)
                return False
            self.state = state
            return True
