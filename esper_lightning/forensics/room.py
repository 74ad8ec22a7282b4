"""Small JSON files that can be written on a full disk, into room that was reserved."""

import contextlib
import errno
import json
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from esper_lightning.forensics.files import write_atomically

__all__ = ["encode", "release_room", "reserve_room", "trim_report", "write_json"]

_ROOM_BYTES = (1 << 16, 1 << 14, 1 << 12)  # the largest size that the disk takes
_LEAST_BYTES = 1 << 10
_ROOMS = 3  # for crash.json, process.json, and the next version of either
_CUTS = (4096, 512, 64)  # lengths to which texts are cut, until a report fits


def write_json(path: Path, content: Mapping[str, Any], *, expendable: Sequence[str] = ()) -> None:
    """Replace a file by a JSON object, whole; values that JSON does not know become text.

    If the disk takes no new file, the object is written into room that ``reserve_room`` made in the
    file's folder, shortened to fit, and padded with blanks. Without such room the object is written
    into a new file that is small enough for the disk, or for a limit on the size of files.

    Args:
        path: File to replace.
        content: JSON object to write.
        expendable: Keys whose entries are dropped, one after another, where shortening is not
            enough; ``a.b`` names an entry of an object within the object.

    Raises:
        OSError: If the disk takes no new file, and there is no reserved room.
    """
    try:
        write_atomically(path, encode(content))
    except OSError:
        in_room = _write_in_room(path, content, expendable)
        if not in_room and not _write_short(path, content, expendable):
            raise


def reserve_room(folder: Path) -> None:
    """Reserve space on the disk for the reports of a folder, in case the disk becomes full.

    The space is in files ``.reserved.<n>``; there are smaller files, fewer or none if the disk is
    full already.
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
    """Free the space that a report in reserved room does not need.

    Raises:
        OSError: If the file cannot be changed.
    """
    if path.is_file() and path.stat().st_size in _ROOM_BYTES:
        content = path.read_bytes()
        if content.endswith(b" "):
            os.truncate(path, len(content.rstrip(b" ")))


def release_room(folder: Path) -> None:
    """Free the space that ``reserve_room`` reserved and no report has used."""
    for room in folder.glob(".reserved.*"):
        with contextlib.suppress(OSError):
            room.unlink()


def encode(content: Mapping[str, Any]) -> bytes:
    """A JSON object as a file of one line; values that JSON does not know become text."""
    return json.dumps(content, default=str).encode() + b"\n"


def _shorten(value: Any, cut: int) -> Any:
    """A value with shorter texts, and with only the last entries of its lists and objects.

    Entries that are ``null`` are dropped, because they mean the same as absent entries.
    """
    if isinstance(value, str):
        return value if len(value) <= cut else value[:cut] + "..."
    if isinstance(value, dict):
        entries = list(cast(dict[str, Any], value).items())[-cut:]
        return {name: _shorten(entry, cut) for name, entry in entries if entry is not None}
    if isinstance(value, list | tuple):
        return [_shorten(entry, cut) for entry in cast(list[Any], value)[-max(8, cut // 64) :]]
    return value


def _without(content: dict[str, Any], key: str) -> dict[str, Any]:
    """An object without one of its entries; ``a.b`` names an entry of an object within it."""
    name, _, inner = key.partition(".")
    if inner and isinstance(content.get(name), dict):
        return content | {name: _without(content[name], inner)}
    return {other: entry for other, entry in content.items() if inner or other != name}


def _fit(content: Mapping[str, Any], size: int, expendable: Sequence[str]) -> bytes | None:
    """An object in at most ``size`` bytes: texts are cut, and then expendable entries dropped."""
    encoded, left = encode(content), dict(content)
    for cut in _CUTS:
        if len(encoded) > size:
            left = {name: _shorten(e, cut) for name, e in content.items() if e is not None}
            encoded = encode(left)
    for key in expendable:
        if len(encoded) > size:
            left = _without(left, key)
            encoded = encode(left)
    return encoded if len(encoded) <= size else None


def _write_short(path: Path, content: Mapping[str, Any], expendable: Sequence[str]) -> bool:
    """Write the longest version that the disk takes as a new file, and return whether it did."""
    for size in (*_ROOM_BYTES, _LEAST_BYTES):
        encoded = _fit(content, size, expendable)
        if encoded is not None:
            with contextlib.suppress(OSError):
                write_atomically(path, encoded)
                return True
    return False


def _write_in_room(path: Path, content: Mapping[str, Any], expendable: Sequence[str]) -> bool:
    """Write into a reserved file, and rename it to the report; return whether that was possible."""
    for room in sorted(path.parent.glob(".reserved.*")):
        if not _is_room(room):
            continue
        size = room.stat().st_size
        encoded = _fit(content, size, expendable)
        if encoded is None:
            continue
        _fill(room, encoded.ljust(size))
        if _is_room(path):  # the room of the report before serves the next report
            with contextlib.suppress(OSError):
                os.link(path, room.with_name(f".reserved.{time.time_ns()}"))
        room.replace(path)
        return True
    return False


def _is_room(path: Path) -> bool:
    """Whether a file has all its blocks, and no second name under which it is a report."""
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
            # RLIMIT_FSIZE forbids writes beyond the limit even into a file that is longer already.
            with mmap.mmap(file.fileno(), len(content)) as mapped:
                mapped[:] = content
        os.fsync(file.fileno())
