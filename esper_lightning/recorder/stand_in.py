"""A profiler that does nothing, in place of the one of a dead run until Lightning has shut down."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from esper_lightning.callbacks.lightning_internals import TEARDOWN
from esper_lightning.recorder.patch import Patch

__all__ = ["own_profiler", "stand_in"]


class _StandIn(PassThroughProfiler):
    """In place of the profiler that it holds."""

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.own = profiler


def own_profiler(trainer: Trainer) -> Profiler:
    """The profiler of a Trainer, which takes the place of its stand-in if there is one."""
    profiler: Profiler = trainer.profiler
    if isinstance(profiler, _StandIn):
        profiler = trainer.profiler = profiler.own
    return profiler


def stand_in(trainer: Trainer, profiler: Profiler, on_return: Callable[[], None]) -> None:
    """Keep hooks that follow a death from starting the profiler again; the next run has its own.

    Args:
        trainer: Trainer whose run has died.
        profiler: Profiler that the run began with.
        on_return: Called when Lightning has shut the run down and the profiler is in place again.
    """
    trainer.profiler = _StandIn(profiler)

    def teardown_and_return() -> None:
        teardown.undo()
        try:
            teardown.original()
        finally:
            own_profiler(trainer)
            on_return()

    teardown = Patch(trainer, TEARDOWN, teardown_and_return)
