"""Private attributes of Lightning's loggers for W&B and MLflow, and why this package needs them.

A logger has no public way to say which run of its service it continues, once it is built. Lightning
may rename these attributes in any release. The file is beside ``lightning_internals.py``, for the
same reason, and imports no logger, because a user may have installed none.
"""
# Loggers are objects of other libraries.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any, Literal

__all__ = ["Service", "continue_run", "run_of_tracker", "service_of", "write_below"]

Service = Literal["wandb", "mlflow"]


def service_of(logger: Any) -> Service | None:
    """The service that a logger sends its metrics to; ``None`` for a logger that writes files.

    ``_wandb_init`` and ``_mlflow_client``: classes that derive from Lightning's have them, too.
    """
    attributes = vars(logger)
    if "_wandb_init" in attributes:
        return "wandb"
    return "mlflow" if "_mlflow_client" in attributes else None


def run_of_tracker(logger: Any) -> str | None:
    """Identifier of the run at the service; ``None`` before the first use without a choice of it.

    ``_experiment`` and ``_wandb_init["id"]``, or ``_run_id``: the public property ``version`` would
    begin a run of MLflow.
    """
    if service_of(logger) == "mlflow":
        return logger._run_id
    experiment = logger._experiment
    return logger._wandb_init["id"] if experiment is None else getattr(experiment, "id", None)


def continue_run(logger: Any, identifier: str) -> None:
    """Make a logger that has not begun continue a run of its service.

    ``_wandb_init["id"]`` and ``_id``, or ``_run_id``.
    """
    if service_of(logger) == "mlflow":
        logger._run_id = identifier
    else:
        logger._wandb_init["id"] = logger._id = identifier


def write_below(logger: Any, directory: str) -> None:
    """Make W&B's logger write below a directory, unless the user chose another than the current.

    ``_wandb_init["dir"]`` and ``_save_dir``.
    """
    if service_of(logger) == "wandb" and logger._wandb_init["dir"] in (None, "."):
        logger._wandb_init["dir"] = logger._save_dir = directory
