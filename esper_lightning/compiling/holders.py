"""Everything that a function holds, and what of it a call changes.

That is the owner of a method, arguments of a partial function, variables of a closure and, in turn,
what these hold: modules, lists, dicts, sets, arrays and random streams of NumPy. Of what users
wrote, also classes and global variables.

While other threads of the user run, what has changed may be theirs: it is not restored then, except
for tensors without numbers, which only a trace can have left.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper_lightning.compiling.entries import (
    REPLACED_BY_TORCH,
    Globals,
    can_grow,
    differences,
    entries_of,
    has_attributes,
    holds_no_numbers,
    is_users,
    names_of,
    restore,
)
from esper_lightning.compiling.other_threads import other_threads_run

__all__ = ["Holder", "ImpureError", "find_holders", "unchanged", "unused_streams"]

_MOST_OBJECTS = 20_000  # that are watched: 10 ms
_LEAVES = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype)


class ImpureError(NotImplementedError):
    """Raised for a function that is not pure: it runs eagerly."""


class Holder(NamedTuple):
    """An object that can be changed, and what it held at first."""

    held: Any
    name: str  # such as "Owner" or "Owner.attribute"
    entries: dict[Hashable, Any]

    def name_of(self, entry: Hashable) -> str:
        """Name of an entry: of the attribute in which a container lies, for containers."""
        if isinstance(self.held, Globals):
            return str(entry)
        is_owner = isinstance(self.held, type | FunctionType) or has_attributes(self.held)
        return f"{self.name}.{entry}" if is_owner else self.name


@contextmanager
def unchanged(function: Callable[..., Any]) -> Generator[None]:
    """Restore everything that a function holds, once the context is left.

    Args:
        function: Function that is called or traced in the context.

    Raises:
        ImpureError: If something has changed, which has been restored unless it may be the work of
            another thread. Or if the function holds too many objects to watch.
    """
    holders, others = find_holders(function), other_threads_run()
    changed: list[str] = []
    try:
        yield
    finally:
        others = others or other_threads_run()
        for holder in holders:
            now = entries_of(holder.held)
            names = differences(holder.entries, now)
            changed += [holder.name_of(name) for name in names]
            if others:
                names = [name for name in names if name in now and holds_no_numbers(now[name])]
            if names:
                restore(holder.held, names, holder.entries, now)
    changed = [name for name in changed if name.rpartition(".")[2] not in REPLACED_BY_TORCH]
    if changed:
        raise ImpureError(f"an attribute that changes: {changed[0]}")


@contextmanager
def unused_streams() -> Generator[None]:
    """Restore the global random streams of Python and NumPy, once the context is left.

    Where beartype checks functions, Python's stream is not watched: it samples elements by it.

    Raises:
        ImpureError: If one was used. It has been restored, unless other threads of the user run.
    """
    others = other_threads_run()
    states: list[tuple[Any, Any, Any]] = []
    states += [(np.random.get_state, np.random.set_state, np.random.get_state())]  # noqa: NPY002
    if "beartype" not in sys.modules:
        states += [(random.getstate, random.setstate, random.getstate())]
    used = False
    try:
        yield
    finally:
        for now, restore, before in states:
            if _numbers(now()) != _numbers(before):
                used = True
                if not (others or other_threads_run()):
                    restore(before)
    if used:
        raise ImpureError("random numbers of Python or NumPy")


def _numbers(state: Any) -> list[Any]:
    """The state of a stream as what can be compared."""
    return [one.tobytes() if isinstance(one, np.ndarray) else one for one in state]


def find_holders(function: Callable[..., Any]) -> list[Holder]:
    """Everything that a function holds, and what of that can be changed.

    Args:
        function: Function or object.

    Raises:
        ImpureError: If there are too many objects to watch.
    """
    left: deque[tuple[Any, str]] = deque([(function, "a function")])
    seen: dict[
        Hashable, Any
    ] = {}  # objects by identity: they must live as long as these numbers count
    found: list[Holder] = []
    while left:
        held, name = left.popleft()
        key = held.key if isinstance(held, Globals) else id(held)
        if key in seen or isinstance(held, _LEAVES) or _is_own(held):
            continue
        if len(seen) == _MOST_OBJECTS:
            raise ImpureError(f"more than {_MOST_OBJECTS} objects to watch, such as in {name}")
        seen[key] = held
        if isinstance(held, MethodType):
            left.append((held.__self__, name))
        elif isinstance(held, functools.partial):
            found.append(Holder(held, name, {}))
            left.extend((one, name) for one in (held.func, held.args, held.keywords))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        elif isinstance(held, ModuleType):
            if is_users(held):
                left.append((Globals(vars(held), None), name))
        elif isinstance(held, tuple | frozenset | MappingProxyType):
            elements = held.values() if isinstance(held, MappingProxyType) else held
            left.extend((one, name) for one in elements)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        elif not isinstance(held, type | FunctionType) or is_users(held):
            name = held.__name__ if isinstance(held, type | FunctionType) else name
            name = type(held).__name__ if has_attributes(held) else name
            holder = Holder(held, name, entries_of(held))
            if holder.entries or can_grow(held):
                found.append(holder)
            followed = held.followed() if isinstance(held, Globals) else holder.entries
            left.extend((one, holder.name_of(key)) for key, one in followed.items())
            left.extend((one, name) for one in _of_class(held))
        if isinstance(held, FunctionType):
            left.extend(zip(held.__closure__ or (), held.__code__.co_freevars, strict=True))
            if is_users(held):
                left.extend((one, name) for one in (held.__defaults__, held.__kwdefaults__))
                left.append((Globals(held.__globals__, frozenset(names_of(held.__code__))), name))
    return found


def _is_own(held: Any) -> bool:
    """Whether an object or function is of this package: users' objects lie there to be compared."""
    kind = held if isinstance(held, FunctionType) else type(held)
    own = str(kind.__module__).startswith("esper_lightning.compiling.")
    return own and kind is not Globals


def _of_class(held: Any) -> list[Any]:
    """The classes of an object that users wrote, or the functions of such a class."""
    if not isinstance(held, type):
        return [kind for kind in type(held).__mro__ if is_users(kind)]
    values = (getattr(one, "__func__", getattr(one, "fget", one)) for one in vars(held).values())
    return [value for value in values if isinstance(value, FunctionType) and is_users(value)]
