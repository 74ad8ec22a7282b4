"""Whether a function is pure, as far as two calls can show, before native code is made of it.

A trace sees tensors without numbers, and calls the function once. What a function does besides
computing its results would happen at the trace, and never again. Attributes of the objects that a
function holds are watched; what it reaches through globals, classes or ``__slots__`` is not.
"""

import functools
import itertools
import operator
import pickle
import random
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from esper_lightning.core.tensor_trees import leaves

__all__ = ["ImpureError", "results_of_pure", "same_bits", "unchanged", "watched_results"]

Tree = Any
_MOST_OBJECTS = 20_000  # that are watched: 10 ms
_NOT_WATCHED = ("torch", "logging", "threading", "multiprocessing", "concurrent", "asyncio")
# Recurrent layers replace these whenever they are called with other weights, by weights as before.
_REPLACED_BY_TORCH = ("._flat_weights", "._flat_weight_refs")


class ImpureError(NotImplementedError):
    """Raised for a function that is not pure: it runs eagerly."""


def results_of_pure(function: Callable[..., Tree], *args: Tree) -> list[Tensor]:
    """The tensors of a function's result, after two calls.

    A write to a tensor that the function did not make itself, and random numbers, are refused
    before they happen. Neither changes the tensors of a user, or a random stream. Attributes that
    change are restored.

    Args:
        function: Function of trees of tensors.
        *args: Arguments of the function.

    Raises:
        ImpureError: If the function does what a pure one does not, or gives other results at the
            second call.
    """
    first, second = (watched_results(function, *args) for _ in range(2))
    if len(first) != len(second) or not all(map(same_bits, first, second)):
        raise ImpureError("results that change from call to call")
    return second


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in kind and in every bit; NaN equals itself."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def watched_results(function: Callable[..., Tree], *args: Tree) -> list[Tensor]:
    """The tensors of a function's result, computed eagerly and by one thread.

    More threads would take longer: they wait for each other at each of many small operations.

    Args:
        function: Function of trees of tensors.
        *args: Arguments of the function.

    Raises:
        ImpureError: If the function does what a pure one does not, before it happens; or if an
            attribute has changed, which is restored.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # A function that needs a gradient computes it itself; nothing outside needs autograd.
        with unchanged(function), torch.no_grad(), _NoNumbers(), _OwnTensorsOnly():
            return leaves(function(*args))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def unchanged(function: Callable[..., Any]) -> Generator[None]:
    """Restore the attributes of all objects that a function holds, once the context is left.

    These objects are the owner of a method, arguments of a partial function, variables of a closure
    and, in turn, what these hold: modules, lists, dicts, random streams of Python and NumPy.

    Args:
        function: Function that is called or traced in the context.

    Raises:
        ImpureError: If an attribute has changed. It has been restored.
    """
    holders = _holders(function)
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


class _Holder(NamedTuple):
    """An object that can be changed, and what it held at first."""

    held: Any
    name: str  # such as "Owner" or "Owner.attribute"
    entries: dict[Hashable, Any]

    def name_of(self, entry: Hashable) -> str:
        """Name of an entry: of the attribute in which a container lies, for containers."""
        return f"{self.name}.{entry}" if _has_attributes(self.held) else self.name


def _holders(function: Callable[..., Any]) -> list[_Holder]:
    """Everything that a function holds; the global random streams are used by torch's tracer."""
    left: deque[tuple[Any, str]] = deque([(function, "a function")])
    seen: dict[int, Any] = {}  # objects by identity: they must live as long as these numbers count
    found: list[_Holder] = []
    while left and len(seen) < _MOST_OBJECTS:
        held, name = left.popleft()
        if id(held) in seen or isinstance(held, Tensor | type | ModuleType):
            continue
        seen[id(held)] = held
        if isinstance(held, MethodType):
            left.append((held.__self__, name))
        elif isinstance(held, functools.partial):
            left.extend((one, name) for one in (held.func, held.args, held.keywords))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        elif isinstance(held, FunctionType):
            names = held.__code__.co_freevars
            left.extend(zip(held.__closure__ or (), names, strict=True))
        elif isinstance(held, tuple | frozenset):
            left.extend((one, name) for one in held)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        else:
            name = type(held).__name__ if _has_attributes(held) else name
            holder = _Holder(held, name, _entries(held))
            if holder.entries or isinstance(held, list | dict | deque) or _has_attributes(held):
                found.append(holder)
            left.extend((one, holder.name_of(key)) for key, one in holder.entries.items())
    return found


def _has_attributes(held: Any) -> bool:
    """Whether an object is a user's or a module, with attributes of its own."""
    if isinstance(held, FunctionType | list | dict | deque) or _is_stream(held):
        return False
    ours = isinstance(held, nn.Module) or type(held).__module__.split(".")[0] not in _NOT_WATCHED
    return ours and isinstance(_attributes(held), dict)


def _attributes(held: Any) -> Any:
    try:
        return object.__getattribute__(held, "__dict__")
    except AttributeError:
        return None


def _is_stream(held: Any) -> bool:
    """Whether an object is a random stream of Python or NumPy."""
    return isinstance(held, random.Random) or _numpy_bits(held) is not None


def _numpy_bits(held: Any) -> Any:
    """The object whose ``state`` is that of a stream of NumPy; ``None`` for other objects."""
    name = {"Generator": "bit_generator", "RandomState": "_bit_generator"}.get(type(held).__name__)
    is_numpy = name is not None and type(held).__module__.startswith("numpy.random")
    return getattr(held, name) if is_numpy and name is not None else None


def _entries(held: Any) -> dict[Hashable, Any]:
    """What may change of an object, by its name, key or place."""
    if isinstance(held, dict):
        return dict(held)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(held, list | deque):
        return dict(enumerate(held))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(held, CellType):
        try:
            return {"": held.cell_contents}
        except ValueError:  # a variable without a value
            return {}
    if _is_stream(held):
        state = held.getstate() if isinstance(held, random.Random) else _numpy_bits(held).state
        return {"": pickle.dumps(state)}
    return dict(_attributes(held)) if _has_attributes(held) else {}


def _restore(held: Any, before: dict[Hashable, Any], now: dict[Hashable, Any]) -> None:
    if isinstance(held, list | deque):
        held.clear()  # pyright: ignore[reportUnknownMemberType]
        held.extend(before.values())  # pyright: ignore[reportUnknownMemberType]
    elif isinstance(held, CellType):
        held.cell_contents = before[""]
    elif isinstance(held, random.Random):
        held.setstate(pickle.loads(before[""]))
    elif _is_stream(held):
        _numpy_bits(held).state = pickle.loads(before[""])
    else:
        entries: Any = held if isinstance(held, dict) else _attributes(held)  # pyright: ignore[reportUnknownVariableType]
        for name in now.keys() - before.keys():
            del entries[name]
        entries.update(before)


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


class _NoNumbers(TorchFunctionMode):
    """Refuses lists of a tensor's numbers, which a trace would take for constants."""

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.tolist:
            raise ImpureError("the numbers of a tensor as a list of Python")
        return func(*args, **(kwargs or {}))


class _OwnTensorsOnly(TorchDispatchMode):
    """Refuses writes to tensors that were not made under this mode, and random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._made: set[StorageWeakRef] = set()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ImpureError(f"random numbers of its own ({func})")
        kwargs = kwargs or {}
        given = _storages((args, kwargs))
        if func is torch.ops.aten.lift_fresh.default:  # what torch.tensor has just made
            self._made |= given
        if func._schema.is_mutable and not self._made.issuperset(
            _storages(_written(func._schema, args, kwargs))
        ):
            raise ImpureError(f"writing to what it did not make itself ({func})")
        result = func(*args, **kwargs)
        self._made |= _storages(result) - given
        return result


def _written(schema: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of an operation that the operation writes to."""
    written: list[Any] = []
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[number] if number < len(args) else kwargs.get(argument.name))
    return written


def _storages(values: Any) -> set[StorageWeakRef]:
    """The memory of all tensors in containers."""
    if isinstance(values, Tensor):
        return {StorageWeakRef(values.untyped_storage())}
    found: set[StorageWeakRef] = set()
    if isinstance(values, dict):
        values = list(values.values())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(values, list | tuple):
        for value in values:  # pyright: ignore[reportUnknownVariableType]
            found |= _storages(value)
    return found
