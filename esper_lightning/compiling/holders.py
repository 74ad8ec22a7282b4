"""Everything that a function holds, and what of it a call changes.

That is the owner of a method, arguments of a partial function, variables of a closure and, in turn,
what these hold: modules, lists, dicts, sets, arrays and random streams of NumPy. Of what users
wrote, also classes and global variables.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import functools
import itertools
import operator
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Globals",
    "Holder",
    "ImpureError",
    "attributes_of",
    "find_holders",
    "is_users",
    "unchanged",
    "unused_streams",
]

_MOST_OBJECTS = 20_000  # that are watched: 10 ms
_MOST_BYTES = 2**20  # of an array that is watched
_NOT_WATCHED = ("torch", "logging", "threading", "multiprocessing", "concurrent", "asyncio")
_NOT_OF_USERS = {
    *sys.stdlib_module_names,
    *(
        "esper_lightning",
        "lightning",
        "torch",
        "torchmetrics",
        "numpy",
        "scipy",
        "jax",
        "gymnasium",
    ),
}
_NOTHING = object()
_LEAVES = (Tensor, ModuleType, bool, int, float, complex, str, bytes, type(None), torch.dtype)
# Recurrent layers replace these whenever they are called with other weights, by weights as before.
_REPLACED_BY_TORCH = ("._flat_weights", "._flat_weight_refs")


class ImpureError(NotImplementedError):
    """Raised for a function that is not pure: it runs eagerly."""


class Globals:
    """The global variables that a function of a user names.

    Args:
        function: The function.
    """

    def __init__(self, function: FunctionType) -> None:
        self.variables = function.__globals__
        self.names = {name for name in _names(function.__code__) if name in self.variables}


class Holder(NamedTuple):
    """An object that can be changed, and what it held at first."""

    held: Any
    name: str  # such as "Owner" or "Owner.attribute"
    entries: dict[Hashable, Any]

    def name_of(self, entry: Hashable) -> str:
        """Name of an entry: of the attribute in which a container lies, for containers."""
        if isinstance(self.held, Globals):
            return str(entry)
        is_owner = isinstance(self.held, type) or _has_attributes(self.held)
        return f"{self.name}.{entry}" if is_owner else self.name


@contextmanager
def unchanged(function: Callable[..., Any]) -> Generator[None]:
    """Restore everything that a function holds, once the context is left.

    Args:
        function: Function that is called or traced in the context.

    Raises:
        ImpureError: If something has changed. It has been restored.
    """
    holders = find_holders(function)
    changed: list[str] = []
    try:
        yield
    finally:
        for holder in holders:
            now = _entries(holder.held)
            names = _differences(holder.entries, now)
            if names:
                _restore(holder.held, holder.entries, now)
                changed += [holder.name_of(name) for name in names]
    changed = [name for name in changed if not name.endswith(_REPLACED_BY_TORCH)]
    if changed:
        raise ImpureError(f"an attribute that changes: {changed[0]}")


@contextmanager
def unused_streams() -> Generator[None]:
    """Restore the global random streams of Python and NumPy, once the context is left.

    Where beartype checks functions, Python's stream is not watched: it samples elements by it.

    Raises:
        ImpureError: If one was used. It has been restored.
    """
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
    """
    left: deque[tuple[Any, str]] = deque([(function, "a function")])
    seen: dict[int, Any] = {}  # objects by identity: they must live as long as these numbers count
    found: list[Holder] = []
    while left and len(seen) < _MOST_OBJECTS:
        held, name = left.popleft()
        if id(held) in seen or isinstance(held, _LEAVES):
            continue
        seen[id(held)] = held
        if isinstance(held, MethodType):
            left.append((held.__self__, name))
        elif isinstance(held, functools.partial):
            left.extend((one, name) for one in (held.func, held.args, held.keywords))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        elif isinstance(held, FunctionType):
            names = held.__code__.co_freevars
            left.extend(zip(held.__closure__ or (), names, strict=True))
            if is_users(held):
                left.append((Globals(held), name))
        elif isinstance(held, tuple | frozenset):
            left.extend((one, name) for one in held)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        elif not isinstance(held, type) or is_users(held):
            name = held.__name__ if isinstance(held, type) else name
            name = type(held).__name__ if _has_attributes(held) else name
            holder = Holder(held, name, _entries(held))
            if holder.entries or _can_grow(held):
                found.append(holder)
            left.extend((one, holder.name_of(key)) for key, one in holder.entries.items())
            left.extend((one, name) for one in _of_class(held))
    return found


def is_users(held: Any) -> bool:
    """Whether a user wrote a class or function."""
    return str(held.__module__ or "").split(".")[0] not in _NOT_OF_USERS


def _names(code: CodeType) -> Iterator[str]:
    """All names in a function, and in functions within."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _of_class(held: Any) -> list[Any]:
    """The classes of an object that users wrote, or the functions of such a class."""
    if not isinstance(held, type):
        return [kind for kind in type(held).__mro__ if is_users(kind)]
    values = (getattr(one, "__func__", getattr(one, "fget", one)) for one in vars(held).values())
    return [value for value in values if isinstance(value, FunctionType) and is_users(value)]


def _can_grow(held: Any) -> bool:
    return isinstance(held, list | dict | deque | set) or _has_attributes(held)


def _has_attributes(held: Any) -> bool:
    """Whether an object is a user's or a module, with attributes of its own."""
    if isinstance(held, FunctionType | type | list | dict | deque | set) or _is_stream(held):
        return False
    ours = isinstance(held, nn.Module) or type(held).__module__.split(".")[0] not in _NOT_WATCHED
    return ours and (isinstance(_attributes(held), dict) or bool(_slots(held)))


def _attributes(held: Any) -> Any:
    try:
        return object.__getattribute__(held, "__dict__")
    except AttributeError:
        return None


def attributes_of(held: Any) -> dict[Any, Any]:
    """The attributes of an object that it holds itself, in its dict or in slots."""
    slots = {name: getattr(held, name) for name in _slots(held) if hasattr(held, name)}
    return {**slots, **(_attributes(held) or {})}


def _slots(held: Any) -> list[str]:
    """Names of the attributes that an object of a user has in slots."""
    kinds = [kind for kind in type(held).__mro__ if is_users(kind)]
    members = (item for kind in kinds for item in vars(kind).items())
    return [name for name, value in members if type(value).__name__ == "member_descriptor"]


def _is_stream(held: Any) -> bool:
    """Whether an object is a random stream of Python or NumPy."""
    return isinstance(held, random.Random | np.random.Generator | np.random.RandomState)


def _numpy_bits(held: Any) -> Any:
    """The object whose ``state`` is that of a stream of NumPy."""
    return held.bit_generator if isinstance(held, np.random.Generator) else held._bit_generator


def _entries(held: Any) -> dict[Hashable, Any]:  # noqa: PLR0911 - a kind of object each
    """What may change of an object, by its name, key or place."""
    if isinstance(held, dict):
        return dict(held)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(held, list | deque):
        return dict(enumerate(held))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(held, set):
        return dict.fromkeys(held, True)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(held, np.ndarray):
        is_small = held.dtype != object and held.nbytes <= _MOST_BYTES
        return {"": held.tobytes()} if is_small else {}
    if isinstance(held, CellType):
        try:
            return {"": held.cell_contents}
        except ValueError:  # a variable without a value
            return {}
    if isinstance(held, Globals):
        return {name: held.variables[name] for name in held.names if name in held.variables}
    if isinstance(held, type):
        return {name: value for name, value in vars(held).items() if not name.startswith("__")}
    if _is_stream(held):
        state = held.getstate() if isinstance(held, random.Random) else _numpy_bits(held).state
        return {"": pickle.dumps(state)}
    return dict(attributes_of(held)) if _has_attributes(held) else {}


def _restore(held: Any, before: dict[Hashable, Any], now: dict[Hashable, Any]) -> None:
    if isinstance(held, list | deque | set):
        held.clear()  # pyright: ignore[reportUnknownMemberType]
        more: Any = held.update if isinstance(held, set) else held.extend  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        more(before if isinstance(held, set) else before.values())
    elif isinstance(held, np.ndarray):
        held[...] = np.frombuffer(before[""], held.dtype).reshape(held.shape)
    elif isinstance(held, CellType):
        held.cell_contents = before[""]
    elif isinstance(held, random.Random):
        held.setstate(pickle.loads(before[""]))
    elif _is_stream(held):
        _numpy_bits(held).state = pickle.loads(before[""])
    else:
        for name in _differences(before, now):
            _set(held, name, before.get(name, _NOTHING))


def _set(held: Any, name: Any, value: Any) -> None:
    """Set or delete a key or an attribute, without the object's own rules for that."""
    by_key: Any = held.variables if isinstance(held, Globals) else held
    if not isinstance(by_key, dict | type) and name not in _slots(held):
        by_key = _attributes(held)
    if isinstance(by_key, dict):
        if value is _NOTHING:
            del by_key[name]
        else:
            by_key[name] = value
        return
    kind: Any = type if isinstance(held, type) else object
    if value is _NOTHING:
        kind.__delattr__(held, name)
    else:
        kind.__setattr__(held, name, value)


def _differences(before: dict[Hashable, Any], now: dict[Hashable, Any]) -> list[Hashable]:
    if before.keys() == now.keys() and all(map(operator.is_, before.values(), now.values())):
        return []
    names = dict.fromkeys(itertools.chain(before, now))
    return [name for name in names if not _is_same(before, now, name)]


def _is_same(before: dict[Hashable, Any], now: dict[Hashable, Any], name: Hashable) -> bool:
    if name not in before or name not in now:
        return False
    one, other = before[name], now[name]
    plain = isinstance(one, bool | int | float | str | bytes) and type(one) is type(other)
    return one is other or (plain and one == other)
