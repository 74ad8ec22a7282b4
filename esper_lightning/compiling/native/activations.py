"""Activation functions and their gradients."""

from esper_lightning.compiling.native.elementwise import clamp
from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import (
    Number,
    Operations,
    Result,
    pointwise,
)
from esper_lightning.compiling.native.values import UnsupportedError, Value

__all__ = ["OPERATIONS"]

OPERATIONS = Operations()
operation = OPERATIONS.register


@operation("relu.default")
def _relu(kernel: Kernel, result: Result, x: Value) -> Value:
    return clamp(kernel, result, x, 0)


@operation("threshold_backward.default")
def _threshold_backward(
    kernel: Kernel, result: Result, gradient: Value, x: Value, threshold: Number
) -> Value:
    # Torch compares the other way round: the gradient passes where x is NaN.
    return pointwise(
        kernel, result, "f_where<{T}>({1} <= {2}, ({T})0, {0})", gradient, x, threshold
    )


@operation("elu.default")
def _elu(
    kernel: Kernel,
    result: Result,
    x: Value,
    alpha: Number = 1,
    scale: Number = 1,
    input_scale: Number = 1,
) -> Value:
    return pointwise(
        kernel, result, "f_elu<{T}>({0}, {1}, {2}, {3})", x, alpha * scale, scale, input_scale
    )


@operation("elu_backward.default")
def _elu_backward(
    kernel: Kernel,
    result: Result,
    gradient: Value,
    alpha: Number,
    scale: Number,
    input_scale: Number,
    is_result: bool,
    x: Value,
) -> Value:
    flag = "true" if is_result else "false"
    return pointwise(
        kernel,
        result,
        f"f_elu_backward<{{T}}>({{0}}, {{1}}, {{2}}, {{3}}, {flag}, {{4}})",
        gradient,
        alpha * scale,
        scale,
        input_scale,
        x,
    )


@operation("gelu.default")
def _gelu(kernel: Kernel, result: Result, x: Value, *, approximate: str = "none") -> Value:
    if approximate != "none":
        raise UnsupportedError(f"gelu with approximate={approximate!r}")
    return pointwise(kernel, result, "f_gelu<{T}>({0})", x)


@operation("gelu_backward.default")
def _gelu_backward(
    kernel: Kernel, result: Result, gradient: Value, x: Value, *, approximate: str = "none"
) -> Value:
    if approximate != "none":
        raise UnsupportedError(f"gelu with approximate={approximate!r}")
    return pointwise(kernel, result, "f_gelu_backward<{T}>({0}, {1})", gradient, x)


@operation("softplus.default")
def _softplus(
    kernel: Kernel, result: Result, x: Value, beta: Number = 1, threshold: Number = 20
) -> Value:
    return pointwise(kernel, result, "f_softplus<{T}>({0}, {1}, {2})", x, beta, threshold)


@operation("softplus_backward.default")
def _softplus_backward(
    kernel: Kernel, result: Result, gradient: Value, x: Value, beta: Number, threshold: Number
) -> Value:
    return pointwise(
        kernel,
        result,
        "f_softplus_backward<{T}>({0}, {1}, {2}, {3})",
        gradient,
        x,
        beta,
        threshold,
    )
