"""Private attributes of Lightning that this package reads or writes, and why it has to.

Lightning may rename these attributes in any release: before the pin of Lightning is raised, this
file is compared with the new release. Lightning 2.5.0 and 2.6.6 have the same attributes.

The file is in ``callbacks`` because every folder that needs it (``callbacks``, ``recorder``,
``training``, ``train``, ``cli``) may import it, and no folder below imports Lightning.

Four classes that derive from Lightning's use private attributes that they inherit, on ``self``:
they override methods of Lightning, or take part in what Lightning does with an attribute.

* ``WindowProfiler``: ``_delete_profilers``, ``_rank_zero_info``, ``_recording_map``, ``_stage``;
* ``_OneFile``, the base of the checkpoint callbacks: ``_find_last_checkpoints``;
* ``EsperCLI``: ``_get``, ``_parse_ckpt_path``, ``_parser``, ``_set_seed``;
* ``CheckpointHooks``, the base of ``PPO``: ``_trainer``.
"""
# Lightning sets many attributes of its objects where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import functools
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar, cast

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.prediction_loop import _PredictionLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.exceptions import _TunerExitException

__all__ = [
    "INTERRUPT",
    "LAUNCHER_KILLS",
    "RUN_STAGE",
    "TEARDOWN",
    "TunerExit",
    "batches_in_epoch",
    "calm",
    "checkpoint_io_of",
    "cluster_environment",
    "evaluates_next",
    "experiment_of",
    "forget_experiment",
    "handlers_to_restore",
    "is_handler_of",
    "known_results",
    "launcher_observers",
    "limit_meeting",
    "monitors_cpu",
    "no_hook_ends_data",
    "note_sigterm",
    "restore_signal_handlers",
    "run_depth",
    "set_version",
    "spawns_processes",
    "summary_depth",
    "time_between_evaluations",
    "train_time_interval",
    "version_of",
]

# Places where the recorder puts a function of its own in front of Lightning's.

INTERRUPT: tuple[Any, str] = (call, "_interrupt")
"""Module and name of the function that every error of a run comes to (``trainer/call.py``).

``on_exception`` would be too late: the hook of another callback may raise before ours.
"""

RUN_STAGE = "_run_stage"
"""Name of the Trainer's method that runs the loops; errors leave the method in any process."""

TEARDOWN = "_teardown"
"""Name of the Trainer's method that shuts down a run that died; afterwards it may run again."""

LAUNCHER_KILLS = "_terminate_all"
"""Name of the method by which Lightning's launcher thread kills every rank when one has died."""

TunerExit: type[BaseException] = _TunerExitException
"""Error that Lightning's tuners raise to end a trial run; it is no death."""

_RUN: Any = call._call_and_handle_interrupt
_ADVANCES = ("advance", "on_advance_end")
_PARTS = ("pytorch", "fabric")  # each has a logger of its own
_SAYS_NOTHING = re.compile(r"PU available: False|Tip: ")
_NO_HOOK_ENDS_DATA = "no_hook_ends_data"
_Module = TypeVar("_Module", bound=LightningModule)


def run_depth(trainer: Trainer) -> int:
    """Number of runs of a Trainer, one within another, that the calling thread is in.

    Counts the frames of ``call._call_and_handle_interrupt``, which every entry point goes through:
    Lightning has no other mark of a run within a run.
    """
    depth, frame = 0, cast(FrameType | None, sys._getframe())
    while frame is not None:
        if frame.f_code is _RUN.__code__ and frame.f_locals.get("trainer") is trainer:
            depth += 1
        frame = frame.f_back
    return depth


# The Trainer and its connectors.


def handlers_to_restore(trainer: Trainer) -> dict[int, Any]:
    """The signal handlers that Lightning restores at the end of a run, by signal; may be changed.

    ``_signal_connector._original_handlers``: Lightning would restore them over the handlers of
    other recordings that still live.
    """
    return trainer._signal_connector._original_handlers


def is_handler_of(trainer: Trainer, handler: Any) -> bool:
    """Whether a signal handler is a method of the Trainer's ``_signal_connector``.

    Lightning composes its own handlers with the handlers that it found: only the found ones belong
    to others.
    """
    return getattr(handler, "__self__", None) is trainer._signal_connector


def note_sigterm(trainer: Trainer) -> None:
    """Note in the Trainer that SIGTERM came, as its own handler would.

    ``_signal_connector.received_sigterm`` has no public setter.
    """
    trainer._signal_connector.received_sigterm = True


def restore_signal_handlers(trainer: Trainer) -> None:
    """Restore the handlers that Lightning has replaced; nothing happens the second time.

    Lightning does so at the end of its shutdown, and not where the shutdown itself fails: after an
    assertion on a GPU weights cannot be moved to the host.
    """
    trainer._signal_connector.teardown()


def no_hook_ends_data(kind: type[_Module]) -> type[_Module]:
    """Class decorator of modules whose runs fail where code of a hook raises ``StopIteration``.

    Each loop of Lightning takes it for the end of its data, wherever it comes from: where every
    epoch ends so, training never does. So what the loops run for an epoch or a batch is replaced,
    in their classes. For other modules nothing changes.
    """
    steps = [(loop, each) for loop in (_FitLoop, _TrainingEpochLoop) for each in _ADVANCES]
    steps += [(_FitLoop, "on_advance_start"), (_ManualOptimization, "advance")]
    steps += [(_EvaluationLoop, "_evaluation_step"), (_PredictionLoop, "_predict_step")]
    for loop, name in steps:
        setattr(loop, name, _only_data_end(getattr(loop, name)))
    setattr(kind, _NO_HOOK_ENDS_DATA, True)
    return kind


def _only_data_end(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(self, *args, **kwargs)
        except StopIteration as error:
            frames = [frame for frame, _line in traceback.walk_tb(error.__traceback__)][1:]
            # Lightning itself raises it after an epoch that a module skips.
            is_end = len(frames) == 1 or any(
                isinstance(frame.f_locals.get("self"), _DataFetcher) for frame in frames
            )
            if is_end or not hasattr(self.trainer.lightning_module, _NO_HOOK_ENDS_DATA):
                raise
            others = [each for each in frames if not _is_of_lightning(each)]
            name = (others or frames)[-1].f_code.co_qualname
            message = f"{name} raised StopIteration, which Lightning takes for the end of data"
            raise RuntimeError(message) from error

    return checked


def _is_of_lightning(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("lightning.")


def limit_meeting(strategy: Strategy, seconds: float) -> None:
    """Set the time limit of operations of ranks that are not connected yet, with ``ddp``."""
    if isinstance(strategy, DDPStrategy):
        strategy._timeout = timedelta(seconds=seconds)


def cluster_environment(trainer: Trainer) -> ClusterEnvironment | None:
    """The cluster environment in which a Trainer runs.

    ``_accelerator_connector.cluster_environment``: a strategy shows it only if there are several
    ranks, and the setting of SLURM's requeueing is an attribute of it.
    """
    return trainer._accelerator_connector.cluster_environment


def spawns_processes(trainer: Trainer) -> bool:
    """Whether a Trainer runs in child processes of its own making (``ddp_spawn``, ``ddp_fork``).

    ``launchers._MultiProcessingLauncher`` is the class of the launchers that spawn processes.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def known_results(trainer: Trainer) -> dict[str, Any]:
    """Logged values that are known without any computation, by name.

    ``_logger_connector._callback_metrics`` and ``_results``: ``trainer.callback_metrics`` would
    compute the metrics of the epoch, with a collective under ``ddp``.
    """
    known: dict[str, Any] = dict(trainer._logger_connector._callback_metrics)
    for item in trainer._results.valid_items() if trainer._results else ():
        result: Any = item[1]
        if result.meta.on_step:
            known[result.meta.name] = result._forward_cache
        elif result._computed is not None:
            known[result.meta.name] = result._computed
    return known


@contextlib.contextmanager
def calm() -> Generator[None]:
    """A context without Lightning's lines about hardware that is absent and about its products."""
    logs = [logging.getLogger(f"lightning.{part}.utilities.rank_zero") for part in _PARTS]

    def says_something(record: logging.LogRecord) -> bool:
        return _SAYS_NOTHING.search(record.getMessage()) is None

    for log in logs:
        log.addFilter(says_something)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(says_something)


def batches_in_epoch(length: int, limit: int | float) -> int | float:
    """Number of training batches of an epoch under ``Trainer(limit_train_batches=limit)``.

    ``data_connector._parse_num_batches``: needed before Lightning has connected any data.

    Args:
        length: Number of batches of an epoch without a limit.
        limit: Value of the Trainer's setting ``limit_train_batches``.
    """
    return _parse_num_batches(RunningStage.TRAINING, length, limit)


def evaluates_next(trainer: Trainer) -> bool:
    """Whether an evaluation follows the training batch that ends (``_should_check_val_fx``)."""
    loop: Any = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def train_time_interval(callback: Callback) -> Any:
    """``ModelCheckpoint(train_time_interval=...)``, which is stored as ``_train_time_interval``."""
    return getattr(callback, "_train_time_interval", None)


def time_between_evaluations(trainer: Trainer) -> float | None:
    """Seconds of ``Trainer(val_check_interval=...)`` where the setting is a time, else ``None``.

    ``_val_check_time_interval``: releases without this attribute accept no time.
    """
    return getattr(trainer, "_val_check_time_interval", None)


def monitors_cpu(callback: Callback, device: str) -> bool:
    """Whether a ``DeviceStatsMonitor`` reads the CPU in a run on a device of the given type.

    ``_cpu_stats`` is ``None`` where the user has made no choice; a CPU is then read alone.
    """
    chosen = getattr(callback, "_cpu_stats", False)
    return device == "cpu" if chosen is None else bool(chosen)


def summary_depth(callback: ModelSummary) -> int:
    """``ModelSummary(max_depth=...)``, which is stored as ``_max_depth``."""
    return callback._max_depth


def checkpoint_io_of(strategy: object) -> Any:
    """The ``CheckpointIO`` that a strategy was given, or ``None``.

    ``_checkpoint_io``: the public property makes a ``CheckpointIO`` where none was given.
    """
    return getattr(strategy, "_checkpoint_io", None)


def launcher_observers() -> list[threading.Thread]:
    """Threads in which Lightning's launcher watches the ranks that it launched.

    The threads are recognised by their name, ``child-process-observer``: Lightning stores them
    nowhere.
    """
    return [each for each in threading.enumerate() if each.name == "child-process-observer"]


# Loggers.


def version_of(logger: Any) -> int | str | None:
    """The version that a logger was given or has chosen; ``None`` before it has one.

    ``_version``: the public property would choose a version. For a logger without versions the
    result is ``""``.
    """
    return getattr(logger, "_version", "")


def set_version(logger: Any, version: int | str | None) -> None:
    """Make a logger write into the folder of a version, by setting its ``_version``."""
    logger._version = version


def experiment_of(logger: Any, absent: Any = None) -> Any:
    """The experiment that a logger has begun; ``None`` where it has not begun one.

    ``_experiment``: the public property would begin an experiment. ``absent`` is the result for a
    logger that never stores an experiment.
    """
    return vars(logger).get("_experiment", absent)


def forget_experiment(logger: Any) -> None:
    """Make a logger begin a new experiment at its next use, by clearing its ``_experiment``."""
    logger._experiment = None
