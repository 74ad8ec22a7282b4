"""The directory that a run writes into, and into which no other run writes.

The run directory of a Trainer is the first of these: the ``dirpath`` that one of its callbacks was
given; the folder of its first logger with a folder for each run (TensorBoard and CSV);
``default_root_dir``, unless it is the current directory, or files of a run, or with a run's names,
are or were there; a new folder ``lightning_logs/version_<n>`` in ``default_root_dir``. The first
rank claims the directory (``forensics.claims``) and shares its path with the other ranks. If the
directory is a remote address, the run writes into a local folder, which is copied to the address at
every checkpoint and at the end (``callbacks.mirror``).
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import weakref
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerStatus

from esper_lightning.callbacks.lightning_internals import (
    set_version,
    setup_profiler_again,
    spawns_processes,
    version_of,
)
from esper_lightning.callbacks.logger_folders import (
    NumberedLogger,
    announced_directory,
    begin_table,
    numbered_logger,
    remove_events,
    take_next_number,
    write_into,
)
from esper_lightning.callbacks.mirror import Mirror, place_of
from esper_lightning.core.errors import require_name
from esper_lightning.forensics.asides import replace_keeping
from esper_lightning.forensics.claims import (
    Claim,
    DirectoryInUseError,
    DirectoryRefusedError,
    claim,
    claim_next,
    holds_a_run,
)
from esper_lightning.forensics.layout import RunLayout

__all__ = [
    "WritesRun",
    "assign_run_directory",
    "begin_run_directory",
    "claim_new",
    "close_run_directory",
    "copy_run_directory",
    "end_run",
    "given_directory",
    "open_run_directory",
    "run_directory",
]

_log = logging.getLogger(__name__)
_COPY_S = 30.0  # limit of the copy at the end; a scheduler's grace period is often as long


class WritesRun(Callback):
    """A callback with files in the run directory.

    Args:
        dirpath: Run directory; ``None`` for the run directory of the Trainer.

    Raises:
        ValueError: If ``dirpath`` is empty, or holds a NUL byte.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        require_name(f"{type(self).__name__}.dirpath", dirpath, "a directory")
        self.dirpath = dirpath


class _RunDirectory:
    """The run directory of one Trainer, and the callbacks that use the directory.

    Attributes:
        config: Content of ``config.yaml`` that is to be written; ``None`` where there is none.
        is_used: Whether a run has written into the directory; if not, it is restored at the end.
    """

    config: str | None = None
    is_used = False

    def __init__(self, directory: Path, held: Claim | None, address: str | None = None) -> None:
        self.directory, self.claim, self.address = directory, held, address
        self.users: set[int] = set()
        self.is_open = False  # whether a run writes into it, on any rank
        self.mirror: Mirror | None = None

    def begin(self, rank: int) -> None:
        """Begin to copy the directory to its address, if it has one, and report where files are."""
        self.is_open = self.is_used = True
        if self.address is not None:
            self.mirror = Mirror(self.directory, self.address, rank)
            if self.claim is not None:  # the second process of a rank that vanishes copies too
                self.claim.note(address=self.address)
            text = "The run writes into %s, which is copied to %s at checkpoints and at the end."
            _log.warning(text, self.directory, self.address)

    def end(self) -> None:
        """Release the directory, after its last copy to its address if it has one."""
        self.is_open = False
        self.users.clear()
        if self.mirror is not None:
            self.mirror.copy(seconds=_COPY_S)
            self.mirror = None
        self.release()

    def release(self) -> None:
        """Release the directory as it is, without a copy to its address."""
        if self.claim is not None:
            self.claim.release(used=self.is_used)


_of_trainers: "weakref.WeakKeyDictionary[Trainer, _RunDirectory]" = weakref.WeakKeyDictionary()


def run_directory(trainer: Trainer) -> Path | None:
    """Directory that a Trainer's latest run writes or wrote into; ``None`` before the first."""
    found = _of_trainers.get(trainer)
    return None if found is None or trainer.fast_dev_run else found.directory


def open_run_directory(
    trainer: Trainer, user: object = None, *, alone: bool = False
) -> Path | None:
    """Claim the run directory, or join the callbacks of the same Trainer that have claimed it.

    A disk that takes no directory is no error here: the first write of a file raises it.

    Args:
        trainer: Trainer of the run; all its ranks call this function, in ``setup``.
        user: Callback that uses the directory, which is released when every user has called
            ``close_run_directory``; ``None`` for a caller that does not count as a user.
        alone: Whether the other ranks may be out of reach, as at a death: nothing is shared with
            them then.

    Returns:
        The directory, absolute; ``None`` under ``fast_dev_run``, which must leave nothing behind.

    Raises:
        DirectoryInUseError: If a living run owns the directory; raised on all ranks.
        DirectoryRefusedError: If no run wrote into the directory, and it has files where a run has
            its own; raised on all ranks.
        ValueError: If the address of the directory has no known protocol; raised on all ranks.
    """
    if trainer.fast_dev_run:
        return None
    found = _of_trainers.get(trainer)
    if found is None or not found.is_open:
        announced = announced_directory(trainer)
        found = _take(trainer, alone=alone) if alone else _agree(trainer)
        found.begin(trainer.global_rank)
        _of_trainers[trainer] = found
        if announced != found.directory:
            _move_profiler(trainer, announced, found.directory)
    if user is not None:
        found.users.add(id(user))
    return found.directory


def close_run_directory(trainer: Trainer, user: object) -> None:
    """Release the run directory, unless another callback of the Trainer uses it."""
    found = _of_trainers.get(trainer)
    if found is not None and id(user) in found.users:
        found.users.discard(id(user))
        if not found.users:
            found.end()


def end_run(trainer: Trainer) -> None:
    """Release the run directory, even if callbacks still use it."""
    found = _of_trainers.get(trainer)
    if found is not None:
        found.end()


def copy_run_directory(trainer: Trainer) -> None:
    """Copy a run directory to its remote address, if it has one, while the run continues."""
    found = _of_trainers.get(trainer)
    if found is not None and found.mirror is not None:
        found.mirror.copy_soon()


def claim_new(trainer: Trainer, parent: str | Path) -> tuple[Claim, str | None]:
    """Claim the directory for a run that has not begun, and number it if it has no number yet.

    Args:
        trainer: Trainer of the run, whose callbacks or loggers may have been given a directory.
        parent: Folder for a new directory, used where no directory was given.

    Returns:
        The claim, and the remote address of the directory or ``None``.

    Raises:
        DirectoryRefusedError: If a living run owns the directory that was given, or files are
            where a run has its own, and no run wrote them.
        OSError: If the directory cannot be made.
    """
    given, logger = given_directory(trainer), numbered_logger(trainer)
    if given is None and logger is not None and version_of(logger) is not None:
        given = logger.log_dir
    if given is not None:
        directory, address = place_of(given)
        return claim(directory), address
    folder, address = place_of(parent if logger is None else logger.root_dir)
    held = claim_next(folder)
    return held, None if address is None else f"{address}/{held.directory.name}"


def assign_run_directory(
    trainer: Trainer, held: Claim, config: str, address: str | None = None
) -> None:
    """Make a Trainer's runs write into a directory that the first rank has claimed already.

    A logger that would have chosen its own number in the same folder gets the directory's number.
    Checkpoints without a folder of their own go into the directory too. With several ranks, nothing
    is written before they agree (``begin_run_directory``).

    Args:
        trainer: Trainer whose run has not begun.
        held: Claim of the directory.
        config: Content of ``config.yaml``.
        address: Remote address that the directory is copied to; ``None`` without one.

    Raises:
        OSError: If a file cannot be written.
    """
    found = _of_trainers[trainer] = _RunDirectory(held.directory, held, address)
    weakref.finalize(trainer, found.release)
    found.config = config
    for logger in trainer.loggers:
        write_into(logger, held.directory)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(RunLayout(held.directory).checkpoints)
    if trainer.world_size == 1:
        _write_first_files(trainer, found)


def begin_run_directory(trainer: Trainer) -> None:
    """Claim the run directory before the loggers of a run write, and write its first files.

    Args:
        trainer: Trainer of a run that begins; all its ranks call this function, and agree. Nothing
            is claimed if no callback writes into a run directory.

    Raises:
        DirectoryRefusedError: As ``open_run_directory``.
    """
    callbacks: list[Any] = trainer.callbacks
    if trainer.fast_dev_run or not any(isinstance(each, WritesRun) for each in callbacks):
        return
    found = _of_trainers.get(trainer)
    if found is None or not found.is_open:
        found = _of_trainers[trainer] = _agree(trainer)
        _write_first_files(trainer, found)


def _write_first_files(trainer: Trainer, found: _RunDirectory) -> None:
    """Write ``config.yaml`` and the files of loggers that must exist before Lightning uses them."""
    if found.claim is None:
        return
    for logger in trainer.loggers:
        begin_table(logger, found.directory)
    if found.config is None:
        return
    config, found.config = found.config, None
    path = RunLayout(found.directory).config
    found.is_used = True
    if not path.exists() or path.read_text() != config:
        replace_keeping(path, config.encode())


def _agree(trainer: Trainer) -> _RunDirectory:
    """Claim the directory on the first rank, and share it with the other ranks."""
    mine: _RunDirectory | None = None
    shared: tuple[str, str | None, int | str | None] | ValueError | None = None
    if trainer.is_global_zero:
        try:
            mine = _take(trainer)
            logger = numbered_logger(trainer)
            version = None if logger is None else logger.version
            shared = (str(mine.directory), mine.address, version)
        except ValueError as error:  # the other ranks are waiting
            shared = error
            for logger in trainer.loggers:
                remove_events(logger)
    if trainer.world_size > 1:
        shared = trainer.strategy.broadcast(shared)
    if isinstance(shared, ValueError):
        raise shared
    assert shared is not None
    directory, address, version = shared
    logger = numbered_logger(trainer)
    if logger is not None:
        set_version(logger, version)
    return mine or _RunDirectory(Path(directory), None, address)


def _take(trainer: Trainer, *, alone: bool = False) -> _RunDirectory:
    """Claim the directory of a Trainer: that of its earlier runs again, if it has had any."""
    found = _of_trainers.get(trainer)
    if found is not None:
        if found.claim is None or not found.claim.holds:
            found.claim = _claim(found.directory)
    else:
        spawned = spawns_processes(trainer)
        found = _choose(trainer, joins=alone and spawned)
    if found.claim is not None:
        weakref.finalize(trainer, found.release)
    return found


def _choose(trainer: Trainer, *, joins: bool) -> _RunDirectory:
    """Choose and claim a directory.

    Args:
        trainer: Trainer of the run.
        joins: Whether processes of this run may have written into the directory already.
    """
    given, logger = given_directory(trainer), numbered_logger(trainer)
    if given is not None:
        directory, address = place_of(given)
        return _RunDirectory(directory, _claim(directory), address)
    if logger is not None:
        held = _claim_folder_of(logger)
        directory, address = place_of(logger.log_dir)
        return _RunDirectory(directory, held, address)
    root, address = place_of(trainer.default_root_dir)
    parent = root / "lightning_logs"
    if root != Path.cwd():
        try:
            if joins or not holds_a_run(root):
                return _RunDirectory(root, _claim(root), address)
            text = "%s has the files of an earlier run: this run makes a directory in %s."
            _log.warning(text, root, parent)
        except DirectoryRefusedError as error:
            _log.warning("%s This run makes a directory in %s.", error, parent)
    try:
        held = claim_next(parent)
    except OSError as error:
        _log.warning("No run directory can be made in %s: %s", parent, error)
        return _RunDirectory(parent / "version_0", None)
    below = f"{address}/lightning_logs/{held.directory.name}"
    return _RunDirectory(held.directory, held, None if address is None else below)


def given_directory(trainer: Trainer) -> str | Path | None:
    """Run directory that a callback of the Trainer was given; ``None`` without one."""
    callbacks: list[Any] = trainer.callbacks
    given = (each.dirpath for each in callbacks if isinstance(each, WritesRun))
    return next((dirpath for dirpath in given if dirpath is not None), None)


def _claim(directory: Path) -> Claim | None:
    for trainer, found in list(_of_trainers.items()):
        over = found.is_open and trainer.state.status is not TrainerStatus.RUNNING
        if over and found.directory == directory:  # a run that failed without closing it
            found.end()
    try:
        return claim(directory)
    except OSError as error:
        _log.warning("The run directory %s cannot be claimed: %s", directory, error)
        return None


def _claim_folder_of(logger: NumberedLogger) -> Claim | None:
    """Claim a logger's folder.

    Lightning chooses the number after the greatest that it sees: two runs that look at the same
    time choose the same number. The run that claims the folder second takes the next number.
    """
    while True:
        try:
            return _claim(place_of(logger.log_dir)[0])
        except DirectoryInUseError as error:
            if not isinstance(logger.version, int):
                raise
            take_next_number(logger)
            _log.warning("%s This run writes into %s.", error, logger.log_dir)


def _move_profiler(trainer: Trainer, announced: Path, directory: Path) -> None:
    """Make the profiler write into ``directory``: it was set up before callbacks chose that."""
    profiler = trainer.profiler
    if profiler.dirpath is not None and Path(profiler.dirpath).absolute() == announced:
        profiler.dirpath = None
    setup_profiler_again(profiler, directory)
