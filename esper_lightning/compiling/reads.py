"""What native code read of users' objects when it was made; it is right while that stays the same.

A trace takes numbers, lists and arrays for constants, and reads tensors where they lie.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import functools
import os
import sys
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import CellType, FunctionType
from typing import Any

from torch import nn

from esper_lightning.compiling.entries import (
    REPLACED_BY_TORCH,
    Globals,
    attributes_of,
    dict_of,
    is_users,
    slots_of,
)
from esper_lightning.compiling.holders import Holder, find_holders
from esper_lightning.compiling.snapshots import Snapshot, Snapshots

__all__ = ["Reads", "recorded"]

_OF_MODULES = ("_parameters", "_buffers", "_modules")
_NAMES_OF_ALL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_Names = dict[tuple[int, str], None]  # of attributes that were read, with the objects' identities


class Reads:
    """Everything that a function read of what users wrote, as it was then."""

    def __init__(self) -> None:
        self._snapshots = Snapshots([])

    def take(self, snapshots: Iterable[Snapshot]) -> None:
        """Keep what was read.

        Raises:
            ImpureError: If that is too much to compare at every call.
        """
        self._snapshots = Snapshots(snapshots)

    def changed(self) -> str | None:
        """Name of something that has changed since; ``None`` if nothing has."""
        return self._snapshots.changed()


@contextmanager
def recorded(function: Callable[..., Any]) -> Generator[Reads]:
    """Record what a function reads while it is called in the context.

    Args:
        function: Function that is called.

    Raises:
        ImpureError: If the function holds or reads too much to watch it.
    """
    reads, names, variables = Reads(), _Names(), dict[str, None]()
    holders = find_holders(function)
    kinds = {type(holder.held) for holder in holders}
    kinds = {kind for kind in kinds if _is_open(kind)}
    with ExitStack() as patched:
        watched = {kind for kind in kinds if patched.enter_context(_watched(kind, names))}
        patched.enter_context(_watched_environment(variables))
        yield reads
    for number, name in _all_attributes(holders, kinds - watched):
        names[number, name] = None
    reads.take([*_of_holders(holders, names), *_of_process(variables)])


def _is_open(kind: type) -> bool:
    """Whether attributes of objects may change: of users, of Python, and of torch's layers."""
    package = str(kind.__module__).split(".")[0]
    is_layer = package == "torch" and issubclass(kind, nn.Module)
    is_other = package in sys.stdlib_module_names and not issubclass(kind, type)
    return is_layer or is_other or is_users(kind)


@contextmanager
def _watched(kind: type, names: _Names) -> Generator[bool]:
    """Note the names of all attributes that this thread reads of objects of a class.

    The context is False for a class that cannot be changed, such as those written in C.
    """
    original: Any = kind.__getattribute__
    thread = threading.get_ident()

    def read(self: Any, name: str) -> Any:
        if threading.get_ident() == thread and not (name == "__dict__" and _is_called_by_torch()):
            names[id(self), name] = None
        return original(self, name)

    own = vars(kind).get("__getattribute__")
    try:
        type.__setattr__(kind, "__getattribute__", read)
    except (TypeError, AttributeError):
        yield False
        return
    try:
        yield True
    finally:
        with suppress(TypeError, AttributeError):
            if own is None:
                type.__delattr__(kind, "__getattribute__")
            else:
                type.__setattr__(kind, "__getattribute__", own)


def _is_called_by_torch() -> bool:
    """Whether torch reads the dict of a module, as it does to find each parameter."""
    caller = sys._getframe(2).f_globals.get("__name__", "")  # pyright: ignore[reportPrivateUsage]
    return str(caller).startswith("torch.")


@contextmanager
def _watched_environment(variables: dict[str, None]) -> Generator[None]:
    """Note the names of all environment variables that are read."""
    kind: Any = type(os.environ)
    original: Any = kind.__getitem__

    def read(self: Any, name: str) -> str:
        variables[name] = None
        return original(self, name)

    kind.__getitem__ = read
    try:
        yield
    finally:
        kind.__getitem__ = original


def _all_attributes(holders: list[Holder], kinds: set[type]) -> Iterator[tuple[int, str]]:
    """All attributes of the objects of some classes, with the identities of the objects."""
    for held in (holder.held for holder in holders if type(holder.held) in kinds):
        yield from ((id(held), name) for name in attributes_of(held))


def _of_holders(holders: list[Holder], names: _Names) -> Iterator[Snapshot]:
    """What was read of objects, and what functions name without reading attributes."""
    read: dict[int, list[str]] = {}
    for number, name in names:
        read.setdefault(number, []).append(name)
    variables: dict[int, tuple[Holder, set[Hashable]]] = {}
    for holder in holders:
        held = holder.held
        if isinstance(held, CellType):
            yield Snapshot(held, ["cell_contents"] if holder.entries else [], holder.name_of)
        elif isinstance(held, functools.partial):
            yield Snapshot(held, ["func", "args", "keywords"], holder.name_of)
        elif isinstance(held, Globals):
            variables.setdefault(id(held.variables), (holder, set()))[1].update(holder.entries)
        elif isinstance(held, type):
            code = {name for name, one in vars(held).items() if isinstance(one, FunctionType)}
            yield Snapshot(vars(held), code | {*holder.entries}, holder.name_of, is_whole=True)
        elif isinstance(held, FunctionType):
            yield Snapshot(vars(held), holder.entries, holder.name_of)
            if held.__defaults__ or held.__kwdefaults__:
                yield Snapshot(held, ["__defaults__", "__kwdefaults__"], holder.name_of)
        if id(held) in read:
            yield from _of_object(holder, read[id(held)])
    for holder, entries in variables.values():
        yield Snapshot(holder.held.variables, entries, str)


def _of_object(holder: Holder, names: list[str]) -> Iterator[Snapshot]:
    """What was read of an object, or was asked for in vain and would now be found."""
    held, left = holder.held, {*names} - REPLACED_BY_TORCH
    own, slots = dict_of(held) or {}, {*slots_of(held)}
    kinds = [own.get(name) for name in _OF_MODULES] if isinstance(held, nn.Module) else []
    for entries in [entries for entries in kinds if entries]:
        yield Snapshot(entries, left & entries.keys(), holder.name_of)
        left -= entries.keys()
    yield Snapshot(held, [name for name in left & slots if hasattr(held, name)], holder.name_of)
    is_whole, left = "__dict__" in left, left - slots
    present = {*own} if is_whole else left & own.keys()
    absent = {name for name in left - present if not name.startswith("__")}
    yield Snapshot(own, present, holder.name_of, absent=absent, is_whole=is_whole)


def _of_process(variables: dict[str, None]) -> Iterator[Snapshot]:
    """Environment variables that were read, and the hooks of all modules."""
    values = vars(os.environ)["_data"]
    names = [os.environ.encodekey(name) for name in variables]
    present = [name for name in names if name in values]
    absent = {*names} - {*present}
    yield Snapshot(values, present, lambda name: f"os.environ[{name!r}]", absent=absent)
    yield Snapshot(vars(nn.modules.module), _NAMES_OF_ALL_HOOKS, str)
