"""What may change of an object, by its name, key or place: as entries, compared and restored."""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import dis
import itertools
import operator
import os
import pickle
import random
import sys
from array import array
from collections import deque
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions.utils import lazy_property

__all__ = [
    "MOST_BYTES",
    "Globals",
    "Members",
    "attributes_of",
    "can_grow",
    "dict_of",
    "differences",
    "entries_of",
    "has_attributes",
    "holds_no_numbers",
    "is_installed",
    "is_users",
    "is_users_name",
    "names_of",
    "replaced_by_torch",
    "restore",
    "slots_of",
    "variables_of",
]

MOST_BYTES = 2**20  # of an array that is watched
# Recurrent layers replace these whenever they are called with other weights, by weights as before.
_OF_RECURRENT_LAYERS = frozenset({"_flat_weights", "_flat_weight_refs"})
_BY_TEXT = frozenset({"getattr", "setattr", "vars", "__dict__", "attrgetter", "methodcaller"})
_OF_VARIABLES = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"})
_NOT_WATCHED = ("torch", "logging", "threading", "multiprocessing", "concurrent", "asyncio")
_WATCHED_OF_TORCH = ("torch.optim", "torch.distributions", "torch.utils.data")
_OF_TORCH = """torch functorch torchgen triton optree sympy mpmath networkx jinja2 markupsafe
fsspec filelock typing_extensions packaging setuptools"""  # torch and what it imports while it runs
_OTHERS = "lightning torchmetrics numpy scipy jax gymnasium jaxtyping beartype"
_NOT_OF_USERS = {
    *sys.stdlib_module_names,
    *f"esper_lightning {_OF_TORCH} {_OTHERS}".split(),
}
_OF_PYTHON = Path(os.__file__).parent
_NOTHING = object()


class Globals:
    """Global variables of a module that a function of a user may read.

    Args:
        variables: All variables of the module.
        names: Names of the variables that the function may read; ``None`` for all.
        attributes: Names that the function may read of other modules.
    """

    def __init__(
        self,
        variables: dict[str, Any],
        names: frozenset[str] | None,
        attributes: frozenset[str] = frozenset(),
    ) -> None:
        self.variables, self.is_whole = variables, names is None
        self.key = (id(variables), names, attributes)
        self._all_names = frozenset(variables) if names is None else names
        self._attributes = attributes
        self.names = [one for one in self._all_names if one in variables and one[:2] != "__"]

    def followed(self, *, by_text: bool) -> dict[Hashable, Any]:
        """What a function may change or call, and the modules that it names.

        Of an installed module that is no functions, except, by text, those of its own package, and
        no methods of classes: both are watched as they run. Known libraries do not change.

        Args:
            by_text: Whether modules count whole where the function may read them by a text, as by
                ``getattr(module, name)``.
        """
        entries = entries_of(self)
        if is_installed(self.variables):
            package = _package(self.variables.get("__name__")) if by_text else None
            entries = {name: _followed(one, package) for name, one in entries.items()}
        whole = by_text and not _BY_TEXT.isdisjoint(self._all_names | self._attributes)
        names = self._all_names | self._attributes
        for name in names:
            module = self._module(name)
            if module is not None:
                is_whole = whole and not is_installed(vars(module))
                of_module = Globals(vars(module), None if is_whole else names, names)
                entries[name] = of_module if is_users(module) else None
        return entries

    def _module(self, name: str) -> ModuleType | None:
        """The module that a name or a text means, which the function may import itself."""
        package = self.variables.get("__package__")
        found = [self.variables.get(name), sys.modules.get(name)]
        found += [sys.modules.get(f"{package}.{name}")] if package else []
        return next((one for one in found if isinstance(one, ModuleType)), None)


class Members:
    """A class without its methods.

    Args:
        kind: The class.
    """

    def __init__(self, kind: type) -> None:
        self.kinds = [one for one in kind.__mro__ if is_users(one)]
        self.key = ("members", id(kind))

    def followed(self) -> list[Any]:
        """What the class and its bases hold."""
        values = [one for kind in self.kinds for one in entries_of(kind).values()]
        values = [one for one in values if not isinstance(one, FunctionType)]
        return [Members(one) if isinstance(one, type) else one for one in values]


def _followed(held: Any, package: str | None) -> Any:
    """What a global variable of an installed module may change or call; ``None`` for nothing."""
    if isinstance(held, FunctionType):
        return held if _package(held.__module__) == package else None
    return Members(held) if isinstance(held, type) else held


def _package(name: Any) -> str:
    return str(name or "").split(".")[0]


def is_installed(variables: dict[str, Any]) -> bool:
    """Whether a module lies in a folder of installed packages."""
    folders = Path(str(variables.get("__file__"))).parts
    return "site-packages" in folders or "dist-packages" in folders


def is_users(held: Any) -> bool:
    """Whether a user wrote a class, function or module."""
    return is_users_name(held.__name__ if isinstance(held, ModuleType) else held.__module__)


@lru_cache(8192)
def is_users_name(name: Hashable) -> bool:
    """Whether a user wrote the module of a name."""
    package = _package(name)
    if package in _NOT_OF_USERS:
        return _is_alone(sys.modules.get(package))
    return not package.startswith("namedtuple_")


def _is_alone(module: ModuleType | None) -> bool:
    """Whether a module is a user's file with the name of a library, such as ``turtle.py``."""
    place = Path(str(getattr(module, "__file__", None)))
    if place.suffix != ".py" or hasattr(module, "__path__"):
        return False
    return not place.is_relative_to(_OF_PYTHON) and not is_installed(vars(module))


@lru_cache(4096)
def names_of(code: CodeType) -> frozenset[str]:
    """All names and texts in a function, and in functions within."""
    texts = {one for one in code.co_consts if isinstance(one, str)}
    within = (names_of(one) for one in code.co_consts if isinstance(one, CodeType))
    return frozenset(texts.union(code.co_names, *within))


@lru_cache(4096)
def variables_of(code: CodeType) -> frozenset[str]:
    """Names of the global variables of a function, and of functions within.

    ``globals()`` may read a variable by any text of the function.
    """
    own = (one.argval for one in dis.get_instructions(code) if one.opname in _OF_VARIABLES)
    within = (variables_of(one) for one in code.co_consts if isinstance(one, CodeType))
    found = frozenset(own).union(*within)
    return found | names_of(code) if "globals" in found else found


def replaced_by_torch(held: Any) -> frozenset[str]:
    """Names of attributes that torch sets when it reads them, to what they were or would be."""
    if isinstance(held, nn.RNNBase):
        return _OF_RECURRENT_LAYERS
    if type(held).__module__.startswith("torch.distributions"):
        members = [item for kind in type(held).__mro__ for item in vars(kind).items()]
        return frozenset(name for name, one in members if isinstance(one, lazy_property))
    return frozenset()


def can_grow(held: Any) -> bool:
    """Whether an object that holds nothing may hold something later."""
    kinds = (list, dict, deque, set, FunctionType, type)
    return isinstance(held, kinds) or has_attributes(held)


def has_attributes(held: Any) -> bool:
    """Whether an object is a user's or a module, with attributes of its own."""
    if isinstance(held, FunctionType | type | list | dict | deque | set) or _is_stream(held):
        return False
    module = str(type(held).__module__)
    ours = isinstance(held, nn.Module) or module.startswith(_WATCHED_OF_TORCH)
    ours = ours or _package(module) not in _NOT_WATCHED
    return ours and (isinstance(dict_of(held), dict) or bool(slots_of(held)))


def dict_of(held: Any) -> Any:
    """The dict of an object's attributes; ``None`` where there is none."""
    try:
        return object.__getattribute__(held, "__dict__")
    except AttributeError:
        return None


def attributes_of(held: Any) -> dict[Any, Any]:
    """The attributes of an object that it holds itself, in its dict or in slots."""
    slots = {name: getattr(held, name) for name in slots_of(held) if hasattr(held, name)}
    return {**slots, **(dict_of(held) or {})}


def slots_of(held: Any) -> list[str]:
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


def entries_of(held: Any) -> dict[Hashable, Any]:  # noqa: PLR0911 - a kind of object each
    """What may change of an object, by its name, key or place."""
    if isinstance(held, dict):
        return dict(held)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(held, list | deque):
        return dict(enumerate(held))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(held, set):
        return dict.fromkeys(held, True)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(held, np.ndarray):
        is_small = held.dtype != object and held.nbytes <= MOST_BYTES
        return {"": held.tobytes()} if is_small else {}
    if isinstance(held, array | bytearray):
        return {"": bytes(held)}
    if isinstance(held, CellType):
        try:
            return {"": held.cell_contents}
        except ValueError:  # a variable without a value
            return {}
    if isinstance(held, Globals):
        return {name: held.variables[name] for name in held.names if name in held.variables}
    if isinstance(held, FunctionType):
        return {name: one for name, one in vars(held).items() if name != "__wrapped__"}
    if isinstance(held, type):
        return {name: value for name, value in vars(held).items() if not name.startswith("__")}
    if _is_stream(held):
        state = held.getstate() if isinstance(held, random.Random) else _numpy_bits(held).state
        return {"": pickle.dumps(state)}
    return dict(attributes_of(held)) if has_attributes(held) else {}


def restore(
    held: Any, names: list[Hashable], before: dict[Hashable, Any], now: dict[Hashable, Any]
) -> None:
    """Restore single entries of an object; no other entry is touched.

    Args:
        held: Object whose entries have changed.
        names: Names of the entries that are restored.
        before: Entries to restore.
        now: Entries as they are.
    """
    if isinstance(held, list | deque):
        _restore_places(held, names, before, now)
    elif isinstance(held, np.ndarray):
        held[...] = np.frombuffer(before[""], held.dtype).reshape(held.shape)
    elif isinstance(held, array | bytearray):
        held[:] = array(held.typecode, before[""]) if isinstance(held, array) else before[""]
    elif isinstance(held, CellType):
        held.cell_contents = before[""]
    elif isinstance(held, random.Random):
        held.setstate(pickle.loads(before[""]))
    elif _is_stream(held):
        _numpy_bits(held).state = pickle.loads(before[""])
    else:
        for name in names:
            if isinstance(held, set):
                (held.add if name in before else held.discard)(name)  # pyright: ignore[reportUnknownMemberType]
            else:
                _set(held, name, before.get(name, _NOTHING))


def _restore_places(held: Any, places: list[Any], before: Any, now: Any) -> None:
    """Restore single elements of a list or deque, unless another thread has moved them."""
    for place in reversed(places):
        if place not in before and place < len(held) and held[place] is now[place]:
            del held[place]
    for place in places:
        if place in before and place not in now:
            held.append(before[place])
        elif place in before and place < len(held) and held[place] is now[place]:
            held[place] = before[place]


def _set(held: Any, name: Any, value: Any) -> None:
    """Set or delete a key or an attribute, without the object's own rules for that."""
    by_key: Any = held.variables if isinstance(held, Globals) else held
    if not isinstance(by_key, dict | type) and name not in slots_of(held):
        by_key = dict_of(held)
    if isinstance(by_key, dict):
        if value is _NOTHING:
            by_key.pop(name, None)
        else:
            by_key[name] = value
        return
    kind: Any = type if isinstance(held, type) else object
    if value is _NOTHING:
        kind.__delattr__(held, name)
    else:
        kind.__setattr__(held, name, value)


def differences(before: dict[Hashable, Any], now: dict[Hashable, Any]) -> list[Hashable]:
    """Names of the entries that are not the same; equal numbers and texts are."""
    if before.keys() == now.keys() and all(map(operator.is_, before.values(), now.values())):
        return []
    names = dict.fromkeys(itertools.chain(before, now))
    return [name for name in names if not _is_same(before, now, name)]


def _is_same(before: dict[Hashable, Any], now: dict[Hashable, Any], name: Hashable) -> bool:
    if name not in before or name not in now:
        return False
    one, other = before[name], now[name]
    plain = type(one) in (bool, int, float, str, bytes) and type(one) is type(other)
    return one is other or (plain and one == other and repr(one) == repr(other))  # 0.0 and -0.0


def holds_no_numbers(value: Any) -> bool:
    """Whether a tensor without numbers, which a trace makes, lies in an object."""
    left, seen = [value], dict[int, Any]()
    while left:
        one = left.pop()
        if isinstance(one, Tensor) and (one.is_meta or isinstance(one, FakeTensor)):
            return True
        if id(one) in seen or isinstance(one, Tensor | ModuleType | type):
            continue
        seen[id(one)] = one
        left += one if isinstance(one, tuple | frozenset) else entries_of(one).values()
        left += one if isinstance(one, set) else []
    return False
