"""Small JSON files that are written although the disk is full, into room that was reserved."""

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

_ROOM_BYTES = (1 << 16, 1 << 14, 1 << 12)  # the largest for which there is space
_LEAST_BYTES = 1 << 10
_ROOMS = 3  # crash.json, process.json, and the next version of either
_CUTS = (4096, 512, 64)  # characters of a text, until a report fits


def write_json(path: Path, content: Mapping[str, Any], *, expendable: Sequence[str] = ()) -> None:
    """Replace a file by a JSON object, whole; what JSON does not know becomes text.

    Where the disk takes no new file, the object is written into room that ``reserve_room`` made in
    the file's folder, shortened to fit, and padded with blanks; without such room, into a new file
    that is small enough for what the disk, or a limit on the size of files, takes.

    Args:
        path: The file.
        content: The object.
        expendable: Keys whose entries are left out, one after another, where shortening is not
            enough; ``a.b`` for an entry of an object within the object.

    Raises:
        OSError: If the disk takes nothing, and there is no such room.
    """
    try:
        write_atomically(path, encode(content))
    except OSError:
        in_room = _write_in_room(path, content, expendable)
        if not in_room and not _write_short(path, content, expendable):
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


def encode(content: Mapping[str, Any]) -> bytes:
    """A JSON object as a file of one line; what JSON does not know becomes text."""
    return json.dumps(content, default=str).encode() + b"\n"


def _shorten(value: Any, cut: int) -> Any:
    """A value whose texts, and whose lists and objects by their last entries, are cut.

    Entries that are ``null`` say no more than those that are not there.
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
    """An object without one of its entries, ``a.b`` for one of an object within it."""
    name, _, inner = key.partition(".")
    if inner and isinstance(content.get(name), dict):
        return content | {name: _without(content[name], inner)}
    return {other: entry for other, entry in content.items() if inner or other != name}


def _fit(content: Mapping[str, Any], size: int, expendable: Sequence[str]) -> bytes | None:
    """An object of at most so many bytes: with texts cut, and then without what is expendable."""
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
    """Write the longest version that the disk takes as a new file; whether it takes one."""
    for size in (*_ROOM_BYTES, _LEAST_BYTES):
        encoded = _fit(content, size, expendable)
        if encoded is not None:
            with contextlib.suppress(OSError):
                write_atomically(path, encoded)
                return True
    return False


def _write_in_room(path: Path, content: Mapping[str, Any], expendable: Sequence[str]) -> bool:
    """Write into a reserved file and give it the name of the report; whether there was one."""
    for room in sorted(path.parent.glob(".reserved.*")):
        if not _is_room(room):
            continue
        size = room.stat().st_size
        encoded = _fit(content, size, expendable)
        if encoded is None:
            continue
        _fill(room, encoded.ljust(size))
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
