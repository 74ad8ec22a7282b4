"""Tensors in generated C++: expressions of their indices, or views of buffers.

Shapes and strides are known when the code is generated. A view is a tensor on the meta device, so
that torch's own view operations compute offsets and strides.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "C_TYPES",
    "Buffer",
    "Index",
    "Shape",
    "UnsupportedError",
    "Value",
    "canonical_index",
    "contiguous_view",
    "linear_index",
    "literal",
    "pointer",
    "strided_index",
]

Shape = tuple[int, ...]
Index = Sequence[str]
"""One C expression for each axis."""

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.int16: "int16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}
"""Types of the elements that generated code can hold."""


class UnsupportedError(NotImplementedError):
    """Raised for what has no translation: the function that needs it runs eagerly."""


@dataclass(eq=False)
class Buffer:
    """Memory of the generated function.

    Attributes:
        name: Name of the pointer in the code.
        dtype: Type of the elements.
        numel: Number of elements.
        kind: ``input`` and ``output`` belong to the caller, ``work`` is scratch memory, and
            ``packed`` is computed from constants once a call.
        writer: Number of the last group of statements that writes it; -1 before any.
        local: Number of a nest, variable and element's index: within that nest, the element at
            that index is the variable.
        is_read: Whether anything reads the memory, and not only the variable.
    """

    name: str
    dtype: torch.dtype
    numel: int
    kind: Literal["input", "output", "work", "packed"]
    writer: int = -1
    local: tuple[int, str, str] | None = None
    is_read: bool = field(default=False)


@dataclass(eq=False)
class Value:
    """A tensor of the traced function.

    Attributes:
        shape: Extent of each axis.
        dtype: Type of the elements.
        expression: Function from an index to the C expression of the element; ``None`` for a value
            in memory.
        buffer: Memory of the value; ``None`` for an expression.
        view: Tensor on the meta device with the strides and the offset in ``buffer``.
        is_constant: Whether the expression is a number that costs nothing to compute again.
    """

    shape: Shape
    dtype: torch.dtype
    expression: Callable[[Index], str] | None = None
    buffer: Buffer | None = None
    view: Tensor | None = None
    is_constant: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def place(self) -> tuple[Buffer, Tensor]:
        """Buffer and view of a value in memory."""
        assert self.buffer is not None
        assert self.view is not None
        return self.buffer, self.view


def literal(value: object, dtype: torch.dtype) -> str:
    """A number as a C constant of a type, exact to the last bit."""
    if not isinstance(value, bool | int | float):
        raise UnsupportedError(f"the constant {value!r}")
    if dtype == torch.bool:
        return "true" if value else "false"
    if not dtype.is_floating_point:
        number = int(value)
        if number != value:
            raise UnsupportedError(f"the constant {value!r} as {dtype}")
        if not torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max:
            raise UnsupportedError(f"the constant {value!r} as {dtype}")
        if number == torch.iinfo(torch.int64).min:
            return "INT64_MIN"
        return f"(({C_TYPES[dtype]})INT64_C({number}))"
    single = dtype == torch.float32
    number = float(torch.tensor(float(value), dtype=dtype).item())
    if math.isnan(number):
        return f'(({C_TYPES[dtype]})__builtin_nanf(""))'
    if math.isinf(number):
        return f"({'-' if number < 0 else ''}({C_TYPES[dtype]})__builtin_inff())"
    text = f"{number!r}{'f' if single else ''}"
    return f"({text})" if math.copysign(1.0, number) < 0 else text


def pointer(value: Value) -> str:
    """The C expression of the address of the first element of a value in memory."""
    buffer, view = value.place
    return f"({buffer.name} + {view.storage_offset()})"


def canonical_index(shape: Shape) -> list[str]:
    """The loop variables of a nest over a shape; axes of extent 1 have no loop."""
    return [f"i{axis}" if extent > 1 else "0" for axis, extent in enumerate(shape)]


def linear_index(shape: Shape, index: Index | None = None) -> str:
    """The offset of an element in contiguous memory; by default, at the canonical index."""
    return _offset(contiguous_view(shape, torch.float32), index or canonical_index(shape))


def strided_index(view: Tensor, index: Index) -> str:
    """The offset of an element of a view in its buffer."""
    return _offset(view, index)


def _offset(view: Tensor, index: Index) -> str:
    terms: list[str] = []
    for at, stride, extent in zip(index, view.stride(), view.shape, strict=True):
        if extent > 1 and stride != 0 and at != "0":
            # An index may be a constant, and as an ``int`` the product could be too large.
            factor = f"INT64_C({stride})" if stride >= 2**16 else str(stride)
            terms.append(at if stride == 1 else f"({at}) * {factor}")
    if view.storage_offset():
        terms.append(str(view.storage_offset()))
    return " + ".join(terms) or "0"


def contiguous_view(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A view of a whole buffer."""
    return torch.empty(shape, dtype=dtype, device="meta")
