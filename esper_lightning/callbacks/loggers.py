"""Loggers that cannot end a run: a guard around each logger, from the run's start to its end.

The guard knows loggers by the methods that Lightning calls, and two of Lightning's own loggers by
their attributes. The guard imports no logger, because a user may have installed none.
"""
# Loggers are objects of other libraries.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import errno
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.rank_zero import rank_zero_only

from esper_lightning.callbacks.lightning_internals import experiment_of
from esper_lightning.callbacks.logger_files import EventFile, whole_hyperparams, whole_table
from esper_lightning.callbacks.tensorboard_internals import OneEvent, replace_event_file
from esper_lightning.forensics.files import Backlog, first_cause

__all__ = ["flush_logger", "guard_loggers", "when_begun"]

_log = logging.getLogger(__name__)
_GUARD = "_esper_lightning_guard"
_KEPT_CALLS = ("log_metrics", "log_hyperparams")
_OTHER_CALLS = ("log_graph", "after_save_checkpoint")
_EXPERIMENT_BYTES, _EXPERIMENT_FILES = 1 << 16, 4
_FINALIZE_S = 10.0  # of a run that died: launchers kill a process about half a minute after SIGTERM
_SLOW_S, _WAIT = 0.2, 10  # a service that refuses after a second is called again after ten
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def guard_loggers(
    loggers: Iterable[Any],
    step: Callable[[], int] | None = None,
    *,
    at_end: Callable[[Any, bool], None] | None = None,
) -> None:
    """Prevent errors of loggers from ending the run that begins.

    An error of a logger becomes one warning that names its cause. Metrics and hyperparameters that
    a logger did not take are logged when the logger takes them again. Files that TensorBoard's and
    the CSV logger rewrite are replaced whole. The guard ends with ``finalize``, the last call of a
    run; a logger that has a guard already gets no second one.

    Args:
        loggers: Loggers of the Trainer, as in ``trainer.loggers``.
        step: Function that returns the x axis of everything that is logged under the guard;
            ``None`` for the step that ``log_metrics`` is given: Lightning and its callbacks give
            iterations, or none.
        at_end: Function that is called with each logger before its ``finalize``, and whether the
            run died; ``None`` for none, or for that of an earlier call.
    """
    for logger in loggers:
        if _GUARD not in vars(logger):
            _Guard(logger)
        guard: _Guard | None = vars(logger).get(_GUARD)
        if guard is not None and step is not None:
            guard.step = step
        if guard is not None and at_end is not None:
            guard.at_end = at_end


def when_begun(logger: Any, act: Callable[[Any], object]) -> None:
    """Call a function with a logger once the logger has its experiment.

    Args:
        logger: Logger of a run. If it has a guard and its service is out of reach, the function is
            called when the service is first reached, and an error of the function is a warning.
        act: Function of the logger.

    Raises:
        Exception: Whatever ``act`` raises, if it is called now.
    """
    guard: _Guard | None = vars(logger).get(_GUARD)
    if guard is None or guard.has_begun():
        act(logger)
    else:
        guard.at_begin.append(act)


def flush_logger(logger: Any) -> None:
    """Write the metrics that a logger holds in memory.

    Raises:
        Exception: Whatever error prevents the logger from writing.
    """
    guard: _Guard | None = vars(logger).get(_GUARD)
    if guard is not None:
        guard.flush()
    else:
        logger.save()
    flush = getattr(getattr(logger, "experiment", None), "flush", None)
    if callable(flush):
        flush()


class _Call(NamedTuple):
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Guard:
    """The guard of one logger, in the class of the logger: properties are guarded like methods."""

    step: Callable[[], int] | None = None
    at_end: Callable[[Any, bool], None] | None = None

    def __init__(self, logger: Any) -> None:
        self._logger, self._class = logger, type(logger)
        self._name = self._class.__name__
        self._calls = Backlog[_Call](
            self._name, self._take, errors=Exception, prepare=self._wait, drops_refused=True
        )
        self._events: EventFile | None = None
        self._event: OneEvent | None = None  # of the metrics that are being logged
        self.at_begin: list[Callable[[Any], object]] = []  # to be called with the logger
        self._absent: Exception | None = None  # why there is no experiment
        self._refusal: Exception | None = None  # why the latest call of the logger failed
        self._again_s = 0.0  # time of the next call of a logger that failed
        self._is_calling = False  # whether a method of the logger's class is running
        self._unsaved: Exception | None = None  # why the latest ``save`` failed
        members: dict[str, Any] = {name: self._kept(name) for name in _KEPT_CALLS}
        members |= {name: self._with_warning(name) for name in _OTHER_CALLS}
        members |= {"save": self._with_warning("save"), "finalize": self._finalizing()}
        if isinstance(getattr(self._class, "experiment", None), property):
            members["experiment"] = property(lambda _: self._experiment())
        members = {name: value for name, value in members.items() if hasattr(self._class, name)}
        members |= {"__module__": self._class.__module__, "__doc__": self._class.__doc__}
        # The class of one logger: a search for classes by name must not find two.
        members["__qualname__"] = f"guard_loggers.<locals>.{self._class.__qualname__}"
        try:
            logger.__class__ = type(self._name, (self._class,), members)
        except TypeError as error:  # a class that cannot be derived from
            _log.warning("%s has no guard against its own errors: %s", self._name, error)
            vars(logger)[_GUARD] = None  # one warning is enough
            return
        vars(logger)[_GUARD] = self
        if experiment_of(logger) is not None:
            self._keep_events(experiment_of(logger))

    def has_begun(self) -> bool:
        """Whether the logger has its experiment, which it tries to begin."""
        _ = getattr(self._logger, "experiment", None)
        return self._absent is None

    def flush(self) -> None:
        """Write what the logger holds, or raise the error that prevents it."""
        self._again_s = 0.0
        self._calls.offer()
        self._original("save")
        for backlog in (self._calls, self._events and self._events.backlog):
            if backlog is not None and backlog.error is not None:
                raise first_cause(backlog.error)

    # Replacements of the logger's own methods.

    def _kept(self, name: str) -> Callable[..., None]:
        @functools.wraps(getattr(self._class, name, lambda: None))
        def call(_: Any, *args: Any, **kwargs: Any) -> None:
            if name == "log_metrics" and self.step is not None:
                args, kwargs = args[:1] + args[2:], {**kwargs, "step": self.step()}
            self._calls.put(_Call(name, tuple(map(_copy, args)), _copied(kwargs)))

        return call

    def _with_warning(self, name: str) -> Callable[..., Any]:
        """The method ``name`` of the logger, whose errors become a warning."""

        @functools.wraps(getattr(self._class, name, lambda: None))
        def call(_: Any, *args: Any, **kwargs: Any) -> Any:
            self._calls.offer()
            error = None
            try:
                return self._original(name, *args, **kwargs)
            except Exception as problem:
                error = problem
                text = "%s failed: %s. Training continues."
                self._calls.warn(text, first_cause(error))
            finally:
                if name == "save":
                    self._unsaved = error

        return call

    def _finalizing(self) -> Callable[..., Any]:
        own = self._with_warning("finalize")

        def end(logger: Any, status: str, *args: Any, **kwargs: Any) -> None:
            if self.at_end is not None:
                try:
                    self.at_end(logger, status != "success")
                except Exception as error:
                    self._calls.warn("%s failed: %s. Training continues.", first_cause(error))
            own(logger, status, *args, **kwargs)

        finalize = _within_time(end, self._name)

        @functools.wraps(getattr(self._class, "finalize", lambda: None))
        def call(logger: Any, *args: Any, **kwargs: Any) -> None:
            try:
                finalize(logger, *args, **kwargs)
                if self._unsaved is not None:
                    _log.error("%s: values that it held are lost: %s", self._name, self._unsaved)
            finally:
                self._again_s = 0.0
                self._calls.close()
                logger.__class__ = self._class
                del vars(logger)[_GUARD]

        return call

    def _experiment(self) -> Any:
        """The logger's experiment; one that does nothing while the logger cannot begin its own.

        Raises:
            Exception: Whatever prevents the logger's own methods from using the experiment: what
                they log then waits.
        """
        if self._event is not None:
            return self._event
        began_s = time.monotonic()
        try:
            if self._absent is not None:
                self._wait()
            self._refuse_full_disk()
            experiment = self._class.experiment.fget(self._logger)
        except AttributeError:  # the logger has no experiment
            raise
        except Exception as error:
            self._refused(error, began_s)
            if self._is_calling and not _is_no_room(error):
                raise
            self._absent = error
            self._calls.warn("%s failed: %s. Training continues.", first_cause(error))
            return _Nothing()
        self._absent = None
        self._keep_events(experiment)
        acts, self.at_begin = self.at_begin, []
        for act in acts:
            try:
                act(self._logger)
            except Exception as error:
                self._calls.warn("%s failed: %s. Training continues.", first_cause(error))
        return experiment

    def _wait(self) -> None:
        """Raise the latest error of the logger, unless it is time to call the logger again.

        A service that is out of reach may cost minutes at each call.
        """
        if self._refusal is not None and time.monotonic() < self._again_s:
            raise self._refusal.with_traceback(None)

    def _refused(self, error: Exception, began_s: float) -> None:
        if error is not self._refusal:  # else it is the error of an earlier call
            now_s = time.monotonic()
            took_s = now_s - began_s
            self._refusal = error
            self._again_s = now_s + _WAIT * took_s if took_s > _SLOW_S else 0.0

    def _refuse_full_disk(self) -> None:
        """Raise if the disk has no room: each attempt to begin would leave an empty file."""
        if experiment_of(self._logger, absent=self) is not None:  # it exists, or needs no file
            return
        if "://" in str(self._logger.log_dir):  # not a local disk
            return
        place = Path(str(self._logger.log_dir)).absolute()
        found = os.statvfs(next(parent for parent in (place, *place.parents) if parent.exists()))
        blocks = found.f_bfree if os.geteuid() == 0 else found.f_bavail
        no_file = found.f_files > 0 and found.f_ffree < _EXPERIMENT_FILES
        if blocks * found.f_frsize < _EXPERIMENT_BYTES or no_file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))

    # Calls of the logger's own methods.

    def _take(self, call: _Call) -> None:
        if self._absent is not None:
            _ = self._logger.experiment  # it may begin by now
        if self._absent is not None and _is_no_room(self._absent):
            raise self._absent
        began_s = time.monotonic()
        try:
            self._original(call.method, *call.args, **call.kwargs)
        except Exception as error:
            self._refused(error, began_s)
            raise

    def _original(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the logger's own method; files that the method rewrites are replaced whole."""
        outer, self._is_calling = self._is_calling, True
        try:
            with self._one_event(name), self._whole_files(name):
                return getattr(self._class, name)(self._logger, *args, **kwargs)
        finally:
            self._is_calling = outer

    @contextlib.contextmanager
    def _one_event(self, name: str) -> Generator[None]:
        """Write the metrics of a call into one event, if they go to TensorBoard."""
        experiment = experiment_of(self._logger)
        if name != "log_metrics" or not OneEvent.suits(experiment):
            yield
            return
        self._event = OneEvent(experiment)
        try:
            yield
        finally:
            event, self._event = self._event, None
            event.write()

    def _whole_files(self, name: str) -> AbstractContextManager[object]:
        logger = self._logger
        if experiment_of(logger, absent=self) is not self and name in ("log_hyperparams", "save"):
            _ = logger.experiment  # both methods begin with this
        experiment = experiment_of(logger)
        if hasattr(experiment, "metrics_file_path"):  # the CSV logger's
            if name == "log_hyperparams":
                return whole_hyperparams(experiment, experiment.log_dir)
            if name == "save":
                return whole_table(experiment)
        elif hasattr(logger, "NAME_HPARAMS_FILE"):  # TensorBoard's, also without room for events
            written = Path(logger.log_dir, logger.NAME_HPARAMS_FILE).exists()
            is_first = not getattr(rank_zero_only, "rank", 0)  # other ranks write none
            if name == "save" and is_first and not written:
                return whole_hyperparams(logger, logger.log_dir)
        return contextlib.nullcontext()

    def _keep_events(self, experiment: Any) -> None:
        """Make events of TensorBoard wait while the disk takes none.

        Otherwise the thread that writes events ends with the first error, and events are lost.
        """
        if self._events is not None and not self._events.closed:
            return
        with contextlib.suppress(AttributeError):  # another logger, or a writer that is closed
            said = self._calls.said
            self._events = replace_event_file(experiment, lambda path: EventFile(path, said))


def _within_time(finalize: Callable[..., Any], name: str) -> Callable[..., None]:
    """Limit the time of ``finalize`` where the run has died.

    A signal may have interrupted the logger while it held a lock that ``finalize`` waits for. A run
    that ended well has nothing to hurry for: uploads may take minutes.

    Args:
        finalize: Method of a logger, whose second argument is the status of the run.
        name: Name of the logger, for the warning.
    """

    def call(logger: Any, status: str, *args: Any, **kwargs: Any) -> None:
        def finish() -> None:
            finalize(logger, status, *args, **kwargs)

        if status == "success":
            finish()
            return
        thread = threading.Thread(target=finish, daemon=True, name="finalizes-logger")
        thread.start()
        thread.join(_FINALIZE_S)
        if thread.is_alive():
            text = "%s has not ended within %g s: its latest values may be lost."
            _log.warning(text, name, _FINALIZE_S)

    return call


def _is_no_room(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _NO_ROOM


class _Nothing:
    """An experiment whose methods do nothing, whatever their names."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _copy(value: Any) -> Any:
    """A mapping of metrics as it is now: the caller may write the next metrics into it."""
    return dict(value) if type(value) is dict else value


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) for name, value in values.items()}
