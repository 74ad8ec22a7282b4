"""Several values in one, and elements at indices that are computed."""

from collections.abc import Sequence

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import (
    Number,
    Operations,
    Result,
    pointwise,
)
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Index,
    UnsupportedError,
    Value,
    contiguous_view,
    literal,
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
    index = kernel.stored(index)
    buffer, view = index.place
    key = (buffer, view.storage_offset(), tuple(view.shape), view.stride(), lowest, extent)
    if key in kernel.checked:
        return index
    kernel.checked.add(key)
    outside = pointwise(
        kernel,
        Result(index.shape, torch.bool),
        f"{{0}} < {lowest} || {{0}} >= {extent}",
        index,
        dtype=index.dtype,
    )
    axes = list(range(len(index.shape)))
    combine = "{a} = {a} || {x};"
    found = kernel.reduce(
        outside, axes, (), dtype=torch.bool, start=False, combine=combine, clause="||"
    )
    flag = found.place[0].name
    kernel.call(f"note_bad_index({flag}[0], team);", reads=[found])
    return index


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


@operation("index.Tensor")
def _index(kernel: Kernel, result: Result, x: Value, indices: Sequence[Value | None]) -> Value:
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1:
        raise UnsupportedError("several indices at once")
    axis = used[0]
    index = indices[axis]
    assert index is not None
    return _index_rows(kernel, result, x, axis, index, lowest=-x.shape[axis])


@operation("index_select.default")
def _index_select(kernel: Kernel, result: Result, x: Value, dim: int, index: Value) -> Value:
    if len(index.shape) != 1 or not x.shape:
        raise UnsupportedError("index_select of a number")
    return _index_rows(kernel, result, x, dim % len(x.shape), index, lowest=0)


def _index_rows(
    kernel: Kernel, result: Result, x: Value, axis: int, index: Value, *, lowest: int
) -> Value:
    x, extent, rank = kernel.stored(in_memory(x)), x.shape[axis], len(index.shape)
    index = _indices(kernel, index, extent, lowest=lowest)

    def expression(where: Index) -> str:
        own = where[axis : axis + rank]
        at = f"index_in({kernel.element(index, own)}, {extent})"
        return kernel.element(x, [*where[:axis], at, *where[axis + rank :]])

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
        raise UnsupportedError("scatter of several elements in a row")
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
