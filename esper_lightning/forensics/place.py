"""Where a run directory is: at its path, unless it was moved and another run took its name.

A moved directory whose name nobody took stays at its path: files are made there again.
"""

import contextlib
import os
import tempfile
import weakref
from pathlib import Path

from esper_lightning.forensics.claims import DirectoryInUseError
from esper_lightning.forensics.layout import RunLayout

__all__ = ["Place", "refuse_taken"]


class Place:
    """The folder into which a run writes; calling the place returns the folder.

    The folder is where the ``owner.lock`` that the run began with is, if another run has its own
    ``owner.lock`` at the path. If the former is deleted, the folder is a new one for temporary
    files.

    Args:
        directory: Run directory, which is claimed. Without ``owner.lock`` the place never changes.

    Attributes:
        directory: Path of the run directory when the run began.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = self._folder = directory
        self._owner: int | None = None
        self._pid = os.getpid()
        with contextlib.suppress(OSError):
            self._owner = os.open(RunLayout(directory).owner, os.O_RDONLY | os.O_CLOEXEC)
            _places.add(self)

    def __call__(self) -> Path:
        """The folder into which the run writes now."""
        if self.is_taken or self._folder != self.directory:  # it may be moved again, and back
            self._folder = self._moved() or self._for_temporary_files()
        return self._folder

    @property
    def is_taken(self) -> bool:
        """Whether another run has its ``owner.lock`` at the path."""
        return self._owner is not None and self._is_other(RunLayout(self.directory).owner)

    def close(self) -> None:
        """Close the descriptor; the folder stays what it is now."""
        self()
        owner, self._owner = self._owner, None
        if owner is not None:
            _places.discard(self)
            os.close(owner)

    def _is_other(self, path: Path) -> bool:
        assert self._owner is not None
        try:
            return not os.path.samestat(os.fstat(self._owner), path.stat())
        except OSError:  # nothing is there, or a file system is out of reach for a while
            return False

    def _moved(self) -> Path | None:
        """The folder of the open ``owner.lock``; ``None`` if the file is deleted or not found."""
        with contextlib.suppress(OSError):
            path = Path(f"/proc/self/fd/{self._owner}").readlink()
            if path.exists() and not self._is_other(path):
                return path.parent
        return None

    def _for_temporary_files(self) -> Path:
        if self._folder == self.directory:
            return Path(tempfile.mkdtemp(prefix=f"{self.directory.name}-{self._pid}-"))
        return self._folder


_places: "weakref.WeakSet[Place]" = weakref.WeakSet()


def refuse_taken(path: Path) -> None:
    """Refuse to write into the directory of another run that took the place of this process's.

    Raises:
        DirectoryInUseError: If a run of this process had a directory with the path in it, which was
            moved or deleted, and another run took its name.
    """
    near = [each for each in list(_places) if path.absolute().is_relative_to(each.directory)]
    if near and all(each.is_taken for each in near):
        directory = str(near[0].directory)
        raise DirectoryInUseError(
            f"The run directory must stay this run's, got {directory!r}, which was moved or "
            f"deleted, and another run took its name. Files of this run are in {near[0]()}."
        )
