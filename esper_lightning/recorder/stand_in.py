"""A profiler that does nothing, in place of a dead run's until Lightning has shut down."""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false, reportUnknownVariableType=false

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from esper_lightning.callbacks.lightning_internals import TEARDOWN, restore_signal_handlers
from esper_lightning.recorder.patch import Patch

__all__ = ["own_profiler", "stand_in"]


class _StandIn(PassThroughProfiler):
    """A profiler that does nothing, in place of the profiler ``own``."""

    def __init__(self, profiler: Profiler) -> None:
        super().__init__()
        self.own = profiler


def own_profiler(trainer: Trainer) -> Profiler:
    """The profiler of a Trainer, which is restored if it has a stand-in."""
    profiler: Profiler = trainer.profiler
    if isinstance(profiler, _StandIn):
        profiler = trainer.profiler = profiler.own
    return profiler


def stand_in(trainer: Trainer, profiler: Profiler, on_return: Callable[[], None]) -> None:
    """Prevent hooks after a death from starting the profiler again, until the next run.

    Args:
        trainer: Trainer whose run has died.
        profiler: Profiler that the run began with.
        on_return: Function called when Lightning has shut down the run and the profiler is
            restored.
    """
    trainer.profiler = _StandIn(profiler)

    def teardown_and_return() -> None:
        teardown.undo()
        try:
            teardown.original()
        finally:
            own_profiler(trainer)
            try:
                restore_signal_handlers(trainer)
            finally:
                on_return()

    teardown = Patch(trainer, TEARDOWN, teardown_and_return)
