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
import weakref
from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import contextmanager
from types import (
    BuiltinMethodType,
    FunctionType,
    MappingProxyType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esper_lightning.compiling.entries import (
    Globals,
    Members,
    can_grow,
    dict_of,
    differences,
    entries_of,
    has_attributes,
    holds_no_numbers,
    is_users,
    names_of,
    replaced_by_torch,
    restore,
    variables_of,
)
from esper_lightning.compiling.other_threads import other_threads_run

__all__ = ["Holder", "ImpureError", "find_holders", "unchanged", "unused_streams"]

_MOST_OBJECTS = 20_000  # that are watched: 10 ms
_LEAVES = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype)
_WITH_ATTRIBUTES = (Tensor, tuple, int, float, str)  # where a user's class, or a user, adds some
_METHODS = (MethodType, BuiltinMethodType, MethodWrapperType)  # the latter two are written in C
_SHOWING = (*_METHODS, functools.partial, weakref.ReferenceType, ModuleType, MappingProxyType)


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
    holders, others = find_holders(function, by_text=True), other_threads_run()
    changed: list[str] = []
    try:
        yield
    finally:
        others = others or other_threads_run()
        for holder in holders:
            now = entries_of(holder.held)
            names = differences(holder.entries, now)
            if names:
                kept = replaced_by_torch(holder.held)
                names = [name for name in names if name not in kept]
            changed += [holder.name_of(name) for name in names]
            if others:
                names = [name for name in names if name in now and holds_no_numbers(now[name])]
            if names:
                restore(holder.held, names, holder.entries, now)
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


def find_holders(function: Any, *, by_text: bool = False) -> list[Holder]:
    """Everything that a function holds, and what of that can be changed.

    Args:
        function: Function or object.
        by_text: Whether that includes what the function may find in modules by a text.

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
        key = held.key if isinstance(held, Globals | Members) else id(held)
        if _is_leaf(held) or key in seen or _is_own(held):
            continue
        if len(seen) == _MOST_OBJECTS:
            raise ImpureError(f"more than {_MOST_OBJECTS} objects to watch, such as in {name}")
        seen[key] = held
        if isinstance(held, functools.partial):
            found.append(Holder(held, name, {}))
        if isinstance(held, Members):
            found.extend(Holder(kind, kind.__name__, entries_of(kind)) for kind in held.kinds)
            left.extend((one, name) for one in held.followed())
        elif isinstance(held, _SHOWING):
            left.extend((one, name) for one in _shown(held))
        elif not isinstance(held, type | FunctionType) or is_users(held):
            name = held.__name__ if isinstance(held, type | FunctionType) else name
            name = type(held).__name__ if has_attributes(held) else name
            holder = Holder(held, name, entries_of(held))
            if holder.entries or can_grow(held) or isinstance(held, _WITH_ATTRIBUTES):
                found.append(holder)
            followed = holder.entries
            if isinstance(held, Globals):
                followed = held.followed(by_text=by_text)
            left.extend((one, holder.name_of(key)) for key, one in followed.items())
            left.extend((one, name) for one in _within(held))
            left.extend((one, name) for one in _of_class(held))
        if isinstance(held, FunctionType):
            left.extend(zip(held.__closure__ or (), held.__code__.co_freevars, strict=True))
            if is_users(held):
                left.extend((one, name) for one in (held.__defaults__, held.__kwdefaults__))
                names = (variables_of(held.__code__), names_of(held.__code__))
                left.append((Globals(held.__globals__, *names), name))
    return found


def _shown(held: Any) -> list[Any]:
    """What an object shows that cannot be changed itself."""
    if isinstance(held, functools.partial):
        return [held.func, held.args, held.keywords]
    if isinstance(held, weakref.ReferenceType):
        return [held()]
    if isinstance(held, ModuleType):
        return [Globals(vars(held), None)] if is_users(held) else []
    return [*held.values()] if isinstance(held, MappingProxyType) else [held.__self__]


def _within(held: Any) -> list[Any]:
    """Elements of a container that are no entries, and attributes of a container or tensor."""
    elements = list(held) if isinstance(held, tuple | frozenset | set | dict) else []
    if isinstance(held, list | dict | set | deque | Tensor | np.ndarray):
        elements += [dict_of(held)] if dict_of(held) else []
    return elements


def _is_leaf(held: Any) -> bool:
    """Whether an object holds nothing else, not even by its class."""
    if not isinstance(held, _LEAVES):
        return False
    return not dict_of(held) if isinstance(held, Tensor) else not is_users(type(held))


def _is_own(held: Any) -> bool:
    """Whether an object or function is of this package: users' objects lie there to be compared."""
    kind = held if isinstance(held, FunctionType) else type(held)
    own = str(kind.__module__).startswith("esper_lightning.compiling.")
    return own and kind not in (Globals, Members)


def _of_class(held: Any) -> list[Any]:
    """The classes of an object that users wrote, or the functions of such a class."""
    kinds = [kind for kind in type(held).__mro__ if is_users(kind)]
    if not isinstance(held, type):
        return kinds
    values = (getattr(one, "__func__", getattr(one, "fget", one)) for one in vars(held).values())
    functions = [value for value in values if isinstance(value, FunctionType) and is_users(value)]
    return [*functions, *kinds]
