"""Constants, and values of one type as values of another."""

from typing import Any

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
    literal,
)

__all__ = ["OPERATIONS"]

OPERATIONS = Operations()
operation = OPERATIONS.register


def _constant(result: Result, value: Number) -> Value:
    text = literal(value, result.dtype)
    return Value(result.shape, result.dtype, lambda _: text, is_constant=True)


def _ignoring(kwargs: dict[str, Any]) -> None:
    """Refuse keywords that change more than place and layout, which are always the same here."""
    known = {"dtype", "device", "layout", "pin_memory", "memory_format", "non_blocking"}
    unknown = set(kwargs) - known
    if unknown or kwargs.get("layout") not in (None, torch.strided):
        raise UnsupportedError(f"the arguments {sorted(kwargs)}")
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        raise UnsupportedError(f"the device {kwargs['device']}")


@operation("full.default", "full_like.default", "fill.Scalar")
def _full(kernel: Kernel, result: Result, _: object, value: Number, **kwargs: Any) -> Value:
    _ignoring(kwargs)
    return _constant(result, value)


@operation("new_full.default")
def _new_full(
    kernel: Kernel, result: Result, _: object, size: object, value: Number, **kwargs: Any
) -> Value:
    _ignoring(kwargs)
    return _constant(result, value)


@operation("ones.default", "ones_like.default", "new_ones.default")
def _ones(kernel: Kernel, result: Result, *_: object, **kwargs: Any) -> Value:
    _ignoring(kwargs)
    return _constant(result, 1)


@operation("zeros.default", "zeros_like.default", "new_zeros.default")
def _zeros(kernel: Kernel, result: Result, *_: object, **kwargs: Any) -> Value:
    _ignoring(kwargs)
    return _constant(result, 0)


@operation("scalar_tensor.default")
def _scalar_tensor(kernel: Kernel, result: Result, value: Number, **kwargs: Any) -> Value:
    _ignoring(kwargs)
    return _constant(result, value)


@operation("arange.default", "arange.start", "arange.start_step")
def _arange(kernel: Kernel, result: Result, *bounds: Number, **kwargs: Any) -> Value:
    _ignoring(kwargs)
    start, step = (0 if len(bounds) == 1 else bounds[0]), (bounds[2] if len(bounds) == 3 else 1)
    if not all(isinstance(number, int) for number in (start, step)):
        raise UnsupportedError("a range of numbers that are not integers")
    kind = C_TYPES[result.dtype]

    def expression(index: Index) -> str:
        return f"(({kind})({start} + {step} * ({index[0]})))"

    return Value(result.shape, result.dtype, expression)


@operation("_to_copy.default")
def _to_copy(kernel: Kernel, result: Result, x: Value, **kwargs: Any) -> Value:
    _ignoring(kwargs)
    if x.dtype == result.dtype:
        return x
    return pointwise(kernel, result, "{0}", x)


@operation("detach.default", "alias.default", "lift_fresh_copy.default")
def _same(kernel: Kernel, result: Result, x: Value) -> Value:
    return x


@operation("fill.Tensor")
def _fill(kernel: Kernel, result: Result, _: object, value: Value) -> Value:
    return pointwise(kernel, result, "{0}", value)


@operation("clone.default")
def _clone(kernel: Kernel, result: Result, x: Value, **kwargs: Any) -> Value:
    _ignoring(kwargs)
    return x
