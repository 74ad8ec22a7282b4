"""Attempts: the starts of runs in one directory, and how each of them ended.

A launcher starts a run again after a death (``torchrun --max-restarts``, a SLURM job that is queued
again, a pod). ``attempts.jsonl`` of a rank has a line for each earlier attempt, which is appended
when the next attempt begins. How the latest attempt ended is in ``crash.json`` and
``process.json``. Standard library only.
"""

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from esper_lightning.forensics.deaths import DeathSignature, are_same_death, frames_of
from esper_lightning.forensics.files import JsonLines
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.messages import comparable
from esper_lightning.forensics.phases import read_phases
from esper_lightning.forensics.rank_record import ProcessRecord, same_recording
from esper_lightning.forensics.reading import RowReader
from esper_lightning.forensics.records import NOT_STORED, EpochSeconds, Record
from esper_lightning.forensics.remains import rank_folders, state_of
from esper_lightning.forensics.report import CrashReport

__all__ = ["SAME_DEATH_STATUS", "Attempt", "list_attempt", "read_attempts", "same_deaths"]

SAME_DEATH_STATUS = 65
"""Exit status of ``esper fit`` at a death that an earlier attempt died in the same iteration."""

_LONGEST = 500  # characters of a message
_NOTICED_S = 2.0  # after which the end of a process that vanished is noticed at the latest
_OWN_CAUSES = ("exception", "native")  # deaths that the same program can repeat by itself


@dataclass(frozen=True, kw_only=True)
class Attempt(Record):
    """One attempt of one rank.

    Attributes:
        run: Identifier that all ranks of the attempt share.
        rank: Global rank of the process.
        world_size: Number of ranks.
        host: Name of the host of the process.
        pid: Process identifier.
        started_s: Begin of the recording, in seconds since the epoch.
        ended_s: Time of the death or of the end, in seconds since the epoch.
        state: ``finished``, ``failed``, ``running``, ``vanished`` or ``off``.
        cause: Cause of the death, as in ``CrashReport.cause``.
        iteration: Number of the iteration that was under way, from 1; 0 before the first.
        what: Error of the death, or what is known of the death, in one line.
        place: Line of source in which the error was raised.
        own_frames: Lines of the user's own files through which the error was raised.
        exit_status: Status with which the process ended, as far as it knew.
        ranks: The attempt by each of its ranks, where it is known by several.
    """

    run: str | None = None
    rank: int | None = None
    world_size: int | None = None
    host: str | None = None
    pid: int | None = None
    started_s: EpochSeconds | None = None
    ended_s: EpochSeconds | None = None
    state: str | None = None
    cause: str | None = None
    iteration: int | None = None
    what: str | None = None
    place: str | None = None
    own_frames: tuple[str, ...] = ()
    exit_status: int | None = None
    ranks: tuple["Attempt", ...] = field(default=(), metadata=NOT_STORED)

    @property
    def died(self) -> bool:
        """Whether the attempt ended by a death."""
        return self.state in ("failed", "vanished")

    @property
    def failed_at_s(self) -> float:
        """Estimated time of the failure, for the order of ranks."""
        late_s = _NOTICED_S if "vanished" in (self.state, self.cause) else 0.0
        return (self.ended_s or float("inf")) - late_s

    def is_same_death(self, other: "Attempt") -> bool:
        """Whether both attempts died of the same error, in the same place and iteration.

        Only errors of the program itself count. Signals, and processes that vanished, have their
        causes elsewhere. Type and stack of an error decide, as in a replay (``forensics.deaths``).
        """
        return are_same_death(
            self, self.ranks or (self,), other, other.ranks or (other,), _died_of_the_same
        )


def list_attempt(files: RankLayout) -> None:
    """Append the attempt that ``process.json`` names to the list, unless it is the last there.

    The next attempt calls this as it begins, once the report of the death is complete.

    Args:
        files: Files of the rank.

    Raises:
        OSError: If the disk takes no more.
    """
    latest = _latest(files)
    if latest is None or latest.state == "running":
        return
    listed = _listed(files)
    if listed and listed[-1].started_s == latest.started_s and listed[-1].pid == latest.pid:
        return
    lines = JsonLines(files.attempts)
    try:
        lines.append(latest.to_dict())
    finally:
        lines.close()


def read_attempts(directories: Iterable[Path]) -> list[Attempt]:
    """All attempts in a run directory, the oldest first, each by the rank that failed first.

    Args:
        directories: Run directory, or its copies of several hosts, which hold different ranks.
    """
    found: dict[str, list[Attempt]] = {}
    for directory in directories:
        for rank in rank_folders(directory):
            files = RunLayout(directory).rank(rank)
            latest = _latest(files)
            for each in (*_listed(files), *([] if latest is None else [latest])):
                key = each.run or f"{each.rank} {each.started_s}"
                found.setdefault(key, []).append(each)
    attempts = [replace(min(ranks, key=_blame), ranks=tuple(ranks)) for ranks in found.values()]
    return sorted(attempts, key=lambda each: each.started_s or 0.0)


def same_deaths(attempts: list[Attempt]) -> int:
    """Number of attempts, with the last one, that ended with the last one's death.

    Attempts before one that came further are not counted: the death is then not a certain one.

    Args:
        attempts: Attempts, the oldest first.

    Returns:
        0 if the last attempt ended well, or died of a cause outside of the program.
    """
    if not attempts:
        return 0
    last = attempts[-1]
    came = last.iteration or 0
    since = itertools.takewhile(
        lambda each: each.state != "finished" and (each.iteration or 0) <= came, attempts[::-1]
    )
    return sum(last.is_same_death(each) for each in since)


def _blame(attempt: Attempt) -> tuple[bool, bool, float, int]:
    """Sort key of the ranks of an attempt: the first failure for a reason of its own is least."""
    is_effect = attempt.cause == "peer"
    return not attempt.died, is_effect, attempt.failed_at_s, attempt.rank or 0


def _listed(files: RankLayout) -> list[Attempt]:
    with contextlib.suppress(OSError, ValueError):
        return [Attempt.from_dict(row) for row in RowReader(files.attempts)]
    return []


def _latest(files: RankLayout) -> Attempt | None:
    """The attempt that ``process.json`` names; ``None`` without one."""
    process = ProcessRecord.read(files.process)
    if process is None or process.state is None:
        return None
    state = state_of(process, files)
    report = CrashReport.read(files.crash)
    of_this = report is not None and same_recording(report, process)
    if report is None or not of_this or state in ("finished", "running", "off"):
        report = CrashReport()
    iteration = report.iteration
    if iteration is None:
        with contextlib.suppress(OSError, ValueError):
            iteration = read_phases(files.phases).iteration
    frames = () if report.error is None else frames_of(report.error.traceback)
    what = " ".join(report.what_happened.split())[:_LONGEST]
    return Attempt(
        run=process.run,
        rank=process.rank,
        world_size=process.world_size,
        host=process.host,
        pid=process.pid,
        started_s=process.started_s,
        ended_s=report.time_s or process.changed_s,
        state=state,
        cause=report.cause,
        iteration=iteration,
        what=what or None,
        place=str(frames[-1]) if frames else None,
        own_frames=tuple(frame.name for frame in frames if frame.is_of_user),
        exit_status=report.exit_status,
    )


def _died_of_the_same(one: Attempt, other: Attempt) -> bool:
    died = one.died and other.died and one.cause in _OWN_CAUSES
    return died and _signature_of(one).is_same(_signature_of(other))


def _signature_of(attempt: Attempt) -> DeathSignature:
    kind, _, message = (attempt.what or "").partition(": ")
    return DeathSignature(
        iteration=attempt.iteration,
        cause=attempt.cause,
        kind=kind,
        message=comparable(message),
        place=attempt.place,
        own_frames=attempt.own_frames,
    )
