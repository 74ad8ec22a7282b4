"""How callbacks and whole runs open, share and close the run directory of a Trainer.

``callbacks.directory_choice`` chooses the directory; ``callbacks.held_directory`` copies it to a
remote address and releases it.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import weakref
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from esper_lightning.callbacks.directory_choice import (
    WritesRun,
    agree_on_directory,
    claim_logger_folders,
    take_directory,
)
from esper_lightning.callbacks.held_directory import OF_TRAINERS, HeldDirectory
from esper_lightning.callbacks.logger_folders import announced_directory, begin_files, write_into
from esper_lightning.callbacks.mirror import Mirror
from esper_lightning.callbacks.profiler_internals import setup_profiler_again
from esper_lightning.forensics.asides import replace_keeping
from esper_lightning.forensics.claims import Claim
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import read_file

__all__ = [
    "assign_run_directory",
    "begin_run_directory",
    "close_run_directory",
    "copy_run_directory",
    "end_run",
    "open_run_directory",
    "run_directory",
    "run_layout",
    "withdraw_run",
]


def run_directory(trainer: Trainer) -> Path | None:
    """Directory that a Trainer's latest run writes or wrote into; ``None`` before the first."""
    layout = run_layout(trainer)
    return None if layout is None else layout.directory


def run_layout(trainer: Trainer) -> RunLayout | None:
    """Layout of ``run_directory``, which follows the directory of a run that has begun.

    Where the directory is moved and another run takes its name, the paths are in the moved
    directory from then on (``forensics.place``).
    """
    found = OF_TRAINERS.get(trainer)
    if found is None or trainer.fast_dev_run:
        return None
    return RunLayout(found.place or found.directory)


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
    found = OF_TRAINERS.get(trainer)
    if found is None or not found.is_open:
        announced = announced_directory(trainer)
        found = take_directory(trainer, alone=alone) if alone else agree_on_directory(trainer)
        found.begin(trainer.global_rank)
        OF_TRAINERS[trainer] = found
        _save_checkpoints_in(trainer, found.directory)
        if announced != found.directory:
            _move_profiler(trainer, announced, found.directory)
    if user is not None:
        found.users.add(id(user))
    return found.directory


def close_run_directory(trainer: Trainer, user: object) -> None:
    """Release the run directory, unless another callback of the Trainer uses it."""
    found = OF_TRAINERS.get(trainer)
    if found is not None and id(user) in found.users:
        found.users.discard(id(user))
        if not found.users:
            found.end()


def end_run(trainer: Trainer) -> None:
    """Release the run directory, even if callbacks still use it."""
    found = OF_TRAINERS.get(trainer)
    if found is not None:
        found.end()


def withdraw_run(trainer: Trainer) -> None:
    """Remove the directory of a run that was refused before it began, if the run has made it.

    A directory with a remote address stays, because its files are at the address by now.
    """
    found = OF_TRAINERS.get(trainer)
    if found is not None and found.claim is not None and found.address is None:
        found.end()
        found.claim.withdraw()


def copy_run_directory(trainer: Trainer) -> None:
    """Copy a run directory to its remote address, if it has one, while the run continues."""
    found = OF_TRAINERS.get(trainer)
    if found is not None and found.mirror is not None:
        found.mirror.copy_soon()


def assign_run_directory(
    trainer: Trainer, held: Claim, config: str, mirror: Mirror | None = None
) -> None:
    """Make a Trainer's runs write into a directory that the first rank has claimed already.

    A logger that would have chosen its own number in the same folder gets the directory's number.
    Checkpoints without a folder of their own go into the directory too. With several ranks, nothing
    is written before they agree (``begin_run_directory``).

    Args:
        trainer: Trainer whose run has not begun.
        held: Claim of the directory.
        config: Content of ``config.yaml``.
        mirror: Remote address that the directory is copied to, which has begun; ``None`` without
            one.

    Raises:
        DirectoryRefusedError: If a logger's own folder is in use, or it would replace files there
            that no run wrote.
        OSError: If a file cannot be written.
    """
    address, claims = (None, None) if mirror is None else (mirror.address, mirror.claims)
    found = OF_TRAINERS[trainer] = HeldDirectory(held.directory, held, address, claims)
    weakref.finalize(trainer, found.release)
    found.config = config
    for logger in trainer.loggers:
        write_into(logger, held.directory)
    _save_checkpoints_in(trainer, held.directory)
    try:
        claim_logger_folders(trainer, found)
        if trainer.world_size == 1:
            _write_first_files(trainer, found)
    except BaseException:
        found.release()
        raise


def begin_run_directory(trainer: Trainer) -> None:
    """Claim the run directory before the loggers of a run write, and write its first files.

    Args:
        trainer: Trainer of a run that begins; all its ranks call this function, and agree. Nothing
            is claimed if no callback writes into a run directory.

    Raises:
        DirectoryRefusedError: If a living run owns the directory, or if the directory has files
            where a run has its own, and no run wrote them; likewise for the folders of loggers;
            raised on all ranks.
    """
    callbacks: list[Any] = trainer.callbacks
    if trainer.fast_dev_run or not any(isinstance(each, WritesRun) for each in callbacks):
        return
    found = OF_TRAINERS.get(trainer)
    if found is None or not found.is_open:
        found = OF_TRAINERS[trainer] = agree_on_directory(trainer, with_loggers=True)
        _write_first_files(trainer, found)


def _save_checkpoints_in(trainer: Trainer, directory: Path) -> None:
    """Give the run directory to checkpoint callbacks that have no folder of their own.

    Without a logger, or with a logger that has no folder for each run, Lightning would save beside
    the run directory.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(RunLayout(directory).checkpoints)


def _write_first_files(trainer: Trainer, found: HeldDirectory) -> None:
    """Write ``config.yaml`` and the files of loggers that must exist before Lightning uses them."""
    if found.claim is None:
        return
    for logger in trainer.loggers:
        begin_files(logger, found)
    if found.config is None:
        return
    config, found.config = found.config, None
    path, content = RunLayout(found.directory).config, config.encode()
    found.is_used = True
    with contextlib.suppress(OSError, ValueError):  # it is absent, or damage has made it no file
        if read_file(path) == content:
            return
    replace_keeping(path, content)


def _move_profiler(trainer: Trainer, announced: Path, directory: Path) -> None:
    """Make the profiler write into ``directory``: it was set up before callbacks chose that."""
    profiler = trainer.profiler
    if profiler.dirpath is not None and Path(profiler.dirpath).absolute() == announced:
        profiler.dirpath = None
    setup_profiler_again(profiler, directory)
