"""Services that track runs, W&B and MLflow: a resumed run continues there, and files follow it.

``trackers.json`` of a run directory has the identifier of the run at each service. A run that is
resumed in the directory continues under these identifiers; a new run there gets new ones. The
loggers are known by their attributes: a user may have installed none.
"""
# Loggers are objects of other libraries.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportAttributeAccessIssue=false

import logging
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer

from esper_lightning.callbacks.checkpoint_internals import checkpoint_to_load
from esper_lightning.callbacks.loggers import when_begun
from esper_lightning.callbacks.run_directory import run_directory
from esper_lightning.callbacks.tracker_internals import (
    continue_run,
    run_of_tracker,
    service_of,
    write_below,
)
from esper_lightning.forensics.asides import rename_aside
from esper_lightning.forensics.bundle import write_bundle
from esper_lightning.forensics.files import first_cause, replacing, strict_json, write_atomically
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import parse_json, read_file

__all__ = ["begin_tracking", "continue_tracking", "upload_results"]

_log = logging.getLogger(__name__)
_NAMES_AT_WANDB = {"config.yaml": "run_config.yaml"}  # W&B has a config.yaml of its own


def continue_tracking(trainer: Trainer) -> None:
    """Make the loggers of a run that is resumed continue at their services.

    The report of an attempt that was killed becomes a bundle, which is uploaded with the results of
    the run that begins.

    Args:
        trainer: Trainer of a run that begins, before its loggers do, on the first rank. A run
            without a run directory is none that could be resumed.
    """
    directory = run_directory(trainer)
    if directory is None or not trainer.is_global_zero:
        return
    layout, is_resumed = RunLayout(directory), checkpoint_to_load(trainer) is not None
    known: dict[str, str] = {}
    with _warns("The trackers of the run before"):
        if is_resumed:
            known = _read(layout.trackers)
        else:
            rename_aside(layout.trackers)
    for name, logger in _trackers(trainer):
        with _warns(type(logger).__name__):
            write_below(logger, str(directory))
            if run_of_tracker(logger) is None and name in known:
                continue_run(logger, known[name])
            if is_resumed:
                write_bundle(directory)


def begin_tracking(trainer: Trainer) -> None:
    """Write down which runs the loggers have begun, and give them the config of the run.

    A service that is out of reach now gets the config when its logger first reaches the service.

    Args:
        trainer: Trainer of a run, whose loggers have begun, on the first rank.
    """
    directory = run_directory(trainer)
    if directory is None or not trainer.is_global_zero:
        return
    layout, begun = RunLayout(directory), dict[str, str]()
    with _warns("The trackers of the run before"):
        begun = _read(layout.trackers)

    def begin(name: str, logger: Any) -> None:
        identifier = run_of_tracker(logger)
        if identifier is not None:
            begun[name] = identifier
            write_atomically(layout.trackers, f"{strict_json(begun)}\n".encode())
        _place(logger, layout.directory)
        _upload(logger, layout.config)

    for name, logger in _trackers(trainer):
        with _warns(type(logger).__name__):
            when_begun(logger, partial(begin, name))
    for logger in trainer.loggers:
        with _warns(type(logger).__name__):
            when_begun(logger, partial(_add_config, layout))


def upload_results(directory: Path, logger: Any, *, died: bool, resumed: bool) -> None:
    """Give a service the best checkpoint of a run, and the bundle of its death.

    Args:
        directory: Run directory.
        logger: Logger of the run; one that writes files gets nothing.
        died: Whether the run died.
        resumed: Whether the run continues an earlier attempt, whose bundle is uploaded, then.

    Raises:
        Exception: Whatever prevents the service from taking a file.
    """
    if service_of(logger) is None:
        return
    if died:
        write_bundle(directory)
    layout = RunLayout(directory)
    if died or resumed:  # else the bundle is that of another run
        _upload(logger, layout.crash_bundle)
    _upload(logger, layout.best_checkpoint)


def _trackers(trainer: Trainer) -> Iterator[tuple[str, Any]]:
    """The loggers of services, with a name for each: ``wandb``, ``mlflow``, ``wandb-2``."""
    names: list[str] = []
    for logger in trainer.loggers:
        service = service_of(logger)
        if service is not None:
            names.append(service)
            count = names.count(service)
            yield service if count == 1 else f"{service}-{count}", logger


def _add_config(layout: RunLayout, logger: Any) -> None:
    """Give TensorBoard the config as text."""
    add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
    if callable(add_text) and layout.config.is_file():
        text = layout.config.read_text().replace("\n", "\n    ")
        add_text("config", f"    {text}", 0)  # indented: Markdown shows it as it is


def _upload(logger: Any, path: Path) -> None:
    """Give a service a file, if the file exists.

    W&B gets a copy in its own folder. It would make a link to any other file, and its service
    writes files through such links.
    """
    if not path.is_file():
        return
    if service_of(logger) == "mlflow":
        logger.experiment.log_artifact(run_of_tracker(logger), str(path))
    else:
        folder = Path(logger.experiment.dir)
        copy = folder / _NAMES_AT_WANDB.get(path.name, path.name)
        with replacing(copy) as temporary:
            shutil.copyfile(path, temporary)
        logger.experiment.save(str(copy), base_path=str(folder), policy="now")


def _place(logger: Any, directory: Path) -> None:
    """Tell a service where the run directory is, and MLflow that the run goes on."""
    if service_of(logger) == "mlflow":
        identifier = run_of_tracker(logger)
        logger.experiment.set_tag(identifier, "run_dir", str(directory))
        logger.experiment.update_run(identifier, status="RUNNING")
    else:
        logger.experiment.config.update({"run_dir": str(directory)}, allow_val_change=True)


def _read(path: Path) -> dict[str, str]:
    """Identifiers by service; none where the file is missing or damaged."""
    try:
        content = parse_json(read_file(path))
    except (FileNotFoundError, ValueError):
        return {}
    known = cast(dict[str, Any], content) if isinstance(content, dict) else {}
    return {name: value for name, value in known.items() if isinstance(value, str)}


@contextmanager
def _warns(name: str) -> Generator[None]:
    """A context whose errors are one warning: what a service lacks must not end a run."""
    try:
        yield
    except Exception as error:
        _log.warning("%s failed: %s. Training continues.", name, first_cause(error))
