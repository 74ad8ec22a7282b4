"""A function is called on zeros now and then: what it does is compared with what it did at first.

A program is right while its function does the same operations with the same numbers of Python's.
Where these come from does not matter: a changed number, another branch or another order is seen
wherever Python, a library or a file keeps the reason, and however rarely results show it.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from esper_lightning.compiling.entries import MOST_BYTES
from esper_lightning.core.tensor_trees import map_tree, named_tensors

__all__ = ["Rehearsal"]

_MOST_SHOWN = 60  # characters of an operation in a message


class Rehearsal:
    """What a function does with arguments of a kind, whatever their numbers.

    A function that can be called neither on zeros nor on ones is not rehearsed.

    Args:
        function: Function that reads no numbers of its tensors.
        args: Arguments, whose shapes and strides count; in the modes of torch that are in force.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function, self._args = function, map_tree(_without_memory, args)
        self._autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        self._first: _Notes | None = None
        for self._number in (0, 1):  # an integer may be divided by an argument
            with suppress(Exception):
                self._first = self._noted()
                break

    def changed(self) -> str | None:
        """What the function does now and did not do at first; ``None`` if it does the same."""
        if self._first is None:
            return None
        try:
            return self._first.difference(self._noted())
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except Exception as error:  # an error, where there was none
            return f"{type(error).__name__}: {error}".splitlines()[0][:_MOST_SHOWN]

    def _noted(self) -> "_Notes":
        enabled, dtype = self._autocast
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ExitStack() as modes:
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.no_grad())
                modes.enter_context(torch.autocast("cpu", dtype, enabled, cache_enabled=False))
                args = map_tree(self._filled, self._args)
                noting = modes.enter_context(_Noting(args))
                result = self._function(*args)
            return noting.notes(result)
        finally:
            torch.set_num_threads(threads)

    def _filled(self, tensor: Tensor) -> Tensor:
        """Zeros, or ones, of the shape, strides and kind of a tensor.

        Zeros that nobody writes to take no memory: the system maps pages of NumPy's to one.
        """
        places = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((size - 1) * step for size, step in places) if tensor.numel() else 0
        memory = torch.from_numpy(np.zeros(count * tensor.element_size(), np.uint8))
        memory = memory.view(tensor.dtype)
        if self._number:
            memory.fill_(self._number)
        return memory.as_strided(tensor.shape, tensor.stride())


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and kind on the meta device."""
    stride = tensor.stride()
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device="meta")


class _Noting(TorchDispatchMode):
    """Notes operations with their arguments: a tensor by what made it, all else by its value.

    Args:
        args: Arguments of the function that is called.
    """

    def __init__(self, args: Any) -> None:
        super().__init__()
        self._lines = [f"computing in {torch.get_default_dtype()}"]
        self._names: Any = WeakIdKeyDictionary()
        self._memory: dict[StorageWeakRef, str] = {}
        self._outside: list[_Outside] = []
        for name, tensor in named_tensors(args, "argument"):
            self._keep(tensor, name)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [*map(self._shown, args), *(f"{k}={self._shown(one)}" for k, one in kwargs.items())]
        self._lines.append(f"{func}({', '.join(given)})")
        result: Any = func(*args, **kwargs)
        for place, tensor in enumerate(result if isinstance(result, tuple | list) else [result]):  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            if isinstance(tensor, Tensor) and tensor not in self._names:
                self._keep(tensor, f"{len(self._lines)}.{place}")
        return result  # pyright: ignore[reportUnknownVariableType]

    def notes(self, result: Any) -> "_Notes":
        """All that was done, to the result of the function."""
        returned = [(name, self._name(one)) for name, one in named_tensors(result)]
        return _Notes([*self._lines, f"return {returned}"], self._outside)

    def _name(self, tensor: Tensor) -> str:
        """Name of a tensor: that of the operation, argument or thing outside that it comes from."""
        found = self._names.get(tensor)
        if found is not None:
            return found
        of_memory = self._memory.get(_memory(tensor))
        if of_memory is not None:  # another view, which autograd has made
            return f"{of_memory}{[*tensor.shape]}{tensor.stride()}"
        self._outside.append(_Outside(tensor))
        return self._keep(tensor, f"outside {len(self._outside)}")

    def _keep(self, tensor: Tensor, name: str) -> str:
        self._names[tensor] = name
        self._memory.setdefault(_memory(tensor), name)
        return name

    def _shown(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._name(value)
        if isinstance(value, tuple | list):
            return f"[{', '.join(map(self._shown, value))}]"  # pyright: ignore[reportUnknownArgumentType]
        return repr(value)


class _Notes(NamedTuple):
    """What a function did."""

    lines: list[str]
    outside: list["_Outside"]

    def difference(self, other: "_Notes") -> str | None:
        """What is done in other notes and not in these; ``None`` if that is the same."""
        for one, another in zip(self.lines, other.lines, strict=False):
            if one != another:
                return f"{_short(another, one)} instead of {_short(one, another)}"
        if len(self.lines) != len(other.lines):
            return f"{len(other.lines)} operations instead of {len(self.lines)}"
        for one, another in zip(self.outside, other.outside, strict=True):
            if not one.is_as(another):
                return f"another tensor of shape {another.shape}"
        return None


class _Outside:
    """A tensor that was there before, or that Python made of numbers."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape = [*tensor.shape]
        self._kind = (tensor.stride(), tensor.storage_offset(), tensor.dtype)
        self._memory, self._content = _memory(tensor), _digest(tensor)

    def is_as(self, other: "_Outside") -> bool:
        """Whether another one is the same memory, or new memory with the same numbers."""
        if self.shape != other.shape or self._kind != other._kind:
            return False
        if self._memory == other._memory:
            return True  # whose numbers a program reads where they lie
        memory: Any = self._memory
        is_new = bool(memory.expired())
        return self._content == other._content and (is_new or self._content is not None)


def _memory(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _digest(tensor: Tensor) -> bytes | None:
    """Digest of the numbers of a tensor; ``None`` for those of a large one."""
    if tensor.numel() * tensor.element_size() > MOST_BYTES:
        return None
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()


def _short(line: str, other: str) -> str:
    """A line for a message: the operation, and its arguments from where they differ."""
    name, bracket, given = line.partition("(")
    differing = (k for k, pair in enumerate(zip(line, other, strict=False)) if len({*pair}) > 1)
    place = next(differing, 0) - len(name) - 1
    start = given.rfind(",", 0, max(place, 0)) + 1
    left_out = "... " if start else ""
    return f"{name}{bracket}{left_out}{given[start:].strip()}"[:_MOST_SHOWN]
