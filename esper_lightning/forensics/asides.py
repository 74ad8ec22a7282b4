"""Files of an earlier run stay beside those of a new one, as ``<name>.<n>``."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from esper_lightning.forensics.files import replacing

__all__ = ["KEPT_ASIDE", "keep_latest", "replace_keeping", "set_aside", "write_aside"]

KEPT_ASIDE = 10
"""How many files of an earlier run are kept under each name; the oldest are removed."""
_HEAD = 65536  # bytes of a report in which its schema is named


def set_aside(path: Path) -> Path | None:
    """Give what an earlier run left here another name, ``<name>.<n>``, and return that.

    No file is replaced, and of several processes one has its way. The latest ``KEPT_ASIDE`` files
    are kept.
    """
    return _move_aside(path, path) if path.exists() else None


def replace_keeping(path: Path, content: bytes) -> None:
    """Replace a file whole, and keep what an earlier run left there as ``<name>.<n>``.

    Whatever fails or ends the process in between, a file that was there is there, old or new.

    Raises:
        OSError: If the disk takes no more; the file is as it was then.
    """

    def place(temporary: Path) -> None:
        if path.exists():
            with replacing(path, place=lambda kept: _move_aside(kept, path)) as kept:
                _copy(path, kept)
        temporary.replace(path)

    with replacing(path, place=place) as temporary:
        temporary.write_bytes(content)


def _copy(path: Path, other: Path) -> None:
    """Give a file another name, too, or copy it where files have one name each."""
    try:
        os.link(path, other)
    except OSError:
        other.write_bytes(path.read_bytes())


def write_aside(path: Path, content: bytes) -> Path:
    """Write what is taken out of a file into a new one, ``<name>.<n>``, whole or not at all.

    Raises:
        OSError: If the disk takes no more; nothing new is there then.
    """
    asides: list[Path | None] = []

    def place(temporary: Path) -> None:
        asides.append(_move_aside(temporary, path))

    with replacing(path, place=place) as temporary:
        temporary.write_bytes(content)
    assert asides[0] is not None
    return asides[0]


def _move_aside(source: Path, path: Path) -> Path | None:
    """Move ``source`` to the next free ``<name of path>.<n>``; ``None`` where it is gone."""
    number = max((number for number, _ in _asides(path)), default=0) + 1
    while True:
        aside = path.with_name(f"{path.name}.{number}")
        try:
            os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL))  # nobody else's now
        except FileExistsError:
            number += 1
            continue
        try:
            source.replace(aside)
        except OSError as error:
            aside.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                return None
            raise
        ours = (file for _, file in sorted(_asides(path)) if _is_ours(file))
        keep_latest(ours, KEPT_ASIDE)
        return aside


def _is_ours(file: Path) -> bool:
    """Whether a file may be removed: somebody's own ``crash.json.1`` is no report of a run."""
    if not file.name.rpartition(".")[0].endswith(".json"):
        return True
    with contextlib.suppress(OSError), file.open("rb") as opened:
        return b'"schema"' in opened.read(_HEAD)
    return False


def _asides(path: Path) -> list[tuple[int, Path]]:
    """Files set aside under a name, with their numbers."""
    start = f"{path.name}."
    names = [file.name for file in path.parent.iterdir() if file.name.startswith(start)]
    numbers = [name.removeprefix(start) for name in names]
    return [(int(n), path.with_name(start + n)) for n in numbers if n.isdecimal()]


def keep_latest(files: Iterable[Path], number: int) -> None:
    """Remove all but the last of some files.

    Args:
        files: From the oldest to the newest.
        number: How many stay.
    """
    for file in list(files)[:-number]:
        with contextlib.suppress(OSError):
            file.unlink()
