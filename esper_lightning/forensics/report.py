"""``crash.json`` and ``process.json``: what one rank leaves behind about its end.

``process.json`` is written when a rank starts and again when it ends::

    {"schema": 1, "rank": 0, "world_size": 2, "pid": 71, "host": "a", "start_ticks": 8,
     "boot": "5f1c...", "pid_namespace": 4, "started_s": 1.7e9, "run": "9f3c...",
     "event_files": ["events.out.tfevents...."],
     "state": "running" | "finished" | "failed" | "off", "changed_s": 1.7e9}

(``forensics.processes.identify`` says what tells one process from another. ``run`` is the same for
all ranks of a run that have met, and for no other run. ``event_files`` are those of TensorBoard
that this run and earlier ones in the directory are known to have begun.)

``crash.json`` (times in seconds since the epoch, paths relative to the rank's folder), which also
has what tells the process from others in ``process.json``::

    {"schema": 1, "rank": 0, "world_size": 2, "pid": 71, "host": "a", "started_s": 1.7e9,
     "time_s": 1.7e9,
     "cause": "exception" | "signal" | "native" | "vanished" | "peer" | "hang" | "exit",
     "error": {"type": "ValueError", "message": "...", "traceback": ["...", ...],
               "non_finite": {"phase": "rollout", "tensors": [...], "environments": [...]}} | null,
     "signal": "SIGTERM" | null, "exit_status": 143 | null,
     "peer": {"rank": 1, "reason": "..."} | null,
     "stage": "fit", "iteration": 12, "global_step": 12, "epoch": 0,
     "phases": ["run_training_batch", "...training_step", "update"],
     "metrics": {"loss": 0.1},
     "profiler": {"class": "PyTorchProfiler", "action": "RECORD" | "WARMUP" | "NONE",
                  "dirpath": "/where/it/writes" | null} | null,
     "evidence": {"history": {"state": "saved", "path": "history.jsonl", "detail": "12 rows"},
                  "trace": {"state": "saved" | "absent" | "pending" | "failed", "path": ...,
                            "detail": "why, where there is nothing"},
                  "checkpoint": ..., "profile": ..., "stacks": ..., "memory": ..., ...},
     "cgroup": {"before": {"oom_kill": 0}, "after": {"oom_kill": 1}} | null,
     "memory": {"rss_bytes": 1, "peak_bytes": 1, "limit_bytes": 9, "available_bytes": 8} | null,
     "duration_s": 0.3, "complete": true, "versions": {"torch": "2.13.0", ...}}
"""
# Reports are read as they are, from whatever version wrote them.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import errno
import json
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.processes import same_process
from esper_lightning.forensics.reading import parse_json, read_file

__all__ = [
    "SCHEMA",
    "load_report",
    "read_report",
    "release_room",
    "reserve_room",
    "same_recording",
    "trim_report",
    "what_happened",
    "write_report",
]

SCHEMA = 1
"""How many files of an earlier run are kept under each name; the oldest are removed."""
_ROOM_BYTES = (1 << 16, 1 << 14, 1 << 12)  # the largest for which there is space
_LEAST_BYTES = 1 << 10
_ROOMS = 3  # crash.json, process.json, and the next version of either
_CUTS = (4096, 512, 64)  # characters of a text, until a report fits
_LEFT_OUT = ("versions", "metrics", "cgroup", "memory", "evidence", "phases", "profiler")
_TIME = "seconds since the epoch"
_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("rank", "world_size", "pid", "exit_status", "iteration"), int),
    **dict.fromkeys(("start_ticks", "pid_namespace"), int),
    **dict.fromkeys(("state", "host", "boot", "run", "cause", "signal", "stage"), str),
    **dict.fromkeys(("time_s", "started_s", "changed_s"), _TIME),
    **dict.fromkeys(("saved", "complete"), bool),
    "error": {
        **dict.fromkeys(("type", "message"), str),
        "traceback": [str],
        "non_finite": {"phase": str, "tensors": [str], "environments": [int]},
    },
    "peer": {"rank": int, "reason": str},
    "phases": [str],
    "event_files": [str],
    "metrics": {"*": (int, float, str)},
    "profiler": {"class": str, "action": str, "dirpath": str},
    "evidence": {"*": {"state": str, "path": str, "detail": str}},
    "memory": {"*": int},
    "cgroup": {"before": {"*": int}, "after": {"*": int}},
}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Replace ``crash.json`` or ``process.json`` whole; what JSON does not know becomes text.

    Where the disk takes no new file, the report is written into room that ``reserve_room`` made in
    its folder, shortened to fit, and padded with blanks; without such room, into a new file that is
    small enough for what the disk, or a limit on the size of files, takes.

    Raises:
        OSError: If the disk takes nothing, and there is no such room.
    """
    try:
        write_atomically(path, _encode(report))
    except OSError:
        if not _write_in_room(path, report) and not _write_short(path, report):
            raise


def reserve_room(folder: Path) -> None:
    """Occupy space on the disk for the reports of a folder, for when the disk is full.

    Files ``.reserved.<n>``; smaller ones, fewer or none where the disk is full already.
    """
    for number in range(_ROOMS):
        room = folder / f".reserved.{number}"
        if not any(_reserve(room, size) for size in _ROOM_BYTES):
            return


def _reserve(room: Path, size: int) -> bool:
    try:
        fd = os.open(room, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
    except OSError:
        with contextlib.suppress(OSError):
            room.unlink()
        return False
    return True


def trim_report(path: Path) -> None:
    """Give the space back that a report does not need which was written into reserved room.

    Raises:
        OSError: If the file cannot be changed.
    """
    if path.is_file() and path.stat().st_size in _ROOM_BYTES:
        content = path.read_bytes()
        if content.endswith(b" "):
            os.truncate(path, len(content.rstrip(b" ")))


def release_room(folder: Path) -> None:
    """Give the space back that ``reserve_room`` occupied and no report needed."""
    for room in folder.glob(".reserved.*"):
        with contextlib.suppress(OSError):
            room.unlink()


def _encode(report: dict[str, Any]) -> bytes:
    return json.dumps({"schema": SCHEMA, **report}, default=str).encode() + b"\n"


def _shorten(value: Any, cut: int) -> Any:
    """A value whose texts, and whose lists and dictionaries by their last entries, are cut."""
    if isinstance(value, str):
        return value if len(value) <= cut else value[:cut] + "..."
    if isinstance(value, dict):
        return {name: _shorten(entry, cut) for name, entry in list(value.items())[-cut:]}
    if isinstance(value, list | tuple):
        return [_shorten(entry, cut) for entry in value[-max(8, cut // 64) :]]
    return value


def _fit(report: dict[str, Any], size: int) -> bytes | None:
    """A report of at most so many bytes: with texts cut, and at last without what can be missed."""
    content = _encode(report)
    for cut in _CUTS:
        if len(content) > size:
            content = _encode({name: _shorten(value, cut) for name, value in report.items()})
    left = {name: _shorten(value, _CUTS[-1]) for name, value in report.items()}
    for name in _LEFT_OUT:
        if len(content) > size and name in left:
            del left[name]
            content = _encode(left)
    if len(content) > size and isinstance(left.get("error"), dict):
        error = {name: left["error"].get(name) for name in ("type", "message")}
        content = _encode({**left, "error": error})
    return content if len(content) <= size else None


def _write_short(path: Path, report: dict[str, Any]) -> bool:
    """Write the longest report that the disk takes as a new file; whether it takes one."""
    for size in (*_ROOM_BYTES, _LEAST_BYTES):
        content = _fit(report, size)
        if content is not None:
            with contextlib.suppress(OSError):
                write_atomically(path, content)
                return True
    return False


def _write_in_room(path: Path, report: dict[str, Any]) -> bool:
    """Write into a reserved file and give it the name of the report; whether there was one."""
    for room in sorted(path.parent.glob(".reserved.*")):
        if not _is_room(room):
            continue
        size = room.stat().st_size
        content = _fit(report, size)
        if content is None:
            continue
        _fill(room, content.ljust(size))
        if _is_room(path):  # where the report before this one is: the next one will need it
            with contextlib.suppress(OSError):
                os.link(path, room.with_name(f".reserved.{time.time_ns()}"))
        room.replace(path)
        return True
    return False


def _is_room(path: Path) -> bool:
    """Whether a file has all its blocks, and no other name under which it is a report."""
    try:
        found = path.stat()
    except OSError:
        return False
    size = found.st_size
    return size in _ROOM_BYTES and found.st_blocks * 512 >= size and found.st_nlink == 1


def _fill(room: Path, content: bytes) -> None:
    with room.open("r+b", buffering=0) as file:
        try:
            file.write(content)
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            # RLIMIT_FSIZE forbids to write beyond it even into a file that is as long already.
            with mmap.mmap(file.fileno(), len(content)) as mapped:
                mapped[:] = content
        os.fsync(file.fileno())


def read_report(path: Path) -> dict[str, Any] | None:
    """What ``write_report`` wrote; ``None`` where there is none or it is damaged.

    Fields that are not of their type are left out.
    """
    try:
        return load_report(path)
    except (FileNotFoundError, ValueError):
        return None


def load_report(path: Path) -> dict[str, Any]:
    """What ``write_report`` wrote, without the fields that are not of their type.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read, saying why in a few words.
    """
    report = parse_json(read_file(path))
    if not isinstance(report, dict):
        raise ValueError("it is no JSON object")
    return cast(dict[str, Any], _fitting(report, _SHAPE))


def _fitting(value: Any, shape: Any) -> Any:
    """What of a value is of a shape: a type, or a list or dictionary of shapes; else ``None``."""
    if shape is _TIME:
        is_time = isinstance(value, int | float) and 0 <= value < 1e11
        return value if is_time and not isinstance(value, bool) else None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return None
        return [entry for entry in value if _fitting(entry, shape[0]) is not None]
    if not isinstance(shape, dict):
        is_flag = isinstance(value, bool) and shape not in (bool, object)
        return value if isinstance(value, shape) and not is_flag else None
    if not isinstance(value, dict):
        return None
    fitting = {k: _fitting(v, shape.get(k, shape.get("*", object))) for k, v in value.items()}
    return {k: v for k, v in fitting.items() if v is not None or (value[k] is None and k in shape)}


def same_recording(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records, of ``process.json`` or ``crash.json``, are of one run of one process.

    A field that either record lacks is not compared.
    """
    began = one.get("started_s"), other.get("started_s")
    return same_process(one, other) and (None in began or began[0] == began[1])


def what_happened(report: dict[str, Any]) -> str:
    """What ended a run, in a few words; empty where a report does not say."""
    error, peer = report.get("error") or {}, report.get("peer") or {}
    if report.get("cause") == "peer" and peer:
        return f"rank {peer.get('rank')}: {peer.get('reason')}"
    if error.get("type"):
        return f"{error['type']}: {error.get('message', '')}".rstrip(": ")
    return str(error.get("message") or report.get("signal") or report.get("cause") or "")
