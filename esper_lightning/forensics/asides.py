"""Files of earlier runs, which stay beside the files of a new run as ``<name>.<n>``."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from esper_lightning.forensics.files import replacing

__all__ = ["KEPT_ASIDE", "keep_latest", "rename_aside", "replace_keeping", "write_aside"]

KEPT_ASIDE = 10
"""Number of files of earlier runs that stay under each name; older files are removed."""
_HEAD = 65536  # bytes at the start of a report that name its schema


def rename_aside(path: Path) -> Path | None:
    """Rename a file of an earlier run to ``<name>.<n>``.

    No file is replaced, and if several processes rename the file, one of them succeeds. The latest
    ``KEPT_ASIDE`` files stay.

    Returns:
        The new path; ``None`` where there was no file.
    """
    return _move_aside(path, path) if path.exists() else None


def replace_keeping(path: Path, content: bytes) -> None:
    """Replace a file whole, and rename the file of an earlier run to ``<name>.<n>``.

    At any moment, also after an error or a kill, ``path`` has the old content or the new.

    Raises:
        OSError: If the disk takes no more; the file is unchanged then.
    """

    def place(temporary: Path) -> None:
        if path.exists():
            with replacing(path, place=lambda kept: _move_aside(kept, path)) as kept:
                _copy(path, kept)
        temporary.replace(path)

    with replacing(path, place=place) as temporary:
        temporary.write_bytes(content)


def _copy(path: Path, other: Path) -> None:
    """Give a file a second name, or copy it where the file system allows one name only."""
    try:
        os.link(path, other)
    except OSError:
        other.write_bytes(path.read_bytes())


def write_aside(path: Path, content: bytes) -> Path:
    """Write content that is removed from a file into a new file ``<name>.<n>``, or not at all.

    Returns:
        Path of the new file.

    Raises:
        OSError: If the disk takes no more; there is no new file then.
    """
    asides: list[Path | None] = []

    def place(temporary: Path) -> None:
        asides.append(_move_aside(temporary, path))

    with replacing(path, place=place) as temporary:
        temporary.write_bytes(content)
    assert asides[0] is not None
    return asides[0]


def _move_aside(source: Path, path: Path) -> Path | None:
    """Move ``source`` to the next free ``<name of path>.<n>``; ``None`` if it has vanished."""
    number = max((number for number, _ in _asides(path)), default=0) + 1
    while True:
        aside = path.with_name(f"{path.name}.{number}")
        try:
            os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL))  # reserves the name
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
    """Whether a file is a run's and may be removed: a ``crash.json.1`` may be somebody's own."""
    if not file.name.rpartition(".")[0].endswith(".json"):
        return True
    with contextlib.suppress(OSError), file.open("rb") as opened:
        return b'"schema"' in opened.read(_HEAD)
    return False


def _asides(path: Path) -> list[tuple[int, Path]]:
    """Files ``<name>.<n>`` of earlier runs, with their numbers."""
    start = f"{path.name}."
    names = [file.name for file in path.parent.iterdir() if file.name.startswith(start)]
    numbers = [name.removeprefix(start) for name in names]
    return [(int(n), path.with_name(start + n)) for n in numbers if n.isdecimal()]


def keep_latest(files: Iterable[Path], number: int) -> None:
    """Remove all but the last of some files.

    Args:
        files: Files from the oldest to the newest.
        number: Number of files that stay.
    """
    for file in list(files)[:-number]:
        with contextlib.suppress(OSError):
            file.unlink()
