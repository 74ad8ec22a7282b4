"""Private attributes of Lightning by which runs find, load and collect checkpoints.

Lightning may rename these attributes in any release. The file is beside
``lightning_internals.py``, for the same reason.
"""
# Lightning sets many attributes of its objects where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, cast
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

__all__ = [
    "checkpoint_connector",
    "checkpoint_to_load",
    "dump_checkpoint",
    "load_in_place_of_last",
    "parse_checkpoint_path",
    "resumes_last",
]

_NOWHERE = Path(os.devnull, "checkpoints")
_IN_PLACE_OF_LAST: WeakKeyDictionary[Trainer, str] = WeakKeyDictionary()


def checkpoint_to_load(trainer: Trainer) -> Any:
    """Path of the checkpoint that the run in this thread is about to load; ``None`` without one.

    ``ckpt_path``, a local variable of ``Trainer._run``: Lightning stores the path only when it
    loads the checkpoint, after callbacks and loggers have written their first files.
    """
    if trainer in _IN_PLACE_OF_LAST and resumes_last(trainer):
        return _IN_PLACE_OF_LAST[trainer]
    return _variable_of(Trainer._run, trainer)


def resumes_last(trainer: Trainer) -> bool:
    """Whether the run in this thread was begun by ``Trainer.fit(ckpt_path="last")`` of Lightning.

    ``ckpt_path``, a local variable of ``Trainer.fit``: it is ``None`` in ``Trainer._run`` where
    Lightning has found no checkpoint.
    """
    return str(_variable_of(Trainer.fit, trainer)) == "last"


def load_in_place_of_last(trainer: Trainer, path: str | None) -> None:
    """Make a run for which ``resumes_last`` holds load a later checkpoint than Lightning found.

    ``_checkpoint_connector.resume_start`` reads the file.

    Args:
        trainer: Trainer of a run that has loaded nothing yet.
        path: Path of the checkpoint; ``None`` for the one that Lightning found.
    """
    _IN_PLACE_OF_LAST.pop(trainer, None)  # of an earlier run of this Trainer
    if path is None:
        return
    _IN_PLACE_OF_LAST[trainer] = path
    connector = checkpoint_connector(trainer)
    original: Callable[..., None] = connector.resume_start

    def resume_start(found: Any = None, *args: Any, **kwargs: Any) -> None:
        later = _IN_PLACE_OF_LAST.get(trainer, found)
        original(later if resumes_last(trainer) else found, *args, **kwargs)

    connector.resume_start = resume_start


def _variable_of(function: Callable[..., Any], trainer: Trainer) -> Any:
    """``ckpt_path`` in the innermost call of a method of a Trainer; ``None`` outside of any."""
    code: CodeType = function.__code__
    frame = cast(FrameType | None, sys._getframe())
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path")
        frame = frame.f_back
    return None


def checkpoint_connector(trainer: Trainer) -> Any:
    """Object whose method ``resume_start`` reads the checkpoint that a run resumes from."""
    return trainer._checkpoint_connector


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The checkpoint that ``Trainer.save_checkpoint`` would write.

    ``_checkpoint_connector.dump_checkpoint`` makes the checkpoint on this rank alone;
    ``save_checkpoint`` would wait for the other ranks.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def parse_checkpoint_path(trainer: Trainer, name: str, folder: Path | None) -> str | None:
    """Path of the file that ``Trainer.fit(ckpt_path="last")`` would load; ``None`` without a file.

    ``_checkpoint_connector._parse_ckpt_path``: to refuse a checkpoint before the run begins, the
    file must be known before Lightning looks for it. Lightning would ask the logger for the folder
    of a callback without one, and a logger of a service begins a run to answer.

    Args:
        trainer: Trainer of a run that has not begun.
        name: ``last``, ``best`` or ``hpc``.
        folder: Folder of checkpoints of the run directory; ``None`` where that will be a new one.
    """
    connector: Any = trainer._checkpoint_connector
    placed = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is None
    ]
    for callback in placed:
        callback.dirpath = str(folder or _NOWHERE)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*there is no last checkpoint available")
            path = connector._parse_ckpt_path(
                TrainerFn.FITTING, name, model_provided=True, model_connected=False
            )
    finally:
        for callback in placed:
            callback.dirpath = None
    return None if path is None else str(path)
