"""Errors before a command begins, reported as mistakes in the settings: one line, status 2."""

import argparse
import logging
import os
import re
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

__all__ = ["PACKAGE", "passes_user_code", "settings_come_first", "shows_tracebacks"]

_CONFIG_ERRORS = (argparse.ArgumentError, ValueError, TypeError, OSError, MisconfigurationException)
PACKAGE = Path(esper_lightning.__file__).parent
"""Folder of this package."""


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
        if shows_tracebacks():
            raise
        fail(_describe(error))
    except SystemExit as error:  # also of --help; a user's code has nothing to end here
        place = _place(error)
        if not place:
            raise
        fail(f"SystemExit: code of a setting must not end the process, got {error.code!r}{place}")
    finally:
        warnings.showwarning = show
        for handler, hold in filters:
            handler.removeFilter(hold)
    for emit in held:
        emit()


def shows_tracebacks() -> bool:
    """Whether the user asks for the traceback of an error in place of its line."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true"


def passes_user_code(error: BaseException) -> bool:
    """Whether an error came through code that is neither of a library nor of this package."""
    return bool(_place(error))


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
    setting = _setting(error)
    while (branch := _branch(error)) is not None:
        error = branch
    said = _text(error)
    if _is_of_remote_file(error):
        return f"--{setting or 'config'} must name a file that can be read: {said}."
    if not isinstance(error, _CONFIG_ERRORS) or not said:
        said = f"{type(error).__name__}: {said}"
    refuses = _refuses(error)
    if refuses not in said:
        said = f"{refuses}: {said}"
    names_one = refuses or re.match(r"\w+(\.\w+)+ must ", said)
    if "." in setting and not names_one and not _has_word(said, setting.rpartition(".")[2]):
        said = f"{setting}: {said}"
    return said + _place(error, raised_there=isinstance(error, _CONFIG_ERRORS))


def _place(error: BaseException, *, raised_there: bool = False) -> str:
    """File and line of the user's code that an error came through; empty if there is none.

    Args:
        error: Error that was raised.
        raised_there: Whether the user's code itself must have raised the error.
    """
    libraries = (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), str(PACKAGE))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*libraries, "<"))]
    if not own or (raised_there and own[-1] is not frames[-1]):
        return ""
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})"


def _is_of_remote_file(error: BaseException) -> bool:
    """Whether the library that reads ``s3://`` and the like raised an error, or one below it."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).parent.name == "fsspec" for frame in frames)


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _branch(error: Exception) -> Exception | None:
    """The error that matters of a setting with several types; ``None`` if the setting has one type.

    jsonargparse tries all types, and fails itself where it cannot show the error of one of them.
    The error of a class that was found and could not be built matters most.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "raise_union_unexpected_value":
            tried: list[Exception] = frame.f_locals.get("exceptions") or []
            builds = [each for each in tried if not _is_of_parser(each)]
            return next(iter([*builds, *tried]), None)
    return None


def _is_of_parser(error: Exception) -> bool:
    """Whether jsonargparse itself raised an error, so that the error is about a type."""
    if _branch(error) is not None:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.name == "jsonargparse"


def _text(error: Exception) -> str:
    """The text of an error; empty if there is none, or if a user's class fails to make it."""
    try:
        return str(error)
    except Exception:
        return ""


def _setting(error: BaseException) -> str:
    """Name of the setting that was being read or built at an error; empty if there is none."""
    names: list[str] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = (frame.f_locals.get(name) for name in ("self", "component"))
        actions = (each for each in found if isinstance(each, argparse.Action))
        names += [each.dest for each in actions if isinstance(getattr(each, "dest", None), str)]
    return re.sub(r"^(fit|evaluate|bench)\.", "", names[-1]) if names else ""


def _refuses(error: Exception) -> str:
    """Name of the callback or logger that refused its arguments; empty if there is none."""
    makes = [
        frame.f_locals.get("self")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "__init__"
    ]
    made = [each for each in makes if isinstance(each, Callback | Logger)]
    return type(made[-1]).__name__ if made else ""
