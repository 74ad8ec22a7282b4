"""The remains of a run, rank by rank, even if files are missing, damaged or of another run."""
# Reports of all versions are read as they are.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import dataclasses
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from esper_lightning.forensics.collectives import (
    Collectives,
    collectives_in,
    late_ranks,
    read_collectives,
)
from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.heartbeat import last_sign_s, silent
from esper_lightning.forensics.layout import RankLayout, RunLayout
from esper_lightning.forensics.owner_record import read_owner
from esper_lightning.forensics.phases import Phases, read_phases
from esper_lightning.forensics.processes import ProcessIdentity, is_alive, same_process
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.reading import RowReader
from esper_lightning.forensics.report import CrashReport, Evidence
from esper_lightning.forensics.trace import TraceSummary

__all__ = [
    "LAST_ROWS",
    "Remains",
    "Window",
    "collectives_of",
    "culprit_of_hang",
    "examine",
    "first_failure",
    "rank_folders",
    "state_of",
    "unrecorded_start",
]

T = TypeVar("T")

LAST_ROWS = 5
_NOTICED_S = 2.0
_SILENT_S = 60.0  # clocks of hosts differ by less
_CLOCKS_S = 0.1  # a file's time may lag so far behind the process's clock
_TOGETHER_S = 60.0  # the ranks of a run begin within this time, for they have met before
# Names as in RunLayout: rank7, and not rank007.
_RANK_FOLDER = re.compile(r"rank(0|[1-9]\d{0,8})", re.ASCII)
# Our traces are named ...-rank<k>-..., Lightning's <stage>-<local rank>-[Strategy]<step>.<time>...
_RANK_IN_NAME = re.compile(r"-rank(\d+)-|-(\d+)-\[")
_NO_TRAINING = re.compile(r"\.(validation|test|predict)_step\.")
_TIME_IN_NAME = re.compile(r"\.(\d{18,19})\.pt\.trace\.json")


class Window(NamedTuple):
    """A trace of this run: a window that was open at the death, or one closed before it."""

    path: Path
    ended_s: float
    was_open: bool


@dataclasses.dataclass(kw_only=True)
class Remains:
    """The remains of one rank."""

    rank: int
    state: str  # finished, running, failed, vanished, unknown
    world_size: int | None
    started_s: float | None
    report: CrashReport | None
    unreadable: dict[str, str]  # reason why a file that exists cannot be read, by its name
    rows: int
    history: list[dict[str, Any]]  # the last rows
    damaged_rows: int
    remarks: list[str]  # sentences about the rows
    phases: Phases | None
    windows: list[Window]  # the window nearest to the end comes last
    trace: TraceSummary | None = None
    collectives: Collectives | None = None
    run: str | None = None  # identifier that all ranks of a run share
    fingerprint: Fingerprint | None = None
    differences: tuple[str, ...] = ()  # from the run that was resumed, or the one before
    resumed_from: str | None = None  # checkpoint; None for a new run
    directory: Path = Path()  # run directory, or its copy on the host of the rank

    @property
    def time_s(self) -> float:
        """Time at which the rank failed, in seconds since the epoch; infinite if it did not."""
        return float((self.report and self.report.time_s) or float("inf"))

    @property
    def failed(self) -> bool:
        """Whether the rank died; a hang after which the run continued is no death."""
        hung = self.report is not None and self.report.cause == "hang"
        alive = self.state in ("finished", "running")
        reported = self.report is not None and not (hung and alive)
        is_lost = "crash.json" in self.unreadable and not alive
        return reported or is_lost or self.state in ("vanished", "failed")

    @property
    def is_first_cause(self) -> bool:
        """Whether the rank failed for a reason of its own, as far as is known."""
        return self.state == "vanished" or self.report is None or self.report.cause != "peer"

    @property
    def failed_at_s(self) -> float:
        """Estimated time of the failure, for the order of ranks.

        The end of a process that vanished is noticed late, but its peers may fail at once.
        """
        report = self.report
        vanished = self.state == "vanished" or (report is not None and report.cause == "vanished")
        if report is None and self.phases is not None and self.phases.open:
            return self.phases.open[-1].begin_ns / 1e9
        return self.time_s - (_NOTICED_S if vanished else 0.0)

    @property
    def trace_path(self) -> Path | None:
        """Path of the trace nearest to the end; ``None`` without one."""
        return self.windows[-1].path if self.windows else None


def examine(*directories: Path) -> list[Remains]:
    """The remains of each rank of the latest run in a directory.

    Args:
        *directories: Run directory; several for the copies of one run on hosts that share no disk.
            Of a rank that is in several of them, the latest remains count.

    Raises:
        ValueError: If a directory is no run directory, or cannot be read.
    """
    ranks: list[Remains] = []
    for directory in directories:
        got = repr(str(directory))
        try:
            found = _remains_of_ranks(directory)
        except OSError as error:
            raise ValueError(f"RUN_DIR must be readable, got {got}: {error}.") from error
        if not found:
            raise ValueError(f"RUN_DIR must hold rank folders (rank0, ...), got {got}.")
        ranks += found
    latest = max(ranks, key=_began)
    of_run = {
        remains.rank: remains
        for remains in sorted(ranks, key=_began)
        if _of_the_same_run(remains, latest)
    }
    return [of_run[rank] for rank in sorted(of_run)]


def _began(remains: Remains) -> float:
    return remains.started_s or 0.0


def unrecorded_start(directory: Path) -> dict[str, Any]:
    """The owner of a directory that has recorded nothing: a run that starts, or died at its start.

    Returns:
        The fields of ``owner_record.read_owner``; empty if the owner has recorded its run, or none
        is known.
    """
    owner = read_owner(directory)
    identity, claimed_s = ProcessIdentity.from_dict(owner), owner.get("claimed_s")
    since_s = claimed_s if isinstance(claimed_s, int | float) else 0.0
    for rank in rank_folders(directory):
        record = ProcessRecord.read(RunLayout(directory).rank(rank).process)
        if record is None or record.pid is None or not same_process(record, identity):
            continue
        if record.changed_s is None or record.changed_s >= since_s:
            return {}
    return owner


def _of_the_same_run(remains: Remains, latest: Remains) -> bool:
    """Whether the remains of a rank are of the same run as the latest remains.

    An earlier run may have had more ranks, and a later run may have died before all ranks began.
    """
    if remains.run is not None and latest.run is not None:
        return remains.run == latest.run
    if latest.started_s is None:
        return True
    began_s = latest.started_s if remains.started_s is None else remains.started_s
    world_size = latest.world_size or 0
    together = latest.started_s - began_s < _TOGETHER_S
    return together and (remains.rank < world_size or world_size < 1)


def rank_folders(directory: Path) -> list[int]:
    """The ranks that have a folder in a directory, of this run or earlier ones."""
    if "\0" in str(directory):  # no folder has such a name, and Python 3.13 raises ValueError
        return []
    named = ((_RANK_FOLDER.fullmatch(path.name), path) for path in directory.glob("rank*"))
    return sorted(int(name[1]) for name, path in named if name is not None and path.is_dir())


def first_failure(ranks: list[Remains]) -> Remains | None:
    """The rank that failed first, for a reason of its own if any rank did; ``None`` without.

    All ranks of a hang wait for one that never reached a collective. That one is the first failure.
    """
    failed = [rank for rank in ranks if rank.failed]
    own = [rank for rank in failed if rank.is_first_cause]
    first = min(own or failed, key=lambda remains: remains.failed_at_s, default=None)
    if first is None or first.report is None or first.report.cause != "hang":
        return first
    return culprit_of_hang(ranks) or first


def culprit_of_hang(ranks: list[Remains]) -> Remains | None:
    """The rank that others wait for, which may wait itself, outside of collectives."""
    late = late_ranks(collectives_of(ranks))
    candidates = (rank for rank in ranks if rank.rank in late)
    return min(candidates, key=lambda remains: remains.failed_at_s, default=None)


def collectives_of(ranks: list[Remains]) -> dict[int, Collectives | None]:
    """The collectives of each rank, by numbers that can be compared.

    torch counts all collectives. A rank that was killed has no record of torch's; then those that
    PPO has noted in the phase rings count, if that rank noted any.
    """
    of_torch = {each.rank: each.collectives for each in ranks}
    noted = {each.rank: collectives_in(each.phases) for each in ranks}
    gains = any(of_torch[rank] is None and noted[rank] is not None for rank in noted)
    return noted if gains else of_torch


def _remains_of_ranks(directory: Path) -> list[Remains]:
    """The remains of each rank; one that is out of sight and gives no sign of life has vanished."""
    layout = RunLayout(directory)
    ranks = {rank: _remains(directory, rank) for rank in rank_folders(directory)}
    unseen: dict[Path, Remains] = {}
    for rank, remains in ranks.items():
        path = layout.rank(rank).process
        if remains.state == "running" and is_unseen(ProcessRecord.read(path)):
            unseen[path] = remains
    for path in silent(unseen):
        unseen[path].state = "vanished"
    return [*ranks.values()]


def is_unseen(process: ProcessRecord | None) -> bool:
    """Whether a process cannot be seen from here, and gives signs of life."""
    return process is not None and process.beat_s is not None and is_alive(process) is None


def _remains(directory: Path, rank: int) -> Remains:
    files = RunLayout(directory).rank(rank)
    unreadable: dict[str, str] = {}
    process = _read(files.process, ProcessRecord.load, unreadable) or ProcessRecord()
    report = _read(files.crash, CrashReport.load, unreadable)
    rows = RowReader(files.history)
    windows = _windows(directory, rank, report or CrashReport(), process.started_s)
    return Remains(
        rank=rank,
        state=_state(process),
        world_size=process.world_size or (report and report.world_size),
        started_s=process.started_s,
        report=report,
        phases=_read(files.phases, read_phases, unreadable),
        history=list(_read(files.history, lambda _: deque(rows, LAST_ROWS), unreadable) or ()),
        rows=rows.rows,
        damaged_rows=rows.damaged,
        remarks=rows.remarks,
        unreadable=unreadable,
        windows=windows,
        run=process.run,
        collectives=read_collectives(files.collectives),
        fingerprint=process.fingerprint,
        differences=process.differences,
        resumed_from=process.resumed_from,
        directory=directory,
    )


def _read(path: Path, read: Callable[[Path], T], unreadable: dict[str, str]) -> T | None:
    """The content of a file, or ``None``, with the reason in ``unreadable`` if the file exists."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        unreadable[path.name] = str(error)
        return None


def state_of(process: ProcessRecord, files: RankLayout) -> str:
    """The state of a rank: that of its record, or ``vanished`` where the process is gone.

    A process that cannot be seen from here counts as gone after a minute without a sign of life, by
    the clock of this host: nobody waits here, as ``examine`` does.

    Args:
        process: Content of the rank's ``process.json``.
        files: Files of the rank.
    """
    state = _state(process)
    if state == "running" and is_unseen(process):
        sign_s = last_sign_s(files.process)
        return state if sign_s is None or time.time() - sign_s < _SILENT_S else "vanished"
    return state


def _state(process: ProcessRecord) -> str:
    state = process.state or "unknown"
    return "vanished" if state == "running" and is_alive(process) is False else state


def _windows(
    directory: Path, rank: int, report: CrashReport, started_s: float | None
) -> list[Window]:
    """Traces of this run: those in the rank's folder, and Lightning's in the run directory."""
    files = RunLayout(directory).rank(rank)
    crash = _open_window(files, report)
    places = [files.trace, directory]
    if report.profiler is not None and report.profiler.dirpath:
        places.append(Path(report.profiler.dirpath))
    windows: dict[Path, Window] = {}
    for place in places:
        for path in place.glob("*.pt.trace.json*") if _is(place.is_dir) else ():
            if path.name.startswith(".") or not _is(path.is_file):
                continue
            window = _window(path, was_open=False)
            of_rank = place == files.trace or _names_rank(path, rank)
            is_old = started_s is not None and window.ended_s < started_s - _CLOCKS_S
            if of_rank and not is_old:
                windows[path.resolve()] = window
    if crash is not None:
        windows[crash.resolve()] = _window(crash, was_open=True)
    return sorted(windows.values(), key=_nearness)


def _nearness(window: Window) -> tuple[bool, bool, float]:
    """Sort key: nearness to the death of a training run, for which validations count least."""
    trains = _NO_TRAINING.search(window.path.name) is None
    return window.was_open, trains, window.ended_s


def _open_window(files: RankLayout, report: CrashReport) -> Path | None:
    trace = report.evidence.get("trace", Evidence())
    if trace.state != "saved" or not trace.path:
        return None
    path = files.directory / trace.path
    places = (path, files.trace / path.name)  # the run directory may have been moved
    return next((place for place in places if _is(place.is_file)), None)


def _is(check: Callable[[], bool]) -> bool:
    """Whether ``check`` is true of a path from a report, which may be no valid path."""
    with contextlib.suppress(OSError, ValueError):
        return check()
    return False


def _window(path: Path, *, was_open: bool) -> Window:
    written = _TIME_IN_NAME.search(path.name)
    ended_s = int(written[1]) / 1e9 if written else path.stat().st_mtime
    return Window(path, ended_s, was_open)


def _names_rank(path: Path, rank: int) -> bool:
    """Whether a file in a folder that ranks share names this rank, or no rank at all."""
    named = _RANK_IN_NAME.search(path.name)
    return named is None or int(named[1] or named[2]) == rank
