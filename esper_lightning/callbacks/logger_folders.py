"""Loggers that have a numbered folder for each run, and how they get another folder."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from esper_lightning.callbacks.held_directory import HeldDirectory
from esper_lightning.callbacks.lightning_internals import (
    experiment_of,
    forget_experiment,
    set_version,
    version_of,
)
from esper_lightning.callbacks.mirror import place_of
from esper_lightning.callbacks.tensorboard_internals import event_file
from esper_lightning.forensics.asides import rename_aside

__all__ = [
    "NumberedLogger",
    "announced_directory",
    "begin_files",
    "files_replaced_by",
    "numbered_logger",
    "remove_events",
    "take_next_number",
    "write_into",
]

NumberedLogger = TensorBoardLogger | CSVLogger
"""A logger with a folder ``version_<n>`` for each run."""


def numbered_logger(trainer: Trainer) -> NumberedLogger | None:
    """The first logger of a Trainer with a folder for each run; ``None`` without one."""
    return next((each for each in trainer.loggers if isinstance(each, NumberedLogger)), None)


def announced_directory(trainer: Trainer) -> Path:
    """Where Lightning's profilers write unless they were given a folder: ``Trainer.log_dir``."""
    directory: Any = trainer.default_root_dir
    if trainer.loggers:
        logger = trainer.loggers[0]
        directory = logger.log_dir if isinstance(logger, NumberedLogger) else logger.save_dir
    return Path(directory or trainer.default_root_dir).absolute()


def write_into(logger: Logger, directory: Path) -> None:
    """Make a logger write into a run directory, if it would have chosen its own number beside it.

    Args:
        logger: Logger of a run that has not begun.
        directory: Run directory, ``version_<n>`` or that of a replay, which is claimed.
    """
    if not isinstance(logger, NumberedLogger):
        return
    if version_of(logger) is None and place_of(logger.root_dir)[0] == directory.parent:
        number = directory.name.removeprefix("version_")
        set_version(logger, int(number) if number.isdecimal() else directory.name)


def files_replaced_by(logger: NumberedLogger) -> tuple[str, ...]:
    """Names of the files in its folder that a logger removes or replaces when a run begins."""
    if not isinstance(logger, CSVLogger):
        return ()
    return (ExperimentWriter.NAME_METRICS_FILE, ExperimentWriter.NAME_HPARAMS_FILE)


def begin_files(logger: Logger, found: HeldDirectory) -> None:
    """Begin the files of a logger, so that no file of an earlier run is lost or taken for its own.

    ``hparams.yaml`` and the table of an earlier run are renamed. Otherwise Lightning would let
    TensorBoard's ``hparams.yaml`` stand, and delete the table of a CSV logger.

    Args:
        logger: Logger of a run that begins.
        found: Run directory of the run; a folder that it has not claimed is left alone.
    """
    if not isinstance(logger, NumberedLogger):
        return
    folder, address = place_of(logger.log_dir)
    held = found.claim_of(folder)
    if address is not None or held is None:
        return
    if held.was_used:  # otherwise, an hparams.yaml is somebody else's
        rename_aside(folder / ExperimentWriter.NAME_HPARAMS_FILE)
    if isinstance(logger, CSVLogger):
        rename_aside(folder / ExperimentWriter.NAME_METRICS_FILE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory .* not empty")
            _ = logger.experiment


def remove_events(logger: Logger) -> None:
    """Remove the event file of a TensorBoard logger that has logged nothing yet."""
    experiment = experiment_of(logger) if isinstance(logger, TensorBoardLogger) else None
    if experiment is not None:
        path = event_file(experiment)
        experiment.close()
        Path(path).unlink(missing_ok=True)
        forget_experiment(logger)


def take_next_number(logger: NumberedLogger) -> None:
    """Move a logger that has logged nothing yet to the next number that is free."""
    remove_events(logger)
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
    _ = logger.experiment  # a CSVLogger must write into its folder before others do
