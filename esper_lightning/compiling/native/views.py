"""Views, their gradients, and writes to views: operations that move numbers unchanged."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import (
    Number,
    Operation,
    Operations,
    Result,
)
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Index,
    UnsupportedError,
    Value,
    literal,
)

__all__ = ["OPERATIONS", "contiguous", "in_memory"]

OPERATIONS = Operations()
operation = OPERATIONS.register


def _squeezed(shape: Sequence[int]) -> list[int]:
    return [extent for extent in shape if extent != 1]


@operation("view.default", "_unsafe_view.default")
def _view(kernel: Kernel, result: Result, x: Value, size: Sequence[int]) -> Value:
    if x.is_constant:
        return Value(result.shape, x.dtype, x.expression, is_constant=True)
    if x.buffer is None and _squeezed(x.shape) == _squeezed(result.shape):
        kept = [axis for axis, extent in enumerate(result.shape) if extent != 1]

        def expression(index: Index) -> str:
            rest = iter(index[axis] for axis in kept)
            return kernel.element(x, ["0" if extent == 1 else next(rest) for extent in x.shape])

        return Value(result.shape, x.dtype, expression)
    buffer, view = kernel.stored(x).place
    try:
        return Value(result.shape, x.dtype, buffer=buffer, view=view.view(result.shape))
    except RuntimeError:  # the elements do not follow each other as a view needs it
        buffer, view = contiguous(kernel, x).place
        return Value(result.shape, x.dtype, buffer=buffer, view=view.view(result.shape))


def _by_torch(name: str) -> Operation:
    """A view of memory, whose strides torch's own operation computes on the meta device."""
    function: Any = getattr(torch.ops.aten, name.split(".", maxsplit=1)[0])
    function = getattr(function, name.split(".")[1])

    def run(kernel: Kernel, result: Result, x: Value, *args: Any, **kwargs: Any) -> Any:
        if x.buffer is None:
            moved = _moved(kernel, result, name.split(".", maxsplit=1)[0], x, args)
            if moved is not None:
                return moved
        buffer, view = kernel.stored(in_memory(x)).place
        out: Any = function(view, *args, **kwargs)

        def wrap(view: Tensor) -> Value:
            return Value(tuple(view.shape), x.dtype, buffer=buffer, view=view)

        return wrap(out) if isinstance(out, Tensor) else [*map(wrap, out)]

    return run


def in_memory(x: Value) -> Value:
    """The value; a constant as an expression that can be stored."""
    if not x.is_constant:
        return x
    return Value(x.shape, x.dtype, x.expression)


def contiguous(kernel: Kernel, x: Value) -> Value:
    """The value in memory without gaps, in the order of its indices."""
    x = kernel.stored(in_memory(x))
    if x.place[1].is_contiguous():
        return x
    return kernel.stored(Value(x.shape, x.dtype, lambda index: kernel.element(x, index)))


def _moved(
    kernel: Kernel, result: Result, name: str, x: Value, args: tuple[Any, ...]
) -> Value | None:
    """A view of an expression: the same expression at another index; ``None`` if unknown."""
    rank = len(x.shape)
    if x.is_constant and name not in ("split", "split_with_sizes", "unbind", "unsafe_split"):
        return Value(result.shape, x.dtype, x.expression, is_constant=True)
    if name == "unsqueeze":
        axis = args[0] % (rank + 1)
        return Value(
            result.shape,
            x.dtype,
            lambda index: kernel.element(x, [*index[:axis], *index[axis + 1 :]]),
        )
    if name == "expand":
        return Value(result.shape, x.dtype, lambda index: kernel.broadcast(x, index, x.dtype))
    if name == "select":
        axis: int = args[0] % rank
        at: int = args[1] % x.shape[axis]
        return Value(
            result.shape,
            x.dtype,
            lambda index: kernel.element(x, [*index[:axis], str(at), *index[axis:]]),
        )
    if name == "t" and rank == 2:
        return Value(result.shape, x.dtype, lambda index: kernel.element(x, index[::-1]))
    return None


for _name in (
    "t.default",
    "transpose.int",
    "permute.default",
    "unsqueeze.default",
    "squeeze.default",
    "squeeze.dim",
    "squeeze.dims",
    "expand.default",
    "select.int",
    "slice.Tensor",
    "split.Tensor",
    "unsafe_split.Tensor",
    "split_with_sizes.default",
    "unbind.int",
    "unfold.default",
    "diagonal.default",
):
    OPERATIONS[_name] = _by_torch(_name)


@operation("flip.default")
def _flip(kernel: Kernel, result: Result, x: Value, dims: Sequence[int]) -> Value:
    axes = {axis % len(x.shape) for axis in dims}

    def expression(index: Index) -> str:
        return kernel.element(
            x,
            [
                f"({x.shape[axis] - 1} - ({at}))" if axis in axes else at
                for axis, at in enumerate(index)
            ],
        )

    return Value(result.shape, x.dtype, expression)


@operation("roll.default")
def _roll(
    kernel: Kernel, result: Result, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()
) -> Value:
    if not dims:
        raise UnsupportedError("a roll of all axes as one")
    rank = len(x.shape)
    by = dict.fromkeys(range(rank), 0)
    for shift, axis in zip(shifts, dims, strict=True):
        by[axis % rank] += shift

    def expression(index: Index) -> str:
        places = zip(index, x.shape, by.values(), strict=True)
        return kernel.element(
            x, [f"((({at}) + {-shift % n}) % {n})" if shift % n else at for at, n, shift in places]
        )

    return Value(result.shape, x.dtype, expression)


# Backward of views: zeros but for the view


@operation("select_backward.default")
def _select_backward(
    kernel: Kernel, result: Result, gradient: Value, sizes: Sequence[int], dim: int, index: int
) -> Value:
    axis, extent = dim % len(result.shape), result.shape[dim]
    at = index % extent
    zero, kind = literal(0, result.dtype), C_TYPES[result.dtype]

    def expression(where: Index) -> str:
        text = kernel.element(gradient, [*where[:axis], *where[axis + 1 :]])
        return text if extent == 1 else f"f_where<{kind}>({where[axis]} == {at}, {text}, {zero})"

    return Value(result.shape, result.dtype, expression)


@operation("slice_backward.default")
def _slice_backward(
    kernel: Kernel,
    result: Result,
    gradient: Value,
    sizes: Sequence[int],
    dim: int,
    start: int,
    end: int,
    step: int,
) -> Value:
    axis = dim % len(result.shape)
    extent = result.shape[axis]
    first, _, by = slice(start, end, step).indices(extent)
    if by != 1:
        raise UnsupportedError("the gradient of a slice with steps")
    return _padded(kernel, result, gradient, {axis: first}, 0)


# Writes in place, as the new tensors that they become


@operation("select_scatter.default")
def _select_scatter(
    kernel: Kernel, result: Result, x: Value, source: Value, dim: int, index: int
) -> Value:
    axis, extent = dim % len(result.shape), result.shape[dim]
    at, kind = index % extent, C_TYPES[result.dtype]

    def expression(where: Index) -> str:
        new = kernel.broadcast(source, [*where[:axis], *where[axis + 1 :]], result.dtype)
        return f"f_where<{kind}>({where[axis]} == {at}, {new}, {kernel.element(x, where)})"

    return Value(result.shape, result.dtype, expression)


@operation("slice_scatter.default")
def _slice_scatter(
    kernel: Kernel,
    result: Result,
    x: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    axis = dim % len(result.shape)
    first, last, by = slice(start, end, step).indices(result.shape[axis])
    if by != 1:
        raise UnsupportedError("a write to a slice with steps")
    source = kernel.stored(in_memory(source))

    def expression(where: Index) -> str:
        at = where[axis]
        place = "0" if source.shape[axis] == 1 else f"(({at}) - {first})"
        new = kernel.broadcast(source, [*where[:axis], place, *where[axis + 1 :]], result.dtype)
        inside = f"({at}) >= {first} && ({at}) < {last}"
        return f"({inside} ? {new} : {kernel.element(x, where)})"

    return Value(result.shape, result.dtype, expression)


@operation("copy.default")
def _copy(
    kernel: Kernel, result: Result, x: Value, source: Value, non_blocking: bool = False
) -> Value:
    return Value(
        result.shape,
        result.dtype,
        lambda index: kernel.broadcast(source, index, result.dtype),
    )


@operation("fill.Scalar")
def _fill(kernel: Kernel, result: Result, x: Value, value: Number) -> Value:
    text = literal(value, result.dtype)
    return Value(result.shape, result.dtype, lambda _: text, is_constant=True)


@operation("constant_pad_nd.default")
def _pad(kernel: Kernel, result: Result, x: Value, pad: Sequence[int], value: Number = 0) -> Value:
    rank = len(x.shape)
    before = {rank - 1 - number: pad[2 * number] for number in range(len(pad) // 2)}
    return _padded(kernel, result, x, before, value)


def _padded(
    kernel: Kernel, result: Result, x: Value, before: dict[int, int], value: Number
) -> Value:
    x = kernel.stored(in_memory(x))
    other = literal(value, result.dtype)

    def expression(index: Index) -> str:
        inside: list[str] = []
        places: list[str] = []
        for axis, at in enumerate(index):
            first, extent = before.get(axis, 0), x.shape[axis]
            place = f"(({at}) - {first})" if first else at
            places.append("0" if extent == 1 else place)
            if first or extent != result.shape[axis]:
                inside.append(f"({at}) >= {first} && ({at}) < {first + extent}")
        text = kernel.element(
            x, ["0" if n == 1 else at for at, n in zip(places, x.shape, strict=True)]
        )
        return f"({' && '.join(inside)} ? {text} : {other})" if inside else text

    return Value(result.shape, result.dtype, expression)
