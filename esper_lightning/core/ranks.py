"""Communication between processes that train together: sums of gradients, statistics, states.

Nothing here knows of Lightning, which starts the processes and their process group.
"""

import contextlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = [
    "SINGLE_RANK",
    "FirstMessage",
    "PeerFailedError",
    "Ranks",
    "RanksDisagreeError",
    "noting_collectives",
]

Tree = Any
Noting = Callable[[str], AbstractContextManager[object]]
"""Makes the context of a collective from the collective's name."""

_notes: list[Noting] = []


def noting_collectives(note: Noting) -> Callable[[], None]:
    """Have each collective of ``Ranks`` run in a context, from now on.

    Args:
        note: Makes the context. Its ``__exit__`` must not raise.

    Returns:
        Function that ends this; a second call does nothing.
    """
    _notes.append(note)

    def end() -> None:
        with contextlib.suppress(ValueError):
            _notes.remove(note)

    return end


@contextlib.contextmanager
def _noted(name: str) -> Generator[None]:
    """The contexts of a collective."""
    with contextlib.ExitStack() as stack:
        for note in _notes:
            stack.enter_context(note(name))
        yield


class PeerFailedError(RuntimeError):
    """This rank stops because of an error on another rank."""


class FirstMessage(NamedTuple):
    """The first message of a rank to all ranks, when they meet."""

    settings: dict[str, Any]
    """Settings of the rank by name, in plain data."""
    problem: str = ""
    """Why the rank cannot take part in the run; empty if it can."""


class RanksDisagreeError(ValueError):
    """The ranks do not begin with the same settings and the same state; raised on every rank."""


class Ranks:
    """The ranks of the default process group, which all call the same methods in the same order.

    Every rank gets the same bits back, so that decisions that depend on them are the same
    everywhere.

    Args:
        size: Number of ranks; with 1, nothing is communicated.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._host_group: Any = None  # for states on the host; None for the default group

    def sum(self, tree: Tree) -> Tree:
        """Each tensor summed over ranks, in one collective; all tensors share a dtype."""
        if self.size == 1:
            return tree
        parts = leaves(tree)
        total = torch.cat([part.reshape(-1) for part in parts])
        with _noted(_name("all_reduce", total)):
            dist.all_reduce(total)
        return _unpack(total, tree)

    def gather(self, tree: Tree) -> list[Tree]:
        """The same tree of every rank, in the order of the ranks.

        For small trees: a tree travels as one tensor of doubles.
        """
        if self.size == 1:
            return [tree]
        parts = leaves(tree)
        packed = torch.cat([part.reshape(-1).double() for part in parts])
        gathered = [torch.empty_like(packed) for _ in range(self.size)]
        with _noted(_name("all_gather", packed)):
            dist.all_gather(gathered, packed)
        return [_unpack(values, tree) for values in gathered]

    def gather_objects(self, mine: Any) -> list[Any]:
        """A small picklable object of every rank, in the order of the ranks."""
        if self.size == 1:
            return [mine]
        everyones: list[Any] = [None] * self.size
        with _noted("all_gather of objects"):
            dist.all_gather_object(everyones, mine)
        return everyones

    def send_from_first(self, mine: Any) -> Any:
        """A picklable object of the first rank, on every rank; those of the others are ignored."""
        if self.size == 1:
            return mine
        sent = [mine]
        with _noted("broadcast of an object"):
            dist.broadcast_object_list(sent, src=0)
        return sent[0]

    def collect_states(self, state: Tree) -> list[Tree]:
        """The state of every rank, on the CPU, on the first rank; elsewhere an empty list."""
        on_host = map_tree(lambda leaf: leaf.to("cpu", copy=True), state)
        if self.size == 1:
            return [on_host]
        if self._host_group is None and dist.get_backend() != "gloo":
            # NCCL would send the pickled states through GPU memory: all of them at once on one GPU.
            self._host_group = dist.new_group(backend="gloo")
        first = dist.get_rank() == 0
        states: list[Tree] = [None] * self.size if first else []
        with _noted("gather of states"):
            dist.gather_object(on_host, states if first else None, group=self._host_group)
        return states


def _name(kind: str, values: Tensor) -> str:
    return f"{kind} of {values.numel()} {str(values.dtype).removeprefix('torch.')}"


def _unpack(packed: Tensor, tree: Tree) -> Tree:
    """A vector cut into tensors with the shapes and dtypes of ``tree``."""
    unpacked: list[Tensor] = []
    start = 0
    for leaf in leaves(tree):
        piece = packed[start : start + leaf.numel()]
        unpacked.append(piece.view_as(leaf).to(leaf.dtype))
        start += leaf.numel()
    return rebuild(tree, unpacked)


SINGLE_RANK = Ranks(1)
"""The ranks of a run of one process."""
