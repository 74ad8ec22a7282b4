"""Whether a compiler rounds as it must with its flags, asked of a library that it has made.

Flags such as ``-ffast-math`` let a compiler assume that there is no NaN, or that sums may be added
in any order. They have many names and may be part of ``CXX``, so the numbers themselves are asked.
"""

import ctypes
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PROBE", "flaw_of"]

_COUNT = 64  # elements, for which compilers use vectors
_TINY = 2.0**-126  # the smallest normal number of float32


class _Check(NamedTuple):
    """An expression of float32 numbers.

    Attributes:
        expression: C expression of the elements ``a``, ``b`` and ``c``.
        numbers: The elements, which are the same at all places.
        result: What the expression must be at all places.
        flaw: What a compiler does that makes another number of it.
    """

    expression: str
    numbers: tuple[float, float, float]
    result: float
    flaw: str


_CHECKS = [
    _Check("a != a", (math.nan, 0.0, 0.0), 1.0, "does not notice NaN"),
    _Check("a - a", (math.inf, 0.0, 0.0), math.nan, "takes infinities for numbers"),
    _Check("a == __builtin_inff()", (math.inf, 0.0, 0.0), 1.0, "takes infinities for numbers"),
    # 2**24 + 1 is rounded to 2**24.
    _Check("(a + b) - a", (2.0**24, 1.0, 0.0), 0.0, "changes the order of sums"),
    _Check("a + 0.0f", (-0.0, 0.0, 0.0), 0.0, "loses the signs of zeros"),
    _Check("0.0f - a", (0.0, 0.0, 0.0), 0.0, "loses the signs of zeros"),
    # The product is 1 + 2**-11 + 2**-24 before it is rounded.
    _Check("a * b - c", (1 + 2**-12, 1 + 2**-12, 1 + 2**-11), 0.0, "does not round products"),
    _Check("a / B[0]", (5.0, 3.0, 0.0), 13981013 * 2.0**-23, "does not round quotients"),
    _Check("a * b", (_TINY, 0.5, 0.0), 0.5 * _TINY, "takes denormal numbers for zero"),
    _Check("a + a", (0.25 * _TINY, 0.0, 0.0), 0.5 * _TINY, "takes denormal numbers for zero"),
]

_FUNCTION = """
extern "C" void check_{number}(
    const float* __restrict__ A, const float* __restrict__ B, const float* __restrict__ C,
    float* __restrict__ result) {{
  for (int i = 0; i < {count}; i++) {{
    const float a = A[i], b = B[i], c = C[i];
    result[i] = {expression};
  }}
}}"""
PROBE = "".join(
    _FUNCTION.format(number=number, count=_COUNT, expression=check.expression)
    for number, check in enumerate(_CHECKS)
)
"""C++ text of the library to ask."""


def flaw_of(load: Callable[[], ctypes.CDLL]) -> str | None:
    """What a compiler does that it must not, in a few words; ``None`` if nothing.

    A library of loose flags may have denormal numbers taken for zero as soon as it is loaded, by
    all code that runs in this thread. That is undone.

    Args:
        load: Function that loads the library of ``PROBE``.
    """
    was_flushing = sys.float_info.min * 0.5 == 0.0
    torch.set_flush_denormal(False)
    try:
        library = load()
        for number, check in enumerate(_CHECKS):
            numbers = [torch.full((_COUNT,), one) for one in check.numbers]
            result = torch.empty(_COUNT)
            library[f"check_{number}"](*map(_pointer, (*numbers, result)))
            if {*map(repr, _numbers(result))} != {
                repr(check.result)
            }:  # with NaN and signs of zeros
                return check.flaw
    finally:
        torch.set_flush_denormal(was_flushing)
    return None


def _numbers(tensor: Tensor) -> list[float]:
    return tensor.tolist()  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
