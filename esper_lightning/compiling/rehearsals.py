"""A function is called on zeros now and then: what it does is compared with what it did at first.

A program is right while its function does the same operations with the same numbers of Python's.
Where these come from does not matter: a changed number, another branch or another order is seen
wherever Python, a library or a file keeps the reason, and however rarely results show it.
"""

import hashlib
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from esper_lightning.core.tensor_trees import map_tree, named_tensors

__all__ = ["Rehearsal"]

_MOST_SHOWN = 60  # characters of an operation in a message


class Rehearsal:
    """What a function does with arguments of a kind, whatever their numbers.

    It is called on zeros; where these are an error, on ones, or on copies of the arguments.

    Args:
        function: Function that reads no numbers of its tensors.
        args: Arguments, whose shapes and strides count.

    Raises:
        Exception: Of the function, if it cannot even be called on the arguments.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function = function
        self._autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
        blank = map_tree(_without_memory, args)
        for number in (0, 1):
            self._args: Callable[[], Any] = partial(
                map_tree, partial(_filled, number=number), blank
            )
            with suppress(Exception):
                self._first = self._noted()
                return
        copies = map_tree(torch.clone, args)
        self._args = lambda: copies
        self._first = self._noted()

    def changed(self) -> str | None:
        """What the function does now and did not do at first; ``None`` if it does the same."""
        try:
            return self._first.difference(self._noted(self._first))
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except Exception as error:  # where there was none
            return f"{type(error).__name__}: {error}".splitlines()[0][:_MOST_SHOWN]

    def _noted(self, first: "_Notes | None" = None) -> "_Notes":
        enabled, dtype = self._autocast
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())
            modes.enter_context(torch.autocast("cpu", dtype, enabled, cache_enabled=False))
            args = self._args()
            noting = modes.enter_context(_Noting(args, first))
            result = self._function(*args)
        return noting.notes(result)


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, strides and kind on the meta device."""
    stride = tensor.stride()
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device="meta")


def _filled(tensor: Tensor, number: int) -> Tensor:
    """A tensor of the same shape, strides and kind that is the same number everywhere.

    Zeros that nobody writes to take no memory: the system maps pages of NumPy's to one.
    """
    places = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1 + sum((size - 1) * step for size, step in places) if tensor.numel() else 0
    memory = torch.from_numpy(np.zeros(count * tensor.element_size(), np.uint8))
    memory = memory.view(tensor.dtype)
    if number:
        memory.fill_(number)
    return memory.as_strided(tensor.shape, tensor.stride())


class _Noting(TorchDispatchMode):
    """Notes operations with their arguments: a tensor by what made it, all else by its value.

    Args:
        args: Arguments of the function that is called.
        first: Notes of its first call; ``None`` for that call itself.
    """

    def __init__(self, args: Any, first: "_Notes | None") -> None:
        super().__init__()
        self._lines = [f"computing in {torch.get_default_dtype()}"]
        self._names: Any = WeakIdKeyDictionary()
        self._memory: dict[Any, str] = {}
        self._outside: list[_Outside] = []
        self._former = [] if first is None else first.outside
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
            place = (tensor.dtype, tensor.stride(), tensor.storage_offset())
            return f"{of_memory}{[*tensor.shape]}{place}"
        number = len(self._outside)
        former = self._former[number] if number < len(self._former) else None
        self._outside.append(_Outside(tensor, former))
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
        others = (one for one in other.outside if not one.is_as_before)
        return next((f"another tensor of shape {one.shape}" for one in others), None)


class _Outside:
    """A tensor that was there before, or that Python made of numbers.

    Args:
        tensor: The tensor.
        former: What was there in its place at first; ``None`` in the first call.
    """

    def __init__(self, tensor: Tensor, former: "_Outside | None") -> None:
        self.shape = [*tensor.shape]
        self.is_as_before = former is not None and former._is(tensor)
        self._kind = (tensor.stride(), tensor.storage_offset(), tensor.dtype)
        self._tensor, self._memory = weakref.ref(tensor), _memory(tensor)
        self._content = _digest(tensor) if former is None else b""

    def _is(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one, which a program reads where it lies; or has its numbers."""
        kind = (tensor.stride(), tensor.storage_offset(), tensor.dtype)
        if self.shape != [*tensor.shape] or self._kind != kind:
            return False
        former = self._tensor()
        if former is tensor or bool(self._memory == _memory(tensor)):
            return True
        # One that is gone was made of numbers; of one that is there, numbers may have changed.
        return _digest(tensor) == (self._content if former is None else _digest(former))


def _memory(tensor: Tensor) -> Any:
    return StorageWeakRef(tensor.untyped_storage())


def _digest(tensor: Tensor) -> bytes:
    """Digest of the numbers of a tensor."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1).contiguous()
    data: Any = flat.view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).digest()


def _short(line: str, other: str) -> str:
    """A line for a message: the operation, and its arguments from where they differ."""
    name, bracket, given = line.partition("(")
    differing = (k for k, pair in enumerate(zip(line, other, strict=False)) if len({*pair}) > 1)
    place = next(differing, 0) - len(name) - 1
    start = given.rfind(",", 0, max(place, 0)) + 1
    left_out = "... " if start else ""
    return f"{name}{bracket}{left_out}{given[start:].strip()}"[:_MOST_SHOWN]
