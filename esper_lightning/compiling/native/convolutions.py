"""Convolutions of images and sequences, and their gradients: calls of ``convolutions.hpp``.

A sequence is an image of one row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import Operations, Result
from esper_lightning.compiling.native.statements import Rows
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Shape,
    UnsupportedError,
    Value,
    pointer,
)
from esper_lightning.compiling.native.views import contiguous, in_memory

__all__ = ["OPERATIONS"]

OPERATIONS = Operations()
operation = OPERATIONS.register

_LANES = 16  # numbers of the widest vector
_ROWS = 8  # rows of a result that are computed together, at most
_SUMMED = 512  # numbers of a row that are worth the sum of a vector behind them
_DEEPEST = 2**16  # numbers of which one number of a convolution is the sum
_LARGEST = 2**25  # numbers of the memory in which one thread works


@dataclass(frozen=True)
class _Convolution:
    """The sizes of a convolution.

    Attributes:
        images: Number of images.
        channels: Channels of an image.
        size: Rows and columns of an image.
        outputs: Channels of a result.
        kernel: Rows and columns of the kernel.
        stride: Pixels from one place of the kernel to the next.
        padding: Zeros on each side.
        dilation: Pixels from one tap of the kernel to the next.
        groups: Groups of channels.
        dtype: Type of all numbers.
    """

    images: int
    channels: int
    size: tuple[int, int]
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: torch.dtype

    @property
    def function(self) -> str:
        """The C++ class with the functions of this convolution."""
        numbers = (self.channels, *self.size, self.outputs, *self.kernel, *self.stride)
        numbers += (*self.padding, *self.dilation, self.groups)
        return f"Convolution<{C_TYPES[self.dtype]}, {', '.join(map(str, numbers))}>"

    @property
    def depth(self) -> int:
        """Numbers of which one number of the result is the sum."""
        return self.channels // self.groups * math.prod(self.kernel)

    @property
    def _axes(self) -> list[tuple[int, int, int, int]]:
        """Of each axis: extents of the result, of a plane, of the planes' input, and of shifts."""
        axes: list[tuple[int, int, int, int]] = []
        for size, kernel, stride, padding, dilation in zip(
            self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            result = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            shift = (kernel - 1) * dilation // stride
            reached = (size - 1 + padding) // stride - padding // stride + 1
            axes.append((result, result + shift, reached, shift))
        return axes

    @property
    def _row(self) -> int:
        """Numbers of a channel of the result in the width of a plane, rounded up."""
        rows, columns = self._axes
        return (rows[0] - 1) * columns[1] + columns[0] + _LANES

    @property
    def _planes(self) -> int:
        rows, columns = self._axes
        return self.channels * math.prod(self.stride) * rows[1] * columns[1] + self._row

    @property
    def batch(self) -> int:
        """Images over which the gradient of the weights is summed at once."""
        return min(self.images, -(-_SUMMED // self._row))

    @property
    def forward_work(self) -> int:
        """Numbers of the memory in which a thread computes results."""
        return self._planes + _ROWS * self._row

    @property
    def weight_work(self) -> int:
        """Numbers of the memory in which a thread computes the gradient of the weights."""
        return self.batch * (self._planes + self.outputs * self._row)

    @property
    def input_work(self) -> int:
        """Numbers of the memory in which a thread computes the gradient of the input."""
        rows, columns = ((reached, reached + shift) for _, _, reached, shift in self._axes)
        row = (rows[0] - 1) * columns[1] + columns[0] + _LANES
        planes = self.outputs * rows[1] * columns[1] + row
        return self.outputs * self.depth + planes + _ROWS * row


def _as_image(sizes: Sequence[int], otherwise: int) -> tuple[int, int]:
    """Sizes of the two axes of an image; those of a sequence get another size for the row."""
    one, *two = sizes
    return (one, two[0]) if two else (otherwise, one)


def _sizes(
    x: Value,
    weight: Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
) -> _Convolution:
    rank = len(x.shape) - 2
    if transposed:
        raise UnsupportedError("a transposed convolution")
    if rank not in (1, 2):
        raise UnsupportedError(f"a convolution of {rank} axes")
    if x.dtype not in (torch.float32, torch.float64) or weight.dtype != x.dtype:
        raise UnsupportedError(f"a convolution of {x.dtype} and {weight.dtype}")

    def axes(sizes: Sequence[int], otherwise: int) -> tuple[int, int]:
        return _as_image(list(sizes) * (rank if len(sizes) == 1 else 1), otherwise)

    convolution = _Convolution(
        images=x.shape[0],
        channels=x.shape[1],
        size=axes(x.shape[2:], 1),
        outputs=weight.shape[0],
        kernel=axes(weight.shape[2:], 1),
        stride=axes(stride, 1),
        padding=axes(padding, 0),
        dilation=axes(dilation, 1),
        groups=groups,
        dtype=x.dtype,
    )
    works = (convolution.forward_work, convolution.weight_work, convolution.input_work)
    outputs = convolution.outputs // groups * math.prod(convolution.kernel)
    if max(works) > _LARGEST or max(convolution.depth, outputs) > _DEEPEST:
        raise UnsupportedError(f"a convolution as large as of {[*x.shape]} and {[*weight.shape]}")
    return convolution


def _strides(x: Value) -> str:
    """Strides of images, channels, rows and columns in memory."""
    strides = x.place[1].stride()
    return ", ".join(map(str, strides if len(strides) == 4 else (*strides[:2], 0, strides[2])))


def _work(kernel: Kernel, dtype: torch.dtype, size: int, rows: int) -> str:
    """Pointer to the memory in which the thread works whose first row is ``{first}``."""
    if not kernel.shared:
        buffer = kernel.new_buffer(dtype, size)
        buffer.is_read = True
        return buffer.name
    granularity = Rows(rows).granularity  # threads have rows that are at least so far apart
    buffer = kernel.new_buffer(dtype, -(-rows // granularity) * size)
    buffer.is_read = True
    return f"{buffer.name} + ({{first}}) / {granularity} * (int64_t){size}"


@operation("convolution.default")
def _convolution(
    kernel: Kernel,
    result: Result,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    sizes = _sizes(x, weight, stride, padding, dilation, transposed, groups)
    x, weight = kernel.stored(in_memory(x)), contiguous(kernel, weight)
    reads = [weight]
    if bias is not None:
        bias = contiguous(kernel, bias)
        reads.append(bias)
    out = kernel.new_value(result.shape, result.dtype)
    work = _work(kernel, sizes.dtype, sizes.forward_work, sizes.images)
    pointers = [pointer(x), pointer(weight), "nullptr" if bias is None else pointer(bias)]
    pointers += [pointer(out), work, "{first}", "{end}"]
    kernel.call(
        f"{sizes.function}::forward<{_strides(x)}, {sizes.forward_work}>({', '.join(pointers)});",
        reads=reads,
        reads_by_row=[x],
        writes_by_row=[out],
        number=sizes.images,
    )
    return out


@operation("convolution_backward.default")
def _convolution_backward(
    kernel: Kernel,
    result: Result,
    gradient: Value,
    x: Value,
    weight: Value,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> list[Value | None]:
    sizes = _sizes(x, weight, stride, padding, dilation, transposed, groups)
    gradient = contiguous(kernel, gradient)
    of_input, of_weight, of_bias = output_mask
    return [
        _of_input(kernel, sizes, gradient, weight, x.shape) if of_input else None,
        _of_weight(kernel, sizes, gradient, x, weight.shape) if of_weight else None,
        _of_bias(kernel, sizes, gradient) if of_bias else None,
    ]


def _of_input(
    kernel: Kernel, sizes: _Convolution, gradient: Value, weight: Value, shape: Shape
) -> Value:
    weight = contiguous(kernel, weight)
    out = kernel.new_value(shape, sizes.dtype)
    work = _work(kernel, sizes.dtype, sizes.input_work, sizes.images)
    pointers = [pointer(gradient), pointer(weight), pointer(out), work, "{first}", "{end}"]
    kernel.call(
        f"{sizes.function}::of_input<{sizes.input_work}>({', '.join(pointers)});",
        reads=[weight],
        reads_by_row=[gradient],
        writes_by_row=[out],
        number=sizes.images,
    )
    return out


def _of_weight(
    kernel: Kernel, sizes: _Convolution, gradient: Value, x: Value, shape: Shape
) -> Value:
    x = kernel.stored(in_memory(x))
    out = kernel.new_value(shape, sizes.dtype)
    work = _work(kernel, sizes.dtype, sizes.weight_work, sizes.outputs)
    pointers = [pointer(x), pointer(gradient), pointer(out), work, "{first}", "{end}"]
    numbers = f"{_strides(x)}, {sizes.images}, {sizes.batch}, {sizes.weight_work}"
    kernel.call(
        f"{sizes.function}::of_weight<{numbers}>({', '.join(pointers)});",
        reads=[x, gradient],
        writes_by_row=[out],
        number=sizes.outputs,
    )
    return out


def _of_bias(kernel: Kernel, sizes: _Convolution, gradient: Value) -> Value:
    axes = [axis for axis in range(len(gradient.shape)) if axis != 1]
    return kernel.reduce(
        gradient,
        axes,
        (sizes.outputs,),
        dtype=sizes.dtype,
        start=0,
        combine="{a} += {x};",
        clause="+",
    )
