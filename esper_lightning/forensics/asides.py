"""Files of earlier runs, which stay beside the files of a new run as ``<name>.<n>``.

Old ones are removed, but a ``config.yaml.1`` may be somebody's own. Therefore each folder has a
list of the files that were so renamed, and no file that is not in the list is removed. A file
enters the list after it has its name: one whose process is killed in between stays for ever.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from esper_lightning.forensics.files import Appender, replacing, write_atomically
from esper_lightning.forensics.reading import read_file

__all__ = ["KEPT_ASIDE", "keep_latest", "rename_aside", "replace_keeping", "write_aside"]

KEPT_ASIDE = 10
"""Number of files of earlier runs that stay under each name; older files are removed."""
_LIST = ".set_aside"
_MOST_ENTRIES = 1000  # of a list, before the entries of files that are gone are dropped


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
        if not path.is_file():
            rename_aside(path)  # a pipe or a folder, of which there is no copy
        else:
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
        _add_to_list(aside)
        _remove_old(path)
        return aside


def _add_to_list(aside: Path) -> None:
    with contextlib.suppress(OSError):  # without an entry, the file stays
        entries = Appender(aside.with_name(_LIST))
        try:
            entries.append(_entry(aside) + b"\n")
        finally:
            entries.close()


def _remove_old(path: Path) -> None:
    """Remove all but the latest files in the list that were renamed to ``<name of path>.<n>``."""
    listed = path.with_name(_LIST)
    with contextlib.suppress(OSError, ValueError):
        entries = set(read_file(listed).splitlines())
        ours = [file for _, file in sorted(_asides(path)) if _entry(file) in entries]
        keep_latest(ours, KEPT_ASIDE)
        if len(entries) > _MOST_ENTRIES:
            left = entries.intersection(map(_entry, path.parent.iterdir()))
            write_atomically(listed, b"".join(entry + b"\n" for entry in left))


def _entry(file: Path) -> bytes:
    """Entry of a file in the list; a file that was changed or copied since has another entry."""
    found = file.lstat()
    marks = (found.st_ino, found.st_size, found.st_mtime_ns)
    return " ".join(map(str, marks)).encode() + b" " + os.fsencode(file.name)


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
