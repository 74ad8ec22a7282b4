"""What native code read of users' objects when it was made; it is right while that stays the same.

A trace takes numbers, lists and arrays for constants, and reads tensors where they lie.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import ExitStack, contextmanager, suppress
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from esper_lightning.compiling.entries import Globals, attributes_of, is_users
from esper_lightning.compiling.holders import Holder, find_holders

__all__ = ["Reads", "recorded"]

_CODE = (ModuleType, FunctionType, type, property, classmethod, staticmethod)
_MOST = 1000  # elements of a container that are compared at every call
_FLAGGED = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)  # pyright: ignore[reportPrivateUsage]


class _Read(NamedTuple):
    """An attribute, variable or class member that was read."""

    holder: Holder
    name: Hashable
    value: Any
    content: Any


class Reads:
    """Everything that a function read of what users wrote, as it was then."""

    def __init__(self) -> None:
        self._reads: list[_Read] = []

    def add(self, holder: Holder, name: Hashable) -> None:
        """Note the present value of an entry of a holder."""
        value = _value(holder.held, name)
        self._reads.append(_Read(holder, name, value, _content(value)))

    def changed(self) -> str | None:
        """Name of something that has changed since; ``None`` if nothing has."""
        for holder, name, value, content in self._reads:
            now = _value(holder.held, name)
            if (now is not value or isinstance(now, _CONTAINERS)) and _content(now) != content:
                return holder.name_of(name)
        return None


@contextmanager
def recorded(function: Callable[..., Any]) -> Generator[Reads]:
    """Record what a function reads while it is called in the context.

    Args:
        function: Function that is called.
    """
    reads, names = Reads(), dict[tuple[int, str], None]()
    holders = {id(holder.held): holder for holder in find_holders(function)}
    with ExitStack() as patched:
        for kind in {type(holder.held) for holder in holders.values()}:
            if is_users(kind):
                patched.enter_context(_watched(kind, names))
        yield reads
    for number, name in names:
        if number in holders and _has(holders[number].held, name):
            reads.add(holders[number], name)
    for holder in holders.values():
        if isinstance(holder.held, _FLAGGED):
            reads.add(holder, "training")
        elif isinstance(holder.held, CellType):
            reads.add(holder, "")
        elif isinstance(holder.held, Globals | type):
            for name, value in holder.entries.items():
                if not isinstance(value, _CODE):
                    reads.add(holder, name)


@contextmanager
def _watched(kind: type, names: dict[tuple[int, str], None]) -> Generator[None]:
    """Note the names of all attributes that are read of objects of a class."""
    original: Any = kind.__getattribute__

    def read(self: Any, name: str) -> Any:
        names[id(self), name] = None
        return original(self, name)

    own = vars(kind).get("__getattribute__")
    with suppress(TypeError, AttributeError):  # a class that cannot be changed
        type.__setattr__(kind, "__getattribute__", read)
    try:
        yield
    finally:
        with suppress(TypeError, AttributeError):
            if own is None:
                type.__delattr__(kind, "__getattribute__")
            else:
                type.__setattr__(kind, "__getattribute__", own)


_CONTAINERS = (list, tuple, deque, dict, set, frozenset, np.ndarray)


class _Identity:
    """Equal to itself alone."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.held is self.held

    __hash__ = object.__hash__


def _has(held: Any, name: str) -> bool:
    return name in attributes_of(held) or _is_module_of(held, name)


def _is_module_of(held: Any, name: str) -> bool:
    """Whether an attribute of a module is a module, which it does not hold in its dict."""
    return isinstance(held, nn.Module) and isinstance(getattr(held, name, None), nn.Module)


def _value(held: Any, name: Any) -> Any:
    """The present value of an entry of a holder."""
    if isinstance(held, CellType):
        try:
            return held.cell_contents
        except ValueError:
            return None
    if isinstance(held, Globals):
        return held.variables.get(name)
    if isinstance(held, type):
        return vars(held).get(name)
    try:
        return object.__getattribute__(held, name)
    except AttributeError:
        return getattr(held, name, None)  # a module within a module


def _content(value: Any) -> Any:
    """What must stay equal of a value: the elements of containers, and the identity of objects."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return (type(value), value)
    if isinstance(value, np.ndarray) and value.size <= _MOST and value.dtype != object:
        return (value.shape, value.dtype, value.tobytes())
    if isinstance(value, _CONTAINERS) and len(value) <= _MOST and not isinstance(value, np.ndarray):
        if isinstance(value, dict):
            return (dict, {key: _content(one) for key, one in value.items()})
        if isinstance(value, set | frozenset):
            return (set, frozenset(value))
        return (type(value), [_content(one) for one in value])
    return _Identity(value)
