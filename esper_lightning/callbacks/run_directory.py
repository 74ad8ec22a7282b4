"""Which directory a run writes into."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

__all__ = ["agree_on_run_directory", "run_directory"]


def agree_on_run_directory(trainer: Trainer) -> None:
    """Let every rank write where the first one does; all of them call this, in ``setup``.

    A logger takes the next version that is free. When the other ranks look, the first one has taken
    it.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if trainer.world_size > 1 and isinstance(logger, TensorBoardLogger | CSVLogger):
        logger._version = trainer.strategy.broadcast(logger.version)


def run_directory(trainer: Trainer) -> Path | None:
    """The run directory: where the first logger writes, or ``default_root_dir`` without loggers.

    ``None`` under ``fast_dev_run``, which is not to leave anything behind. Calls no collective,
    unlike ``trainer.log_dir``.
    """
    if trainer.fast_dev_run:
        return None
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    directory = (
        logger.log_dir if isinstance(logger, TensorBoardLogger | CSVLogger) else logger.save_dir
    )
    return Path(directory or trainer.default_root_dir)
