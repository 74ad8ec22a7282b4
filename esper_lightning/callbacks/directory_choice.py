"""Which directory a run writes into, and the claim by which no other run writes there.

The run directory of a Trainer is the first of these: the ``dirpath`` that one of its callbacks was
given; the folder of its first logger with a folder for each run (TensorBoard and CSV);
``default_root_dir``, unless it is the current directory, or files of a run, or with a run's names,
are or were there; a new folder ``lightning_logs/version_<n>`` in ``default_root_dir``. The first
rank claims the directory (``forensics.claims``) and shares its path with the other ranks.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import os
import weakref
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerStatus

from esper_lightning.callbacks.held_directory import OF_TRAINERS, HeldDirectory
from esper_lightning.callbacks.lightning_internals import set_version, spawns_processes, version_of
from esper_lightning.callbacks.logger_folders import (
    NumberedLogger,
    files_replaced_by,
    numbered_logger,
    remove_events,
    take_next_number,
)
from esper_lightning.callbacks.mirror import place_of
from esper_lightning.core.errors import require_name
from esper_lightning.forensics.claims import (
    Claim,
    DirectoryInUseError,
    DirectoryRefusedError,
    claim,
    claim_for_logger,
    claim_next,
)
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.owner_record import holds_a_run

__all__ = [
    "WritesRun",
    "agree_on_directory",
    "claim_logger_folders",
    "claim_new",
    "given_directory",
    "known_directory",
    "take_directory",
]

_log = logging.getLogger(__name__)


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


def given_directory(trainer: Trainer) -> str | Path | None:
    """Run directory that callbacks of the Trainer were given; ``None`` without one.

    Raises:
        DirectoryRefusedError: If two callbacks were given different directories.
    """
    callbacks: list[Any] = trainer.callbacks
    given = [
        (type(each).__name__, each.dirpath)
        for each in callbacks
        if isinstance(each, WritesRun) and each.dirpath is not None
    ]
    for name, dirpath in given[1:]:
        first, own = given[0]
        if place_of(dirpath) != place_of(own):
            raise DirectoryRefusedError(
                f"{name}.dirpath must be that of {first}, {str(own)!r}, got {str(dirpath)!r}. "
                "A run has one directory."
            )
    return given[0][1] if given else None


def known_directory(trainer: Trainer) -> str | Path | None:
    """Run directory that callbacks or the logger of a Trainer were given; ``None`` for a new one.

    Raises:
        DirectoryRefusedError: If two callbacks were given different directories.
    """
    given, logger = given_directory(trainer), numbered_logger(trainer)
    if given is None and logger is not None and version_of(logger) is not None:
        return logger.log_dir
    return given


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
    given, logger = known_directory(trainer), numbered_logger(trainer)
    if given is not None:
        directory, address = place_of(given)
        return claim(directory), address
    folder, address = place_of(parent if logger is None else logger.root_dir)
    held = claim_next(folder)
    return held, None if address is None else f"{address}/{held.directory.name}"


def agree_on_directory(trainer: Trainer, *, with_loggers: bool = False) -> HeldDirectory:
    """Claim the directory on the first rank, and share it with the other ranks.

    Args:
        trainer: Trainer whose ranks all call this function.
        with_loggers: Whether the folders of loggers are claimed, too: no logger has written yet.

    Raises:
        ValueError: If the directory or a folder is refused; raised on all ranks.
    """
    mine: HeldDirectory | None = None
    shared: tuple[str, str | None, str | None, int | str | None] | ValueError | None = None
    if trainer.is_global_zero:
        try:
            mine = take_directory(trainer)
            if with_loggers:
                claim_logger_folders(trainer, mine)
            logger = numbered_logger(trainer)
            version = None if logger is None else logger.version
            shared = (str(mine.directory), mine.address, mine.claim_address(), version)
        except ValueError as error:  # the other ranks are waiting
            shared = error
            if mine is not None:
                mine.release()
            for logger in trainer.loggers:
                remove_events(logger)
    if trainer.world_size > 1:
        shared = trainer.strategy.broadcast(shared)
    if isinstance(shared, ValueError):
        raise shared
    assert shared is not None
    directory, address, claims, version = shared
    logger = numbered_logger(trainer)
    if logger is not None:
        set_version(logger, version)
    return mine or HeldDirectory(Path(directory), None, address, claims)


def take_directory(trainer: Trainer, *, alone: bool = False) -> HeldDirectory:
    """Claim the directory of a Trainer: that of its earlier runs again, if it has had any."""
    found = OF_TRAINERS.get(trainer)
    if found is not None:
        if found.claim is None or not found.claim.holds:
            found.claim = _claim(found.directory, is_ours=found.claim is None)
    else:
        spawned = spawns_processes(trainer)
        found = _choose(trainer, joins=alone and spawned)
    if found.claim is not None:
        weakref.finalize(trainer, found.release)
    return found


def _choose(trainer: Trainer, *, joins: bool) -> HeldDirectory:
    """Choose and claim a directory.

    Args:
        trainer: Trainer of the run.
        joins: Whether processes of this run may have written into the directory already.
    """
    given, logger = given_directory(trainer), numbered_logger(trainer)
    if given is not None:
        directory, address = place_of(given)
        return HeldDirectory(directory, _claim(directory), address)
    if logger is not None:
        held = _claim_folder_of(logger)
        directory, address = place_of(logger.log_dir)
        return HeldDirectory(directory, held, address)
    root, address = place_of(trainer.default_root_dir)
    parent = root / "lightning_logs"
    if root != Path.cwd():
        try:
            if joins or not holds_a_run(root):
                return HeldDirectory(root, _claim(root), address)
            text = "%s has the files of an earlier run: this run makes a directory in %s."
            _log.warning(text, root, parent)
        except DirectoryRefusedError as error:
            _log.warning("%s This run makes a directory in %s.", error, parent)
    try:
        held = claim_next(parent)
    except OSError as error:
        _log.warning("No run directory can be made in %s: %s", parent, error)
        return HeldDirectory(parent / "version_0", None)
    below = f"{address}/lightning_logs/{held.directory.name}"
    return HeldDirectory(held.directory, held, None if address is None else below)


def claim_logger_folders(trainer: Trainer, found: HeldDirectory) -> None:
    """Claim the folders outside the run directory into which loggers of the first rank write.

    Args:
        trainer: Trainer of a run whose loggers have written nothing yet.
        found: Run directory, which holds the claims from now on.

    Raises:
        DirectoryRefusedError: If a living run owns a folder; or if a logger would replace files in
            its folder or in the run directory that no run wrote.
    """
    if found.claim is not None:
        for logger in trainer.loggers:
            if isinstance(logger, NumberedLogger) and place_of(logger.log_dir)[1] is None:
                _claim_for(logger, found)


def _claim_for(logger: NumberedLogger, found: HeldDirectory) -> None:
    while True:
        folder, files = place_of(logger.log_dir)[0], files_replaced_by(logger)
        held = found.claim_of(folder)
        if held is not None:
            held.refuse_others(files)
            return
        _end_over(folder)
        try:
            below = folder.resolve().is_relative_to(found.directory.resolve())
            is_runs = below and found.claim is not None and found.claim.was_run
            found.of_loggers.append(claim_for_logger(folder, () if is_runs else files))
        except OSError as error:
            name = type(logger).__name__
            claimed = os.path.lexists(RunLayout(folder).owner)
            if claimed or any((folder / file).exists() for file in files):  # of whom, is not known
                rule = f"be one that can be claimed, got {str(folder)!r}"
                raise DirectoryRefusedError(f"The folder of {name} must {rule}: {error}.") from None
            _log.warning("The folder of %s cannot be claimed: %s", name, error)
            return
        except DirectoryInUseError as error:
            _take_next(logger, error)
        else:
            return


def _end_over(directory: Path) -> None:
    """Release a directory that a run of this process, which failed, did not close."""
    for trainer, found in list(OF_TRAINERS.items()):
        over = found.is_open and trainer.state.status is not TrainerStatus.RUNNING
        if over and found.claim_of(directory) is not None:
            found.end()


def _claim(directory: Path, *, is_ours: bool = False) -> Claim | None:
    """Claim a run directory.

    Args:
        directory: The directory.
        is_ours: Whether an earlier run of the same Trainer made it and could not claim it.

    Returns:
        The claim; ``None`` where the directory does not exist, and cannot be made now.

    Raises:
        DirectoryRefusedError: If a living run owns the directory; or if a directory that exists
            cannot be claimed, where a living run is not noticed.
    """
    _end_over(directory)
    try:
        return claim(directory)
    except OSError as error:
        if directory.is_dir() and not is_ours:
            rule = f"be one that can be claimed, got {str(directory)!r}"
            hint = f"{error}. Choose another run directory."
            raise DirectoryRefusedError(f"The run directory must {rule}: {hint}") from None
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
            _take_next(logger, error)


def _take_next(logger: NumberedLogger, error: DirectoryInUseError) -> None:
    if not isinstance(logger.version, int):
        raise error
    take_next_number(logger)
    _log.warning("%s This run writes into %s.", error, logger.log_dir)
