"""Operations that reduce axes, softmax, and products of matrices."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import (
    Number,
    Operation,
    Operations,
    Result,
    pointwise,
)
from esper_lightning.compiling.native.products import product
from esper_lightning.compiling.native.values import C_TYPES, Index, Shape, UnsupportedError, Value
from esper_lightning.compiling.native.views import in_memory

__all__ = ["OPERATIONS"]

OPERATIONS = Operations()
operation = OPERATIONS.register

_SHORT_ROW = 16  # numbers of a row that are written out instead of looped over
_LARGEST_SUMMED = 2**24  # multiplications of a product without vectors of columns


def _axes(axes: int | Sequence[int] | None, rank: int) -> list[int]:
    """Axes that are not negative; all axes for ``None`` and for an empty list."""
    if axes is None or axes == []:
        return list(range(rank))
    listed = [axes] if isinstance(axes, int) else list(axes)
    return [axis % rank for axis in listed] if rank else []


# Reductions


def _sum(kernel: Kernel, x: Value, result: Result, axes: list[int]) -> Value:
    return kernel.reduce(
        x, axes, result.shape, dtype=result.dtype, start=0, combine="{a} += {x};", clause="+"
    )


@operation("sum.default", "sum.dim_IntList")
def _sum_of(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    return _sum(kernel, x, result, _axes(dim, len(x.shape)))


@operation("mean.default", "mean.dim")
def _mean(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    axes = _axes(dim, len(x.shape))
    total = _sum(kernel, x, result, axes)
    count = math.prod(x.shape[axis] for axis in axes)
    return pointwise(kernel, result, "{0} / {1}", total, float(count))


@operation("linalg_vector_norm.default")
def _norm(
    kernel: Kernel,
    result: Result,
    x: Value,
    ord: Number = 2,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    if ord in (1, math.inf, -math.inf):
        size = pointwise(kernel, Result(x.shape, result.dtype), "f_abs({0})", x)
        axes = _axes(dim, len(x.shape))
        if ord == 1:
            return _sum(kernel, size, result, axes)
        return _extreme(larger=ord > 0)(kernel, result, size, axes)
    if ord != 2:
        raise UnsupportedError(f"a norm of order {ord}")
    square = pointwise(kernel, Result(x.shape, result.dtype), "{0} * {0}", x)
    return pointwise(
        kernel, result, "f_sqrt({0})", _sum(kernel, square, result, _axes(dim, len(x.shape)))
    )


@operation("var.correction")
def _var(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int | Sequence[int] | None = None,
    *,
    correction: Number | None = None,
    keepdim: bool = False,
) -> Value:
    axes = _axes(dim, len(x.shape))
    x = kernel.named(x)
    count = math.prod(x.shape[axis] for axis in axes)
    kept = tuple(1 if axis in axes else extent for axis, extent in enumerate(x.shape))
    total = _sum(kernel, x, Result(kept, result.dtype), axes)
    mean = pointwise(kernel, Result(kept, result.dtype), "{0} / {1}", total, float(count))
    deviation = pointwise(kernel, Result(x.shape, result.dtype), "{0} - {1}", x, mean)
    square = pointwise(kernel, Result(x.shape, result.dtype), "{0} * {0}", deviation)
    divisor = float(max(0.0, count - (1 if correction is None else correction)))
    squares = _sum(kernel, square, result, axes)
    return pointwise(kernel, result, "{0} / {1}", squares, divisor)


@operation("std.correction")
def _std(kernel: Kernel, result: Result, x: Value, *args: Any, **kwargs: Any) -> Value:
    return pointwise(kernel, result, "f_sqrt({0})", _var(kernel, result, x, *args, **kwargs))


@operation("prod.default", "prod.dim_int")
def _prod(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    axes = _axes(dim, len(x.shape))
    combine = "{a} *= {x};"
    return kernel.reduce(
        x, axes, result.shape, dtype=result.dtype, start=1, combine=combine, clause="*"
    )


@operation("logsumexp.default")
def _logsumexp(
    kernel: Kernel, result: Result, x: Value, dim: int | Sequence[int], keepdim: bool = False
) -> Value:
    if not x.dtype.is_floating_point:
        raise UnsupportedError(f"logsumexp of {x.dtype}")
    axes = _axes(dim, len(x.shape))
    x = kernel.named(x)
    kept = Result(tuple(1 if a in axes else n for a, n in enumerate(x.shape)), result.dtype)
    largest = _extreme(larger=True)(kernel, kept, x, axes)
    finite = "f_where<{T}>(f_abs({0}) == ({T})__builtin_inff(), ({T})0, {0})"
    largest = kernel.stored(pointwise(kernel, kept, finite, largest))
    scaled = pointwise(kernel, Result(x.shape, result.dtype), "f_exp({0} - {1})", x, largest)
    total = _sum(kernel, scaled, result, axes)
    buffer, view = largest.place
    largest = Value(result.shape, result.dtype, buffer=buffer, view=view.view(result.shape))
    return pointwise(kernel, result, "f_log({0}) + {1}", total, largest)


@operation("all.default", "all.dim", "all.dims")
def _all(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
) -> Value:
    return _logical(kernel, result, x, dim, start=True, sign="&&")


@operation("any.default", "any.dim", "any.dims")
def _any(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
) -> Value:
    return _logical(kernel, result, x, dim, start=False, sign="||")


def _logical(
    kernel: Kernel,
    result: Result,
    x: Value,
    dim: int | Sequence[int] | None,
    *,
    start: bool,
    sign: str,
) -> Value:
    if result.dtype != torch.bool:
        raise UnsupportedError(f"{result.dtype} here")
    if dim == []:  # unlike a sum, of nothing
        return pointwise(kernel, result, "{0}", x)
    axes = _axes(dim, len(x.shape))
    combine = f"{{a}} = {{a}} {sign} {{x}};"
    return kernel.reduce(
        x, axes, result.shape, dtype=torch.bool, start=start, combine=combine, clause=sign
    )


def _extreme(larger: bool) -> Operation:
    function = "f_maximum<{T}>" if larger else "f_minimum<{T}>"

    def run(
        kernel: Kernel,
        result: Result,
        x: Value,
        dim: int | Sequence[int] | None = None,
        keepdim: bool = False,
    ) -> Value:
        if result.dtype == torch.bool or 0 in x.shape:
            raise UnsupportedError("an extreme of bools or of nothing")
        start: Number = -math.inf if larger else math.inf
        if not result.dtype.is_floating_point:
            ends = torch.iinfo(result.dtype)
            start = ends.min if larger else ends.max
        called = function.format(T=C_TYPES[result.dtype])
        combine = f"{{a}} = {called}({{a}}, {{x}});"
        axes = _axes(dim, len(x.shape))
        return kernel.reduce(
            x, axes, result.shape, dtype=result.dtype, start=start, combine=combine, clause=""
        )

    return run


OPERATIONS["amax.default"] = OPERATIONS["max.default"] = _extreme(True)
OPERATIONS["amin.default"] = OPERATIONS["min.default"] = _extreme(False)


@operation("argmax.default")
def _argmax(
    kernel: Kernel, result: Result, x: Value, dim: int | None = None, keepdim: bool = False
) -> Value:
    return _first_extreme(kernel, result, x, dim, keepdim, sign="")


@operation("argmin.default")
def _argmin(
    kernel: Kernel, result: Result, x: Value, dim: int | None = None, keepdim: bool = False
) -> Value:
    # Of integers, the complement: the negative of the smallest does not exist.
    sign = "-" if x.dtype.is_floating_point else "~"
    return _first_extreme(kernel, result, x, dim, keepdim, sign=sign)


def _first_extreme(
    kernel: Kernel, result: Result, x: Value, dim: int | None, keepdim: bool, *, sign: str
) -> Value:
    x = kernel.stored(x)
    if dim is None:
        buffer, view = x.place
        if not view.is_contiguous() or keepdim:
            raise UnsupportedError("the place of the extreme of a whole view")
        x = Value((x.numel,), x.dtype, buffer=buffer, view=view.reshape(-1))
    axis, kind = (dim or 0) % len(x.shape), C_TYPES[x.dtype]

    def expression(index: Index) -> str:
        row = [*index[:axis], "k", *index[axis + keepdim :]]
        element = f"({kind})({sign}{kernel.element(x, row)})"
        return f"(first_largest<{x.shape[axis]}, {kind}>([&](int64_t k) {{ return {element}; }}))"

    return Value(result.shape, result.dtype, expression)


@operation("_log_softmax.default")
def _log_softmax(kernel: Kernel, result: Result, x: Value, dim: int, half_to_float: bool) -> Value:
    row, shape = _row(x, dim)
    x = kernel.named(x)
    if x.is_constant:
        raise UnsupportedError("a softmax of a constant")
    rows = Result(shape, result.dtype)
    largest = _of_row(kernel, rows, x, row, "f_maximum({0}, {1})")
    largest = kernel.stored(largest)
    scaled = Value(
        x.shape,
        x.dtype,
        lambda index: f"f_exp({kernel.element(x, index)} - {kernel.element(largest, index[:-1])})",
    )
    total = kernel.stored(_of_row(kernel, rows, scaled, row, "({0} + {1})"))
    log_total = kernel.stored(pointwise(kernel, rows, "f_log({0})", total))

    def expression(index: Index) -> str:  # in this order: logits may be large, and the rest is not
        own, row = kernel.element(x, index), index[:-1]
        return f"(({own} - {kernel.element(largest, row)}) - {kernel.element(log_total, row)})"

    return Value(x.shape, x.dtype, expression)


@operation("_log_softmax_backward_data.default")
def _log_softmax_backward(
    kernel: Kernel, result: Result, gradient: Value, y: Value, dim: int, input_dtype: torch.dtype
) -> Value:
    row, shape = _row(y, dim)
    gradient, y = kernel.named(gradient), kernel.named(y)
    rows = Result(shape, result.dtype)
    total = kernel.stored(_of_row(kernel, rows, gradient, row, "({0} + {1})"))
    return Value(
        y.shape,
        y.dtype,
        lambda index: (
            f"({kernel.element(gradient, index)}"
            f" - f_exp({kernel.element(y, index)}) * {kernel.element(total, index[:-1])})"
        ),
    )


def _row(x: Value, dim: int) -> tuple[int, Shape]:
    if dim % len(x.shape) != len(x.shape) - 1 or not x.dtype.is_floating_point or 0 in x.shape:
        raise UnsupportedError("a softmax along other axes than the last one")
    return x.shape[-1], x.shape[:-1]


def _of_row(kernel: Kernel, rows: Result, x: Value, extent: int, combine: str) -> Value:
    """A reduction of the last axis: written out for short rows, and else a loop."""
    if extent <= _SHORT_ROW:

        def expression(index: Index) -> str:
            text = kernel.element(x, [*index, "0"])
            for at in range(1, extent):
                text = combine.format(text, kernel.element(x, [*index, str(at)]))
            return text

        return Value(rows.shape, rows.dtype, expression)
    adds = combine.startswith("({0} +")
    return kernel.reduce(
        x,
        [len(x.shape) - 1],
        rows.shape,
        dtype=rows.dtype,
        start=0 if adds else -math.inf,
        combine="{a} = " + combine.replace("{0}", "{a}").replace("{1}", "{x}") + ";",
        clause="+" if adds else "",
    )


# Products


@operation("mm.default")
def _mm(kernel: Kernel, result: Result, a: Value, b: Value) -> Value:
    return product(kernel, a, b)


@operation("addmm.default")
def _addmm(
    kernel: Kernel,
    result: Result,
    bias: Value,
    a: Value,
    b: Value,
    *,
    beta: Number = 1,
    alpha: Number = 1,
) -> Value:
    if (beta, alpha) != (1, 1):
        raise UnsupportedError("addmm with factors")
    return pointwise(kernel, result, "{0} + {1}", product(kernel, a, b), bias)


@operation("bmm.default", "mv.default", "dot.default")
def _contracted(kernel: Kernel, result: Result, a: Value, b: Value) -> Value:
    """Sums of products over the last axis of ``a``, in a plain loop."""
    a, b = kernel.stored(in_memory(a)), kernel.stored(in_memory(b))
    last, rest = len(a.shape) - 1, result.shape
    if len(rest) == 3 and rest[0] == 1:  # as torch.einsum makes of matrices
        buffer, view = product(kernel, _first(a), _first(b)).place
        return Value(rest, result.dtype, buffer=buffer, view=view[None])
    terms = (*rest, a.shape[-1])
    if 0 in terms or math.prod(terms) > _LARGEST_SUMMED:
        raise UnsupportedError(f"a product of {list(a.shape)} and {list(b.shape)}")

    def term(index: Index) -> str:
        left = [*index[:last], index[-1]]
        right = [index[0], index[-1], index[2]] if len(b.shape) == 3 else [index[-1]]
        one, other = (kernel.broadcast(*pair, result.dtype) for pair in ((a, left), (b, right)))
        return f"({one} * {other})"

    return _sum(kernel, Value(terms, result.dtype, term), result, [len(rest)])


def _first(value: Value) -> Value:
    """The first matrix of a batch in memory."""
    buffer, view = value.place
    return Value(value.shape[1:], value.dtype, buffer=buffer, view=view[0])
