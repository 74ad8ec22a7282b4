"""Errors before a command begins, reported as mistakes in the settings: one line, status 2."""

import argparse
import logging
import os
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from typing_extensions import override

import esper_lightning
from esper_lightning.cli.errors import fail

__all__ = ["settings_come_first"]

_CONFIG_ERRORS = (argparse.ArgumentError, ValueError, TypeError, OSError, MisconfigurationException)
_PACKAGE = Path(esper_lightning.__file__).parent


@contextmanager
def settings_come_first() -> Generator[None]:
    """Report an error of the block as a mistake in the settings, and print nothing else.

    Log records and warnings of the block appear once the settings are known to be good. An error
    that is not about settings is a bug, perhaps in a class that the user named: its line names file
    and line. ``JSONARGPARSE_DEBUG=true`` shows the traceback of every error.
    """
    held: list[Callable[[], object]] = []
    names = (None, "lightning.pytorch", "lightning.fabric")
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    filters = [(handler, _Hold(handler, held)) for handler in handlers]
    for handler, hold in filters:
        handler.addFilter(hold)
    show = warnings.showwarning

    def hold_warning(*args: Any, **kwargs: Any) -> None:
        held.append(partial(show, *args, **kwargs))

    warnings.showwarning = hold_warning
    try:
        yield
    except Exception as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        fail(_describe(error))
    finally:
        warnings.showwarning = show
        for handler, hold in filters:
            handler.removeFilter(hold)
    for emit in held:
        emit()


class _Hold(logging.Filter):
    """A filter that holds back the records of a handler."""

    def __init__(self, handler: logging.Handler, held: list[Callable[[], object]]) -> None:
        super().__init__()
        self._handler, self._held = handler, held

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        self._held.append(partial(self._handler.handle, record))
        return False


def _describe(error: Exception) -> str:
    """The text of an error.

    File and line follow if the error is not about settings, or if a user's code raised it.
    """
    while "any of the Union subtypes" in str(error) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the error of the class that could not be built
    said = str(error)
    if not isinstance(error, _CONFIG_ERRORS) or not said:
        said = f"{type(error).__name__}: {said}"
    refuses = _refuses(error)
    if refuses not in said:
        said = f"{refuses}: {said}"
    libraries = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(_PACKAGE))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))]
    if own and (own[-1] is frames[-1] or not isinstance(error, _CONFIG_ERRORS)):
        return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno})"
    return said


def _refuses(error: Exception) -> str:
    """Name of the callback or logger that refused its arguments; empty if there is none."""
    makes = [
        frame.f_locals.get("self")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "__init__"
    ]
    made = [each for each in makes if isinstance(each, Callback | Logger)]
    return type(made[-1]).__name__ if made else ""
