"""A recording as the registry of the process knows it."""

import signal
import threading
from collections import deque
from pathlib import Path
from typing import Protocol

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from esper_lightning.callbacks.lightning_internals import cluster_environment
from esper_lightning.recorder.signals import in_main_thread
from esper_lightning.recorder.watchdog import Arrival

__all__ = ["Member", "Recorded"]


class Recorded(Protocol):
    """The methods of a recording that the registry calls."""

    @property
    def trainer(self) -> Trainer:
        """Trainer of the run."""
        ...

    @property
    def stacks(self) -> Path:
        """File for the stacks of all threads."""
        ...

    def die(self, error: BaseException, *, lingers: bool) -> None:
        """Save all evidence of a run that an error ends.

        Args:
            error: Error that ends the run.
            lingers: Whether Lightning will shut down the run, and ``leave`` is called afterwards.
        """
        ...

    def last_gasp(self, signal_name: str) -> None:
        """Save the evidence that can be saved within a handler in C."""
        ...

    def at_exit(self) -> None:
        """Save all evidence: the interpreter ends before the run does."""
        ...

    def leave(self) -> None:
        """Leave the registry: Lightning has shut down the run that died."""
        ...

    def saving_for_s(self) -> float | None:
        """Seconds since the latest step of saving began; ``Watchdog`` explains the values."""
        ...


class Member:
    """One recording in the registry, from its beginning to the end of Lightning's shutdown.

    Args:
        of: The recording, made in the thread that runs the fit.

    Attributes:
        thread: Identifier of the thread that runs the fit.
        in_main_thread: Whether the main thread runs the fit.
        left_to_lightning: Signals that Lightning handles to requeue a SLURM job.
        arrived: Signals that arrived for this recording and that its watchdog has not seen.
        ended: Whether the run has died, and Lightning is shutting it down.
        ended_by_signal: Whether the run died of a signal.
    """

    def __init__(self, of: Recorded) -> None:
        self.of = of
        self.thread = threading.get_ident()
        self.in_main_thread = in_main_thread()
        self.left_to_lightning = _requeue_signals(of.trainer)
        self.arrived: deque[Arrival] = deque()
        self.ended = False
        self.ended_by_signal = False

    @property
    def unwinds(self) -> bool:
        """Whether a signal's exception in the main thread would end, or is ending, this run."""
        return self.in_main_thread and (self.ended_by_signal or not self.ended)


def _requeue_signals(trainer: Trainer) -> set[int]:
    """Signals that Lightning handles to requeue a SLURM job.

    With several ranks Lightning's SIGTERM handler broadcasts, wherever the other ranks are: the
    ranks would wait for each other for ever. SIGTERM is Lightning's only on a single rank.
    """
    environment = cluster_environment(trainer)
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return set()
    requeue: int = environment.requeue_signal or signal.SIGUSR1
    return {requeue, signal.SIGTERM} if trainer.world_size == 1 else {requeue}
