"""Restarts by ``torchrun --max-restarts``: the ranks of each attempt must find each other.

``torchrun`` keeps one store for all attempts (https://github.com/pytorch/pytorch/issues/135712).
torch stores the addresses of the ranks there under the same names in each attempt, so that ranks
read the addresses of dead ranks, and fail or wait for ever. Here, the ranks of a later attempt use
names of their own.
"""
# pyright: reportPrivateImportUsage=false

import contextlib
import logging
import os
from collections.abc import Generator
from typing import Any

from torch import distributed as dist

from esper_lightning.core.ranks import RanksDisagreeError
from esper_lightning.recorder.patch import Patch

__all__ = ["refuse_stale_store", "store_of_attempt"]

_log = logging.getLogger(__name__)
_CURE = (
    "Start torchrun on every host with --rdzv-backend c10d and "
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as scripts/torchrun.sh does"
)


def refuse_stale_store() -> None:
    """Refuse an attempt whose ranks would read the addresses of an earlier attempt.

    On several hosts the launchers count attempts by themselves, so that the ranks cannot agree on
    names of their own. The first attempt has a warning.

    Raises:
        RanksDisagreeError: If this attempt would fail, or wait for ever.
    """
    if not _shares_store() or _number("GROUP_WORLD_SIZE") < 2:
        return
    if _number("TORCHELASTIC_RESTART_COUNT"):
        rule = "torchrun must have a new store in each attempt on several hosts"
        raise RanksDisagreeError(f"{rule}, got the store of all attempts. {_CURE}.")
    if _number("TORCHELASTIC_MAX_RESTARTS") and os.environ.get("RANK") == "0":
        _log.warning("torchrun --max-restarts cannot restart these hosts. %s.", _CURE)


@contextlib.contextmanager
def store_of_attempt() -> Generator[None]:
    """Let torch connect ranks by names in the store of ``torchrun`` that are this attempt's own."""
    attempt = _number("TORCHELASTIC_RESTART_COUNT")
    if not _shares_store() or attempt == 0:
        yield
        return

    def connect(*arguments: Any, **settings: Any) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        shared = dist.TCPStore(address, port, is_master=False)
        patch.original(*arguments, store=dist.PrefixStore(f"attempt_{attempt}", shared), **settings)

    patch = Patch(dist, "init_process_group", connect)
    try:
        yield
    finally:
        patch.undo()


def _shares_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _number(variable: str) -> int:
    """Value of an environment variable; 0 where it is missing or no number."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
