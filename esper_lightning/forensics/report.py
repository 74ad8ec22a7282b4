"""``crash.json`` and ``process.json``: what one rank leaves behind about its end.

``process.json`` is written when a rank starts and again when it ends::

    {"schema": 1, "rank": 0, "world_size": 2, "pid": 71, "host": "a", "start_ticks": 8,
     "boot": "5f1c...", "pid_namespace": 4, "started_s": 1.7e9,
     "state": "running" | "finished" | "failed" | "off", "changed_s": 1.7e9}

(``forensics.processes.identify`` says what tells one process from another.)

``crash.json`` (times in seconds since the epoch, paths relative to the rank's folder)::

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
     "duration_s": 0.3, "complete": true, "versions": {"torch": "2.13.0", ...}}
"""
# Reports are read as they are, from whatever version wrote them.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
from pathlib import Path
from typing import Any, cast

from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.reading import parse_json, read_file

__all__ = ["SCHEMA", "load_report", "read_report", "set_aside", "what_happened", "write_report"]

SCHEMA = 1
_TIME = "seconds since the epoch"
_SHAPE: dict[str, Any] = {
    **dict.fromkeys(("rank", "world_size", "pid", "exit_status", "iteration"), int),
    **dict.fromkeys(("start_ticks", "pid_namespace"), int),
    **dict.fromkeys(("state", "host", "boot", "cause", "signal", "stage"), str),
    **dict.fromkeys(("time_s", "started_s", "changed_s"), _TIME),
    **dict.fromkeys(("saved", "complete"), bool),
    "error": {
        **dict.fromkeys(("type", "message"), str),
        "traceback": [str],
        "non_finite": {"phase": str, "tensors": [str], "environments": [int]},
    },
    "peer": {"rank": int, "reason": str},
    "phases": [str],
    "metrics": {"*": (int, float, str)},
    "profiler": {"class": str, "action": str, "dirpath": str},
    "evidence": {"*": {"state": str, "path": str, "detail": str}},
}


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Replace ``crash.json`` or ``process.json`` whole; what JSON does not know becomes text.

    Raises:
        OSError: If the disk takes no more.
    """
    write_atomically(path, json.dumps({"schema": SCHEMA, **report}, default=str).encode() + b"\n")


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


def what_happened(report: dict[str, Any]) -> str:
    """What ended a run, in a few words; empty where a report does not say."""
    error, peer = report.get("error") or {}, report.get("peer") or {}
    if report.get("cause") == "peer" and peer:
        return f"rank {peer.get('rank')}: {peer.get('reason')}"
    if error.get("type"):
        return f"{error['type']}: {error.get('message', '')}".rstrip(": ")
    return str(error.get("message") or report.get("signal") or report.get("cause") or "")


def set_aside(path: Path) -> Path | None:
    """Give what an earlier run left here another name, ``<name>.<n>``, and return that."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)
