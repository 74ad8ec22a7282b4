"""A compiled program: its pointers, the memory in which it works, and its threads."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from esper_lightning.compiling.native.library import build_library

__all__ = ["Program", "aligned"]

_ALIGNMENT = 64  # bytes


def aligned(size: int) -> int:
    """Bytes that a piece of memory takes, so that the next piece begins at a multiple of 64."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Program:
    """A compiled program.

    Args:
        text: C++ text with the function ``run``, from ``drivers``.
        shared_bytes: Size of the memory that all threads share.
        own_bytes: Size of the memory of each thread.
        captured: Tensors that the traced functions hold; the program reads them in place.
    """

    def __init__(
        self, text: str, *, shared_bytes: int, own_bytes: int, captured: Sequence[Tensor]
    ) -> None:
        self._run = build_library(text).run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._run.restype = ctypes.c_int
        self._shared_bytes, self._own_bytes = shared_bytes, own_bytes
        self._captured = list(captured)
        self._work = torch.empty(0, dtype=torch.uint8)

    def run(self, arguments: Sequence[Tensor], results: Sequence[Tensor], *, steps: int) -> None:
        """Run the program on as many threads as torch uses.

        Args:
            arguments: Tensors of the arguments, of the shapes for which the program was compiled.
            results: Contiguous memory for the results.
            steps: Number of steps, or of chunks.

        Raises:
            IndexError: If an index lay outside of its tensor.
        """
        threads = torch.get_num_threads()
        size = self._shared_bytes + threads * self._own_bytes + _ALIGNMENT
        if self._work.numel() < size:
            self._work = torch.empty(size, dtype=torch.uint8)
        flat = [tensor.contiguous() for tensor in (*arguments, *self._captured)]  # until the end
        pointers = [tensor.data_ptr() for tensor in (*flat, *results)]
        array = (ctypes.c_void_p * len(pointers))(*pointers)
        work = aligned(self._work.data_ptr())
        if self._run(ctypes.addressof(array), work, steps, threads):
            raise IndexError("an index lies outside of its tensor")
