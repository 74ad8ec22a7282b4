"""Snapshots of the CUDA allocator when memory runs out, before unwinding frees anything."""

import contextlib
import functools
from pathlib import Path

import torch

from esper_lightning.forensics.files import replacing
from esper_lightning.forensics.layout import RankLayout

__all__ = ["forget_memory", "save_memory", "watch_memory"]

_ranks: list[RankLayout] = []


def watch_memory(files: RankLayout) -> None:
    """Write a snapshot whenever CUDA memory runs out; nothing happens where CUDA is not in use.

    A snapshot opens in https://pytorch.org/memory_viz. If
    ``torch.cuda.memory._record_memory_history()`` was called, the snapshot shows for each
    allocation where it was made.

    Args:
        files: Folder of the rank, whose snapshot is replaced each time memory runs out.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        _ranks.append(files)
        _attach()


def forget_memory(files: RankLayout) -> None:
    """Write no more snapshots of a rank: its run has ended."""
    with contextlib.suppress(ValueError):
        _ranks.remove(files)


def save_memory(target: Path) -> None:
    """Write a snapshot of the allocator, whole or not at all."""
    with replacing(target) as temporary:
        torch.cuda.memory._dump_snapshot(str(temporary))  # pyright: ignore[reportPrivateUsage]


@functools.cache
def _attach() -> None:  # there is no way to detach an observer
    torch._C._cuda_attach_out_of_memory_observer(_observe)  # pyright: ignore - of CUDA builds only


def _observe(*_: int) -> None:
    for files in _ranks:
        with contextlib.suppress(Exception):  # the user's own error must follow
            save_memory(files.memory)
