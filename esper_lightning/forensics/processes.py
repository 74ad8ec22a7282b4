"""Which process a file names: identifiers of processes are used again, start times are not."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["identify", "is_alive", "same_process"]

_PROC = Path("/proc")
_HOST = socket.gethostname()
_IDENTITY = ("pid", "host", "start_ticks", "boot", "pid_namespace")


def identify(pid: int) -> dict[str, Any]:
    """A record of a process on this host, which no later process has.

    Args:
        pid: Process identifier, in the namespace of the calling process.

    Returns:
        ``pid``, ``host``, ``start_ticks`` (clock ticks from the boot of the host to the start of
        the process), ``boot`` (identifier of that boot) and ``pid_namespace`` (inode of the
        namespace in which ``pid`` counts). The last three are ``None`` where there is no ``/proc``.
    """
    return {
        "pid": pid,
        "host": _HOST,
        "start_ticks": _start_ticks(pid),
        "boot": _boot(),
        "pid_namespace": _pid_namespace(),
    }


def is_alive(identity: Mapping[str, Any]) -> bool | None:
    """Whether the process that ``identify`` recorded still runs.

    A record without ``start_ticks``, of an earlier version, is compared by ``pid`` alone.

    Returns:
        ``None`` where it cannot be seen from here: a process of another host or of another
        container. A zombie is dead.
    """
    host, boot, namespace = (identity.get(name) for name in ("host", "boot", "pid_namespace"))
    if host != _HOST:
        return None
    if boot is not None and boot != _boot():  # the host was started again
        return False
    if namespace is not None and namespace != _pid_namespace():
        return None
    pid, began = identity.get("pid"), identity.get("start_ticks")
    if not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid < 1 << 31:
        return False
    if not (_PROC / "self" / "stat").exists():
        return _takes_signals(pid)
    fields = _stat(pid) or ["X"]
    return fields[0] not in "ZX" and began in (None, int(fields[19]))


def same_process(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of one process; a field that either lacks is not compared."""
    pairs = [(one.get(name), other.get(name)) for name in _IDENTITY]
    return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/<pid>/stat`` from the third on; the name before them may hold spaces."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _start_ticks(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def _boot() -> str | None:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> int | None:
    try:
        return (_PROC / "self/ns/pid").stat().st_ino
    except OSError:
        return None


def _takes_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # it is there, and somebody else's
        return True
    except OSError:
        return False
    return True
