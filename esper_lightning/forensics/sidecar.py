"""A second process that completes the report of a run whose process vanished.

SIGKILL, the kernel's OOM killer and ``os._exit`` leave a process no moment to write. This one waits
for its end, and writes from the files it left. Standard library only.
"""

import contextlib
import itertools
import os
import select
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.phases import read_phases
from esper_lightning.forensics.reading import open_file, read_file
from esper_lightning.forensics.report import read_report, set_aside, write_report

__all__ = ["Sidecar", "complete_report", "oom_kills", "start", "watch"]

_PROCESS = ("rank", "world_size", "pid", "host", "started_s")
_CGROUP = Path("/sys/fs/cgroup")
_MOST_MEGABYTES = 4096  # of a history, in which lines are counted


class Sidecar:
    """Handle of the process that watches."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._owner = os.getpid()

    def stop(self) -> None:
        """End it: there will be nothing to complete. In a forked child nothing happens."""
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


def start(directory: Path, pid: int) -> Sidecar | None:
    """Watch a process.

    Args:
        directory: Folder of its rank, with its ``process.json``.
        pid: Of the process.

    Returns:
        A handle, or ``None`` where processes cannot be watched (no ``pidfd``) or started.
    """
    if not hasattr(os, "pidfd_open"):
        return None
    package_root = Path(__file__).parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(package_root)!r}); "
        "from esper_lightning.forensics.sidecar import watch; watch(*sys.argv[1:])"
    )
    # Of the signals that a scheduler sends to all processes of a job, none is for it.
    ignoring = (
        "import signal; [signal.signal(getattr(signal, name), signal.SIG_IGN) for name in "
        "('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU', 'SIGQUIT')]; "
    )
    command = [sys.executable, "-S", "-E", "-s", "-c", ignoring + program, str(directory), str(pid)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            bufsize=0,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
    except OSError:
        return None
    return Sidecar(process)


def complete_report(
    files: RankLayout, *, before: dict[str, int] | None = None, after: dict[str, int] | None = None
) -> bool:
    """Write what the process no longer could; call it when the process is gone.

    Args:
        files: Of the rank.
        before: The kernel's OOM counters when the run began.
        after: The same now.

    Returns:
        Whether there was something to complete.
    """
    process, report = read_report(files.process) or {}, read_report(files.crash)
    if report is not None and not _is_its_death(report, process):
        set_aside(files.crash)
        report = None
    if report is not None and not report.get("complete"):
        for evidence in (report.get("evidence") or {}).values():
            if evidence.get("state") == "pending":
                detail = "the process died while this was being saved"
                evidence |= {"state": "failed", "detail": detail}
        report["complete"] = True
    elif report is None and process.get("state") == "running":
        report = _post_mortem(files, process, before or {}, after or {})
    else:
        return False
    _remove_temporaries(files)
    report["cgroup"] = {"before": before, "after": after}
    write_report(files.crash, report)
    write_report(files.process, {**process, "state": "failed", "changed_s": time.time()})
    return True


def _is_its_death(report: dict[str, Any], process: dict[str, Any]) -> bool:
    """Not a hang after which it went on, nor the death of an earlier run."""
    went_on = report.get("cause") == "hang" and process.get("state") == "running"
    times = report.get("started_s"), process.get("started_s")
    return not went_on and (None in times or times[0] == times[1])


def oom_kills(pid: int, root: Path = _CGROUP) -> dict[str, int]:
    """Counters of the kernel's OOM killer that concern a process; empty where none is readable."""
    counters: dict[str, int] = {}
    places = [root]
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base = root / controllers if controllers else root
            places.append(base / path.lstrip("/"))
    for place in places:
        for name in ("memory.events", "memory.oom_control"):
            counters |= _counters(place / name, prefix="oom")
    return counters | _counters(Path("/proc/vmstat"), prefix="oom_kill", rename="host_")


def _counters(path: Path, *, prefix: str, rename: str = "") -> dict[str, int]:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
        return {rename + pair[0]: int(pair[1]) for pair in pairs if pair[0].startswith(prefix)}
    except (OSError, ValueError, IndexError):
        return {}


def _post_mortem(
    files: RankLayout, process: dict[str, Any], before: dict[str, int], after: dict[str, int]
) -> dict[str, Any]:
    iteration, phases = None, list[str]()
    with contextlib.suppress(OSError, ValueError):
        ring = read_phases(files.phases)
        iteration, phases = ring.iteration, [span.name for span in ring.open]
    fault = _native_fault(files.stacks)
    killed = any(after.get(name, 0) > count for name, count in before.items() if "kill" in name)
    vanished = "The process vanished: SIGKILL, os._exit or a power failure."
    if killed:
        vanished = "The process vanished; meanwhile the kernel's OOM killer killed a process."
    return {
        **{name: process.get(name) for name in _PROCESS},
        "time_s": time.time(),
        "cause": "native" if fault else "vanished",
        "error": {"type": None, "message": fault or vanished, "traceback": []},
        "signal": None,
        "exit_status": None,
        "peer": None,
        "iteration": iteration,
        "phases": phases,
        "metrics": {},
        "profiler": None,
        "evidence": _evidence(files, process.get("started_s") or 0.0),
        "complete": True,
        "written_by": "sidecar",
    }


def _evidence(files: RankLayout, started_s: float) -> dict[str, dict[str, str | None]]:
    def entry(path: Path, saved: str, absent: str) -> dict[str, str | None]:
        if not path.exists() or path.stat().st_mtime < started_s:
            return {"state": "absent", "path": None, "detail": absent}
        return {"state": "saved", "path": path.name, "detail": saved}

    rows, last = 0, b"\n"
    with contextlib.suppress(OSError, ValueError), open_file(files.history) as file:
        for piece in itertools.islice(iter(partial(file.read, 1 << 20), b""), _MOST_MEGABYTES):
            rows, last = rows + piece.count(b"\n"), piece[-1:]
    torn = "" if last == b"\n" else "; the last line is torn"
    lost = "a window that was open died with the process; closed windows stay"
    return {
        "history": entry(files.history, f"{rows} rows{torn}", "no iteration was finished"),
        "trace": {"state": "absent", "path": None, "detail": lost},
        "checkpoint": entry(
            files.crash_checkpoint,
            "from earlier in the run",
            "the process had no time to write one",
        ),
        "stacks": entry(files.stacks, "of all threads", "the process had no time to write them"),
    }


def _native_fault(stacks: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        for line in read_file(stacks).decode(errors="replace").splitlines():
            if line.startswith("Fatal Python error"):
                return line
    return None


def _remove_temporaries(files: RankLayout) -> None:
    for folder in (files.directory, files.trace):
        for path in folder.glob(".*"):
            if ".tmp" in path.suffixes or path.name.endswith((".tmp", ".json")):
                path.unlink(missing_ok=True)


def _is_told_to_end(watched: int, pipe: int) -> bool:
    """Wait for one of two: a word in the pipe, or the end of the process, which closes it too."""
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


def watch(directory: str, pid_text: str) -> None:
    """Wait until a process is gone, and complete its report; what the second process runs."""
    files, pid = RankLayout(Path(directory)), int(pid_text)
    before = oom_kills(pid)
    try:
        watched = os.pidfd_open(pid)
    except OSError:  # it is gone already
        watched = None
    if watched is not None and _is_told_to_end(watched, sys.stdin.fileno()):
        return
    with contextlib.suppress(OSError):
        complete_report(files, before=before, after=oom_kills(os.getpid()))
