"""The operations of torch that native code knows: its contract.

``elementwise``, ``activations``, ``constants``, ``reductions``, ``views``, ``indexing``,
``convolutions`` and ``pooling`` hold what each becomes in C++. An operation, an overload or an
argument that none of them knows is refused, and the function that needs it runs eagerly.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Index,
    Shape,
    UnsupportedError,
    Value,
    literal,
)

__all__ = ["Number", "Operation", "Operations", "Result", "checked", "pointwise"]


class Result(NamedTuple):
    """Shape and dtype that torch gives to the result of an operation."""

    shape: Shape
    dtype: torch.dtype


Operation = Callable[..., Any]
"""An operation: ``(kernel, result, *arguments of torch's operation) -> value or values``."""

Number = bool | int | float


class Operations(dict[str, Operation]):
    """Translations by torch's name of the overload, without ``aten.``."""

    def register(self, *names: str) -> Callable[[Operation], Operation]:
        """Register a function as the translation of overloads of torch's operations."""

        def add(function: Operation) -> Operation:
            for name in names:
                assert name not in self, name
                self[name] = function
            return function

        return add


def pointwise(
    kernel: Kernel,
    result: Result,
    template: str,
    *arguments: Value | Number,
    dtype: torch.dtype | None = None,
) -> Value:
    """A value whose elements are an expression of the elements of others, which are broadcast.

    Args:
        kernel: Kernel that gets the statements.
        result: Shape and dtype of the value.
        template: C expression with ``{0}``, ``{1}`` and so on for the arguments, and ``{T}`` for
            the type in which it computes.
        *arguments: Values and numbers.
        dtype: Type in which the expression computes; by default that of the result.
    """
    kind = result.dtype if dtype is None else dtype
    if kind not in C_TYPES or result.dtype not in C_TYPES:
        raise UnsupportedError(f"{result.dtype}")
    total = math.prod(result.shape)
    for number, argument in enumerate(arguments):
        if isinstance(argument, Value):
            repeated = template.count(f"{{{number}}}") > 1
            # What is computed once is not to be computed in every pass of a larger loop.
            if repeated or argument.numel * 8 <= total:
                kernel.named(argument)

    def expression(index: Index) -> str:
        texts = [
            kernel.broadcast(argument, index, kind)
            if isinstance(argument, Value)
            else literal(argument, kind)
            for argument in arguments
        ]
        text = template.format(*texts, T=C_TYPES[kind])
        narrow = result.dtype.itemsize < 4 and result.dtype != torch.bool
        return f"(({C_TYPES[result.dtype]})({text}))" if narrow else f"({text})"

    return Value(result.shape, result.dtype, expression)


def checked(
    kernel: Kernel, value: Value, wrong: str, error: str, dtype: torch.dtype | None = None
) -> Value:
    """A value in memory, checked once: a wrong element is an error after the call.

    Args:
        kernel: Kernel that gets the statements.
        value: Value to check.
        wrong: C expression that is true of a wrong element ``{0}``.
        error: Name of the error in the headers.
        dtype: Type in which the expression computes; by default that of the value.
    """
    value = kernel.stored(value)
    buffer, view = value.place
    kind = value.dtype if dtype is None else dtype
    key = (buffer, view.storage_offset(), tuple(view.shape), view.stride(), wrong, kind)
    if key not in kernel.checked:
        kernel.checked.add(key)
        each = pointwise(kernel, Result(value.shape, torch.bool), wrong, value, dtype=kind)
        axes = list(range(len(value.shape)))
        combine = "{a} = {a} || {x};"
        found = kernel.reduce(
            each, axes, (), dtype=torch.bool, start=False, combine=combine, clause="||"
        )
        flag = found.place[0].name
        kernel.call(f"note_error({flag}[0], {error}, team);", reads=[found])
    return value
