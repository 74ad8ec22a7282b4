"""The loggers of a replay: those of the run that died, in the directory of the replay and offline.

Callbacks call methods of the run's own loggers. A logger is kept if it is one of Lightning's whose
files have a place that can be chosen, or derived from one; what any other writes to may be shared
with the run, and TensorBoard's takes its place.
"""

import contextlib
import importlib
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)

__all__ = ["importing_from", "replace_loggers"]

_NUMBERED: Mapping[str, Any] = {"name": "", "version": "", "sub_dir": None}
_SETTINGS: Mapping[type[Logger], Mapping[str, Any]] = {
    TensorBoardLogger: _NUMBERED,
    CSVLogger: _NUMBERED,
    WandbLogger: {"offline": True, "dir": None, "id": None, "version": None, "log_model": False},
    MLFlowLogger: {"tracking_uri": None, "artifact_location": None, "run_id": None},
}
"""Settings of each logger without which it would write elsewhere than into ``save_dir``."""


def replace_loggers(
    trainer: dict[str, Any], directory: Path, *, found_in: Sequence[str] = ()
) -> list[str]:
    """Make the loggers in the settings of a Trainer write into the directory of a replay.

    Args:
        trainer: Settings of the Trainer of the run that died, which are changed.
        directory: Run directory of the replay.
        found_in: Folders in which the process of the run found its classes.

    Returns:
        A sentence for each logger that is replaced.
    """
    given = trainer.get("logger")
    remarks: list[str] = []
    if given not in (None, True, False):
        listed = cast(list[Any], given if isinstance(given, list) else [given])
        kept: list[Any] = []
        for number, each in enumerate(listed):
            with importing_from(found_in):
                moved = _moved(each, directory / "loggers" / str(number))
            if moved is not None:
                kept.append(moved)
            else:
                settings = cast(dict[str, Any], each if isinstance(each, dict) else {})
                name = settings.get("class_path", "logger")
                remarks.append(f"Without the run's {name}: what it writes to may be shared.")
        # Lightning's default, for code that needs some logger.
        trainer["logger"] = (kept if isinstance(given, list) else kept[0]) if kept else None
    if trainer.get("default_root_dir") is not None:
        is_default = trainer.get("logger") in (None, True)  # its place is that of the run
        trainer["default_root_dir"] = None if is_default else str(directory)
    return remarks


def _moved(logger: Any, folder: Path) -> dict[str, Any] | None:
    """A logger of a config that writes into a folder alone; ``None`` if it has no such setting."""
    if not isinstance(logger, dict):
        return None
    settings = cast(dict[str, Any], logger)
    arguments = cast(dict[str, Any], settings.get("init_args") or {})
    kind = _class_of(str(settings.get("class_path")))
    known = next((each for each in _SETTINGS if kind is not None and issubclass(kind, each)), None)
    if known is None or "save_dir" not in arguments:
        return None
    moved = {name: value for name, value in _SETTINGS[known].items() if name in arguments}
    return settings | {"init_args": {**arguments, **moved, "save_dir": str(folder)}}


def _class_of(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception:  # of code of the user's, which the replay would raise, too
        return None
    return found if isinstance(found, type) else None


@contextlib.contextmanager
def importing_from(folders: Sequence[str]) -> Generator[None]:
    """Find modules in some folders first, as the process of the run did."""
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.path[:] = before
