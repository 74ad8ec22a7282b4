"""The states of a recording."""

from enum import Enum

__all__ = ["State"]


class State(Enum):
    """A recording's state as the thread of its fit knows it; ``process.json`` has the values.

    ``Recording`` starts as ``RUNNING``, changes its state in one method, and stays in a state in
    which it has ended. How far evidence is saved is no part of the state: other threads may save
    at any time, and ``Saving`` stores the progress.
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
