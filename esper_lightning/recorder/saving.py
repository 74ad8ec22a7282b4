"""Saving the evidence of one recording: once, in the thread that sees the death first."""

import threading
from collections.abc import Callable

from esper_lightning.forensics.asides import rename_aside
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.recorder.attempt import attempt
from esper_lightning.recorder.awake import awake_s
from esper_lightning.recorder.death import Death
from esper_lightning.recorder.peers import Peers
from esper_lightning.recorder.rescue import Rescue

__all__ = ["Saving"]


class Saving:
    """The state of saving a run's evidence, and its report to the other ranks.

    Args:
        files: Folder of this rank.
        peers: Files by which this rank and the other ranks know each other.
        make_rescue: Function that makes a rescue. Its argument: whether steps may have threads of
            their own, and with them time limits.
        hangs_end: Whether a hang ends the run, and is saved as any death.

    Attributes:
        rescue: Rescue that takes, or has taken, the steps for the death; ``None`` before.
    """

    def __init__(
        self,
        files: RankLayout,
        peers: Peers,
        make_rescue: Callable[[bool], Rescue],
        *,
        hangs_end: bool = False,
    ) -> None:
        self._files, self._peers, self._make_rescue = files, peers, make_rescue
        self._hangs_end = hangs_end
        self._lock = threading.RLock()
        self.rescue: Rescue | None = None
        # Whether evidence of a hang was saved; the run continues, and its death is saved again.
        self._has_hung = False
        self._is_over = False

    def finish(self) -> None:
        """Save nothing from now on, and rename a report of what did not end the run.

        A signal may have been caught, and the failure of another rank may have been survived. The
        call waits for a thread that still saves.
        """
        with self._lock:
            self._is_over = True
            if self.rescue is not None and self.rescue.report.cause in ("signal", "peer"):
                self.rescue = None
                attempt(lambda: rename_aside(self._files.crash))

    def save(self, death: Death, *, bounded: bool = True) -> None:
        """Take all steps; if they are taken already, add the error to the report if there is one.

        Args:
            death: Death that ends the run, or a hang, which is saved once if it does not.
            bounded: Whether steps may have threads of their own.
        """
        with self._lock:
            if self._is_over:
                return
            if self.rescue is not None:
                if death.error is not None:
                    self.rescue.amend(death.error)
                return
            hangs = death.cause == "hang" and not self._hangs_end
            if self._has_hung:
                if hangs:  # once is enough: the profiler is off, and the run is slow
                    return
                # Now the run dies: the report of the hang stays under another name.
                attempt(lambda: rename_aside(self._files.crash))
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
        """Save the evidence that a handler in C can save; nothing while another thread saves."""
        if self._lock.acquire(blocking=False):
            self.save(death, bounded=False)

    def forget_caught_signal(self, caught_s: float) -> None:
        """Forget the evidence of a signal that did not end the run, so that a death is saved again.

        Args:
            caught_s: Time at which the main thread was last seen to continue (``awake_s``).
        """
        if self.rescue is None:  # nearly always; needs no lock
            return
        with self._lock:
            self._forget(caught_s)

    def _forget(self, caught_s: float) -> None:
        if self.rescue is None or caught_s < self.rescue.begun_s:
            return
        if self.rescue.report.cause == "signal":
            self.rescue = None
            attempt(lambda: rename_aside(self._files.crash))
            attempt(lambda: self._peers.report("running"))

    def going_for_s(self, *, is_known: bool) -> float | None:
        """Seconds since the latest step began; ``None`` before the first.

        Args:
            is_known: Whether the thread of the fit has noticed the death. If it has not, the time
                is infinite once all is saved: only the watchdog can end the process then.
        """
        rescue = self.rescue
        if rescue is None:
            return None
        return float("inf") if rescue.is_done and not is_known else awake_s() - rescue.progress_s

    @property
    def is_lost(self) -> bool:
        """Whether no place took the report."""
        return self.rescue is not None and self.rescue.written is None
