"""The other ranks of a run, known by their files in the run directory, without a collective."""

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
from esper_lightning.forensics.fingerprint import Fingerprint, differences
from esper_lightning.forensics.heartbeat import BEAT_S, SILENT_S, Pulse, beat
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
_SILENT_S = 60.0  # a network disk may stand still for a while; a death is noticed by others, too
_VANISHED = "its process vanished"
_previous_end_s = [time.time()]  # of the latest run in this process, or of the import


def is_of_this_run(process: ProcessRecord, since_s: float | None = None) -> bool:
    """Whether a ``process.json`` is of this run, and not of an earlier run in the directory.

    Only ranks that have not met need this function: they have nothing but times to compare.
    Lightning has all ranks meet before any of them calls ``setup``, in which a rank reports that it
    runs: by then each rank has imported this module, and ended its previous run.

    Args:
        process: Content of the file.
        since_s: End of the previous run in this process, in seconds since the epoch; ``None`` for
            the latest end of any run.
    """
    tolerance_s = 0.0 if process.host == _HOST else _CLOCKS_DIFFER_S
    since_s = _previous_end_s[0] if since_s is None else since_s
    return (process.started_s or 0.0) >= since_s - tolerance_s


def end_of_run() -> None:
    """Note that a run of this process has ended: what starts later is another run."""
    _previous_end_s[0] = time.time()


def meet(world_size: int) -> list[ProcessRecord]:
    """Exchange the identities of the processes of the run that begins, among all its ranks.

    The call is a collective where there is a process group.

    Args:
        world_size: Number of ranks.

    Returns:
        For each rank, in order, the identity of its process and the begin of its recording; empty
        where several ranks have no process group.
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
    """The ``process.json`` of this rank, and those of the other ranks.

    Args:
        layout: Layout of the run directory.
        rank: Global rank of this process.
        world_size: Number of ranks.
        met: Result of ``meet``. If it is not empty, a ``process.json`` of any process that it does
            not list is of another run, whenever that run began.

    Attributes:
        process: Record that identifies this rank's recording, as in ``process.json``.
        started_s: Begin of this rank's recording, in seconds since the epoch.
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
        self._files = layout.rank(rank)
        run = None
        if self._met:
            names = json.dumps([record.to_dict() for record in self._met], sort_keys=True).encode()
            run = hashlib.blake2b(names, digest_size=8).hexdigest()
        self.process = replace(mine, rank=rank, world_size=world_size, run=run, beat_s=BEAT_S)
        self._pulses: dict[int, Pulse] = {}  # of ranks that cannot be seen from here
        self._beat_due_s = 0.0

    def note_event_files(self, names: list[str]) -> None:
        """Add the names of the runs' TensorBoard event files to this rank's record."""
        if names:
            self.process = replace(self.process, event_files=tuple(names))

    def note_fingerprint(self, fingerprint: Fingerprint, before: Fingerprint | None) -> None:
        """Add a run's fingerprint to this rank's record, and what differs from that before.

        Args:
            fingerprint: Fingerprint of this run.
            before: Fingerprint of the run that is resumed, or of the one before in the directory;
                ``None`` where it is not known.
        """
        differs = () if before is None else differences(before, fingerprint)
        self.process = replace(self.process, fingerprint=fingerprint, differences=differs)

    def note_resumption(self, path: str) -> None:
        """Add the checkpoint that the run is resumed from to this rank's record."""
        is_local = "://" not in path
        resumed_from = str(Path(path).absolute()) if is_local else path
        self.process = replace(self.process, resumed_from=resumed_from)

    def report(self, state: str, *, saved: bool = False) -> None:
        """Write this rank's state into its ``process.json``, for the other ranks.

        Args:
            state: ``running``, ``finished``, ``failed``, or ``off``: the rank runs, unrecorded.
            saved: Whether the evidence of a failure is on disk.

        Raises:
            OSError: If the disk takes no more.
        """
        now_s = time.time()
        process = replace(self.process, state=state, evidence_saved=saved, changed_s=now_s)
        process.write(self._files.process)

    def beat(self) -> None:
        """Give a sign of life, if it is time, to ranks that cannot see this process."""
        now_s = time.monotonic()
        if now_s >= self._beat_due_s:
            self._beat_due_s = now_s + BEAT_S
            beat(self._files.process)

    def listen(self) -> None:
        """Note signs of life of other ranks, also while this rank saves its evidence."""
        for pulse in [*self._pulses.values()]:
            pulse.silent_s()

    def first_failure(self) -> tuple[int, str] | None:
        """A rank that failed or vanished in this run, with the reason; ``None`` without one."""
        for peer in self._others:
            process = self._read(peer)
            if process is None:
                continue
            if process.state == "failed":
                return peer, "it failed"
            if _has_vanished(process):
                return peer, _VANISHED
            if process.state == "running" and self._silent_s(peer, process) > _SILENT_S:
                return peer, f"it gave no sign of life for {_SILENT_S:g} s"
        return None

    def first_vanished(self) -> tuple[int, str] | None:
        """A rank whose process ended without a word, with the reason; ``None`` without one."""
        for peer in self._others:
            process = self._read(peer)
            if process is not None and _has_vanished(process):
                return peer, _VANISHED
        return None

    def wait_until_saved(self, timeout_s: float) -> None:
        """Stay alive while other ranks still save their evidence.

        Launchers kill every process soon after the first process has ended. A rank that is out of
        sight, gives no sign of life and has not begun to save is not waited for.

        Args:
            timeout_s: Longest time to wait, in seconds.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and any(map(self._is_saving, self._others)):
            time.sleep(0.05)

    def _is_saving(self, peer: int) -> bool:
        process = self._read(peer)
        if process is None or process.state in ("finished", "off") or process.evidence_saved:
            return False
        if process.state == "running" and self._silent_s(peer, process) > SILENT_S:
            return False
        return is_alive(process) is not False

    def _silent_s(self, peer: int, process: ProcessRecord) -> float:
        """Seconds without a sign of life of a process that cannot be seen from here, else 0."""
        if process.beat_s is None or is_alive(process) is not None:
            return 0.0
        if peer not in self._pulses:
            self._pulses[peer] = Pulse(self._layout.rank(peer).process)
        return self._pulses[peer].silent_s()

    def _read(self, peer: int) -> ProcessRecord | None:
        """The record of a peer; ``None`` where it is missing, or of an earlier run."""
        process = ProcessRecord.read(self._layout.rank(peer).process)
        if process is None or process.state is None:
            return None
        known = self._met and same_recording(process, self._met[peer])
        of_this_run = not self._met and is_of_this_run(process, self._since_s)
        return process if known or of_this_run else None


def _has_vanished(process: ProcessRecord) -> bool:
    return process.state == "running" and is_alive(process) is False


# Only gloo names the place in its source at which an operation failed.
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
    """Whether an operation of several ranks failed only because another rank is gone.

    The words of the message are not enough. The error, or one in its chain of ``__cause__``, must
    be of a type that only ``torch.distributed`` raises, or a ``RuntimeError`` that names gloo's
    source or was raised by torch itself.
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
    except Exception:  # an error of the user's class may have no text
        return False
    if not _LOST.search(message):
        return False
    if isinstance(error, _DIST_ERRORS):
        return True
    if type(error) is not RuntimeError:
        return False
    return bool(_OF_GLOO.match(message)) or ("gloo" in message.lower() and _is_of_torch(error))


def _is_of_torch(error: BaseException) -> bool:
    """Whether torch's own code, in Python or in C, raised an error, and not a caller of torch."""
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    code = innermost.tb_frame.f_code
    by_statement = dis.opname[code.co_code[innermost.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return not by_statement or code.co_filename.startswith(_TORCH)


def keep_launcher_from_killing(save: Callable[[], None]) -> None:
    """Save evidence before Lightning's launcher kills every rank because one rank died.

    Args:
        save: Function that saves this rank's evidence; the launcher's thread calls it.
    """
    for thread in launcher_observers():
        _save_before_killing(thread, save)


def _save_before_killing(thread: Any, save: Callable[[], None]) -> None:
    kill: Callable[[], None] = getattr(cast(Any, type(thread)), LAUNCHER_KILLS).__get__(thread)

    def save_and_kill() -> None:
        save()
        kill()

    setattr(thread, LAUNCHER_KILLS, save_and_kill)
