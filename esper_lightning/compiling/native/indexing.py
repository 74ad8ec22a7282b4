"""Several values in one, and elements at indices that are computed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import (
    Number,
    Operations,
    Result,
    checked,
)
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Index,
    Shape,
    UnsupportedError,
    Value,
    canonical_index,
    contiguous_view,
    literal,
    strided_index,
)
from esper_lightning.compiling.native.views import in_memory

__all__ = ["OPERATIONS"]

OPERATIONS = Operations()
operation = OPERATIONS.register


# Several values in one


@operation("cat.default")
def _cat(kernel: Kernel, result: Result, pieces: Sequence[Value], dim: int = 0) -> Value:
    pieces = [piece for piece in pieces if piece.shape != (0,)]
    axis = dim % len(result.shape)
    buffer = kernel.new_buffer(result.dtype, max(1, _numel(result)))
    view = contiguous_view(result.shape, result.dtype)
    first = 0
    for piece in pieces:
        extent = piece.shape[axis]
        if extent:
            place = view.narrow(axis, first, extent)
            kernel.write(_converted(kernel, piece, result.dtype), buffer, place)
        first += extent
    buffer.is_read = True
    return Value(result.shape, result.dtype, buffer=buffer, view=view)


@operation("stack.default")
def _stack(kernel: Kernel, result: Result, pieces: Sequence[Value], dim: int = 0) -> Value:
    axis = dim % len(result.shape)
    buffer = kernel.new_buffer(result.dtype, max(1, _numel(result)))
    view = contiguous_view(result.shape, result.dtype)
    for number, piece in enumerate(pieces):
        kernel.write(_converted(kernel, piece, result.dtype), buffer, view.select(axis, number))
    buffer.is_read = True
    return Value(result.shape, result.dtype, buffer=buffer, view=view)


def _numel(result: Result) -> int:
    return contiguous_view(result.shape, result.dtype).numel()


def _converted(kernel: Kernel, value: Value, dtype: torch.dtype) -> Value:
    return Value(value.shape, dtype, lambda index: kernel.broadcast(value, index, dtype))


# Elements at computed indices


def _indices(kernel: Kernel, index: Value, extent: int, *, lowest: int = 0) -> Value:
    """Indices in memory, checked once: one outside of its tensor is an error after the call.

    Args:
        kernel: Kernel that gets the statements.
        index: Indices.
        extent: Extent of the axis.
        lowest: The lowest index that is allowed; negative ones count from the end.
    """
    if index.dtype not in (torch.int64, torch.int32):
        raise UnsupportedError(f"an index of {index.dtype}")
    if extent == 0:
        raise UnsupportedError("an index into nothing")
    outside = f"{{0}} < {lowest} || {{0}} >= {extent}"
    return checked(kernel, index, outside, "INDEX_OUTSIDE")


@operation("gather.default")
def _gather(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int,
    index: Value,
    *,
    sparse_grad: bool = False,
) -> Value:
    if not result.shape:
        raise UnsupportedError("gather of a number")
    axis = dim % len(result.shape)
    x, extent = kernel.stored(in_memory(x)), x.shape[dim]
    index = _indices(kernel, index, extent)

    def expression(where: Index) -> str:
        at = f"index_in({kernel.element(index, where)}, {extent})"
        return kernel.element(x, [*where[:axis], at, *where[axis + 1 :]])

    return _collected(kernel, Value(result.shape, result.dtype, expression))


class _Places(NamedTuple):
    """Elements of ``x`` at computed places.

    Attributes:
        shape: Extent of each axis of the elements.
        indices: Indices in memory.
        find: Function ``(element, where) -> index in x`` of the element at ``where``;
            ``element(value, index)`` is the C expression of an element of one of ``indices``.
    """

    shape: Shape
    indices: list[Value]
    find: Callable[[Callable[[Value, Index], str], Index], Index]


def _places(
    kernel: Kernel, x: Value, indices: Sequence[Value | None], *, from_end: bool = True
) -> _Places:
    """Elements of ``x`` at indices, of which negative ones count from the end or are errors."""
    checked = [
        None if one is None else _indices(kernel, one, extent, lowest=-extent if from_end else 0)
        for one, extent in zip(indices, x.shape, strict=False)
    ]
    checked += [None] * (len(x.shape) - len(checked))
    used = [axis for axis, one in enumerate(checked) if one is not None]
    given = [one for one in checked if one is not None]
    shape: Shape = tuple(cast("Any", torch).broadcast_shapes(*(one.shape for one in given)))
    rest = [extent for one, extent in zip(checked, x.shape, strict=True) if one is None]
    together = used[-1] - used[0] + 1 == len(used)  # else their axes come before all others
    first = used[0] if together else 0
    end = first + len(shape)

    def find(element: Callable[[Value, Index], str], where: Index) -> Index:
        others = iter([*where[:first], *where[end:]])
        return [
            next(others) if one is None else f"index_in({element(one, where[first:end])}, {extent})"
            for one, extent in zip(checked, x.shape, strict=True)
        ]

    return _Places((*rest[:first], *shape, *rest[first:]), given, find)


@operation("index.Tensor")
def _index(kernel: Kernel, result: Result, x: Value, indices: Sequence[Value | None]) -> Value:
    x = kernel.stored(in_memory(x))
    places = _places(kernel, x, indices)

    def element(one: Value, index: Index) -> str:
        return kernel.broadcast(one, index, one.dtype)

    def expression(where: Index) -> str:
        return kernel.element(x, places.find(element, where))

    return _collected(kernel, Value(result.shape, result.dtype, expression))


@operation("index_put.default")
def _index_put(
    kernel: Kernel,
    result: Result,
    x: Value,
    indices: Sequence[Value | None],
    values: Value,
    accumulate: bool = False,
) -> Value:
    mask = indices[0]
    if len(indices) == 1 and mask is not None and mask.dtype == torch.bool:
        return _mask_put(kernel, result, x, mask, values, adds=accumulate)
    places = _places(kernel, x, indices)
    return _put(kernel, result, x, places, values, adds=accumulate)


@operation("index_add.default")
def _index_add(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int,
    index: Value,
    source: Value,
    *,
    alpha: Number = 1,
) -> Value:
    if alpha != 1 or not x.shape or len(index.shape) != 1:
        raise UnsupportedError("index_add with a factor, or of a number")
    axes = [None] * (dim % len(x.shape))
    places = _places(kernel, x, [*axes, index], from_end=False)
    return _put(kernel, result, x, places, source, adds=True)


def _mask_put(
    kernel: Kernel, result: Result, x: Value, mask: Value, values: Value, *, adds: bool
) -> Value:
    """The same values for each place of a mask: a choice for each element."""
    rank = len(mask.shape)
    surplus = len(values.shape) - (len(result.shape) - rank)
    if adds or surplus > rank or any(extent != 1 for extent in values.shape[: max(0, surplus)]):
        raise UnsupportedError("as many values as a mask is true for")
    mask, values, x = kernel.named(mask), kernel.named(values), kernel.named(x)

    def expression(where: Index) -> str:
        chosen, new = kernel.element(mask, where[:rank]), kernel.broadcast(values, where, x.dtype)
        return f"f_where<{C_TYPES[result.dtype]}>({chosen}, {new}, {kernel.element(x, where)})"

    return Value(result.shape, result.dtype, expression)


def _put(
    kernel: Kernel, result: Result, x: Value, places: _Places, values: Value, *, adds: bool
) -> Value:
    """``x`` with other elements, which one thread writes in the order of ``values``."""
    if (adds and result.dtype == torch.bool) or 0 in places.shape or values.dtype != result.dtype:
        raise UnsupportedError("adding bools, no values, or values of another type")
    out, values = kernel.new_value(result.shape, result.dtype), kernel.stored(values)
    kernel.write(x, *out.place)

    def element(value: Value, index: Index) -> str:
        buffer, view = value.place
        return f"{buffer.name}[{strided_index(view, index[len(index) - view.dim() :])}]"

    index = canonical_index(places.shape)
    loops = [
        f"for (int64_t {at} = 0; {at} < {extent}; {at}++) "
        for at, extent in zip(index, places.shape, strict=True)
        if extent > 1
    ]
    written = element(out, places.find(element, index))
    statement = f"{written} {'+=' if adds else '='} {element(values, index)};"
    kernel.call("".join(loops) + statement, reads=[out, values, *places.indices], writes=[out])
    return out


@operation("index_select.default")
def _index_select(kernel: Kernel, result: Result, x: Value, dim: int, index: Value) -> Value:
    if len(index.shape) != 1 or not x.shape:
        raise UnsupportedError("index_select of a number")
    axis = dim % len(x.shape)
    x, extent = kernel.stored(in_memory(x)), x.shape[axis]
    index = _indices(kernel, index, extent)

    def expression(where: Index) -> str:
        at = f"index_in({kernel.element(index, where[axis : axis + 1])}, {extent})"
        return kernel.element(x, [*where[:axis], at, *where[axis + 1 :]])

    return _collected(kernel, Value(result.shape, result.dtype, expression))


def _collected(kernel: Kernel, value: Value) -> Value:
    """Elements from computed places, in memory: what follows can then compute with vectors."""
    return kernel.stored(value, in_order=True)


@operation("scatter_add.default")
def _scatter_add(
    kernel: Kernel, result: Result, x: Value, dim: int, index: Value, source: Value
) -> Value:
    return _scattered(kernel, result, x, dim, index, source, adds=True)


@operation("scatter.src")
def _scatter(
    kernel: Kernel, result: Result, x: Value, dim: int, index: Value, source: Value
) -> Value:
    return _scattered(kernel, result, x, dim, index, source, adds=False)


@operation("scatter.value")
def _scatter_value(
    kernel: Kernel, result: Result, x: Value, dim: int, index: Value, value: Number
) -> Value:
    text = literal(value, result.dtype)
    source = Value(index.shape, result.dtype, lambda _: text, is_constant=True)
    return _scattered(kernel, result, x, dim, index, source, adds=False)


def _scattered(
    kernel: Kernel, result: Result, x: Value, dim: int, index: Value, source: Value, *, adds: bool
) -> Value:
    """One element for each row: then every element of the result asks whether it is the one."""
    axis, shape = dim % len(result.shape), result.shape
    rows = [*shape[:axis], 1, *shape[axis + 1 :]]
    if list(index.shape) != rows or list(source.shape) != rows:
        if not adds:  # the order of several for one place is not said
            raise UnsupportedError("scatter of several elements in a row")
        index = _indices(kernel, index, shape[axis])

        def find(element: Callable[[Value, Index], str], where: Index) -> Index:
            at = f"index_in({element(index, where)}, {shape[axis]})"
            return [*where[:axis], at, *where[axis + 1 :]]

        return _put(kernel, result, x, _Places(index.shape, [index], find), source, adds=True)
    index = _indices(kernel, index, shape[axis])
    source, kind = kernel.named(source), C_TYPES[result.dtype]
    x = kernel.named(x)

    def expression(where: Index) -> str:
        row = [*where[:axis], "0", *where[axis + 1 :]]
        at = f"index_in({kernel.element(index, row)}, {shape[axis]})"
        old, new = kernel.element(x, where), kernel.element(source, row)
        if adds:  # and no zero elsewhere, since -0.0 + 0.0 is another number
            new = f"({kind})({old} + {new})"
        return f"f_where<{kind}>({where[axis]} == {at}, {new}, {old})"

    return Value(result.shape, result.dtype, expression)
