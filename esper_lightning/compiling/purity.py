"""Whether a function is pure, as far as two calls can tell: asked before native code is made of it.

Tracing sees tensors without numbers, and sees them once. What a function does besides computing its
results would happen at the trace, and never again. Everything that a function holds is watched
(``holders``).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from esper_lightning.compiling.holders import ImpureError, unchanged, unused_streams
from esper_lightning.compiling.tracing import Traceable
from esper_lightning.core.tensor_trees import leaves

__all__ = ["results_of_pure", "same_bits", "watched_results"]

Tree = Any
_NUMBERS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
_SET_DATA: Any = getattr(Tensor.data, "__set__")  # noqa: B009 - what ``tensor.data = ...`` calls
_A_NUMBER = "a number of a tensor as one of Python"
_SHOWING = """numpy __array__ __dlpack__ data_ptr untyped_storage storage __deepcopy__ __format__
__repr__"""
_READING: dict[Any, str] = {  # methods of tensors, and what is said of them
    Tensor.tolist: "the numbers of a tensor as a list of Python",
    **{getattr(Tensor, name): _A_NUMBER for name in ("item", "__float__", "__int__", "__index__")},
    **{getattr(Tensor, name): "" for name in _SHOWING.split()},
}
_OF_LISTS: set[Any] = {
    *(torch.tensor, torch.as_tensor, torch.asarray, torch.sparse_coo_tensor),
    *(Tensor.new_tensor, Tensor.new),
}
_AT_INDICES: set[Any] = {Tensor.__getitem__, Tensor.__setitem__}


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
        streams, numbers, own = unused_streams(), _NoNumbers(), _OwnTensorsOnly()
        with torch.no_grad(), unchanged(function), streams, numbers, Traceable(), own:
            result = function(*args)
        return leaves(result)
    finally:
        torch.set_num_threads(threads)


class _NoNumbers(TorchFunctionMode):
    """Refuses what reads a tensor's numbers, which a trace would take for constants, and new data.

    Operations see neither how a list of tensors becomes a tensor, nor what other libraries read.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if func in _READING:
            raise ImpureError(_READING[func] or f"what Tensor.{name} shows of a tensor's numbers")
        if func == _SET_DATA:
            raise ImpureError("other data for a tensor")
        given: list[Any] = [*args, *(kwargs or {}).values()]
        if func in _OF_LISTS and any(map(_is_list_of_tensors, given)):
            raise ImpureError(f"a list of tensors in {name}(...), instead of torch.stack")
        if func in _AT_INDICES:
            places: list[Any] = [*args[1]] if type(args[1]) is tuple else [args[1]]
            if any(map(_is_list_of_tensors, places)):
                raise ImpureError("a list of tensors as an index, instead of torch.stack")
        return func(*args, **(kwargs or {}))


def _is_list_of_tensors(value: Any) -> bool:
    """Whether tensors lie in a list or tuple, at any depth."""
    if not isinstance(value, list | tuple):
        return False
    return any(isinstance(one, Tensor) or _is_list_of_tensors(one) for one in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


class _OwnTensorsOnly(TorchDispatchMode):
    """Refuses random numbers, numbers for Python, and writes to tensors made elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self._made: set[StorageWeakRef] = set()

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args):
            raise ImpureError(f"random numbers of its own ({func})")
        if func in _NUMBERS:
            raise ImpureError(_A_NUMBER)
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


def _drops_nothing(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation is random by its dropout alone, such as attention, which is 0."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return not (args[number] if number < len(args) else argument.default_value)
    return False


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
        with torch._C.DisableTorchFunction():  # which is no read of a user  # pyright: ignore[reportPrivateUsage]
            return {StorageWeakRef(values.untyped_storage())}
    found: set[StorageWeakRef] = set()
    if isinstance(values, dict):
        values = list(values.values())  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(values, list | tuple):
        for value in values:  # pyright: ignore[reportUnknownVariableType]
            found |= _storages(value)
    return found
