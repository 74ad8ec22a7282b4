"""Claims of run directories: one process owns a directory at a time, until the process ends.

The owner holds a lock on ``owner.lock`` in the directory. The kernel drops the lock when the
process ends, in whatever way; the file names the process. A directory whose owner is dead is free.
The folder of a logger outside the run directory is claimed in the same way.
"""

import atexit
import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import time
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path

from esper_lightning.forensics.layout import OF_CALLBACKS, RunLayout
from esper_lightning.forensics.owner_record import (
    OWNER_BEGINS,
    Use,
    beating_elsewhere,
    holds_a_run,
    is_copied,
    open_record,
    ranks_of,
    read_locked,
    use_of,
    write_locked,
)
from esper_lightning.forensics.processes import ProcessIdentity, identify, is_alive, same_process

__all__ = [
    "Claim",
    "DirectoryInUseError",
    "DirectoryRefusedError",
    "claim",
    "claim_for_logger",
    "claim_next",
    "in_use",
    "not_of_a_run",
    "reserve",
    "return_reserved",
]

_VERSION = "version_"
_HANDOVER_S = 1.0  # in which a process that has just locked the file writes its identity
_OF_FILE_SYSTEM = "lost+found"  # at the root of a mounted disk
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_INSIDE_RUNS = re.compile(r"rank\d+|checkpoints", re.ASCII)  # folders that runs make
_NAMES: dict[Use, str] = {"run": "The run directory", "logger": "The folder of a logger"}


class DirectoryRefusedError(ValueError):
    """Raised if a directory may not serve a run: files of others there could be lost."""


class DirectoryInUseError(DirectoryRefusedError):
    """Raised if a living run owns the directory."""


class Claim:
    """Ownership of a run directory, until ``release`` or the end of the process.

    Attributes:
        directory: The directory, absolute.
        was_run: Whether the directory had files of an earlier run.
        was_used: Whether an earlier run used it as this run does: as its directory, or for a
            logger.
    """

    def __init__(
        self,
        directory: Path,
        lock: int,
        *,
        made: Sequence[Path],
        former: bytes | None,
        earlier: Use | None,
        use: Use,
    ) -> None:
        self.directory = directory
        self.was_run = earlier == "run"
        self._use: Use = use
        self.was_used = earlier == use
        self._lock, self._made, self._former = lock, made, former
        self._pid = os.getpid()
        _claims.add(self)

    def note(self, **fields: str) -> None:
        """Add fields to ``owner.lock``, for other processes to read."""
        if self.holds:
            write_locked(self._lock, {**read_locked(self._lock), **fields})

    def refuse_others(self, written: Sequence[str] = OF_CALLBACKS) -> None:
        """Refuse a directory in which files that no run wrote have the names of a run's files.

        Args:
            written: Patterns of the names that the run will write, relative to the directory.
                ``claim`` has checked the names of its callbacks' files.

        Raises:
            DirectoryRefusedError: If the directory has such files.
        """
        if self.was_used:
            return
        found = {path for pattern in written for path in self.directory.glob(pattern)}
        theirs = sorted(path for path in found if path.name != _OF_FILE_SYSTEM)
        if theirs:
            names = str(theirs[0].relative_to(self.directory))
            names += f" and {len(theirs) - 1} more" if len(theirs) > 1 else ""
            raise not_of_a_run(self.directory, names, self._use)

    @property
    def holds(self) -> bool:
        """Whether this process still owns the directory."""
        return self._lock >= 0 and self._pid == os.getpid()

    def owns(self, lock: int) -> bool:
        """Whether this process owns the directory whose ``owner.lock`` is open as ``lock``."""
        return self.holds and os.path.samestat(os.fstat(self._lock), os.fstat(lock))

    def release(self, *, used: bool = True) -> None:
        """Release the directory; a directory that was made for the claim and not used is removed.

        Args:
            used: Whether the directory counts as a run's from now on. If not, it is restored.
        """
        if not self.holds:
            return
        path = RunLayout(self.directory).owner
        with contextlib.suppress(OSError):
            # The process may continue, and is no owner any more.
            write_locked(self._lock, {"pid": None, "use": self._use})
            if os.path.samestat(os.fstat(self._lock), path.stat()):  # else it was moved
                self._restore(path, used=used)
        self.leave()

    def _restore(self, path: Path, *, used: bool) -> None:
        is_empty = bool(self._made) and list(self.directory.iterdir()) == [path]
        if is_empty or not (used or self._former is not None):
            path.unlink()
        elif not used and self._former is not None:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, self._former, 0)
        for folder in self._made if is_empty else ():
            folder.rmdir()

    def withdraw(self) -> None:
        """Remove a directory that was made for the claim, with its files, unless others own it."""
        self.release()
        with contextlib.suppress(OSError, DirectoryRefusedError):
            if self._made:
                held = _claim(self.directory, made=(), use=self._use)
                gone = self.directory.with_name(f".{self.directory.name}.{os.getpid()}")
                self.directory.rename(gone)  # from here on, the name is free
                held.leave()
                shutil.rmtree(gone)
                for folder in self._made[1:]:
                    folder.rmdir()

    def leave(self) -> None:
        """Close the lock's descriptor, as a forked child does with its copy of it."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


_claims: "weakref.WeakSet[Claim]" = weakref.WeakSet()
_reserved: dict[Path, Claim] = {}


def _leave_in_child() -> None:
    for held in list(_claims):  # a lock lasts as long as any process has it open
        held.leave()


os.register_at_fork(after_in_child=_leave_in_child)


def claim(directory: Path) -> Claim:
    """Claim a run directory, which is made if it does not exist.

    Raises:
        DirectoryInUseError: If a living run owns the directory; the error names the process.
        DirectoryRefusedError: If files that no run wrote have the names of a run's files, or the
            directory is a folder in which another run has its files.
        OSError: If the directory, or a file in it, cannot be made.
    """
    directory = directory.absolute()
    reserved = _reserved.pop(directory, None)
    if reserved is not None and reserved.holds:
        return reserved
    for folder in (directory, directory.parent):
        if _INSIDE_RUNS.fullmatch(folder.name) and holds_a_run(folder.parent):
            rule = "not be among the files of another run"
            hint = f"{str(folder.parent)!r} is the directory of a run."
            message = f"{_NAMES['run']} must {rule}, got {str(directory)!r}. {hint}"
            raise DirectoryRefusedError(message)
    return _claim_for(directory, OF_CALLBACKS, "run")


def claim_for_logger(directory: Path, written: Sequence[str]) -> Claim:
    """Claim a folder outside the run directory, into which a logger of the run writes.

    A later run does not take the folder for the directory of a run.

    Args:
        directory: Folder of the logger, which is made if it does not exist.
        written: Names of files that the logger would replace.

    Raises:
        DirectoryInUseError: If a living run owns the folder, as its directory or for a logger.
        DirectoryRefusedError: If the folder has such files, and no run wrote into the folder.
        OSError: If the folder, or ``owner.lock`` in it, cannot be made.
    """
    return _claim_for(directory.absolute(), written, "logger")


def _claim_for(directory: Path, written: Sequence[str], use: Use) -> Claim:
    with _making(directory) as made:
        held = _claim(directory, made=made, use=use)
    try:
        held.refuse_others(written)
    except BaseException:
        held.release(used=False)
        raise
    return held


def reserve(directory: Path) -> None:
    """Reserve a run directory for a later ``claim`` of this process, if that is possible.

    If the process ends before the claim, in whatever way, ``owner.lock`` shows that the process had
    begun. A directory that holds other files than a run's stays as it is, and a directory that is
    not claimed in the end is restored. An interrupt waits until the reservation can be returned.
    """
    directory = directory.absolute()
    with _interrupts_wait(), contextlib.suppress(OSError, ValueError):
        if not holds_a_run(directory) and directory.exists() and any(directory.iterdir()):
            return
        _reserved[directory] = claim(directory)


def return_reserved() -> None:
    """Release the directories that were reserved and not claimed."""
    while _reserved:  # an interrupt in between begins anew
        directory, held = next(iter(_reserved.items()))
        held.release(used=False)
        _reserved.pop(directory, None)


@contextlib.contextmanager
def _interrupts_wait() -> Generator[None]:
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


atexit.register(return_reserved)


def claim_next(parent: Path) -> Claim:
    """Claim a new directory ``version_<n>``, whose number is greater than all in its folder.

    Raises:
        OSError: If the directory cannot be made.
    """
    parent = parent.absolute()
    with _making(parent) as above:
        number = 1 + max((_number(path.name) for path in parent.iterdir()), default=-1)
        while True:
            directory = parent / f"{_VERSION}{number}"
            with contextlib.suppress(FileExistsError, DirectoryInUseError):  # others were faster
                directory.mkdir(parents=True)  # another process may remove an unused parent
                return _claim(directory, made=[directory, *above])
            number += 1


@contextlib.contextmanager
def _making(directory: Path) -> Generator[list[Path]]:
    """Make a directory and its parents; if the block fails, the new folders are removed again.

    Folders are made one by one: behind ``..`` an existing folder may follow a missing one.

    Yields:
        Folders that were made, the deepest first.
    """
    made: list[Path] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        RunLayout(directory).owner.lstat()  # an error where the path is too long for any file
    try:
        for folder in (*reversed(directory.parents), directory):
            if not folder.exists():
                folder.mkdir(exist_ok=True)  # another process may be faster
                made.insert(0, folder)
        directory.mkdir(exist_ok=True)  # it may be a file
        yield made
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _number(name: str) -> int:
    digits = name.removeprefix(_VERSION)
    is_version = name.startswith(_VERSION) and digits.isascii() and digits.isdecimal()
    return int(digits) if is_version and len(digits) < 19 else -1


def _claim(directory: Path, *, made: Sequence[Path], use: Use = "run") -> Claim:
    had_owner = RunLayout(directory).owner.exists()
    lock = _lock(directory, use)
    try:
        former = os.pread(lock, os.fstat(lock).st_size, 0) if had_owner else None
        if any(held.owns(lock) for held in list(_claims)):  # where the file system has no locks
            raise in_use(directory, identify(os.getpid()), use)
        for owner in _owners(directory, lock):
            if is_alive(owner) and not same_process(owner, identify(os.getpid())):
                raise in_use(directory, owner, use)
        elsewhere = None if is_copied(lock) else beating_elsewhere(directory)
        if elsewhere is not None:
            raise in_use(directory, elsewhere, use)
        earlier = use_of(directory, former)
        use = "run" if earlier == "run" else use
        identity = identify(os.getpid()).to_dict()
        write_locked(lock, {**identity, "claimed_s": time.time(), "use": use})
    except BaseException:
        os.close(lock)
        raise
    return Claim(directory, lock, made=made, former=former, earlier=earlier, use=use)


def _lock(directory: Path, use: Use) -> int:
    """Descriptor of ``owner.lock``, locked unless the file system has no locks."""
    path = RunLayout(directory).owner
    end = time.monotonic() + _HANDOVER_S
    while True:
        lock = open_record(path)
        begins = os.pread(lock, len(OWNER_BEGINS), 0)
        if not OWNER_BEGINS.startswith(begins):
            os.close(lock)
            raise not_of_a_run(directory, path.name, use)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = ProcessIdentity.from_dict(read_locked(lock))
            if error.errno in _NO_LOCKS:
                return lock
            os.close(lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if owner.pid is not None or time.monotonic() > end:
                raise in_use(directory, owner, use) from None
            time.sleep(0.02)
            continue
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # another process was removing an unused claim
        directory.mkdir(parents=True, exist_ok=True)


def _owners(directory: Path, lock: int) -> list[ProcessIdentity]:
    """Processes that may write here: the recorded owner, and ranks whose state is running."""
    if is_copied(lock):  # its records are those of a run that is elsewhere
        return []
    owner = ProcessIdentity.from_dict(read_locked(lock))
    return [owner, *(rank for rank in ranks_of(directory) if rank.state == "running")]


def in_use(directory: Path | str, owner: ProcessIdentity, use: Use) -> DirectoryInUseError:
    """The error for a directory, or a remote address, that a living process uses."""
    pid, host = owner.pid, owner.host
    who = "another run" if pid is None else f"process {pid}"
    if pid == os.getpid():
        who = f"another run of this process, {pid}"
    elif host is not None and host != identify(os.getpid()).host:
        who += f" on {host}"
    name = _NAMES[use]
    return DirectoryInUseError(
        f"{name} must be free, got {str(directory)!r}, where {who} is running. "
        f"Choose another {name.removeprefix('The ')}, or end that run."
    )


def not_of_a_run(directory: Path | str, names: str, use: Use) -> DirectoryRefusedError:
    """The error for a directory, or a remote address, with files of others of the given names."""
    rule = "name a new directory or that of a run"
    hint = f"It holds {names}, which no run wrote."
    return DirectoryRefusedError(f"{_NAMES[use]} must {rule}, got {str(directory)!r}. {hint}")
