"""The other ranks of a run, known by the files they leave in the run directory: no collective."""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import identify, is_alive
from esper_lightning.forensics.report import read_report, write_report

__all__ = ["Peers", "end_of_run", "is_of_this_run", "keep_launcher_from_killing"]

_HOST = socket.gethostname()
_CLOCKS_DIFFER_S = 10.0
_previous_end_s = [time.time()]  # of a run in this process, or of the import of this module


def is_of_this_run(process: dict[str, Any]) -> bool:
    """Whether a ``process.json`` is no remainder of an earlier run in the same directory.

    Lightning has all ranks meet before any of them calls ``setup``, where a rank says that it
    runs: then each has imported this, and left the run before.
    """
    tolerance_s = 0.0 if process.get("host") == _HOST else _CLOCKS_DIFFER_S
    return (process.get("started_s") or 0.0) >= _previous_end_s[0] - tolerance_s


def end_of_run() -> None:
    """What starts from here on in this process is another run."""
    _previous_end_s[0] = time.time()


class Peers:
    """This rank's ``process.json``, and what those of the others say.

    Args:
        layout: Of the run.
        rank: Global rank of this process.
        world_size: Number of ranks.
    """

    def __init__(self, layout: RunLayout, rank: int, world_size: int) -> None:
        self._layout = layout
        self._others = [peer for peer in range(world_size) if peer != rank]
        self.started_s = time.time()
        self._path = layout.rank(rank).process
        self._process: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            **identify(os.getpid()),
            "started_s": self.started_s,
        }

    def tell(self, state: str, *, saved: bool = False) -> None:
        """Say how this rank fares.

        Args:
            state: ``running``, ``finished``, ``failed``, or ``off``: it runs, but is not recorded.
            saved: Whether its evidence is on disk.

        Raises:
            OSError: If the disk takes no more.
        """
        process = {**self._process, "state": state, "saved": saved, "changed_s": time.time()}
        write_report(self._path, process)

    def first_failure(self) -> tuple[int, str] | None:
        """A rank that failed or vanished in this run, and what is known of it."""
        for peer in self._others:
            process = self._read(peer)
            if process is None:
                continue
            if process.get("state") == "failed":
                return peer, "it failed"
            if process.get("state") == "running" and is_alive(process) is False:
                return peer, "its process vanished"
        return None

    def wait_until_saved(self, timeout_s: float) -> None:
        """Stay alive while others still save.

        Launchers kill every process soon after the first has left.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and any(map(self._is_saving, self._others)):
            time.sleep(0.05)

    def _is_saving(self, peer: int) -> bool:
        process = self._read(peer)
        if process is None or process.get("state") in ("finished", "off") or process.get("saved"):
            return False
        return is_alive(process) is not False  # one that cannot be seen from here is taken to live

    def _read(self, peer: int) -> dict[str, Any] | None:
        """``None`` where it has not started, or the file is of an earlier run."""
        process = read_report(self._layout.rank(peer).process)
        if process is None or process.get("state") is None:
            return None
        return process if is_of_this_run(process) else None


def keep_launcher_from_killing(save: Callable[[], None]) -> None:
    """Lightning's launcher thread kills every rank, this one too, when one died: save before."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            _save_before_killing(thread, save)


def _save_before_killing(thread: Any, save: Callable[[], None]) -> None:
    kill = cast(Callable[[], None], type(thread)._terminate_all.__get__(thread))

    def save_and_kill() -> None:
        save()
        kill()

    thread._terminate_all = save_and_kill
