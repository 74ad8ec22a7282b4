"""Which directory a run writes into."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

__all__ = ["run_directory"]


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
