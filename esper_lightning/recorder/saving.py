"""Saving the evidence of one recording: once, by whichever thread sees the death first."""

import threading
from collections.abc import Callable

from esper_lightning.forensics.asides import set_aside
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.death import Death
from esper_lightning.recorder.peers import Peers
from esper_lightning.recorder.rescue import Rescue
from esper_lightning.recorder.watchdog import awake_s

__all__ = ["Saving"]


class Saving:
    """What is saved of a run that dies, and how far that is; other ranks can read the latter.

    Args:
        files: Folder of this rank.
        peers: The other ranks.
        make_rescue: Makes what takes the steps; called with whether they may take threads of their
            own and are bounded in time.

    Attributes:
        rescue: What has taken, or takes, the steps for the death; ``None`` before.
    """

    def __init__(
        self, files: RankLayout, peers: Peers, make_rescue: Callable[[bool], Rescue]
    ) -> None:
        self._files, self._peers, self._make_rescue = files, peers, make_rescue
        self._lock = threading.RLock()
        self.rescue: Rescue | None = None
        # A run that hung continues, with evidence of its own still to come: no step of saving.
        self._has_hung = False
        self._is_refused = False

    def refuse(self) -> None:
        """Save nothing from now on: the run has not begun."""
        with self._lock:
            self._is_refused = True

    def save(self, death: Death, *, bounded: bool = True) -> None:
        """Take all steps, unless they are taken: then the error, if there is one, is added.

        Args:
            death: What ends the run; a hang does not, and is saved once.
            bounded: Whether steps may take threads of their own.
        """
        with self._lock:
            if self._is_refused:
                return
            if self.rescue is not None:
                if death.error is not None:
                    self.rescue.amend(death.error)
                return
            hangs = death.cause == "hang"
            if self._has_hung:
                if hangs:  # once is enough: the profiler is off, and the run is slow
                    return
                attempt(lambda: set_aside(self._files.crash))  # of the hang; now the run dies
            rescue = self._make_rescue(bounded)
            if hangs:
                self._has_hung = True
                attempt(lambda: rescue.run(death))
                return
            self.rescue = rescue
            attempt(lambda: self._peers.report("failed"))
            attempt(lambda: rescue.run(death))
            rescue.progress_s, rescue.is_done = awake_s(), True
            attempt(lambda: self._peers.report("failed", saved=rescue.written is not None))

    def save_in_c(self, death: Death) -> None:
        """Save what can be saved in a handler in C: nothing while any thread saves."""
        if self._lock.acquire(blocking=False):
            self.save(death, bounded=False)

    def forget_caught_signal(self, caught_s: float) -> None:
        """Forget evidence of a signal that ended nothing; a death will have its own.

        Args:
            caught_s: When the main thread was last seen to continue (``awake_s``).
        """
        if self.rescue is None:  # as nearly always: without the lock
            return
        with self._lock:
            self._forget(caught_s)

    def _forget(self, caught_s: float) -> None:
        if self.rescue is None or caught_s < self.rescue.begun_s:
            return
        if self.rescue.report.cause == "signal":
            self.rescue = None
            attempt(lambda: set_aside(self._files.crash))
            attempt(lambda: self._peers.report("running"))

    def going_for_s(self, *, is_known: bool) -> float | None:
        """Seconds since the latest step began; ``None`` before the first.

        Args:
            is_known: Whether the thread of the fit knows of the death. Where it does not, the time
                is infinite once all is saved: nobody else will end the process.
        """
        rescue = self.rescue
        if rescue is None:
            return None
        return float("inf") if rescue.is_done and not is_known else awake_s() - rescue.progress_s

    @property
    def is_lost(self) -> bool:
        """Whether no place took the report."""
        return self.rescue is not None and self.rescue.written is None
