"""Entries of dicts and objects as they were, compared with what they are.

Most calls compare identities alone, a few nanoseconds each. Only where an identity differs are
contents compared: an equal number or an equal list is no change.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import ctypes
import operator
import threading
import weakref
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from mmap import mmap
from operator import attrgetter, is_, itemgetter
from types import BuiltinMethodType, MappingProxyType, MethodWrapperType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_lightning.compiling.entries import MOST_BYTES, dict_of, is_users
from esper_lightning.compiling.holders import ImpureError

__all__ = ["Snapshot", "Snapshots", "Tensors"]

_MOST_ELEMENTS = 20_000  # of all containers: 0.5 ms
_MOST_NUMBERS = 64  # of a tensor whose numbers are compared
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_BUFFERS = (np.ndarray, array, bytearray)
_DICTS = (dict, MappingProxyType)
_SETS = (set, frozenset)
_METHODS = (BuiltinMethodType, MethodWrapperType)  # such as ``table.get``
_UNSEEN = (
    *(threading.local, threading.Event, weakref.ProxyType, weakref.CallableProxyType, memoryview),
    *(ctypes.Array, ctypes.Structure, ctypes.Union, getattr(ctypes, "_SimpleCData")),  # noqa: B009
)
_call: Any = operator.call
_are_disjoint = type({}.keys()).isdisjoint
_CONTAINERS = (list, tuple, deque, *_DICTS, *_SETS, *_BUFFERS)


class Snapshot:
    """Entries of a dict, or attributes of an object, as they were.

    Args:
        source: Dict, namespace of a class, or object.
        names: Names of entries that are there.
        name_of: Function from the name of an entry to its name in messages.
        absent: Names of entries of a dict that are not there, and must not appear.
        is_whole: Whether no other entry of a dict may appear, except double-underscored ones.
    """

    def __init__(
        self,
        source: Any,
        names: Iterable[Hashable],
        name_of: Callable[[Any], str],
        *,
        absent: Iterable[Hashable] = (),
        is_whole: bool = False,
    ) -> None:
        self.source, self.names, self.absent = source, tuple(names), frozenset(absent)
        self.is_whole, self.name_of = is_whole, name_of
        self._getter: Any = itemgetter if isinstance(source, _DICTS) else attrgetter
        self._contents = [_content(value, name_of(name)) for name, value in self.items()]

    @property
    def get(self) -> Callable[[Any], tuple[Any, ...]]:
        """Function from the source to the values of the names."""
        return self._getter(*self.names, self.names[0])  # of a single name it would be no tuple

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Names and present values of the entries."""
        return ((name, self._getter(name)(self.source)) for name in self.names)

    def changed(self) -> str | None:
        """Name of an entry that has changed; ``None`` if none has."""
        try:
            for (name, value), content in zip(self.items(), self._contents, strict=True):
                if _content(value, "") != content:
                    return self.name_of(name)
        except (LookupError, AttributeError, ValueError, ImpureError):  # it is gone, or has grown
            return self.name_of(self.names[0])
        appeared = self.source.keys() & self.absent if self.absent else set[Any]()
        if self.is_whole:
            appeared |= {one for one in self.source if not str(one).startswith("__")}
            appeared -= {*self.names}
        return self.name_of(min(appeared, key=str)) if appeared else None

    def texts(self) -> Iterator[tuple[str, str]]:
        """Plain values as they were, as texts that are the same in another process, with names."""
        for name, content in zip(self.names, self._contents, strict=True):
            is_of_environment = isinstance(content, tuple) and content[0] is bytes
            if not is_of_environment and (text := _text(content)):
                yield self.name_of(name), text


class Snapshots:
    """Snapshots that are compared together.

    Args:
        snapshots: Snapshots that have just been taken.

    Raises:
        ImpureError: If their containers have too many elements to compare at every call.

    Attributes:
        tensors: The tensors among the values and within containers, with names for messages.
    """

    def __init__(self, snapshots: Iterable[Snapshot]) -> None:
        self._snapshots = list(snapshots)
        self._take_identities()

    def changed(self) -> str | None:
        """Name of something that has changed; ``None`` if nothing has."""
        if self._is_identical():
            return None
        for snapshot in self._snapshots:
            if (name := snapshot.changed()) is not None:
                return name
        self._take_identities()
        return None

    def texts(self) -> dict[str, str]:
        """Plain values as they were, as texts that are the same in another process, by name.

        Values of the same name are one text; how many they are is a part of the name.
        """
        found: dict[str, list[str]] = defaultdict(list)
        for snapshot in self._snapshots:
            for name, text in snapshot.texts():
                found[name].append(text)
        return {f"{name} ({len(all_)})": "; ".join(sorted(all_)) for name, all_ in found.items()}

    def _take_identities(self) -> None:
        taken = [one for one in self._snapshots if one.names]
        self._sources = [one.source for one in taken]
        self._getters = [one.get for one in taken]
        self._values = [value for one in taken for value in one.get(one.source)]
        asked = [one for one in self._snapshots if one.absent]
        self._keys = [one.source.keys() for one in asked]
        self._absent = [one.absent for one in asked]
        self._sized: list[Any] = [one.source for one in self._snapshots if one.is_whole]
        self._iterables: list[Any] = []
        self._sets: list[tuple[Any, Any]] = []
        self._buffers: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, str]] = []
        left = [(held, one.name_of(name)) for one in self._snapshots for name, held in one.items()]
        seen, elements = set[int](), 0
        while left:
            shown, name = left.pop()
            held: Any = _container_of(shown)
            if not isinstance(held, (*_CONTAINERS, Tensor)) or id(held) in seen:
                continue
            seen.add(id(held))
            if isinstance(held, Tensor):
                self.tensors.append((held, name))
                continue
            if isinstance(held, _BUFFERS):
                self._buffers.append((held, _bytes(held, name)))
                continue
            elements += len(held)
            if elements > _MOST_ELEMENTS:
                raise ImpureError(f"{name}: more than {_MOST_ELEMENTS} elements to watch")
            if isinstance(held, _SETS):
                self._sets.append((held, frozenset(held)))
                left += [(one, name) for one in held if isinstance(one, Tensor)]
                continue
            if not isinstance(held, tuple):
                self._sized.append(held)
            is_dict = isinstance(held, _DICTS)
            if held and not isinstance(held, tuple):
                self._iterables += (held, held.values()) if is_dict else (held,)
            left += [(one, name) for one in (held.values() if is_dict else held)]
        self._sizes = list(map(len, self._sized))
        self._elements = [one for held in self._iterables for one in held]

    def _is_identical(self) -> bool:
        """Whether all values, and all elements of containers, are the same objects.

        Each line loops in C: a loop of Python over the same objects takes twice as long.
        """
        try:
            values = chain.from_iterable(map(_call, self._getters, self._sources))
            return (
                all(map(is_, values, self._values))
                and list(map(len, self._sized)) == self._sizes
                and all(map(is_, chain.from_iterable(self._iterables), self._elements))
                and all(map(_are_disjoint, self._keys, self._absent))
                and all(held == elements for held, elements in self._sets)
                and all(_bytes(held) == content for held, content in self._buffers)
            )
        except (LookupError, AttributeError, ValueError, ImpureError):  # it is gone, or has grown
            return False


class Tensors:
    """Tensors whose numbers must stay as they are, for no program reads them where they lie.

    Of a tensor of more than 64 numbers, what torch itself writes is seen.

    Args:
        tensors: Tensors, with their names for messages.
    """

    def __init__(self, tensors: Iterable[tuple[Tensor, str]]) -> None:
        self._all = [(one, name, _state(one)) for one, name in tensors]

    def leave_out(self, read: Iterable[Tensor]) -> None:
        """Leave out the tensors of which a program reads the memory, or a part of it."""
        memory = {_memory(one) for one in read}
        self._all = [one for one in self._all if _memory(one[0]) not in memory]

    def changed(self) -> str | None:
        """Name of a tensor that has changed; ``None`` if none has."""
        return next((name for one, name, state in self._all if not _is_as(one, state)), None)


def _memory(tensor: Tensor) -> int:
    """Number of the memory of a tensor, or of the tensor itself where it has none."""
    try:
        return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
    except NotImplementedError:  # such as a sparse one
        return id(tensor)


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What tells whether a tensor has changed."""
    kind = (tensor.shape, tensor.dtype, tensor.layout)
    with suppress(RuntimeError, TypeError):  # of tensors without memory, or without such numbers
        if tensor.numel() <= _MOST_NUMBERS:
            return (*kind, tensor.tolist())
    pointer = tensor.data_ptr() if tensor.layout is torch.strided else 0
    return (*kind, pointer, 0 if tensor.is_inference() else tensor._version)  # pyright: ignore[reportPrivateUsage]


def _is_as(tensor: Tensor, state: tuple[Any, ...]) -> bool:
    """Whether a tensor is as it was; NaN equals itself."""
    now = _state(tensor)
    return now == state or repr(now) == repr(state)


class _Identity:
    """Equal to itself alone."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.held is self.held

    __hash__ = object.__hash__


def _content(value: Any, name: str) -> Any:  # noqa: PLR0911 - a kind of value each
    """What must stay equal of a value: the elements of containers, and the identity of objects.

    Raises:
        ImpureError: If an array is too large to be compared at every call, or if changes of what an
            object shows cannot be seen.
    """
    if type(value) in _UNSEEN or isinstance(value, _UNSEEN):
        raise ImpureError(f"{name}: changes of a {type(value).__name__} are not noticed")
    value = _container_of(value)
    if isinstance(value, _PLAIN):
        number = isinstance(value, float | complex)  # 0.0 and -0.0 are equal, and not the same
        return (type(value), _exact(value) if number else value, *_added(value))
    if isinstance(value, np.generic):
        return (value.dtype, value.tobytes())
    if isinstance(value, _BUFFERS):
        content = _bytes(value, name)
        return _Identity(value) if content is None else content
    if isinstance(value, _DICTS):
        items = [(_content(key, name), _content(one, name)) for key, one in value.items()]
        return (type(value), items, *_added(value))  # in their order
    if isinstance(value, _SETS):
        return (type(value), frozenset(value), *_added(value))
    if isinstance(value, list | tuple | deque):
        return (type(value), [_content(one, name) for one in value], *_added(value))
    return _Identity(value)


def _exact(number: Any) -> str:
    return float.__repr__(number) if isinstance(number, float) else complex.__repr__(number)


def _added(value: Any) -> list[Any]:
    """What a user's class adds to a number, a text or a container."""
    if not is_users(type(value)):
        return []
    own = dict_of(value) or {}
    return [
        (name, _content(one, name) if isinstance(one, _PLAIN) else _Identity(one))
        for name, one in own.items()
    ]


def _text(content: Any) -> str:
    """A content as a text that is the same in another process; nothing of objects."""
    if isinstance(content, _PLAIN):
        return repr(content)
    if isinstance(content, frozenset):
        return ", ".join(sorted(map(_text, content)))
    if isinstance(content, list | tuple):
        return ", ".join(filter(None, map(_text, content)))
    return ""


def _container_of(held: Any) -> Any:
    """The container of a bound method that is written in C; other objects as they are."""
    if isinstance(held, _METHODS) and not isinstance(held.__self__, ModuleType | type):
        return held.__self__
    return held


def _bytes(held: Any, name: str = "") -> Any:
    """Content of an array; ``None`` for one that cannot be written to."""
    if not isinstance(held, np.ndarray):
        return bytes(held)
    if _is_frozen(held):
        return None
    if held.dtype.hasobject or held.nbytes > MOST_BYTES:
        kind = "of objects" if held.dtype.hasobject else f"of more than {MOST_BYTES} bytes"
        advice = "hold a tensor instead, or set array.flags.writeable = False"
        raise ImpureError(f"{name}: changes of an array {kind} are not noticed ({advice})")
    return (held.shape, held.dtype, held.tobytes())


def _is_frozen(held: Any) -> bool:
    """Whether an array cannot be written to, and shows no memory that can."""
    if not isinstance(held, np.ndarray):
        return held is None or isinstance(held, bytes | mmap)
    return not held.flags.writeable and not held.dtype.hasobject and _is_frozen(held.base)
