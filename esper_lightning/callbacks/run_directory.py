"""Which directory a run writes into, and that no other run does.

The run directory of a Trainer is, in this order: the ``dirpath`` that one of its callbacks was
given; the folder of its first logger that has a folder for each run (TensorBoard and CSV);
``default_root_dir``, where that is not the current directory and no living run has it; or else a
new ``lightning_logs/version_<n>`` below. The first rank claims it (``forensics.claims``), the
others are told.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import warnings
import weakref
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerStatus

from esper_lightning.core.validate import require
from esper_lightning.forensics.claims import Claim, DirectoryInUseError, claim, claim_next
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.report import set_aside

__all__ = [
    "WritesRun",
    "assign_run_directory",
    "claim_new",
    "close_run_directory",
    "end_run",
    "open_run_directory",
    "run_directory",
]

_log = logging.getLogger(__name__)
_Numbered = TensorBoardLogger | CSVLogger


class WritesRun(Callback):
    """A callback with files in the run directory.

    Args:
        dirpath: Run directory; ``None`` for that of the Trainer.

    Raises:
        ValueError: If ``dirpath`` is empty.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        named = dirpath is None or str(dirpath) != ""
        require(named, f"{type(self).__name__}.dirpath", "name a directory", dirpath)
        self.dirpath = dirpath


class _RunDirectory:
    """The directory of one Trainer, and which of its callbacks use it."""

    def __init__(self, directory: Path, held: Claim | None) -> None:
        self.directory, self.claim = directory, held
        self.users: set[int] = set()
        self.is_open = False  # on all ranks

    def end(self) -> None:
        """Let the directory go."""
        self.is_open = False
        self.users.clear()
        if self.claim is not None:
            self.claim.release()


_of_trainers: "weakref.WeakKeyDictionary[Trainer, _RunDirectory]" = weakref.WeakKeyDictionary()


def run_directory(trainer: Trainer) -> Path | None:
    """Directory that a Trainer's latest run writes or wrote into; ``None`` before the first."""
    found = _of_trainers.get(trainer)
    return None if found is None or trainer.fast_dev_run else found.directory


def open_run_directory(
    trainer: Trainer, user: object = None, *, alone: bool = False
) -> Path | None:
    """Claim the run directory, or join the callbacks of the same Trainer that did.

    A disk that takes no directory is no error here: whoever writes a file will meet it.

    Args:
        trainer: Trainer of the run; all its ranks call this, in ``setup``.
        user: The directory is let go when each user has called ``close_run_directory``; ``None``
            for somebody who does not count.
        alone: Whether the other ranks may be out of reach, as at a death: they are not told.

    Returns:
        The directory, absolute; ``None`` under ``fast_dev_run``, which is to leave nothing behind.

    Raises:
        DirectoryInUseError: If a living run owns the directory; on all ranks alike.
    """
    if trainer.fast_dev_run:
        return None
    found = _of_trainers.get(trainer)
    if found is None or not found.is_open:
        told = _default_directory(trainer)
        found = _take(trainer) if alone else _agree(trainer)
        found.is_open = True
        _of_trainers[trainer] = found
        if told != found.directory:
            _move_profiler(trainer, told, found.directory)
    if user is not None:
        found.users.add(id(user))
    return found.directory


def close_run_directory(trainer: Trainer, user: object) -> None:
    """Let the run directory go, unless another callback of the Trainer uses it."""
    found = _of_trainers.get(trainer)
    if found is not None and id(user) in found.users:
        found.users.discard(id(user))
        if not found.users:
            found.end()


def end_run(trainer: Trainer) -> None:
    """Let the run directory go, whoever used it."""
    found = _of_trainers.get(trainer)
    if found is not None:
        found.end()


def claim_new(trainer: Trainer, parent: Path) -> Claim:
    """Claim the directory for a run that has not begun, with its number where it has none yet.

    Args:
        trainer: Trainer of the run, whose callbacks or loggers may have been given a place.
        parent: Folder of a new directory where they were not.

    Raises:
        DirectoryInUseError: If a living run owns the place that was given.
        OSError: If the directory cannot be made.
    """
    given, logger = _given(trainer), _numbered(trainer)
    if given is not None:
        return claim(given)
    if logger is not None and logger._version is not None:
        return claim(Path(logger.log_dir))
    return claim_next(parent if logger is None else Path(logger.root_dir))


def assign_run_directory(trainer: Trainer, held: Claim) -> None:
    """Have a Trainer's runs write into a directory that is claimed already, by the first rank.

    A logger that would have chosen its own number in the same folder gets the directory's.
    Checkpoints without a place of their own go there too.
    """
    _of_trainers[trainer] = _RunDirectory(held.directory, held)
    weakref.finalize(trainer, held.release)
    for logger in trainer.loggers:
        if (
            isinstance(logger, _Numbered)
            and logger._version is None
            and Path(logger.root_dir).absolute() == held.directory.parent
        ):
            logger._version = int(held.directory.name.removeprefix("version_"))
        if isinstance(logger, CSVLogger) and Path(logger.log_dir).absolute() == held.directory:
            set_aside(held.directory / ExperimentWriter.NAME_METRICS_FILE)  # else it is deleted
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory .* not empty")
                _ = logger.experiment
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(RunLayout(held.directory).checkpoints)


def _agree(trainer: Trainer) -> _RunDirectory:
    """Have every rank write where the first one does."""
    mine: _RunDirectory | None = None
    told: tuple[str, int | str | None] | DirectoryInUseError | None = None
    if trainer.is_global_zero:
        try:
            mine = _take(trainer)
            logger = _numbered(trainer)
            told = (str(mine.directory), None if logger is None else logger.version)
        except DirectoryInUseError as error:
            told = error
    if trainer.world_size > 1:
        told = trainer.strategy.broadcast(told)
    if isinstance(told, DirectoryInUseError):
        raise told
    assert told is not None
    directory, version = told
    logger = _numbered(trainer)
    if logger is not None:
        logger._version = version
    return mine or _RunDirectory(Path(directory), None)


def _take(trainer: Trainer) -> _RunDirectory:
    """Claim the directory of a Trainer, anew if its runs have one already."""
    found = _of_trainers.get(trainer)
    if found is not None:
        if found.claim is None or not found.claim.holds:
            found.claim = _claim(found.directory)
    else:
        found = _RunDirectory(*_choose(trainer))
    if found.claim is not None:
        weakref.finalize(trainer, found.claim.release)
    return found


def _choose(trainer: Trainer) -> tuple[Path, Claim | None]:
    chosen, logger = _given(trainer), _numbered(trainer)
    if chosen is not None:
        return chosen, _claim(chosen)
    if logger is not None:
        held = _claim_folder_of(logger)
        return Path(logger.log_dir).absolute(), held
    root = Path(trainer.default_root_dir).absolute()
    if root != Path.cwd():
        try:
            return root, _claim(root)
        except DirectoryInUseError as error:
            _log.warning("%s This run makes a directory below it.", error)
    parent = root / "lightning_logs"
    try:
        held = claim_next(parent)
    except OSError as error:
        _log.warning("No run directory can be made in %s: %s", parent, error)
        return parent / "version_0", None
    return held.directory, held


def _given(trainer: Trainer) -> Path | None:
    callbacks: list[Any] = trainer.callbacks
    given = (each.dirpath for each in callbacks if isinstance(each, WritesRun))
    return next((Path(dirpath).absolute() for dirpath in given if dirpath is not None), None)


def _claim(directory: Path) -> Claim | None:
    for trainer, found in list(_of_trainers.items()):
        over = found.is_open and trainer.state.status is not TrainerStatus.RUNNING
        if over and found.directory == directory:  # a run that failed, and told nobody
            found.end()
    try:
        return claim(directory)
    except OSError as error:
        _log.warning("The run directory %s cannot be claimed: %s", directory, error)
        return None


def _claim_folder_of(logger: _Numbered) -> Claim | None:
    """Claim a logger's folder.

    Lightning takes the number after the greatest that it sees: two runs that look at the same time
    take the same. The one that comes second moves on.
    """
    while True:
        try:
            return _claim(Path(logger.log_dir).absolute())
        except DirectoryInUseError as error:
            if not isinstance(logger.version, int):
                raise
            _renumber(logger)
            _log.warning("%s This run writes into %s.", error, logger.log_dir)


def _renumber(logger: _Numbered) -> None:
    """Give a logger that has logged nothing yet a folder of its own."""
    if isinstance(logger, TensorBoardLogger) and logger._experiment is not None:
        writer: Any = logger._experiment.file_writer
        logger._experiment.close()
        Path(writer.event_writer._file_name).unlink(missing_ok=True)
    folder = Path(logger.log_dir)
    for _ in Path(getattr(logger, "sub_dir", None) or "").parts:
        folder = folder.parent
    number = int(logger.version)
    while True:
        number += 1
        try:
            folder.with_name(f"version_{number}").mkdir(parents=True)
        except FileExistsError:
            continue
        break
    logger._version, logger._experiment = number, None
    _ = logger.experiment  # before others write there: a CSVLogger wants to be the first


def _numbered(trainer: Trainer) -> _Numbered | None:
    """The first logger that has a folder for each run."""
    return next((each for each in trainer.loggers if isinstance(each, _Numbered)), None)


def _default_directory(trainer: Trainer) -> Path:
    """Where Lightning's own profilers write unless they were told: ``Trainer.log_dir``."""
    directory: Any = trainer.default_root_dir
    if trainer.loggers:
        logger = trainer.loggers[0]
        directory = logger.log_dir if isinstance(logger, _Numbered) else logger.save_dir
    return Path(directory or trainer.default_root_dir).absolute()


def _move_profiler(trainer: Trainer, told: Path, directory: Path) -> None:
    """The profiler was told a place before callbacks were asked for theirs."""
    profiler = trainer.profiler
    if profiler.dirpath is not None and Path(profiler.dirpath).absolute() == told:
        profiler.dirpath = None
    profiler.setup(cast(Any, profiler._stage), profiler._local_rank, str(directory))
