"""Products of matrices: which function of ``kernels.hpp`` computes a product."""

from collections.abc import Sequence

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.values import (
    C_TYPES,
    UnsupportedError,
    Value,
    pointer,
)

__all__ = ["product"]

_COLUMNS = 16  # columns that are worth vector instructions along them
_DEEP = 16  # depth of a product that is worth vector instructions along it
_LARGEST_PLAIN = 1_000_000  # multiplications of a product without vector instructions


def product(kernel: Kernel, a: Value, b: Value) -> Value:
    """The product of two matrices, ``[M, K]`` and ``[K, N]``.

    Args:
        kernel: Kernel that gets the statements.
        a: Left matrix.
        b: Right matrix.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    if 0 in (rows, depth, columns):
        raise UnsupportedError("an empty product")
    a, b = kernel.stored(a), kernel.stored(b)
    if a.dtype != torch.float32:
        return _plain(kernel, a, b)
    if columns >= _COLUMNS:
        return _blocked(kernel, a, b)
    if a.place[1].stride(1) == 1 and depth >= _DEEP:
        return _dots(kernel, a, b)
    if rows >= _COLUMNS:
        swapped = _blocked(kernel, transposed(b), transposed(a))
        return transposed(swapped)
    return _plain(kernel, a, b)


def transposed(value: Value) -> Value:
    """A matrix in memory with its axes exchanged."""
    buffer, view = value.place
    return Value(value.shape[::-1], value.dtype, buffer=buffer, view=view.t())


def _strides(value: Value) -> tuple[int, ...]:
    """Strides of a matrix; 0 for an axis of extent 1."""
    view = value.place[1]
    return tuple(
        0 if extent == 1 else stride
        for extent, stride in zip(view.shape, view.stride(), strict=True)
    )


def _packed(
    kernel: Kernel, b: Value, *, columns_first: bool, padded: int
) -> tuple[str, list[Value]]:
    """Pointer to a copy of the right matrix, and the values that must be there before.

    Args:
        kernel: Kernel that gets the statements.
        b: Matrix ``[K, N]`` in memory.
        columns_first: Whether a column is contiguous in the copy, and not a row.
        padded: Numbers from one row, or column, of the copy to the next.
    """
    (depth, columns), (by_depth, by_column) = b.shape, _strides(b)
    sizes = (depth, columns, by_depth, by_column)
    if columns_first:
        sizes = (columns, depth, by_column, by_depth)
    arguments = ", ".join(map(str, (*sizes, padded)))
    statement = f"pack<{arguments}>({pointer(b)}, {{}});"
    numel = sizes[0] * padded
    source = b.place[0]
    if kernel.is_constant(source):
        return kernel.packed(statement, b.dtype, numel).name, []
    copy = kernel.new_value((numel,), b.dtype)
    name = copy.place[0].name
    kernel.call(statement.format(name), reads=[b], writes=[copy])
    return name, [copy]


def _result(
    kernel: Kernel, a: Value, b: Value, others: Sequence[Value], call: str, left: str, right: str
) -> Value:
    (rows, _), columns = a.shape, b.shape[1]
    result = kernel.new_value((rows, columns), a.dtype)
    kernel.call(
        f"{call}({left}, {right}, {pointer(result)}, {{first}}, {{end}});",
        reads=others or [b],
        reads_by_row=[a],
        writes_by_row=[result],
        number=rows,
    )
    return result


def _blocked(kernel: Kernel, a: Value, b: Value) -> Value:
    (depth, columns), (by_depth, by_column) = b.shape, _strides(b)
    right, others, padded = pointer(b), list[Value](), False
    worth = a.shape[0] >= _COLUMNS or kernel.is_constant(b.place[0])
    if (by_column != 1) or (columns % _COLUMNS and worth):
        by_depth = -(-columns // _COLUMNS) * _COLUMNS
        right, others = _packed(kernel, b, columns_first=False, padded=by_depth)
        padded = True
    by_row, by_step = _strides(a)
    flag = "true" if padded else "false"
    call = f"gemm<{columns}, {depth}, {by_row}, {by_step}, {by_depth}, {flag}>"
    return _result(kernel, a, b, others, call, pointer(a), right)


def _dots(kernel: Kernel, a: Value, b: Value) -> Value:
    (depth, columns), (by_depth, by_column) = b.shape, _strides(b)
    right, others = pointer(b), list[Value]()
    if by_depth != 1:
        right, others = _packed(kernel, b, columns_first=True, padded=depth)
        by_column = depth
    call = f"dots<{columns}, {depth}, {_strides(a)[0]}, {by_column}>"
    return _result(kernel, a, b, others, call, pointer(a), right)


def _plain(kernel: Kernel, a: Value, b: Value) -> Value:
    (rows, depth), columns = a.shape, b.shape[1]
    if rows * depth * columns > _LARGEST_PLAIN:
        raise UnsupportedError(f"a product of {rows} x {depth} and {depth} x {columns} {a.dtype}")
    sizes = ", ".join(map(str, (columns, depth, *_strides(a), *_strides(b))))
    call = f"tiny<{C_TYPES[a.dtype]}, {sizes}>"
    return _result(kernel, a, b, [], call, pointer(a), pointer(b))
