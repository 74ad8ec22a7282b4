"""The identity of processes in files: process identifiers are reused, start times are not."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from esper_lightning.forensics.records import Record

__all__ = ["ProcessIdentity", "identify", "is_alive", "same_process"]

_PROC = Path("/proc")
_HOST = socket.gethostname()


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity(Record):
    """Fields that tell a process from all earlier and later processes.

    Attributes:
        pid: Process identifier.
        host: Name of the host on which the process runs.
        start_ticks: Clock ticks from the boot of the host to the start of the process; ``None``
            where there is no ``/proc``.
        boot: Identifier of the boot of the host; ``None`` where there is no ``/proc``.
        pid_namespace: Inode of the namespace in which ``pid`` counts, as in a container; ``None``
            where there is no ``/proc``.
    """

    pid: int | None = None
    host: str | None = None
    start_ticks: int | None = None
    boot: str | None = None
    pid_namespace: int | None = None


def identify(pid: int) -> ProcessIdentity:
    """The identity of a process on this host.

    Args:
        pid: Process identifier, in the namespace of the calling process.
    """
    return ProcessIdentity(
        pid=pid,
        host=_HOST,
        start_ticks=_start_ticks(pid),
        boot=_boot(),
        pid_namespace=_pid_namespace(),
    )


def is_alive(identity: ProcessIdentity) -> bool | None:
    """Whether a process still runs; a zombie counts as dead.

    An identity without ``start_ticks``, of an earlier version, is compared by ``pid`` alone.

    Returns:
        ``None`` where the process cannot be seen, as on another host or in another container.
    """
    boot, namespace = identity.boot, identity.pid_namespace
    if identity.host != _HOST:
        return None
    if boot is not None and boot != _boot():  # the host was rebooted
        return False
    if namespace is not None and namespace != _pid_namespace():
        return None
    pid, began = identity.pid, identity.start_ticks
    if pid is None or not 0 < pid < 1 << 31:
        return False
    if not (_PROC / "self" / "stat").exists():
        return _takes_signals(pid)
    fields = _stat(pid) or ["X"]
    return fields[0] not in "ZX" and began in (None, int(fields[19]))


def same_process(one: ProcessIdentity, other: ProcessIdentity) -> bool:
    """Whether two records are of one process; a field that either record lacks is ignored."""
    names = ("pid", "host", "start_ticks", "boot", "pid_namespace")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(mine is None or theirs is None or mine == theirs for mine, theirs in pairs)


def _stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/<pid>/stat`` after the name, which may hold spaces; ``None`` without."""
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
    except PermissionError:  # the process exists, and belongs to another user
        return True
    except OSError:
        return False
    return True
