"""The life of a recording."""

from enum import Enum

__all__ = ["State"]


class State(Enum):
    """A recording as the thread of its fit knows it; the values are those of ``process.json``.

    ``Recording`` enters a state in one place, from ``RUNNING`` on, and leaves none in which it has
    ended. How far evidence is saved is not part of it: other threads may be saving at any time, and
    ``Saving`` knows.
    """

    RUNNING = "running"
    """Nothing is known of any death."""
    DYING = "dying"
    """The thread of the fit has noticed the death, and saves evidence or waits for it."""
    FINISHED = "finished"
    """The run has reached its end."""
    FAILED = "failed"
    """The run has died, and its evidence is saved."""
    REFUSED = "refused"
    """The run has not begun, and nothing of it is written: not even this."""
    OFF = "off"
    """The run continues without its recorder."""

    @property
    def has_ended(self) -> bool:
        """Whether the recording is closed."""
        return self in (State.FINISHED, State.FAILED, State.REFUSED, State.OFF)
