"""The other ranks of a run, known by the files they leave in the run directory: no collective."""

import dis
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed as dist

from esper_lightning.callbacks.lightning_internals import LAUNCHER_KILLS, launcher_observers
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import identify, is_alive
from esper_lightning.forensics.rank_record import ProcessRecord, same_recording

__all__ = [
    "Peers",
    "end_of_run",
    "is_of_this_run",
    "keep_launcher_from_killing",
    "lost_a_peer",
    "meet",
]

_HOST = socket.gethostname()
_CLOCKS_DIFFER_S = 10.0
_previous_end_s = [time.time()]  # of a run in this process, or of the import of this module


def is_of_this_run(process: ProcessRecord, since_s: float | None = None) -> bool:
    """Whether a ``process.json`` is no remainder of an earlier run in the same directory.

    For where the ranks have not met: time is all there is to compare. Lightning has all ranks meet
    before any of them calls ``setup``, where a rank says that it runs: then each has imported this,
    and left the run before.

    Args:
        process: What the file holds.
        since_s: End of the run before, in this process; ``None`` for the latest end of any.
    """
    tolerance_s = 0.0 if process.host == _HOST else _CLOCKS_DIFFER_S
    since_s = _previous_end_s[0] if since_s is None else since_s
    return (process.started_s or 0.0) >= since_s - tolerance_s


def end_of_run() -> None:
    """Note that what starts from here on in this process is another run."""
    _previous_end_s[0] = time.time()


def meet(world_size: int) -> list[ProcessRecord]:
    """Share with every rank which processes the ranks of the run that begins are.

    A collective, where there is a process group.

    Args:
        world_size: Number of ranks.

    Returns:
        The identity of each process and when its recording began, in the order of ranks; empty
        where nobody can be asked.
    """
    mine = ProcessRecord(**vars(identify(os.getpid())), started_s=time.time())
    if world_size == 1:
        return [mine]
    if not (dist.is_available() and dist.is_initialized()):
        return []
    records: list[Any] = [None] * world_size
    dist.all_gather_object(records, mine)
    return records


class Peers:
    """This rank's ``process.json``, and what those of the others say.

    Args:
        layout: Of the run.
        rank: Global rank of this process.
        world_size: Number of ranks.
        met: What ``meet`` returned. A ``process.json`` of any other process is then of another run,
            whenever that began.

    Attributes:
        process: What tells this rank's recording from every other, as in ``process.json``.
        started_s: When it began, in seconds since the epoch.
    """

    def __init__(
        self,
        layout: RunLayout,
        rank: int,
        world_size: int,
        met: Sequence[ProcessRecord] = (),
    ) -> None:
        self._layout = layout
        self._since_s = _previous_end_s[0]  # other runs of this process may end meanwhile
        self._others = [peer for peer in range(world_size) if peer != rank]
        self._met = list(met)
        mine = self._met[rank] if self._met else meet(1)[0]
        self.started_s: float = mine.started_s or 0.0
        self._path = layout.rank(rank).process
        run = None
        if self._met:
            names = json.dumps([record.to_dict() for record in self._met], sort_keys=True).encode()
            run = hashlib.blake2b(names, digest_size=8).hexdigest()
        self.process = replace(mine, rank=rank, world_size=world_size, run=run)

    def note_event_files(self, names: list[str]) -> None:
        """Store the names of TensorBoard's event files that runs have begun, from now on."""
        if names:
            self.process = replace(self.process, event_files=tuple(names))

    def report(self, state: str, *, saved: bool = False) -> None:
        """Write down for the other ranks how this one fares.

        Args:
            state: ``running``, ``finished``, ``failed``, or ``off``: it runs, but is not recorded.
            saved: Whether its evidence is on disk.

        Raises:
            OSError: If the disk takes no more.
        """
        now_s = time.time()
        process = replace(self.process, state=state, evidence_saved=saved, changed_s=now_s)
        process.write(self._path)

    def first_failure(self) -> tuple[int, str] | None:
        """A rank that failed or vanished in this run, and what is known of it."""
        for peer in self._others:
            process = self._read(peer)
            if process is None:
                continue
            if process.state == "failed":
                return peer, "it failed"
            if process.state == "running" and is_alive(process) is False:
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
        if process is None or process.state in ("finished", "off") or process.evidence_saved:
            return False
        return is_alive(process) is not False  # one that cannot be seen from here is taken to live

    def _read(self, peer: int) -> ProcessRecord | None:
        """``None`` where it has not started, or the file is of an earlier run."""
        process = ProcessRecord.read(self._layout.rank(peer).process)
        if process is None or process.state is None:
            return None
        known = self._met and same_recording(process, self._met[peer])
        of_this_run = not self._met and is_of_this_run(process, self._since_s)
        return process if known or of_this_run else None


# gloo names the place in its source at which an operation failed, as nobody else does.
_OF_GLOO = re.compile(r"^\[[^\]]*gloo/[^\]]*:\d+\]")
_LOST = re.compile(
    r"closed by peer|reset by peer|closed by remote|broken pipe|connection (?:refused|was closed)"
    r"|pair closure|socket closed|remote ?error|remote process (?:exited|has)|timed? ?out|aborted"
    r"|unhandled system error|monitoredBarrier|connectFullMesh",
    re.IGNORECASE,
)
_TORCH = str(Path(torch.__file__).parent) + os.sep
_DIST_ERRORS = tuple(
    getattr(dist, name)
    for name in ("DistBackendError", "DistNetworkError", "DistStoreError")
    if hasattr(dist, name)
)


def lost_a_peer(error: BaseException) -> bool:
    """Whether an operation of several ranks failed because another one is gone: an effect.

    The words of a message are not enough: the error must be of a type that only
    ``torch.distributed`` raises, or a ``RuntimeError`` that gloo signed or that came out of torch
    itself; or have such an error as its ``__cause__``.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if _is_of_a_lost_peer(link):
            return True
        link = link.__cause__
    return False


def _is_of_a_lost_peer(error: BaseException) -> bool:
    try:
        message = str(error)
    except Exception:  # a class of the user's
        return False
    if not _LOST.search(message):
        return False
    if isinstance(error, _DIST_ERRORS):
        return True
    if type(error) is not RuntimeError:
        return False
    return bool(_OF_GLOO.match(message)) or ("gloo" in message.lower() and _is_of_torch(error))


def _is_of_torch(error: BaseException) -> bool:
    """Whether an error was raised in torch's own code, in Python or below, and not by a caller."""
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code
    by_statement = dis.opname[code.co_code[innermost.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return not by_statement or code.co_filename.startswith(_TORCH)


def keep_launcher_from_killing(save: Callable[[], None]) -> None:
    """Have evidence saved before Lightning's launcher kills every rank, because one died.

    Args:
        save: Saves this rank's evidence; called by the launcher's thread.
    """
    for thread in launcher_observers():
        _save_before_killing(thread, save)


def _save_before_killing(thread: Any, save: Callable[[], None]) -> None:
    kill: Callable[[], None] = getattr(cast(Any, type(thread)), LAUNCHER_KILLS).__get__(thread)

    def save_and_kill() -> None:
        save()
        kill()

    setattr(thread, LAUNCHER_KILLS, save_and_kill)
