"""A compiled program: its pointers, the memory in which it works, and its threads."""

import ctypes
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.native.library import build_library
from esper_lightning.core.tensor_trees import leaves, rebuild

__all__ = ["IndexOutsideError", "Program", "aligned"]

_ALIGNMENT = 64  # bytes

Tree = Any


def aligned(size: int) -> int:
    """Bytes that a piece of memory takes, so that the next piece begins at a multiple of 64."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class IndexOutsideError(IndexError):
    """Raised by a program that was given an index outside of its tensor, as torch raises one."""


_ERRORS = {  # as in kernels.hpp, with the types of torch
    1: (IndexOutsideError, "an index lies outside of its tensor"),
    2: (RuntimeError, "ZeroDivisionError: an integer is divided by zero"),
}


class Program:
    """A compiled program.

    The results lie in two sets of memory in turn. A result is thus overwritten by the call after
    the next one, and the results of a call can be the arguments of the next.

    Args:
        text: C++ text with the function ``run``, from ``drivers``.
        results: Tree of tensors of the shapes of the results.
        shared_bytes: Size of the memory that all threads share.
        own_bytes: Size of the memory of each thread.
        captured: Tensors that the traced functions hold; the program reads them in place, as long
            as their shapes, dtypes and devices stay the same.
    """

    def __init__(
        self,
        text: str,
        *,
        results: Tree,
        shared_bytes: int,
        own_bytes: int,
        captured: Sequence[Tensor],
    ) -> None:
        self._run = build_library(text).run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._run.restype = ctypes.c_int
        self._shared_bytes, self._own_bytes = shared_bytes, own_bytes
        self._captured = [(tensor, _kind(tensor)) for tensor in captured]
        self._work = torch.empty(0, dtype=torch.uint8)
        self._like = results
        self._sets: list[_Results] = []  # the one to write next comes first

    def run(self, arguments: Sequence[Tensor], *, steps: int) -> Tree:
        """Run the program on as many threads as torch uses.

        Args:
            arguments: Tensors of the arguments, of the shapes for which the program was compiled.
            steps: Number of steps, or of chunks.

        Returns:
            The results, as a tree.

        Raises:
            IndexOutsideError: If an index lay outside of its tensor.
            RuntimeError: If an integer was divided by zero.
            ImpureError: If a captured tensor has another shape, dtype or device than before. The
                program has not run.
        """
        captured: list[Tensor] = []
        for tensor, kind in self._captured:
            if _kind(tensor) != kind:
                before, now = _text(kind), _text(_kind(tensor))
                raise ImpureError(f"a tensor that changed: {before} became {now}")
            captured.append(tensor)
        threads = torch.get_num_threads()
        size = self._shared_bytes + threads * self._own_bytes + _ALIGNMENT
        if self._work.numel() < size:
            self._work = torch.empty(size, dtype=torch.uint8)
        given = [*arguments, *captured]
        if any(map(Tensor.is_neg, given)):  # in memory are the numbers of the other sign
            given = [tensor.resolve_neg() for tensor in given]
        flat = [tensor.contiguous() for tensor in given]  # until the end
        pointers = [tensor.data_ptr() for tensor in flat]
        results = self._results_apart_from(pointers)
        array = results.pointers
        array[: len(pointers)] = pointers
        work = aligned(self._work.data_ptr())
        if error := self._run(ctypes.addressof(array), work, steps, threads):
            kind, message = _ERRORS[error]
            raise kind(message)
        return rebuild(self._like, results.tensors)

    def _results_apart_from(self, pointers: Sequence[int]) -> "_Results":
        """The next set of results, or new ones if an argument lies in its memory."""
        if len(self._sets) < 2 or self._sets[0].hold(pointers):
            results = _Results(leaves(self._like), len(pointers))
        else:
            results = self._sets[0]
        self._sets = [*self._sets[-1:], results]
        return results


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _text(kind: tuple[torch.Size, torch.dtype, torch.device]) -> str:
    shape, dtype, device = kind
    return f"{dtype} {list(shape)} on {device}"


class _Results:
    """Memory for the results of a program.

    Args:
        like: Tensors of the shapes of the results.
        arguments: Number of the program's arguments and captured tensors.

    Attributes:
        tensors: The results.
        pointers: Pointers of arguments, which each call fills in, and of results.
    """

    def __init__(self, like: Sequence[Tensor], arguments: int) -> None:
        self.tensors = [torch.empty(leaf.shape, dtype=leaf.dtype) for leaf in like]
        pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.pointers = (ctypes.c_void_p * (arguments + len(pointers)))()
        self.pointers[arguments:] = pointers
        ranges = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in self.tensors)
        self._starts = [start for start, _ in ranges]
        self._ends = [start + size for start, size in ranges]

    def hold(self, pointers: Sequence[int]) -> bool:
        """Whether a pointer points into the results."""
        for pointer in pointers:
            number = bisect_right(self._starts, pointer) - 1
            if number >= 0 and pointer < self._ends[number]:
                return True
        return False
