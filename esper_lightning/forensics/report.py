"""``crash.json`` and ``process.json``: what one rank leaves behind about its end.

``process.json`` is written when a rank starts and again when it ends::

    {"schema": 1, "rank": 0, "world_size": 2, "pid": 71, "host": "a", "start_ticks": 8,
     "boot": "5f1c...", "pid_namespace": 4, "started_s": 1.7e9, "run": "9f3c...",
     "state": "running" | "finished" | "failed" | "off", "changed_s": 1.7e9}

(``forensics.processes.identify`` says what tells one process from another. ``run`` is the same for
all ranks of a run that have met, and for no other run.)

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

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from esper_lightning.forensics.files import write_atomically
from esper_lightning.forensics.processes import same_process

__all__ = [
    "SCHEMA",
    "read_report",
    "same_recording",
    "set_aside",
    "what_happened",
    "write_report",
]

SCHEMA = 1


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Replace ``crash.json`` or ``process.json`` whole; what JSON does not know becomes text.

    Raises:
        OSError: If the disk takes no more.
    """
    write_atomically(path, json.dumps({"schema": SCHEMA, **report}, default=str).encode() + b"\n")


def read_report(path: Path) -> dict[str, Any] | None:
    """What ``write_report`` wrote; ``None`` where there is none or it is damaged."""
    try:
        report: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return cast(dict[str, Any], report) if isinstance(report, dict) else None


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


def set_aside(path: Path) -> Path | None:
    """Give what an earlier run left here another name, ``<name>.<n>``, and return that."""
    if not path.exists():
        return None
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)
