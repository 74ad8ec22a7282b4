"""The record in ``owner.lock``: whose a directory is, or what it was claimed for before.

``forensics.claims`` writes the record.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from esper_lightning.forensics.heartbeat import silent
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import is_alive
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.reading import RowReader, open_file, parse_json

__all__ = [
    "OWNER_BEGINS",
    "Use",
    "beating_elsewhere",
    "holds_a_run",
    "is_copied",
    "open_record",
    "parse_owner",
    "ranks_of",
    "read_locked",
    "read_owner",
    "read_record",
    "use_of",
    "write_locked",
]

Use = Literal["run", "logger"]
"""What a directory is claimed for: to be that of a run, or of a logger outside it."""

OWNER_BEGINS = b'{"pid"'
"""Beginning of every record."""

_MOST_BYTES = 4096


def open_record(path: Path) -> int:
    """Descriptor of ``owner.lock``, which is made if it does not exist.

    Without the permission to write, as in the directory of another user's run, the descriptor
    only reads: the file can be locked all the same.

    Raises:
        OSError: If the file can be neither made nor read, or is a link.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError as error:
        with contextlib.suppress(OSError):
            return os.open(path, flags | os.O_RDONLY)
        raise error from None


def parse_owner(content: bytes) -> dict[str, Any]:
    """The fields of a record; empty if the record is damaged."""
    found: Any = None
    with contextlib.suppress(ValueError):
        found = parse_json(content)
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def read_locked(lock: int) -> dict[str, Any]:
    """The fields of the record in an open ``owner.lock``; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        return parse_owner(os.pread(lock, _MOST_BYTES, 0))
    return {}


def write_locked(lock: int, owner: dict[str, Any]) -> None:
    """Write the record into an open ``owner.lock``; on a full disk the lock alone must suffice."""
    with contextlib.suppress(OSError):
        content = json.dumps({**owner, "inode": os.fstat(lock).st_ino}).encode()
        os.ftruncate(lock, 0)
        os.pwrite(lock, content + b"\n", 0)


def is_copied(lock: int) -> bool:
    """Whether an open ``owner.lock`` is a copy of the file that its record was written into."""
    return read_locked(lock).get("inode") not in (None, os.fstat(lock).st_ino)


def read_record(directory: Path) -> bytes | None:
    """The content of ``owner.lock``; ``None`` if there is no such file, or it cannot be read."""
    try:
        with open_file(RunLayout(directory).owner) as file:
            return file.read(_MOST_BYTES)
    except (OSError, ValueError):
        return None


def read_owner(directory: Path) -> dict[str, Any]:
    """The process that owns or owned a directory, as ``owner.lock`` names it.

    Returns:
        The fields of ``ProcessIdentity``, ``claimed_s`` and ``address`` (of a remote copy), as
        far as they are known; empty if the directory has no owner, or its owner has released it.
    """
    owner = parse_owner(read_record(directory) or b"")
    return {} if owner.get("pid") is None else owner


def use_of(directory: Path, record: bytes | None) -> Use | None:
    """What earlier claims of a directory were for; ``None`` if no claim is known.

    Args:
        directory: Directory whose other files decide where the record says nothing: an empty
            ``owner.lock`` may be somebody's own, or what an earlier version or a full disk left.
        record: Content of ``owner.lock``; ``None`` if there is no such file.
    """
    if record is not None and record.startswith(OWNER_BEGINS):
        return "logger" if parse_owner(record).get("use") == "logger" else "run"
    return "run" if any(_signs_of_a_run(directory)) else None


def holds_a_run(directory: Path) -> bool:
    """Whether a run has, or had, its files in a directory."""
    return use_of(directory, read_record(directory)) == "run"


def ranks_of(directory: Path) -> list[ProcessRecord]:
    """The readable records of ranks; versions before ``owner.lock`` wrote such records, too."""
    found = (ProcessRecord.read(path) for path in directory.glob("rank*/process.json"))
    return [rank for rank in found if rank is not None]


def beating_elsewhere(directory: Path) -> ProcessRecord | None:
    """A rank on another host, or in another container, that gives signs of life in a directory.

    Where such a rank is recorded as running, the call takes up to ``heartbeat.GONE_S``.
    """
    layout = RunLayout(directory)
    unseen = {
        layout.rank(record.rank or 0).process: record
        for record in ranks_of(directory)
        if record.state == "running" and record.beat_s is not None and is_alive(record) is None
    }
    quiet = silent(unseen)
    return next((record for path, record in unseen.items() if path not in quiet), None)


def _signs_of_a_run(directory: Path) -> Iterator[bool]:
    for rank in ranks_of(directory):
        yield rank.pid is not None
    if not RunLayout(directory).owner.exists():
        return
    for history in directory.glob("rank*/history.jsonl"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            yield any("iteration" in row for row in islice(RowReader(history), 1))
