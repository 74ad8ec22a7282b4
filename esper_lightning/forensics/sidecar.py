"""A second process that completes the report of a run whose process vanished.

SIGKILL, the kernel's OOM killer and ``os._exit`` leave a process no time to write. The second
process waits for the end of the first, and writes the report from the files that it left. Standard
library only.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from esper_lightning.forensics.asides import rename_aside
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.memory import Memory, oom_kills
from esper_lightning.forensics.owner_record import read_owner
from esper_lightning.forensics.phases import Phases, read_phases
from esper_lightning.forensics.processes import ProcessIdentity, identify, is_alive
from esper_lightning.forensics.rank_record import ProcessRecord, same_recording
from esper_lightning.forensics.reading import open_file, read_file
from esper_lightning.forensics.report import (
    CgroupCounters,
    CrashReport,
    ErrorReport,
    Evidence,
    MemoryReport,
)
from esper_lightning.forensics.room import release_room

__all__ = ["Sidecar", "complete_report", "locked", "start", "watch"]

_LOCK_S = 5.0
_COPY_S = 90.0
_MOST_MEGABYTES = 4096  # length of a history in which lines are counted


class Sidecar:
    """The handle of the second process, which watches this one."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._owner = os.getpid()

    def stop(self) -> None:
        """End the second process, as no report needs it. In a forked child nothing happens."""
        if os.getpid() != self._owner:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError), self._process.stdin as pipe:
            pipe.write(b".")
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start(directory: Path, pid: int, process: ProcessRecord | None = None) -> Sidecar | None:
    """Start a second process that watches a process.

    Args:
        directory: Folder of the rank of the watched process.
        pid: Process identifier of the watched process.
        process: Record of the watched process in ``process.json``; ``None`` to read that file.

    Returns:
        Handle of the second process. ``None`` where the system has no ``pidfd``, without which no
        process can be watched, or where no process can be started.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    if process is None:
        process = ProcessRecord.read(RankLayout(directory).process) or ProcessRecord()
    package_root = Path(__file__).parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(package_root)!r}); "
        "from esper_lightning.forensics.sidecar import watch; watch(*sys.argv[1:])"
    )
    # A scheduler sends signals to all processes of a job; the second process ignores them.
    ignoring = (
        "import signal; [signal.signal(number, signal.SIG_IGN) for number in "
        "signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}]; "
    )
    watched = json.dumps([identify(pid).to_dict(), process.to_dict()])
    command = [sys.executable, "-S", "-E", "-s", "-c", ignoring + program, str(directory), watched]
    try:
        second = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            bufsize=0,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal does not reach it
        )
    except OSError:
        return None
    return Sidecar(second)


@contextlib.contextmanager
def locked(directory: Path) -> Generator[None]:
    """Lock the folder of a rank: one process at a time writes there about the rank's end.

    The death of its holder releases the lock. If the file system has no locks, or the lock is not
    free within some seconds, the block runs without the lock.

    Args:
        directory: Folder of the rank.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + _LOCK_S
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
                continue
            except OSError:
                pass
            break
        yield
    finally:
        os.close(descriptor)


def complete_report(
    files: RankLayout,
    *,
    before: dict[str, int] | None = None,
    after: dict[str, int] | None = None,
    watched: ProcessRecord | None = None,
) -> bool:
    """Complete the report of a process that is gone, or write the report that it could not.

    The second process calls this when the watched process has ended. The next run in the directory
    calls this if the second process died together with the watched one, as in a container. Both
    hold the lock of ``locked``.

    Args:
        files: Files of the rank.
        before: Counters of the kernel's OOM killer when the run began; ``None`` if unknown.
        after: Counters of the kernel's OOM killer now; ``None`` if unknown.
        watched: Record in ``process.json`` of the process that is gone; files of another process
            are not changed. ``None`` for the process that the files name, unless it is alive.

    Returns:
        Whether there was a report to complete or to write.
    """
    process = ProcessRecord.read(files.process) or watched or ProcessRecord()
    if not _is_gone(process, watched):
        return False
    report = CrashReport.read(files.crash)
    if report is not None and not _is_its_death(report, process):
        rename_aside(files.crash)
        report = None
    unsaved = process.state == "failed" and process.evidence_saved is False
    if report is not None and not report.complete:
        report = replace(report, evidence=_without_pending(report.evidence))
    elif report is None and (process.state == "running" or unsaved):
        report = _post_mortem(files, process, before or {}, after or {})
        if watched is not None:  # the process has just ended
            report = replace(report, time_s=time.time())
    else:
        return False
    counters = None if before is None else CgroupCounters(before=before, after=after or {})
    report = replace(report, cgroup=counters, complete=True)
    if not _is_gone(ProcessRecord.read(files.process) or process, process):
        return False
    _remove_temporaries(files, process.pid)
    report.write(files.crash)
    ended = replace(process, state="failed", evidence_saved=True, changed_s=time.time())
    ended.write(files.process)
    release_room(files.directory)
    return True


def _without_pending(evidence: Mapping[str, Evidence]) -> dict[str, Evidence]:
    """The evidence after a death: what was being saved has failed."""
    detail = "the process died while this was being saved"
    return {
        name: replace(entry, state="failed", detail=detail) if entry.state == "pending" else entry
        for name, entry in evidence.items()
    }


def _is_gone(process: ProcessRecord, watched: ProcessRecord | None) -> bool:
    """Whether files are of a process that is gone, and not of the next one in the directory."""
    if watched is None:
        return is_alive(process) is not True
    return same_recording(process, watched)


def _is_its_death(report: CrashReport, process: ProcessRecord) -> bool:
    """Whether a report is of the process's death: of no hang that it survived, of no other run."""
    survived = report.cause == "hang" and process.state == "running"
    return not survived and same_recording(report, process)


def _post_mortem(
    files: RankLayout, process: ProcessRecord, before: dict[str, int], after: dict[str, int]
) -> CrashReport:
    ring: Phases | None = None
    with contextlib.suppress(OSError, ValueError):
        ring = read_phases(files.phases)
    memory = None if ring is None else ring.memory
    fault = _native_fault(files.stacks)
    message = fault or _vanished(memory, before, after)
    return CrashReport(
        **process.of_rank(),
        time_s=_last_sign_of_life(files, ring, process),
        cause="native" if fault else "vanished",
        error=ErrorReport(message=message),
        iteration=None if ring is None else ring.iteration,
        phases=() if ring is None else tuple(span.name for span in ring.open),
        memory=None if memory is None else MemoryReport(**memory._asdict()),
        evidence=_evidence(files, process.started_s or 0.0),
        written_by="sidecar",
    )


def _vanished(memory: Memory | None, before: dict[str, int], after: dict[str, int]) -> str:
    """A sentence on why a process may have vanished: the OOM killer if numbers suggest it."""
    kills = [
        f"{name} {count} -> {after[name]}"
        for name, count in before.items()
        if "kill" in name and after.get(name, 0) > count
    ]
    numbers = "; ".join([*kills, memory.in_words if memory else "its memory is not known"])
    if kills or (memory is not None and memory.is_short):
        return f"The process vanished; first suspect: the kernel's OOM killer ({numbers})."
    return f"The process vanished: SIGKILL by somebody, os._exit or a power failure ({numbers})."


def _last_sign_of_life(files: RankLayout, ring: Phases | None, process: ProcessRecord) -> float:
    signs = [float(process.changed_s or 0.0)]
    if ring is not None:
        signs += [max(span.begin_ns, span.end_ns) / 1e9 for span in (*ring.open, *ring.closed[-1:])]
    with contextlib.suppress(OSError):
        signs.append(files.history.stat().st_mtime)
    return max(signs)


def _evidence(files: RankLayout, started_s: float) -> dict[str, Evidence]:
    def entry(path: Path, saved: str, absent: str) -> Evidence:
        if not path.exists() or path.stat().st_mtime < started_s:
            return Evidence(state="absent", detail=absent)
        return Evidence(state="saved", path=path.name, detail=saved)

    rows, last = 0, b"\n"
    with contextlib.suppress(OSError, ValueError), open_file(files.history) as file:
        for piece in itertools.islice(iter(partial(file.read, 1 << 20), b""), _MOST_MEGABYTES):
            rows, last = rows + piece.count(b"\n"), piece[-1:]
    torn = "" if last == b"\n" else "; the last line is torn"
    lost = "a window that was open died with the process; closed windows stay"
    states = [path for path in files.states if path.exists() and path.stat().st_mtime >= started_s]
    kept = f"; ckpt_path='last' resumes from {states[0].name}" if states else ""
    return {
        "history": entry(files.history, f"{rows} rows{torn}", "no iteration was finished"),
        "trace": Evidence(state="absent", detail=lost),
        "checkpoint": entry(
            files.crash_checkpoint,
            "from earlier in the run",
            f"the process had no time to write one{kept}",
        ),
        "stacks": entry(files.stacks, "of all threads", "the process had no time to write them"),
    }


def _native_fault(stacks: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in read_file(stacks).decode(errors="replace").splitlines():
            if line.startswith("Fatal Python error"):
                return line
    return None


def _remove_temporaries(files: RankLayout, pid: int | None) -> None:
    """Remove the temporary files of a process that is gone, and no others: they may be anyone's."""
    names = re.compile(rf"\.(.+\.)?{pid}(\.\d+\.tmp|-\d+\.(json|json\.tmp|tmp\.json\.gz))")
    for folder in (files.directory, files.trace):
        for path in folder.glob(".*"):
            if names.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _is_told_to_end(watched: int, pipe: int) -> bool:
    """Wait for a byte in the pipe, or the end of the process, which closes the pipe too.

    Returns:
        Whether a byte came: the second process must end.
    """
    poll = select.poll()
    for descriptor in (watched, pipe):
        poll.register(descriptor, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if pipe in ready:
            if os.read(pipe, 1):
                return True
            poll.unregister(pipe)
        if watched in ready:
            return False


def watch(directory: str, records: str) -> None:
    """Wait until a process is gone, and complete its report; the second process runs this.

    Args:
        directory: Folder of the rank of the watched process.
        records: JSON of two records of the watched process: its identity as ``identify`` returns
            it, and its record in ``process.json``.
    """
    files, (of_process, of_rank) = RankLayout(Path(directory)), json.loads(records)
    identity, process = ProcessIdentity.from_dict(of_process), ProcessRecord.from_dict(of_rank)
    pid, watched = identity.pid or 0, None
    before = oom_kills(pid)
    with contextlib.suppress(OSError):
        watched = os.pidfd_open(pid)
    # By now a later process may have the same identifier.
    if watched is not None and is_alive(identity) and _is_told_to_end(watched, sys.stdin.fileno()):
        return
    with contextlib.suppress(OSError), locked(files.directory):
        complete_report(files, before=before, after=oom_kills(os.getpid()), watched=process)
    _copy(files, process.rank)


def _copy(files: RankLayout, rank: int | None) -> None:
    """Copy the run directory of a process that vanished to its remote address, if it has one.

    The copy needs a library, which must not be loaded while the process lives.
    """
    directory = files.directory.parent
    address = read_owner(directory).get("address")
    if isinstance(address, str):
        program = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); "
            "from esper_lightning.callbacks.mirror import main; main(*sys.argv[1:])"
        )
        command = [sys.executable, "-c", program, str(directory), address, str(rank or 0)]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(command, check=False, timeout=_COPY_S, stderr=subprocess.DEVNULL)
