"""Pooling of images, and its gradients: calls of ``convolutions.hpp``.

The axes before the last two are planes, each of which is pooled alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import Operations, Result
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Shape,
    UnsupportedError,
    Value,
    pointer,
)
from esper_lightning.compiling.native.views import contiguous

__all__ = ["OPERATIONS"]

OPERATIONS = Operations()
operation = OPERATIONS.register


class _Window(NamedTuple):
    """Pixels of an axis of which a mean is taken: from ``first`` to before ``end``.

    The sum over a window of an image is divided by the sizes of both axes.
    """

    first: int
    end: int
    size: int


def _pair(sizes: Sequence[int], otherwise: Sequence[int] = ()) -> tuple[int, int]:
    """Sizes of both axes, given as two, as one for both, or as none for others."""
    first, *rest = sizes or otherwise
    return first, (rest or [first])[0]


def _planes(x: Value) -> int:
    if x.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(f"pooling of {x.dtype}")
    return math.prod(x.shape[:-2])


# Maxima


@operation("max_pool2d_with_indices.default")
def _max_pool(
    kernel: Kernel,
    result: Result,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> list[Value]:
    planes, x = _planes(x), contiguous(kernel, x)
    out = kernel.new_value(result.shape, result.dtype)
    places = kernel.new_value(result.shape, torch.int64)
    numbers = [*x.shape[-2:], *result.shape[-2:], *_pair(kernel_size), *_pair(stride, kernel_size)]
    numbers += [*_pair(padding), *_pair(dilation)]
    function = f"largest<{C_TYPES[x.dtype]}, {', '.join(map(str, numbers))}>"
    pointers = f"{pointer(x)}, {pointer(out)}, {pointer(places)}, {{first}}, {{end}}"
    kernel.call(
        f"{function}({pointers});",
        reads_by_row=[_by_plane(x)],
        writes_by_row=[out, places],
        number=planes,
    )
    return [out, places]


@operation("max_pool2d_with_indices_backward.default")
def _max_pool_backward(
    kernel: Kernel,
    result: Result,
    gradient: Value,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    places: Value,
) -> Value:
    planes, gradient, places = _planes(x), contiguous(kernel, gradient), contiguous(kernel, places)
    out = kernel.new_value(x.shape, x.dtype)
    sizes = f"{math.prod(x.shape[-2:])}, {math.prod(gradient.shape[-2:])}"
    pointers = f"{pointer(gradient)}, {pointer(places)}, {pointer(out)}, team, {{first}}, {{end}}"
    kernel.call(
        f"add_at<{C_TYPES[x.dtype]}, {sizes}>({pointers});",
        reads_by_row=[_by_plane(gradient), _by_plane(places)],
        writes_by_row=[out],
        number=planes,
    )
    return out


# Means


@operation("avg_pool2d.default")
def _avg_pool(
    kernel: Kernel,
    result: Result,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    sizes = kernel_size, stride, padding
    windows = _windows(x.shape, result.shape, *sizes, count_include_pad, divisor_override)
    return _means(kernel, x, result.shape, windows)


@operation("avg_pool2d_backward.default")
def _avg_pool_backward(
    kernel: Kernel,
    result: Result,
    gradient: Value,
    x: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Value:
    sizes = kernel_size, stride, padding
    windows = _windows(x.shape, gradient.shape, *sizes, count_include_pad, divisor_override)
    return _of_means(kernel, gradient, x.shape, windows)


@operation("_adaptive_avg_pool2d.default")
def _adaptive_avg_pool(kernel: Kernel, result: Result, x: Value, size: Sequence[int]) -> Value:
    return _means(kernel, x, result.shape, _adaptive_windows(x.shape, result.shape))


@operation("_adaptive_avg_pool2d_backward.default")
def _adaptive_avg_pool_backward(kernel: Kernel, result: Result, gradient: Value, x: Value) -> Value:
    return _of_means(kernel, gradient, x.shape, _adaptive_windows(x.shape, gradient.shape))


def _windows(
    shape: Shape,
    pooled: Shape,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    counts_padding: bool,
    divisor: int | None,
) -> list[list[_Window]]:
    """The windows of both axes.

    Args:
        shape: Shape of the images.
        pooled: Shape of the result.
        kernel_size: Pixels of a window.
        stride: Pixels from one window to the next; as many as those of a window if empty.
        padding: Zeros on each side.
        counts_padding: Whether these zeros count.
        divisor: Number by which all sums are divided; ``None`` for the number of pixels.
    """
    windows: list[list[_Window]] = []
    axes = zip(
        shape[-2:],
        pooled[-2:],
        _pair(kernel_size),
        _pair(stride, kernel_size),
        _pair(padding),
        strict=True,
    )
    for axis, (extent, number, kernel, step, pad) in enumerate(axes):
        windows.append([])
        for at in range(number):
            first = at * step - pad
            end = min(first + kernel, extent + pad)
            inside = max(first, 0), min(end, extent)
            size = end - first if counts_padding else inside[1] - inside[0]
            if divisor is not None:
                size = divisor if axis == 0 else 1
            windows[-1].append(_Window(*inside, size))
    return windows


def _adaptive_windows(shape: Shape, pooled: Shape) -> list[list[_Window]]:
    windows: list[list[_Window]] = []
    for extent, number in zip(shape[-2:], pooled[-2:], strict=True):
        bounds = [(at * extent // number, -(-(at + 1) * extent // number)) for at in range(number)]
        windows.append([_Window(first, end, end - first) for first, end in bounds])
    return windows


def _means(kernel: Kernel, x: Value, shape: Shape, windows: list[list[_Window]]) -> Value:
    return _pool(kernel, "means", x, x.shape, shape, shape, windows)


def _of_means(kernel: Kernel, gradient: Value, shape: Shape, windows: list[list[_Window]]) -> Value:
    return _pool(kernel, "of_means", gradient, shape, gradient.shape, shape, windows)


def _pool(
    kernel: Kernel,
    function: str,
    x: Value,
    images: Shape,
    pooled: Shape,
    shape: Shape,
    windows: list[list[_Window]],
) -> Value:
    planes, x = _planes(x), contiguous(kernel, x)
    out = kernel.new_value(shape, x.dtype)
    sizes = ", ".join(map(str, (*images[-2:], *pooled[-2:])))
    names = f"rows_{out.place[0].name}", f"columns_{out.place[0].name}"
    tables = [
        f"static const Window {name}[] = {{{{"
        + ", ".join(f"{{{{{window.first}, {window.end}, {window.size}}}}}" for window in axis)
        + "}};"
        for name, axis in zip(names, windows, strict=True)
    ]
    arguments = f"{pointer(x)}, {pointer(out)}, {', '.join(names)}, {{first}}, {{end}}"
    kernel.call(
        f"{' '.join(tables)} {function}<{C_TYPES[x.dtype]}, {sizes}>({arguments});",
        reads_by_row=[_by_plane(x)],
        writes_by_row=[out],
        number=planes,
    )
    return out


def _by_plane(x: Value) -> Value:
    """Images in memory without gaps, with one axis for all planes."""
    buffer, view = x.place
    view = view.view(-1, *x.shape[-2:])
    return Value(tuple(view.shape), x.dtype, buffer=buffer, view=view)
