"""What native code read of users' objects when it was made; it is right while that stays the same.

A trace takes numbers, lists and arrays for constants, and reads tensors where they lie.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import builtins
import functools
import gc
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from esper_lightning.compiling.entries import (
    Globals,
    Members,
    attributes_of,
    dict_of,
    is_installed,
    is_users,
    is_users_name,
    replaced_by_torch,
    slots_of,
    variables_of,
)
from esper_lightning.compiling.holders import Holder, ImpureError, find_holders
from esper_lightning.compiling.other_threads import records_calls
from esper_lightning.compiling.snapshots import Snapshot, Snapshots, Tensors

__all__ = ["Reads", "recorded"]

_OF_MODULES = ("_parameters", "_buffers", "_modules")
# Dicts that a module keeps for good: their entries are compared, and not which dicts they are.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WHOLE_OF_MODULES = frozenset({"_parameters", "_buffers", *_HOOKS})
_NAMES_OF_ALL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
_WHOLE = frozenset({"__dict__", "__getstate__", "__reduce_ex__"})  # which copies read, too
_Names = dict[tuple[int, str], None]  # of attributes that were read, with the objects' identities
_Scopes = dict[int, tuple[dict[str, Any], set[str]]]  # global variables, and the names read of them


class Reads:
    """Everything that a function read of what users wrote, as it was then."""

    def __init__(self) -> None:
        self._snapshots, self._tensors = Snapshots([]), Tensors([])

    def take(self, snapshots: Iterable[Snapshot]) -> None:
        """Keep what was read.

        Raises:
            ImpureError: If that is too much to compare at every call.
        """
        self._snapshots = Snapshots(snapshots)
        self._tensors = Tensors(self._snapshots.tensors)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Leave out tensors that a program reads where they lie: they may get other numbers."""
        self._tensors.leave_out(tensors)

    @functools.cached_property
    def values(self) -> dict[str, str]:
        """Digests of plain values that were read, by name; the same in another process."""
        return {
            name: hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()
            for name, text in self._snapshots.texts().items()
        }

    def changed(self) -> str | None:
        """Name of something that has changed since; ``None`` if nothing has."""
        return self._snapshots.changed() or self._tensors.changed()


@contextmanager
def recorded(function: Callable[..., Any]) -> Generator[Reads]:
    """Record what a function reads while it is called in the context.

    Args:
        function: Function that is called.

    Raises:
        ImpureError: If the function holds or reads too much to watch it.
    """
    reads, names, variables, scopes = Reads(), _Names(), dict[str, None](), _Scopes()
    holders = find_holders(function)
    kinds = {type(holder.held) for holder in holders}
    kinds = {kind for kind in kinds if _is_open(kind)}
    with ExitStack() as patched:
        watched = {kind for kind in kinds if patched.enter_context(_watched(kind, names))}
        modules = patched.enter_context(_watched_modules(names))
        patched.enter_context(_watched_environment(variables))
        patched.enter_context(_watched_calls(scopes))
        yield reads
    known: Any = vars(builtins)  # where a user may have put variables of all modules
    of_all = [read & (known.keys() - own.keys()) for own, read in scopes.values()]
    scopes[id(known)] = (known, set[str]().union(*of_all))
    found = _not_among(holders, [*_of_modules(modules, names), *_of_scopes(scopes)])
    holders += [Holder(module, module.__name__, {}) for module in modules]
    for number, name in [*_all_attributes(holders, kinds - watched), *_all_attributes(found)]:
        names[number, name] = None
    reads.take([*_of_holders([*holders, *found], names, scopes), *_of_process(variables)])


def _is_open(kind: type) -> bool:
    """Whether attributes of objects may change: of this package, those of modules alone may."""
    if issubclass(kind, type) or kind.__module__.startswith("esper_lightning."):
        return issubclass(kind, nn.Module) or is_users(kind)
    return True


@contextmanager
def _watched(kind: type, names: _Names) -> Generator[bool]:
    """Note the names of all attributes that this thread reads of objects of a class.

    The context is False for a class that cannot be changed, such as those written in C, for a class
    whose reads a user has defined, and for tensors, of which every operation reads attributes.
    """
    original: Any = kind.__getattribute__
    is_own = isinstance(original, FunctionType) and is_users(original)
    if is_own or issubclass(kind, Tensor):
        yield False
        return
    thread = threading.get_ident()

    def read(self: Any, name: str) -> Any:
        of_torch = name == "__dict__" and _caller(2).startswith("torch.")  # to find a parameter
        if threading.get_ident() == thread and not of_torch:
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


def _caller(depth: int) -> str:
    """Name of the module whose code runs, some frames above this function."""
    return str(sys._getframe(depth).f_globals.get("__name__"))  # pyright: ignore[reportPrivateUsage]


@contextmanager
def _watched_modules(names: _Names) -> Generator[list[ModuleType]]:
    """Note the names of all variables that this thread's users' functions read of users' modules.

    The context is all these modules.
    """
    thread = threading.get_ident()

    class Watched(ModuleType):
        @override
        def __getattribute__(self, name: str) -> Any:
            is_of_python = name[:2] == "__" and name != "__dict__"  # such as the source file
            if threading.get_ident() == thread and not is_of_python and is_users_name(_caller(2)):
                names[id(self), name] = None
            return ModuleType.__getattribute__(self, name)

    imported = [one for name, one in [*sys.modules.items()] if is_users_name(name)]
    modules = [one for one in imported if type(one) is ModuleType]
    for module in modules:
        module.__class__ = Watched
    try:
        yield modules
    finally:
        for module in modules:
            module.__class__ = ModuleType


@contextmanager
def _watched_calls(scopes: _Scopes) -> Generator[None]:
    """Note the global variables of all functions of users that this thread calls."""
    before, watch = _profile_of_python()
    known, outer = set[tuple[CodeType, int]](), sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while outer.f_globals.get("__name__") in (__name__, "contextlib") and outer.f_back is not None:
        outer = outer.f_back

    def note(frame: FrameType, event: str, _: Any) -> None:
        code, variables = frame.f_code, frame.f_globals
        if event != "call" or (code, id(variables)) in known or _is_importing(frame, outer):
            return
        known.add((code, id(variables)))
        module = variables.get("__name__")
        if is_users_name(module):
            read = variables_of(code)
            if "globals" in read:  # which may read all that are not Python's own
                read = read.union(
                    one for one in variables if one.isidentifier() and one[:2] != "__"
                )
            scopes.setdefault(id(variables), (variables, set()))[1].update(read)
        elif (module, code.co_name) == ("concurrent.futures._base", "result"):
            raise ImpureError("waiting for another thread or process")

    in_c: Any = None if callable(before) else before
    if in_c is not None:
        in_c.disable()
    collects = gc.isenabled()
    gc.disable()  # whoever is called by it would count as read
    watch(note)
    try:
        yield
    finally:
        watch(None if in_c is not None else before)
        if collects:
            gc.enable()
        if in_c is not None:
            in_c.enable()


def _profile_of_python() -> tuple[Any, Callable[[Any], None]]:
    """The function, or profile in C, that watches calls by now, and how another one is set.

    Beside a profiler of torch that records stacks, calls are watched as debuggers do.
    """
    if records_calls():
        return sys.gettrace(), sys.settrace
    return sys.getprofile(), sys.setprofile


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


def _is_importing(frame: FrameType, outer: FrameType) -> bool:
    """Whether the code of a frame within an outer frame runs since a module is imported."""
    place: FrameType | None = frame
    while place is not None and place is not outer:
        if place.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        place = place.f_back
    return False


def _of_modules(modules: list[ModuleType], names: _Names) -> Iterator[Any]:
    """What was read of modules."""
    by_number = {id(module): module for module in modules}
    for number, name in names:
        variables = vars(by_number[number]) if number in by_number else {}
        if name in variables:
            yield from _held_by(variables[name], variables)


def _of_scopes(scopes: _Scopes) -> Iterator[Any]:
    """What the functions that were called may have read of global variables."""
    for variables, names in scopes.values():
        for name in names & variables.keys():
            yield from _held_by(variables[name], variables)


def _held_by(value: Any, variables: dict[str, Any]) -> Iterator[Any]:
    """What a variable may hold that changes: functions and modules are watched as they run."""
    if isinstance(value, type) and is_installed(variables):
        yield Members(value)
    elif not isinstance(value, ModuleType | FunctionType):
        yield value


def _not_among(holders: list[Holder], values: list[Any]) -> list[Holder]:
    """What values hold besides what some holders hold."""
    known = {id(holder.held) for holder in holders}
    values = [value for value in values if id(value) not in known]
    found = find_holders(values) if values else []
    return [one for one in found if id(one.held) not in {*known, id(values)}]


def _all_attributes(
    holders: list[Holder], kinds: set[type] | None = None
) -> Iterator[tuple[int, str]]:
    """All attributes of the objects of some classes, with the identities of the objects."""
    for held in (one.held for one in holders if kinds is None or type(one.held) in kinds):
        yield from ((id(held), name) for name in attributes_of(held))


def _of_holders(holders: list[Holder], names: _Names, scopes: _Scopes) -> Iterator[Snapshot]:
    """What was read of objects, and what functions name without reading attributes."""
    read: dict[int, list[str]] = {}
    for number, name in names:
        read.setdefault(number, []).append(name)
    for holder in holders:
        held = holder.held
        if isinstance(held, CellType):
            yield Snapshot(held, ["cell_contents"] if holder.entries else [], holder.name_of)
        elif isinstance(held, functools.partial):
            yield Snapshot(held, ["func", "args", "keywords"], holder.name_of)
        elif isinstance(held, Globals):
            if not held.is_whole:
                scopes.setdefault(id(held.variables), (held.variables, set()))[1].update(held.names)
        elif isinstance(held, type):
            code = {name for name, one in vars(held).items() if isinstance(one, FunctionType)}
            yield Snapshot(vars(held), code | {*holder.entries}, holder.name_of, is_whole=True)
        elif isinstance(held, FunctionType):
            yield Snapshot(vars(held), holder.entries, holder.name_of)
            if held.__defaults__ or held.__kwdefaults__:
                yield Snapshot(held, ["__defaults__", "__kwdefaults__"], holder.name_of)
        if id(held) in read:
            yield from _of_object(holder, read[id(held)])
    for variables, read_names in scopes.values():
        absent = read_names - variables.keys()
        yield Snapshot(variables, read_names - absent, str, absent=absent)


def _of_object(holder: Holder, names: list[str]) -> Iterator[Snapshot]:
    """What was read of an object, or was asked for in vain and would now be found."""
    held, left = holder.held, {*names} - replaced_by_torch(holder.held)
    own, slots = dict_of(held), {*slots_of(held)}
    own = {} if own is None else own
    for of_module in _OF_MODULES if isinstance(held, nn.Module) else ():
        entries = own.get(of_module) or {}
        if left & entries.keys():
            yield Snapshot(entries, left & entries.keys(), holder.name_of)
            left -= entries.keys()
    dicts = _WHOLE_OF_MODULES & left & own.keys() if isinstance(held, nn.Module) else ()
    for of_module in dicts:
        name_of = functools.partial(_name_of, holder, of_module)
        entries = own[of_module]
        yield Snapshot(entries, entries.keys(), name_of, is_whole=True)
        left.discard(of_module)
    has_class = is_users(type(held)) and not isinstance(held, dict)
    of_class = ["__class__"] if has_class else []
    in_slots = [name for name in left & slots if hasattr(held, name)]
    yield Snapshot(held, [*of_class, *in_slots], holder.name_of)
    is_whole, left = not _WHOLE.isdisjoint(left), left - slots
    present = {*own} if is_whole else left & own.keys()
    absent = {name for name in left - present if not name.startswith("__")}
    yield Snapshot(own, present, holder.name_of, absent=absent, is_whole=is_whole)


def _name_of(holder: Holder, name: str, _: Hashable) -> str:
    return holder.name_of(name)


def _of_process(variables: dict[str, None]) -> Iterator[Snapshot]:
    """Environment variables that were read, and the hooks of all modules."""
    values = vars(os.environ)["_data"]
    names = [os.environ.encodekey(name) for name in variables]
    present = [name for name in names if name in values]
    absent = {*names} - {*present}
    yield Snapshot(values, present, lambda name: f"os.environ[{name!r}]", absent=absent)
    yield Snapshot(vars(nn.modules.module), _NAMES_OF_ALL_HOOKS, str)
