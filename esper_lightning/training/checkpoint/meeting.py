"""The meeting of all ranks before a run begins: ranks that wait learn why another rank never comes.

A rank may be refused for what is true of its host alone: a directory that another run uses, memory
that is too small, a checkpoint that is not there. The others wait for that rank, by default for
half an hour.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import contextlib
import logging
import os
import threading
from collections.abc import Generator

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed as dist

from esper_lightning.callbacks.lightning_internals import (
    cluster_environment,
    limit_meeting,
    spawns_processes,
)
from esper_lightning.core.ranks import FirstMessage, Ranks, RanksDisagreeError
from esper_lightning.training.checkpoint.elastic import refuse_stale_store, store_of_attempt

__all__ = ["meet", "tells_other_ranks"]

_log = logging.getLogger(__name__)
_MEETING_S = 30.0  # hosts of one job start within this time
_TELLING_S = 10.0  # that a refused rank waits for the others, which may have been refused, too


def meet(trainer: Trainer) -> None:
    """Connect all ranks, and name what they wait for where they do not meet soon.

    Args:
        trainer: Trainer of several ranks, which connects them only once.

    Raises:
        RanksDisagreeError: If a rank does not come in time (``DDPStrategy(timeout=...)``), or the
            ranks would look for each other at the addresses of an earlier attempt.
    """
    refuse_stale_store()
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    text = (
        f"Rank {trainer.global_rank} has waited {_MEETING_S:g} s for all {trainer.world_size} ranks"
        f" to meet at {place}. A rank whose settings or directory were refused never comes."
    )
    timer = threading.Timer(_MEETING_S, _log.warning, [text])
    timer.daemon = True
    timer.start()
    try:
        with store_of_attempt():
            trainer.strategy.setup_environment()
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        rule = f"All {trainer.world_size} ranks must meet at {place}"
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "The output of the rank that is missing says why."
        raise RanksDisagreeError(f"{rule}, got {got!r}. {hint}") from error
    finally:
        timer.cancel()


@contextlib.contextmanager
def tells_other_ranks(trainer: Trainer) -> Generator[None]:
    """Tell the other ranks about an error in the context, which refuses this rank before they meet.

    The other ranks raise a ``RanksDisagreeError`` then. They get the reason if they have been
    started by now, and meet this rank within ten seconds.

    Args:
        trainer: Trainer whose ranks have not met yet.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(Exception):  # the error itself must be seen
            _tell(trainer, f"{type(error).__name__}: {error}")
        raise


def _tell(trainer: Trainer, problem: str) -> None:
    strategy, environment = trainer.strategy, cluster_environment(trainer)
    meets = isinstance(strategy, DDPStrategy) and not spawns_processes(trainer)
    if trainer.world_size == 1 or environment is None or not meets or dist.is_initialized():
        return
    if environment.creates_processes_externally:  # otherwise this process would start the others
        limit_meeting(strategy, _TELLING_S)
        with store_of_attempt():
            strategy.setup_environment()
        Ranks(trainer.world_size).gather_objects(FirstMessage({}, problem))
        dist.destroy_process_group()
