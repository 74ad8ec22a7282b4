"""Memory of a process, memory that its limits leave, and counters of the kernel's OOM killer."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Memory", "limits_of_cgroups", "measure_memory", "oom_kills"]

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 spells no limit as a number of about 2**63
_SHORT = 0.1  # share of the limit below which the kernel may soon kill, with a margin
# Files of the limit and the usage, and the line of memory.stat with reclaimable memory.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # cgroup v1
)


class Memory(NamedTuple):
    """Memory at one moment, in bytes."""

    rss_bytes: int
    """Resident memory of the process."""
    peak_bytes: int
    """Greatest resident memory of the process so far."""
    limit_bytes: int
    """The lowest limit: that of a cgroup, or the memory of the machine."""
    available_bytes: int
    """Memory left below that limit, caches that can be dropped included."""

    @property
    def is_short(self) -> bool:
        """Whether the limit is so near that the kernel may kill for memory."""
        return self.limit_bytes > 0 and self.available_bytes < _SHORT * self.limit_bytes

    @property
    def in_words(self) -> str:
        """The numbers as a clause of a sentence."""
        rss, peak, limit, available = (f"{count / 1e9:.2f} GB" for count in self)
        return f"it had {rss}, at most {peak}; {available} of {limit} were left"


def measure_memory(pid: int | str = "self", root: Path = _CGROUP) -> Memory | None:
    """Memory of a process now; ``None`` where there is no ``/proc``. Takes about a millisecond.

    Args:
        pid: Process identifier.
        root: Folder of the cgroups.
    """
    status, machine = _fields(_PROC / str(pid) / "status"), _fields(_PROC / "meminfo")
    if "VmRSS:" not in status or "MemTotal:" not in machine:
        return None
    limit, available = machine["MemTotal:"], machine.get("MemAvailable:", 0)
    limit, available = 1024 * limit, 1024 * available
    for place in _cgroups(pid, root):
        for limit_name, usage_name, cache in _FILES:
            group = _number(place / limit_name)
            if group is not None and group < limit:
                used = _number(place / usage_name) or 0
                used -= _fields(place / "memory.stat").get(cache, 0)
                limit, available = group, max(0, min(available, group - used))
    rss = 1024 * status["VmRSS:"]
    return Memory(rss, max(rss, 1024 * status.get("VmHWM:", 0)), limit, available)


def oom_kills(pid: int, root: Path = _CGROUP) -> dict[str, int]:
    """Counters of the kernel's OOM killer that concern a process; empty where none is readable."""
    counters: dict[str, int] = {}
    for place in _cgroups(pid, root):
        for name in ("memory.events", "memory.oom_control"):
            fields = _fields(place / name)
            counters |= {key: count for key, count in fields.items() if key.startswith("oom")}
    machine = _fields(_PROC / "vmstat")
    return counters | {
        f"host_{key}": count for key, count in machine.items() if key.startswith("oom_kill")
    }


def limits_of_cgroups(pid: int | str = "self", root: Path = _CGROUP) -> dict[str, float]:
    """The lowest limits of a process's cgroups: ``memory_bytes`` and ``cpus``, where there are any.

    Args:
        pid: Process identifier.
        root: Folder of the cgroups.
    """
    memory: list[int] = []
    cpus: list[float] = []
    for place in _cgroups(pid, root):
        memory += [n for name, *_ in _FILES if (n := _number(place / name)) is not None]
        with contextlib.suppress(OSError, ValueError):  # "max 100000" is no limit
            quota_us, period_us = map(int, (place / "cpu.max").read_text().split())
            cpus.append(quota_us / period_us)
    limits = {"memory_bytes": memory, "cpus": cpus}
    return {name: min(found) for name, found in limits.items() if found and min(found) < _UNLIMITED}


def _cgroups(pid: int | str, root: Path) -> Iterator[Path]:
    """Folders that may hold the numbers of a process's cgroups, and of the cgroups above them."""
    yield root
    with contextlib.suppress(OSError, ValueError):  # a line of another form
        for line in (_PROC / str(pid) / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / controllers if controllers else root
                folder = base / path.lstrip("/")
                yield from (
                    f for f in (*reversed(folder.parents), folder) if f.is_relative_to(base)
                )


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file whose lines are a name, a number, and perhaps a unit."""
    try:
        words = [line.split() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return {}
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max"
        return None
