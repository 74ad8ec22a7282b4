"""Which directory a run writes into, and that no other run does.

The run directory of a Trainer is, in this order: the ``dirpath`` that one of its callbacks was
given; the folder of its first logger that has a folder for each run (TensorBoard and CSV);
``default_root_dir``, where that is not the current directory and neither a run nor anybody else has
or had files of a run's names there; or else a new ``lightning_logs/version_<n>`` below. The first
rank claims it (``forensics.claims``), the others are told. Where it is a remote address, the run
writes into a local folder, which is copied there at every checkpoint and at the end
(``callbacks.mirror``).
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import warnings
import weakref
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerStatus

from esper_lightning.callbacks.lightning_internals import (
    event_file,
    experiment_of,
    forget_experiment,
    set_version,
    setup_profiler_again,
    spawns_processes,
    version_of,
)
from esper_lightning.callbacks.mirror import Mirror, place_of
from esper_lightning.core.errors import require_name
from esper_lightning.forensics.asides import set_aside
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
    "claim_new",
    "close_run_directory",
    "copy_run_directory",
    "end_run",
    "given_directory",
    "open_run_directory",
    "run_directory",
]

_log = logging.getLogger(__name__)
_Numbered = TensorBoardLogger | CSVLogger
_COPY_S = 30.0  # at the end of a run; a scheduler's grace period is often as long


class WritesRun(Callback):
    """A callback with files in the run directory.

    Args:
        dirpath: Run directory; ``None`` for that of the Trainer.

    Raises:
        ValueError: If ``dirpath`` is empty, or holds a NUL byte.
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        require_name(f"{type(self).__name__}.dirpath", dirpath, "a directory")
        self.dirpath = dirpath


class _RunDirectory:
    """The directory of one Trainer, and which of its callbacks use it."""

    def __init__(self, directory: Path, held: Claim | None, address: str | None = None) -> None:
        self.directory, self.claim, self.address = directory, held, address
        self.users: set[int] = set()
        self.is_open = False  # on all ranks
        self.mirror: Mirror | None = None

    def begin(self, rank: int) -> None:
        """Say where the files are, if that is not where they were asked for."""
        self.is_open = True
        if self.address is not None:
            self.mirror = Mirror(self.directory, self.address, rank)
            if self.claim is not None:  # the second process of a rank that vanishes copies, too
                self.claim.note(address=self.address)
            text = "The run writes into %s, which is copied to %s at checkpoints and at the end."
            _log.warning(text, self.directory, self.address)

    def end(self) -> None:
        """Let the directory go, when it is where it was asked for."""
        self.is_open = False
        self.users.clear()
        if self.mirror is not None:
            self.mirror.copy(seconds=_COPY_S)
            self.mirror = None
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
        DirectoryRefusedError: If it is not a run's, and files are where a run has its own; on all
            ranks alike.
        ValueError: If its address has no known protocol; on all ranks alike.
    """
    if trainer.fast_dev_run:
        return None
    found = _of_trainers.get(trainer)
    if found is None or not found.is_open:
        told = _default_directory(trainer)
        found = _take(trainer, alone=alone) if alone else _agree(trainer)
        found.begin(trainer.global_rank)
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


def copy_run_directory(trainer: Trainer) -> None:
    """Have a run directory with a remote address copied there, while the run goes on."""
    found = _of_trainers.get(trainer)
    if found is not None and found.mirror is not None:
        found.mirror.copy_soon()


def claim_new(trainer: Trainer, parent: Path) -> tuple[Claim, str | None]:
    """Claim the directory for a run that has not begun, with its number where it has none yet.

    Args:
        trainer: Trainer of the run, whose callbacks or loggers may have been given a place.
        parent: Folder of a new directory where they were not.

    Returns:
        The claim, and the remote address if the place has one.

    Raises:
        DirectoryRefusedError: If a living run owns the place that was given, or files are where a
            run has its own, and no run wrote them.
        OSError: If the directory cannot be made.
    """
    given, logger = given_directory(trainer), _numbered(trainer)
    if given is None and logger is not None and version_of(logger) is not None:
        given = logger.log_dir
    if given is not None:
        directory, address = place_of(given)
        return claim(directory), address
    parent, address = place_of(parent if logger is None else logger.root_dir)
    held = claim_next(parent)
    return held, None if address is None else f"{address}/{held.directory.name}"


def assign_run_directory(trainer: Trainer, held: Claim, address: str | None = None) -> None:
    """Have a Trainer's runs write into a directory that is claimed already, by the first rank.

    A logger that would have chosen its own number in the same folder gets the directory's.
    Checkpoints without a place of their own go there too.

    Args:
        trainer: Trainer that has not begun.
        held: Claim of the directory.
        address: Remote address that the directory is copied to.
    """
    _of_trainers[trainer] = _RunDirectory(held.directory, held, address)
    weakref.finalize(trainer, held.release)
    for logger in trainer.loggers:
        if (
            isinstance(logger, _Numbered)
            and version_of(logger) is None
            and place_of(logger.root_dir)[0] == held.directory.parent
        ):
            set_version(logger, int(held.directory.name.removeprefix("version_")))
        if isinstance(logger, CSVLogger) and place_of(logger.log_dir) == (held.directory, None):
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
    told: tuple[str, str | None, int | str | None] | ValueError | None = None
    if trainer.is_global_zero:
        try:
            mine = _take(trainer)
            logger = _numbered(trainer)
            version = None if logger is None else logger.version
            told = (str(mine.directory), mine.address, version)
        except ValueError as error:  # the others are waiting to be told
            told = error
    if trainer.world_size > 1:
        told = trainer.strategy.broadcast(told)
    if isinstance(told, ValueError):
        raise told
    assert told is not None
    directory, address, version = told
    logger = _numbered(trainer)
    if logger is not None:
        set_version(logger, version)
    return mine or _RunDirectory(Path(directory), None, address)


def _take(trainer: Trainer, *, alone: bool = False) -> _RunDirectory:
    """Claim the directory of a Trainer, anew if its runs have one already."""
    found = _of_trainers.get(trainer)
    if found is not None:
        if found.claim is None or not found.claim.holds:
            found.claim = _claim(found.directory)
    else:
        spawned = spawns_processes(trainer)
        found = _choose(trainer, joins=alone and spawned)
    if found.claim is not None:
        weakref.finalize(trainer, found.claim.release)
    return found


def _choose(trainer: Trainer, *, joins: bool) -> _RunDirectory:
    """Choose and claim a directory; ``joins`` where processes of the run may have done so."""
    given, logger = given_directory(trainer), _numbered(trainer)
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
            text = "%s has the files of an earlier run: this one makes a directory in %s."
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
    """Run directory that a callback of the Trainer was given."""
    callbacks: list[Any] = trainer.callbacks
    given = (each.dirpath for each in callbacks if isinstance(each, WritesRun))
    return next((dirpath for dirpath in given if dirpath is not None), None)


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
            return _claim(place_of(logger.log_dir)[0])
        except DirectoryInUseError as error:
            if not isinstance(logger.version, int):
                raise
            _renumber(logger)
            _log.warning("%s This run writes into %s.", error, logger.log_dir)


def _renumber(logger: _Numbered) -> None:
    """Give a logger that has logged nothing yet a folder of its own."""
    experiment = experiment_of(logger)
    if isinstance(logger, TensorBoardLogger) and experiment is not None:
        path = event_file(experiment)
        experiment.close()
        Path(path).unlink(missing_ok=True)
    folder, _address = place_of(logger.log_dir)
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
    set_version(logger, number)
    forget_experiment(logger)
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
    setup_profiler_again(profiler, directory)
