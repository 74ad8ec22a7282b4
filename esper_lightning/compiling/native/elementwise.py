"""Operations on elements: arithmetic, rounding, comparisons and choices."""

import math

import torch

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import (
    Number,
    Operation,
    Operations,
    Result,
    checked,
    pointwise,
)
from esper_lightning.compiling.native.values import (
    C_TYPES,
    Index,
    UnsupportedError,
    Value,
    literal,
)

__all__ = ["OPERATIONS", "clamp"]

OPERATIONS = Operations()
operation = OPERATIONS.register


def _promoted(*arguments: Value | Number) -> torch.dtype:
    """The type in which torch compares arguments."""
    first, second = (
        torch.empty(a.shape, dtype=a.dtype, device="meta") if isinstance(a, Value) else a
        for a in arguments
    )
    return torch.result_type(first, second)


# Arithmetic


def _register_pointwise() -> None:
    def of_one(template: str, *, floats: bool) -> Operation:
        def run(kernel: Kernel, result: Result, x: Value) -> Value:
            if floats and not result.dtype.is_floating_point:
                raise UnsupportedError(f"{result.dtype} here")
            return pointwise(kernel, result, template, x)

        return run

    names = ["exp", "log", "log1p", "expm1", "sin", "cos", "tan", "asin", "acos", "atan", "sinh"]
    names += ["cosh", "tanh", "erf", "sqrt", "sigmoid"]
    for name in names:
        OPERATIONS[f"{name}.default"] = of_one(f"f_{name}({{0}})", floats=True)
    for name in ("floor", "ceil", "trunc", "round"):
        OPERATIONS[f"{name}.default"] = of_one(f"f_{name}({{0}})", floats=True)
    OPERATIONS["abs.default"] = of_one("f_abs(({T})({0}))", floats=False)
    OPERATIONS["reciprocal.default"] = of_one("({T})1 / {0}", floats=True)
    OPERATIONS["rsqrt.default"] = of_one("({T})1 / f_sqrt({0})", floats=True)
    OPERATIONS["frac.default"] = of_one("{0} - f_trunc({0})", floats=True)
    OPERATIONS["deg2rad.default"] = of_one(f"{{0}} * ({{T}}){math.pi / 180}", floats=True)
    OPERATIONS["rad2deg.default"] = of_one(f"{{0}} * ({{T}}){180 / math.pi}", floats=True)
    for name in ("exp2", "log2", "log10"):
        OPERATIONS[f"{name}.default"] = of_one(f"({{T}})__builtin_{name}({{0}})", floats=True)
    OPERATIONS["silu.default"] = of_one("{0} / (({T})1 + f_exp(-{0}))", floats=True)

    def of_bools(template: str) -> Operation:
        def run(kernel: Kernel, result: Result, *arguments: Value) -> Value:
            return pointwise(kernel, result, template, *arguments, dtype=torch.bool)

        return run

    OPERATIONS["logical_and.default"] = of_bools("{0} & {1}")
    OPERATIONS["logical_or.default"] = of_bools("{0} | {1}")
    OPERATIONS["logical_xor.default"] = of_bools("{0} != {1}")
    OPERATIONS["logical_not.default"] = of_bools("!{0}")

    def of_two(template: str, *, floats: bool = True) -> Operation:
        def run(kernel: Kernel, result: Result, x: Value | Number, y: Value | Number) -> Value:
            if floats and not result.dtype.is_floating_point:
                raise UnsupportedError(f"{result.dtype} here")
            return pointwise(kernel, result, template, x, y)

        return run

    OPERATIONS["minimum.default"] = of_two("f_minimum<{T}>({0}, {1})", floats=False)
    OPERATIONS["maximum.default"] = of_two("f_maximum<{T}>({0}, {1})", floats=False)
    for name, larger in (("fmax", "f_maximum"), ("fmin", "f_minimum")):
        OPERATIONS[f"{name}.default"] = of_two(
            f"{{0}} != {{0}} ? {{1}} : {{1}} != {{1}} ? {{0}} : {larger}<{{T}}>({{0}}, {{1}})",
            floats=False,
        )
    OPERATIONS["hypot.default"] = of_two("({T})__builtin_hypot({0}, {1})")
    for overload in ("Tensor", "Scalar"):
        OPERATIONS[f"copysign.{overload}"] = of_two("({T})__builtin_copysign({0}, {1})")
    xlogy = "{1} != {1} ? {1} : {0} == 0 ? ({T})0 : {0} * f_log({1})"
    for overload in ("Tensor", "Scalar_Self", "Scalar_Other"):
        OPERATIONS[f"xlogy.{overload}"] = of_two(xlogy)
    OPERATIONS["heaviside.default"] = of_two("{0} == 0 ? {1} : ({T})({0} > 0)", floats=False)
    OPERATIONS["logaddexp.default"] = of_two(
        "{0} == {1} && f_abs({0}) == ({T})__builtin_inff() ? {0}"
        " : f_maximum<{T}>({0}, {1}) + f_log1p(f_exp(-f_abs({0} - {1})))"
    )
    OPERATIONS["atan2.default"] = of_two("f_atan2({0}, {1})")
    OPERATIONS["tanh_backward.default"] = of_two("{0} * (({T})1 - {1} * {1})")
    OPERATIONS["sigmoid_backward.default"] = of_two("{0} * (({T})1 - {1}) * {1}")
    OPERATIONS["silu_backward.default"] = of_two("f_silu_backward({0}, {1})")

    def comparison(sign: str) -> Operation:
        def run(kernel: Kernel, result: Result, x: Value, y: Value | Number) -> Value:
            kind = _promoted(x, y)
            return pointwise(kernel, result, f"{{0}} {sign} {{1}}", x, y, dtype=kind)

        return run

    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    for name, sign in signs.items():
        for overload in ("Tensor", "Scalar"):
            OPERATIONS[f"{name}.{overload}"] = comparison(sign)

    def bits(sign: str, of_bool: str) -> Operation:
        def run(kernel: Kernel, result: Result, x: Value, y: Value | Number) -> Value:
            used = of_bool if result.dtype == torch.bool else sign
            return pointwise(kernel, result, f"{{0}} {used} {{1}}", x, y)

        return run

    for name, both in {"and": ("&", "&"), "or": ("|", "|"), "xor": ("^", "!=")}.items():
        for overload in ("Tensor", "Scalar"):
            OPERATIONS[f"bitwise_{name}.{overload}"] = bits(*both)


_register_pointwise()


@operation("add.Tensor", "add.Scalar")
def _add(
    kernel: Kernel, result: Result, x: Value | Number, y: Value | Number, alpha: Number = 1
) -> Value:
    if result.dtype == torch.bool:
        raise UnsupportedError("a sum of bools")
    if alpha == 1:
        return pointwise(kernel, result, "{0} + {1}", x, y)
    return pointwise(kernel, result, "{0} + {2} * {1}", x, y, alpha)


@operation("sub.Tensor", "sub.Scalar")
def _sub(
    kernel: Kernel, result: Result, x: Value | Number, y: Value | Number, alpha: Number = 1
) -> Value:
    if alpha == 1:
        return pointwise(kernel, result, "{0} - {1}", x, y)
    return pointwise(kernel, result, "{0} - {2} * {1}", x, y, alpha)


@operation("rsub.Scalar", "rsub.Tensor")
def _rsub(
    kernel: Kernel, result: Result, x: Value | Number, y: Value | Number, alpha: Number = 1
) -> Value:
    return _sub(kernel, result, y, x, alpha)


@operation("round.decimals")
def _round(kernel: Kernel, result: Result, x: Value, *, decimals: int) -> Value:
    if not result.dtype.is_floating_point:
        raise UnsupportedError(f"{result.dtype} here")
    scale = 10.0 ** abs(decimals) if abs(decimals) < 309 else math.inf
    if decimals == 0:
        return pointwise(kernel, result, "f_round({0})", x)
    rounded = "f_round({0} / {1}) * {1}" if decimals < 0 else "f_round({0} * {1}) / {1}"
    return pointwise(kernel, result, rounded, x, scale)


@operation("neg.default")
def _neg(kernel: Kernel, result: Result, x: Value) -> Value:
    return pointwise(kernel, result, "-{0}", x)


@operation("sign.default", "sgn.default")
def _sign(kernel: Kernel, result: Result, x: Value) -> Value:
    if not result.dtype.is_signed:
        raise UnsupportedError(f"{result.dtype} here")
    return pointwise(kernel, result, "f_sign<{T}>({0})", x)


@operation("mul.Tensor", "mul.Scalar")
def _mul(kernel: Kernel, result: Result, x: Value | Number, y: Value | Number) -> Value:
    sign = "&" if result.dtype == torch.bool else "*"
    return pointwise(kernel, result, f"{{0}} {sign} {{1}}", x, y)


@operation("div.Tensor", "div.Scalar")
def _div(kernel: Kernel, result: Result, x: Value | Number, y: Value | Number) -> Value:
    return pointwise(kernel, result, "{0} / {1}", x, y)


@operation("div.Tensor_mode", "div.Scalar_mode")
def _div_rounded(
    kernel: Kernel,
    result: Result,
    x: Value | Number,
    y: Value | Number,
    *,
    rounding_mode: str | None,
) -> Value:
    if rounding_mode is None:
        return _div(kernel, result, x, y)
    if rounding_mode == "floor":
        return _floor_divide(kernel, result, x, y)
    if not result.dtype.is_floating_point:
        return _divide(kernel, result, x, y)
    return pointwise(kernel, result, "f_trunc({0} / {1})", x, y)


def _divides(name: str) -> Operation:
    """An operation that divides, by two functions of the headers: for floats and for integers."""

    def run(kernel: Kernel, result: Result, x: Value | Number, y: Value | Number) -> Value:
        if result.dtype.is_floating_point:
            return pointwise(kernel, result, f"f_{name}<{{T}}>({{0}}, {{1}})", x, y)
        if isinstance(y, Value):
            y = checked(kernel, y, "{0} == 0", "DIVISION_BY_ZERO", result.dtype)
        elif not int(y):
            raise UnsupportedError("a division of integers by 0")
        return pointwise(kernel, result, f"f_integer_{name}<{{T}}>({{0}}, {{1}})", x, y)

    return run


def _shifts(side: str) -> Operation:
    def run(kernel: Kernel, result: Result, x: Value | Number, y: Value | Number) -> Value:
        return pointwise(kernel, result, f"f_{side}_shift<{{T}}>({{0}}, {{1}})", x, y)

    return run


for _side in ("left", "right"):
    for _overload in ("Tensor", "Tensor_Scalar", "Scalar_Tensor"):
        OPERATIONS[f"bitwise_{_side}_shift.{_overload}"] = _shifts(_side)
    for _overload in ("Tensor", "Scalar"):
        OPERATIONS[f"__{_side[0]}shift__.{_overload}"] = _shifts(_side)

_divide, _floor_divide = _divides("divide"), _divides("floor_divide")
for _overload in ("Tensor", "Scalar"):
    OPERATIONS[f"fmod.{_overload}"] = _divides("fmod")
for _overload in ("Tensor", "Scalar", "Scalar_Tensor"):
    OPERATIONS[f"remainder.{_overload}"] = _divides("remainder")
for _overload in ("default", "Scalar"):
    OPERATIONS[f"floor_divide.{_overload}"] = _floor_divide


@operation("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(kernel: Kernel, result: Result, x: Value | Number, y: Value | Number) -> Value:
    squares = {2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "f_sqrt({0})", -1: "({T})1 / {0}"}
    squares[-0.5] = "({T})1 / f_sqrt({0})"
    floats = result.dtype.is_floating_point
    if not isinstance(y, Value) and y in squares and (floats or y in (2, 3)):
        return pointwise(kernel, result, squares[y], x)
    if not floats:
        raise UnsupportedError("a power of integers")
    return pointwise(kernel, result, "f_pow({0}, {1})", x, y)


@operation("lerp.Tensor", "lerp.Scalar")
def _lerp(kernel: Kernel, result: Result, x: Value, y: Value, weight: Value | Number) -> Value:
    return pointwise(kernel, result, "f_lerp<{T}>({0}, {1}, {2})", x, y, weight)


@operation("addcmul.default")
def _addcmul(
    kernel: Kernel, result: Result, x: Value, y: Value, z: Value, *, value: Number = 1
) -> Value:
    return pointwise(kernel, result, "{0} + {3} * {1} * {2}", x, y, z, value)


@operation("addcdiv.default")
def _addcdiv(
    kernel: Kernel, result: Result, x: Value, y: Value, z: Value, *, value: Number = 1
) -> Value:
    return pointwise(kernel, result, "{0} + {3} * {1} / {2}", x, y, z, value)


@operation("clamp.default", "clamp.Tensor")
def clamp(
    kernel: Kernel,
    result: Result,
    x: Value,
    min: Value | Number | None = None,
    max: Value | Number | None = None,
) -> Value:
    """Values between bounds; NaN stays NaN."""
    value = x
    for bound, name, sign in ((min, "f_maximum", "<"), (max, "f_minimum", ">")):
        if isinstance(bound, Value):
            value = pointwise(kernel, result, f"{name}<{{T}}>({{0}}, {{1}})", value, bound)
        elif bound is not None:
            if math.isnan(bound):
                raise UnsupportedError("a bound that is NaN")
            value = pointwise(
                kernel, result, f"f_where<{{T}}>({{0}} {sign} {{1}}, {{1}}, {{0}})", value, bound
            )
    return value


@operation("clamp_min.default", "clamp_min.Tensor")
def _clamp_min(kernel: Kernel, result: Result, x: Value, min: Value | Number) -> Value:
    return clamp(kernel, result, x, min)


@operation("clamp_max.default", "clamp_max.Tensor")
def _clamp_max(kernel: Kernel, result: Result, x: Value, max: Value | Number) -> Value:
    return clamp(kernel, result, x, None, max)


@operation("bitwise_not.default")
def _bitwise_not(kernel: Kernel, result: Result, x: Value) -> Value:
    return pointwise(kernel, result, "!{0}" if result.dtype == torch.bool else "~{0}", x)


@operation("isnan.default")
def _isnan(kernel: Kernel, result: Result, x: Value) -> Value:
    return pointwise(kernel, result, "{0} != {0}", x, dtype=x.dtype)


@operation("signbit.default")
def _signbit(kernel: Kernel, result: Result, x: Value) -> Value:
    sign = "__builtin_signbit({0}) != 0" if x.dtype.is_floating_point else "{0} < 0"
    return pointwise(kernel, result, sign, x, dtype=x.dtype)


@operation("isinf.default")
def _isinf(kernel: Kernel, result: Result, x: Value) -> Value:
    if not x.dtype.is_floating_point:
        raise UnsupportedError(f"{x.dtype} here")
    return pointwise(kernel, result, "f_abs({0}) == ({T})__builtin_inff()", x, dtype=x.dtype)


@operation("nan_to_num.default")
def _nan_to_num(
    kernel: Kernel,
    result: Result,
    x: Value,
    nan: Number | None = None,
    posinf: Number | None = None,
    neginf: Number | None = None,
) -> Value:
    if not x.dtype.is_floating_point:
        return x
    ends = torch.finfo(x.dtype)
    template = "f_nan_to_num<{T}>({0}, {1}, {2}, {3})"
    high, low = ends.max if posinf is None else posinf, ends.min if neginf is None else neginf
    return pointwise(kernel, result, template, x, nan or 0.0, high, low)


@operation("where.self")
def _where(
    kernel: Kernel, result: Result, condition: Value, x: Value | Number, y: Value | Number
) -> Value:
    sides = [
        side
        if not isinstance(side, Value) or side.dtype == result.dtype
        else pointwise(kernel, Result(side.shape, result.dtype), "{0}", side)
        for side in (x, y)
    ]
    return _chosen(kernel, result, condition, *sides)


@operation("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(
    kernel: Kernel, result: Result, x: Value, mask: Value, value: Value | Number
) -> Value:
    return _where(kernel, result, mask, value, x)


def _chosen(
    kernel: Kernel, result: Result, condition: Value, x: Value | Number, y: Value | Number
) -> Value:
    if condition.dtype not in (torch.bool, torch.uint8):
        raise UnsupportedError(f"a condition of {condition.dtype}")
    total = math.prod(result.shape)
    for argument in (condition, x, y):
        if isinstance(argument, Value) and argument.numel * 8 <= total:
            kernel.named(argument)

    def expression(index: Index) -> str:
        chosen, *sides = (
            kernel.broadcast(side, index, kind) if isinstance(side, Value) else literal(side, kind)
            for side, kind in ((condition, torch.bool), (x, result.dtype), (y, result.dtype))
        )
        return f"f_where<{C_TYPES[result.dtype]}>({chosen}, {sides[0]}, {sides[1]})"

    return Value(result.shape, result.dtype, expression)
