"""Errors of a run that are mistakes in its settings, and are one line and exit status 2."""

import traceback
from pathlib import Path

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, early_stopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from esper_lightning.cli.mistakes import PACKAGE, passes_user_code, shows_tracebacks
from esper_lightning.envs.adapters.named import MissingPackageError

__all__ = ["refusal"]

_LIGHTNING = Path(lightning.__file__).parent
_LIGHTNING_CALLBACKS = Path(early_stopping.__file__).parent
_NAMED = (Callback, Logger, Profiler, Strategy)
_DISTRIBUTED = Path(torch.__file__).parent / "distributed"


def refusal(error: Exception, *, began: bool, measures: bool = False) -> str | None:
    """The line about an error of a run; ``None`` for an error that is no mistake in the settings.

    Args:
        error: Error that ended the run.
        began: Whether the run has finished an iteration.
        measures: Whether the run is a measurement, which an environment may refuse.
    """
    if shows_tracebacks():
        return None
    refusals = (MisconfigurationException, MissingPackageError, *((ValueError,) * measures))
    if isinstance(error, refusals) and not began:
        return str(error)
    if _is_refusal_of_callback(error):
        return str(error)
    owner = None if began else _refusing_owner(error)
    return None if owner is None else f"{owner}: {type(error).__name__}: {error}"


def _is_refusal_of_callback(error: Exception) -> bool:
    """Whether an error is about wrong settings of one of Lightning's own callbacks.

    ``EarlyStopping`` and ``ModelCheckpoint`` look for what they monitor only after an epoch.
    """
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent
    refuses = isinstance(error, MisconfigurationException | RuntimeError)
    return refuses and raised_in == _LIGHTNING_CALLBACKS


def _refusing_owner(error: Exception) -> str | None:
    """Name of the class of a setting whose code in Lightning, or below it, raised an error.

    ``None`` if the error came through code of a user, or was raised by code of this package; also
    for an error that other ranks or the device may cause.
    """
    if isinstance(error, torch.OutOfMemoryError) or passes_user_code(error):
        return None
    owner = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_DISTRIBUTED):
            return None
        made = frame.f_locals.get("self")
        if isinstance(made, _NAMED) and file.is_relative_to(_LIGHTNING):
            owner = type(made).__name__
        elif file.is_relative_to(PACKAGE):
            owner = None
    return owner
