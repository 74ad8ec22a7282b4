"""Rules for paths that a user gave: errors name the setting, before anything is created."""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

from esper_lightning.core.errors import require

__all__ = ["expand_home", "require_output", "require_output_folder", "requires_folder"]

_HEADER = 512  # bytes of a file by which its kind is known
_TEMPORARY = ".4194304.10000.tmp"  # longest suffix of a file while it is written


def expand_home(path: str | Path) -> Path:
    """A path whose leading ``~`` is replaced by the user's home folder, as a shell does."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own raises for an unknown user


@contextlib.contextmanager
def requires_folder(field: str, path: object = None) -> Generator[None]:
    """Turn a folder that cannot be made within the context into an error about the setting.

    Args:
        field: Setting that names the folder.
        path: Folder to name in the error; ``None`` for the path of the ``OSError``.

    Raises:
        ValueError: If there is an ``OSError`` or a NUL byte; the error names setting and reason.
    """
    try:
        if "\0" in str(path):
            raise OSError(errno.EINVAL, "embedded null byte")
        yield
    except OSError as error:
        rule = f"be a folder that can be made ({error.strerror or error})"
        got = str(error.filename if path is None else path)
        raise ValueError(f"{field} must {rule}, got {got!r}.") from error


def require_output(field: str, path: str | Path, what: str, begins: bytes) -> Path:
    """Refuse a path where no file can be written, or where a file is that must not be lost.

    Nothing is created, so that an error that is found later leaves no folders behind.

    Args:
        field: Setting that names the file.
        path: Path of the file; a leading ``~`` is the user's home folder.
        what: Word for a file that may be replaced, to follow "an earlier".
        begins: Regular expression that the first bytes of such a file match.

    Returns:
        The path of the file to write: the target if ``path`` is a symbolic link.

    Raises:
        ValueError: If the path is refused; the error names the setting and the reason.
    """
    rule = f"name a new file or an earlier {what}"
    try:
        if "\0" in str(path):
            raise OSError(errno.EINVAL, "embedded null byte")
        target = expand_home(path)
        target = target.resolve(strict=True) if target.is_symlink() else target
        require(not target.is_dir(), field, rule, str(path), "It is a folder.")
        _require_room(target.parent, target.name)
        is_known = not os.path.lexists(target)
        if target.is_file():
            with target.open("rb") as file:
                is_known = re.match(begins, file.read(_HEADER), re.DOTALL) is not None
    except OSError as error:
        hint = f"No file can be written there: {error.strerror or error}."
        raise ValueError(f"{field} must {rule}, got {str(path)!r}. {hint}") from error
    require(is_known, field, rule, str(path), "Something else is there.")
    return target


def require_output_folder(field: str, path: str | Path) -> None:
    """Refuse a folder in which no file can be written; the folder is not made.

    Raises:
        ValueError: If no file can be written in the folder; the error names setting and reason.
    """
    with requires_folder(field, path):
        _require_room(Path(path))


def _require_room(folder: Path, name: str = "") -> None:
    """Make sure that a file can be written in a folder, or in its nearest parent that exists.

    The check writes a nameless file.

    Raises:
        OSError: If no file can be written.
    """
    folder = folder.absolute()
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    for part in (*folder.relative_to(nearest).parts, f".{name}{_TEMPORARY}"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (nearest / part).lstat()  # an error if the name is too long
    tempfile.TemporaryFile(dir=nearest).close()
