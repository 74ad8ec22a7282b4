"""Every operation that native code knows gives what torch gives, for values of every kind.

Operations are compiled together, for a few layouts of their arguments, and run on many values.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from esper_lightning.compiling.native.decompositions import OWN
from esper_lightning.compiling.native.loops import NativeFunction, NativeMap
from esper_lightning.compiling.native.translation import OPERATIONS, translate
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.tracing import Traced
from tests.compiling.native.test_convolutions import used_operations

aten = torch.ops.aten
CPU = torch.device("cpu")
ODD = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1e-3, 3.0, 7.9, -7.9, 20.5, 88.8, -104.5]
ODD += [float("nan"), float("inf"), float("-inf"), 1e-40, -1e-40, 1e-45, 1.1754944e-38]
ODD += [3.4028235e38, -3.4028235e38, 1e30, -1e30, 1e-30, 16777216.0, 2147483648.0]

# Functions of two float tensors ``x`` and ``y`` that broadcast, two integer tensors ``k`` and ``n``
# (indices from 0 to 3) and two bool tensors ``a`` and ``b``, with the number of units in the last
# place by which results may differ (0: the same bits).
EXACT: dict[str, Any] = {
    "add": lambda v: v.x + v.y,
    "add scalar": lambda v: aten.add.Scalar(v.x, 2.5),
    "sub scalar": lambda v: aten.sub.Scalar(v.x, 2.5),
    "mul scalar": lambda v: aten.mul.Scalar(v.x, 2.5),
    "div scalar": lambda v: aten.div.Scalar(v.x, 2.5),
    "rsub tensor": lambda v: aten.rsub.Tensor(v.x, v.y),
    "alias": lambda v: aten.alias(v.x),
    "add alpha": lambda v: torch.add(v.k, v.n, alpha=3),
    "add number": lambda v: v.x + 2,
    "sub": lambda v: v.x - v.y,
    "sub alpha": lambda v: torch.sub(v.k, v.n, alpha=2),
    "rsub": lambda v: 1.5 - v.x,
    "mul": lambda v: v.x * v.y,
    "mul bool": lambda v: v.a * v.b,
    "mul mixed": lambda v: v.x * v.k,
    "div": lambda v: v.x / v.y,
    "div integers": lambda v: v.k / (v.n + 1),
    "div integers by zero": lambda v: (v.k - 2) / v.n,
    "div number": lambda v: v.x / 3.0,
    "div floor": lambda v: torch.div(v.x, v.y, rounding_mode="floor"),
    "div trunc": lambda v: torch.div(v.x, v.y, rounding_mode="trunc"),
    "div floor integers": lambda v: torch.div(v.k - 2, 3, rounding_mode="floor"),
    "div trunc integers": lambda v: torch.div(v.k - 2, -2, rounding_mode="trunc"),
    "div scalar floor": lambda v: aten.div.Scalar_mode(v.x, 0.7, rounding_mode="floor"),
    "floor divide": lambda v: v.x // v.y,
    "floor divide integers": lambda v: (v.k - 2) // -3,
    "floor divide by a tensor": lambda v: (v.k - 2) // (2 * v.n - 3),
    "floor divide of a number": lambda v: 7 // (v.k - 5),
    "div trunc by a tensor": lambda v: torch.div(v.k - 2, 2 * v.n - 3, rounding_mode="trunc"),
    "div trunc by -1": lambda v: torch.div(v.k - 2, -1, rounding_mode="trunc"),
    "remainder by a tensor": lambda v: (v.k - 2) % (2 * v.n - 3),
    "remainder of a number": lambda v: -7 % (v.k + 1),
    "remainder of a float": lambda v: 7.5 % (v.u.abs() + 0.1),
    "fmod by a tensor": lambda v: torch.fmod(v.k - 2, 2 * v.n - 3),
    "fmod integer": lambda v: torch.fmod(v.k - 2, -2),
    "shift left": lambda v: (v.k - 2) << v.n,
    "shift left number": lambda v: (v.k - 2) << 3,
    "shift right": lambda v: (v.k - 2) >> v.n,
    "shift right number": lambda v: (v.k * 9 - 14) >> 1,
    "shift bits left": lambda v: torch.bitwise_left_shift(v.k, v.n),
    "shift bits left by a number": lambda v: torch.bitwise_left_shift(v.k, 2),
    "shift bits left of a number": lambda v: torch.bitwise_left_shift(5, v.k),
    "shift bits right": lambda v: torch.bitwise_right_shift(v.k, v.n),
    "shift bits right by a number": lambda v: torch.bitwise_right_shift(v.k, 2),
    "shift bits right of a number": lambda v: torch.bitwise_right_shift(-5, v.k),
    "floor divide scalar": lambda v: aten.floor_divide.Scalar(v.x, 2.5),
    "frac": lambda v: v.x.frac(),
    "deg2rad": lambda v: v.x.deg2rad(),
    "rad2deg": lambda v: v.x.rad2deg(),
    "copysign": lambda v: torch.copysign(v.x, v.y),
    "copysign number": lambda v: torch.copysign(v.x, -1.0),
    "heaviside": lambda v: torch.heaviside(v.x, v.y),
    "signbit": lambda v: v.x.signbit(),
    "signbit integer": lambda v: (v.k - 2).signbit(),
    "fmax": lambda v: torch.fmax(v.x, v.y),
    "fmin": lambda v: torch.fmin(v.x, v.y),
    "fmax integer": lambda v: torch.fmax(v.k, v.n),
    "products of the same": lambda v: (2 * v.s) * (2 * v.s) - 4 * (v.s * v.s),
    "whole numbers": lambda v: v.x.clamp(-5, 5).nan_to_num().long().float(),
    "whole numbers of 32 bits": lambda v: v.s.int().float() + v.s.double().long().double(),
    "neg": lambda v: -v.x,
    "sign": lambda v: v.x.sign(),
    "sgn": lambda v: v.k.sgn(),
    "abs": lambda v: v.x.abs(),
    "abs integer": lambda v: (v.k - 2).abs(),
    "reciprocal": lambda v: v.x.reciprocal(),
    "square": lambda v: v.x.square(),
    "pow 2": lambda v: v.x**2,
    "pow 3": lambda v: v.k**3,
    "pow -1": lambda v: v.x**-1,
    "pow -0.5": lambda v: v.x**-0.5,
    "floor": lambda v: v.x.floor(),
    "ceil": lambda v: v.x.ceil(),
    "trunc": lambda v: v.x.trunc(),
    "round": lambda v: v.x.round(),
    "round decimals": lambda v: v.x.round(decimals=2),
    "round to hundreds": lambda v: v.x.round(decimals=-2),
    "minimum": lambda v: torch.minimum(v.x, v.y),
    "maximum": lambda v: torch.maximum(v.x, v.y),
    "maximum integer": lambda v: torch.maximum(v.k, v.n),
    "fmod": lambda v: torch.fmod(v.s, v.u.abs() + 0.1),
    "fmod number": lambda v: torch.fmod(v.s, 0.7),
    "remainder": lambda v: torch.remainder(v.s, v.u.abs() + 0.1),
    "remainder number": lambda v: torch.remainder(v.s, -0.7),
    "remainder integer": lambda v: torch.remainder(v.k - 2, 3),
    "clamp": lambda v: v.x.clamp(-1.0, 2.0),
    "clamp tensor": lambda v: v.x.clamp(-v.y.abs(), v.y.abs()),
    "clamp min": lambda v: v.x.clamp_min(0.25),
    "clamp max": lambda v: v.x.clamp_max(0.25),
    "clamp min tensor": lambda v: v.x.clamp_min(v.y),
    "clamp max tensor": lambda v: v.x.clamp_max(v.y),
    "clamp integer": lambda v: v.k.clamp(1, 2),
    "relu": lambda v: v.x.relu(),
    "threshold backward": lambda v: aten.threshold_backward(v.y, v.x, 0),
    "lt": lambda v: v.x < v.y,
    "le": lambda v: v.x <= 1,
    "gt": lambda v: v.x > v.k,
    "ge": lambda v: v.x >= 0.1,
    "eq": lambda v: v.x == v.y,
    "ne": lambda v: v.k != 2,
    "eq number": lambda v: v.k == 1,
    "lt number": lambda v: v.x < 1.5,
    "ne tensor": lambda v: v.x != v.y,
    "le tensor": lambda v: v.k <= v.n,
    "gt number": lambda v: v.k > 1.5,
    "ge tensor": lambda v: v.x >= v.y,
    "logical and": lambda v: torch.logical_and(v.x, v.a),
    "logical or": lambda v: torch.logical_or(v.k, v.a),
    "logical xor": lambda v: torch.logical_xor(v.b, v.a),
    "logical not": lambda v: torch.logical_not(v.x),
    "bitwise and": lambda v: v.k & v.n,
    "bitwise or": lambda v: v.a | v.b,
    "bitwise xor": lambda v: v.k ^ v.n,
    "bitwise and bool": lambda v: v.a & v.b,
    "bitwise or number": lambda v: v.k | 1,
    "bitwise and number": lambda v: v.k & 2,
    "bitwise xor number": lambda v: v.k ^ 3,
    "bitwise not": lambda v: ~v.a,
    "bitwise not integer": lambda v: ~v.k,
    "isnan": lambda v: v.x.isnan(),
    "isinf": lambda v: v.x.isinf(),
    "isfinite": lambda v: v.x.isfinite(),
    "nan to num": lambda v: v.x.nan_to_num(2.0),
    "where": lambda v: torch.where(v.a, v.x, v.y),
    "where number": lambda v: torch.where(v.x > 0, v.y, 0.0),
    "where numbers": lambda v: torch.where(v.a, 1.0, 2.0),
    "where number first": lambda v: torch.where(v.a, 3.0, v.x),
    "where mixed": lambda v: torch.where(v.a, v.k, v.x),
    "masked fill": lambda v: v.x.masked_fill(v.a, -1.0),
    "masked fill tensor": lambda v: v.x.masked_fill(v.a, torch.tensor(2.5)),
    "to double": lambda v: v.x.double(),
    "to integer": lambda v: v.x.clamp(-5, 5).nan_to_num().long(),
    "to bool": lambda v: v.x.bool(),
    "to float": lambda v: v.k.float(),
    "to small": lambda v: (v.k + v.n).to(torch.uint8) * 100,
    "full": lambda v: torch.full((2, 3), 1.5),
    "full like": lambda v: torch.full_like(v.x, 2.0),
    "new full": lambda v: v.x.new_full((3,), float("inf")),
    "ones": lambda v: torch.ones(3),
    "ones like": lambda v: torch.ones_like(v.k),
    "new ones": lambda v: v.x.new_ones(2),
    "zeros": lambda v: torch.zeros(2, dtype=torch.int64),
    "zeros like": lambda v: torch.zeros_like(v.a),
    "new zeros": lambda v: v.x.new_zeros(2),
    "scalar tensor": lambda v: aten.scalar_tensor(2.5),
    "arange": lambda v: torch.arange(5),
    "arange from": lambda v: torch.arange(2, 9),
    "arange by": lambda v: torch.arange(1, 9, 3),
    "detach": lambda v: v.x.detach() + 1.0,
    "amax": lambda v: v.x.amax(-1),
    "amin": lambda v: v.x.amin(0),
    "max": lambda v: v.x.max(),
    "min": lambda v: v.x.min(),
    "amax integers": lambda v: (v.k - v.n).amax(-1),
    "amin integers": lambda v: (v.k - v.n).amin(0),
    "argmax": lambda v: v.x.argmax(-1),
    "argmax first": lambda v: v.x.argmax(0, keepdim=True),
    "argmax integers": lambda v: v.k.argmax(-1),
    "argmax of all": lambda v: (v.x + 0.0).argmax(),
    "argmin": lambda v: v.x.argmin(-1, keepdim=True),
    "argmin integers": lambda v: (v.k - v.n).argmin(0),
    "max dim": lambda v: v.x.max(0).values,
    "max dim place": lambda v: v.x.max(-1, keepdim=True).indices,
    "min dim": lambda v: v.x.min(-1).values,
    "min dim place": lambda v: v.k.min(0).indices,
    "norm of infinity": lambda v: torch.linalg.vector_norm(v.x, float("inf"), dim=-1),
    "cumsum": lambda v: v.s.cumsum(-1),
    "cumsum integers": lambda v: v.a.cumsum(0),
    "cumprod": lambda v: v.s.clamp(-2, 2).cumprod(0),
    "sort": lambda v: v.x.sort(-1).values,
    "sort place": lambda v: v.x.sort(dim=0, stable=True).indices,
    "sort integers": lambda v: v.k.sort(dim=-1, stable=True, descending=True).indices,
    "sort descending": lambda v: v.x.sort(dim=-1, stable=True, descending=True).indices,
    "argsort": lambda v: v.k.argsort(dim=0, stable=True),
    "topk": lambda v: v.x.topk(3).values,
    "topk smallest": lambda v: v.k.topk(2, dim=0, largest=False).values,
    "kthvalue": lambda v: v.x.kthvalue(2, dim=0).values,
    "median": lambda v: v.f[0].median(),
    "median dim": lambda v: v.x.median(-1).values,
    "nanmedian": lambda v: v.f[:, 0].nanmedian(),
    "nanmedian dim": lambda v: v.x.nanmedian(0, keepdim=True).values,
    "cummax": lambda v: v.x.cummax(-1).values,
    "cummax place": lambda v: v.x.cummax(0).indices,
    "cummin": lambda v: v.k.cummin(0).values,
    "cummin place": lambda v: v.k.cummin(-1).indices,
    "triu": lambda v: v.x.flatten(0, -2).triu(),
    "tril": lambda v: v.x.flatten(0, -2).tril(-1),
    "nansum": lambda v: v.k.float().masked_fill(v.a, float("nan")).nansum(-1),
    "count nonzero": lambda v: v.x.count_nonzero(),
    "count nonzero dim": lambda v: v.a.count_nonzero(dim=(0, -1)),
    "isin": lambda v: torch.isin(v.k.contiguous(), v.q[:2]),
    "isin not": lambda v: torch.isin(v.k.contiguous(), v.q[:1], invert=True),
    "bucketize": lambda v: torch.bucketize(v.x.contiguous(), torch.tensor([-1.0, 0.0, 0.5, 1.0])),
    "bucketize right": lambda v: torch.bucketize(
        v.x.contiguous(), torch.tensor([-1.0, 0.5]), right=True
    ),
    "linspace": lambda v: torch.linspace(-0.3, 1.7, 9),
    "eye": lambda v: torch.eye(3),
    "eye of two": lambda v: torch.eye(3, 2, dtype=torch.int64),
    "one hot": lambda v: functional.one_hot(v.k, 5),
    "all": lambda v: v.a.all(),
    "all dim": lambda v: v.a.all(0),
    "all dims": lambda v: v.a.all((0, 1)),
    "any dims": lambda v: v.a.any((0, -1)),
    "any": lambda v: v.a.any(),
    "any dim": lambda v: v.a.any(-1, keepdim=True),
    "any of nothing": lambda v: torch.any(v.a, dim=[]),
    "all of nothing": lambda v: torch.all(v.x, dim=[]),
    "sum integers": lambda v: v.k.sum(),
    "sum bools": lambda v: v.a.sum(-1),
    "prod integers": lambda v: v.k.prod(),
    "prod integers dim": lambda v: v.k.prod(-1, keepdim=True),
    "sum integers dim": lambda v: v.k.sum(0),
}
ROUNDED: dict[str, tuple[Any, float]] = {
    "sqrt": (lambda v: v.x.sqrt(), 1),  # torch's own is not always the nearest number
    "exp": (lambda v: v.x.exp(), 3),
    "log": (lambda v: v.x.log(), 3),
    "log1p": (lambda v: v.x.log1p(), 5),
    "expm1": (lambda v: v.x.expm1(), 8),
    "sin": (lambda v: v.x.clamp(-1e4, 1e4).sin(), 4),
    "cos": (lambda v: v.x.clamp(-1e4, 1e4).cos(), 4),
    "tan": (lambda v: v.x.clamp(-1, 1).tan(), 4),
    "asin": (lambda v: v.x.asin(), 4),
    "acos": (lambda v: v.x.acos(), 4),
    "atan": (lambda v: v.x.atan(), 4),
    "atan2": (lambda v: torch.atan2(v.x, v.y), 4),
    "sinh": (lambda v: v.x.clamp(-80, 80).sinh(), 4),
    "cosh": (lambda v: v.x.clamp(-80, 80).cosh(), 4),
    "tanh": (lambda v: v.x.tanh(), 6),
    "erf": (lambda v: v.x.erf(), 3),
    "one minus erf": (lambda v: (1.0 - v.x.erf()).sign().clamp(max=0.0), 0),
    "one minus tanh": (lambda v: (1.0 - v.x.tanh()).sign().clamp(max=0.0), 0),
    "sigmoid": (lambda v: v.x.sigmoid(), 6),
    "rsqrt": (lambda v: v.x.rsqrt(), 2),
    "exp2": (lambda v: v.x.exp2(), 2),
    "log2": (lambda v: v.x.log2(), 2),
    "log10": (lambda v: v.x.log10(), 2),
    "hypot": (lambda v: torch.hypot(v.x, v.y), 2),
    "xlogy": (lambda v: torch.xlogy(v.x, v.y), 5),
    "xlogy of a number": (lambda v: torch.xlogy(2.0, v.x), 5),
    "xlogy with a number": (lambda v: torch.xlogy(v.x, 2.0), 5),
    "addcdiv": (lambda v: torch.addcdiv(v.s, v.s, v.u.abs() + 1.0, value=0.5), 32),
    "pow": (lambda v: torch.pow(v.s.abs() + 0.1, v.u.clamp(-5, 5)), 20),
    "pow number": (lambda v: torch.pow(0.9, v.x), 4),
    "pow by a number": (lambda v: v.x.abs() ** 1.7, 20),
    "pow 0.5": (lambda v: v.x**0.5, 1),
}
ROUNDED_TO_SIZE: dict[str, tuple[Any, float]] = {
    # Absolutely, in units of the last place of the largest finite argument or 1.
    "logaddexp": (lambda v: torch.logaddexp(v.x, v.y), 8),
    "norm of absolutes": (lambda v: torch.linalg.vector_norm(v.s, 1, dim=-1), 16),
    "cross": (lambda v: torch.linalg.cross(v.s[:3], v.u[:3], dim=0), 8),
    "trace": (lambda v: v.s.flatten(0, -2).trace(), 64),
    "glu": (lambda v: functional.glu(v.s[..., :4]), 8),
    "mse loss": (lambda v: functional.mse_loss(v.s, v.u), 64),
    "huber loss": (lambda v: functional.huber_loss(v.s, v.u, reduction="none"), 16),
    "smooth l1 loss": (lambda v: functional.smooth_l1_loss(v.s, v.u, reduction="sum"), 64),
    "cross entropy": (lambda v: functional.cross_entropy(v.s[0][..., :4], v.k[0][..., 0]), 64),
    "binary cross entropy": (
        lambda v: functional.binary_cross_entropy_with_logits(v.s, v.a.float(), reduction="none"),
        64,
    ),
    "silu": (lambda v: functional.silu(v.s), 8),
    "gelu": (lambda v: functional.gelu(v.s), 8),
    "elu": (lambda v: functional.elu(v.s, 1.3), 8),
    "softplus": (lambda v: functional.softplus(v.s), 8),
    "tanh backward": (lambda v: aten.tanh_backward(v.s, v.u), 8),
    "sigmoid backward": (lambda v: aten.sigmoid_backward(v.s, v.u), 8),
    "silu backward": (lambda v: aten.silu_backward(v.s, v.u), 8),
    "gelu backward": (lambda v: aten.gelu_backward(v.s, v.u), 8),
    "elu backward": (lambda v: aten.elu_backward(v.s, 1.3, 1.0, 1.0, False, v.u), 8),
    "elu backward of results": (lambda v: aten.elu_backward(v.s, 1.0, 1.0, 1.0, True, v.u), 8),
    "softplus backward": (lambda v: aten.softplus_backward(v.s, v.u, 1.0, 20.0), 8),
    "lerp": (lambda v: torch.lerp(v.s, v.u, 0.1), 4),
    "lerp tensor": (lambda v: torch.lerp(v.s, v.u, v.u), 16),
    "addcmul": (lambda v: torch.addcmul(v.s, v.s, v.u, value=0.5), 16),
    "add with a factor": (lambda v: torch.add(v.s, v.u, alpha=0.3), 4),
    "sum": (lambda v: v.s.sum(), 64),
    "sum dim": (lambda v: v.s.sum(0), 16),
    "sum last": (lambda v: v.s.sum(-1, keepdim=True), 16),
    "norm": (lambda v: v.s.norm(), 16),
    "norm dim": (lambda v: torch.linalg.vector_norm(v.s, dim=-1), 16),
    "mean": (lambda v: v.s.mean(), 16),
    "mean dim": (lambda v: v.s.mean(-1), 16),
    "var": (lambda v: v.s.var(), 512),
    "var dim": (lambda v: v.s.var(0, correction=0), 512),
    "std": (lambda v: v.s.std(), 512),
    "std dim": (lambda v: v.s.std(0, correction=0, keepdim=True), 512),
    "prod dim": (lambda v: v.s.clamp(-2, 2).prod(0), 64),
    "logsumexp": (lambda v: v.s.logsumexp(-1), 16),
    "logsumexp of infinities": (lambda v: v.x.clamp(max=50.0).logsumexp(0, keepdim=True), 16),
    "log softmax": (lambda v: v.s.log_softmax(-1), 16),
    "log softmax of large logits": (lambda v: (v.s + 1e6).log_softmax(-1), 16),
    "log softmax backward": (
        lambda v: aten._log_softmax_backward_data(v.s, v.u.log_softmax(-1), -1, torch.float32),
        64,
    ),
    "mm": (lambda v: v.s.flatten(0, -2) @ v.s.flatten(0, -2).t(), 256),
    "bmm": (lambda v: torch.bmm(v.cubes, v.cubes.transpose(1, 2)), 256),
    "mv": (lambda v: v.s.flatten(0, -2) @ v.u.flatten(0, -2)[0], 256),
    "dot": (lambda v: torch.dot(v.s.flatten(), v.u.flatten()), 256),
    "addmm": (lambda v: torch.addmm(v.s[..., 0].flatten(), v.s.flatten(0, -2), v.m), 256),
}
MOVED: dict[str, Any] = {
    "view": lambda v: v.x.reshape(-1) * 2,
    "unsafe view": lambda v: aten._unsafe_view(v.x.contiguous(), [-1]),
    "view of a sum": lambda v: (v.x + 1).reshape(-1),
    "transpose": lambda v: v.x.transpose(0, -1),
    "permute": lambda v: v.x.permute(*reversed(range(v.x.dim()))) + 1,
    "t": lambda v: v.s.flatten(0, -2).t(),
    "t of a sum": lambda v: (v.s.flatten(0, -2) + 1).t(),
    "unsqueeze": lambda v: (v.x + 1).unsqueeze(1),
    "squeeze": lambda v: v.x[:1].squeeze(),
    "squeeze dim": lambda v: aten.squeeze.dim(v.x[:1], 0),
    "squeeze dims": lambda v: aten.squeeze.dims(v.x[:1], [0]),
    "expand": lambda v: (v.x[:1] + 1).expand(3, *v.x.shape[1:]),
    "select": lambda v: (v.x * 2)[-1],
    "select stored": lambda v: v.x[1] + v.x[-2],
    "slice": lambda v: v.x[1:],
    "slice by": lambda v: v.x[..., ::2] + 1,
    "split": lambda v: torch.cat(v.x.split(2, -1)[::-1], -1),
    "unsafe split": lambda v: torch.cat(torch.unsafe_split(v.x, 2, -1)[::-1], -1),
    "split sizes": lambda v: v.x.split([1, v.x.shape[0] - 1])[1],
    "unbind": lambda v: torch.stack(v.x.unbind(-1)[::-1], 0),
    "flip": lambda v: v.x.flip(0, -1),
    "roll": lambda v: v.x.roll((-1, 5), (0, -1)),
    "roll sum": lambda v: (v.x + 1).roll(2, 0),
    "diagonal": lambda v: aten.diagonal(v.s.flatten(0, -2)) + 1,
    "unfold": lambda v: v.x.unfold(-1, 2, 1),
    "select backward": lambda v: aten.select_backward(v.x[0], v.x.shape, 0, 1),
    "slice backward": lambda v: aten.slice_backward(v.x[1:3], v.x.shape, 0, 1, 3, 1),
    "pad": lambda v: functional.pad(v.x, (1, 2), value=-1.0),
    "pad sum": lambda v: functional.pad(v.x + 1, (0, 1)),
    "cat": lambda v: torch.cat([v.x, v.y.expand_as(v.x), v.x * 2], 0),
    "cat last": lambda v: torch.cat([v.x, v.k], -1),
    "stack": lambda v: torch.stack([v.x, v.y.expand_as(v.x)], 1),
    "gather": lambda v: v.x.gather(0, v.k),
    "gather last": lambda v: v.x.gather(-1, v.n[..., :1]),
    "index": lambda v: v.x[v.k.flatten()],
    "index of two axes": lambda v: v.s.flatten(0, -2)[v.k.flatten(0, -2)[:2]],
    "index second": lambda v: v.x[:, v.k.flatten()[:3]],
    "index select": lambda v: v.x.index_select(0, v.k.flatten()),
    "scatter": lambda v: v.x.scatter(-1, v.n[..., :1], v.y.expand_as(v.x)[..., :1]),
    "scatter number": lambda v: v.x.scatter(-1, v.n[..., :1], 7.0),
    "scatter add of zeros": lambda v: v.x.scatter_add(
        -1, v.n[..., :1], v.y.expand_as(v.x)[..., :1]
    ),
    "scatter add": lambda v: v.s.scatter_add(-1, v.n[..., :1], v.u[..., :1]),
    "index of both axes": lambda v: v.f[v.p, v.q],
    "index of rows and columns": lambda v: v.f[v.p[:, None], v.q[:2] - 4],
    "index of axes apart": lambda v: v.f[None, :, None][:, v.p, :, v.q],
    "index put": lambda v: put(v.f, (torch.arange(4), v.q), v.f[0, :4]),
    "index put one": lambda v: put(v.x, (v.p[:1],), 3.0),
    "index put of columns": lambda v: put(v.f, (slice(None), v.q[:1]), v.f[:, :1] * 2),
    "index put a mask": lambda v: put(v.x, (v.a,), -1.0),
    "index put a mask of rows": lambda v: put(v.f, (v.f[:, 0] > 0,), v.f[0] + 1.0),
    "index put and add": lambda v: v.g.index_put((v.p, v.q), v.g[0, :4], accumulate=True),
    "index add": lambda v: v.g.index_add(0, v.p[:3], v.g[:3]),
    "index add second": lambda v: v.g.index_add(1, v.q[:2], v.g[:, :2]),
    "scatter add of many": lambda v: v.k.scatter_add(0, v.n, v.n),
    "fill tensor": lambda v: aten.fill.Tensor(v.x, v.y.flatten()[0]),
    "clone": lambda v: v.x.clone(),
    "select scatter": lambda v: v.x.select_scatter(v.y[0], 0, 1),
    "slice scatter": lambda v: v.x.slice_scatter(v.x[1:3] * 2, 0, 1, 3),
    "slice scatter of one": lambda v: v.x.slice_scatter(v.x[:1] + 1, 0, 2, 3),
    "copy": lambda v: aten.copy(v.x, v.y[:1].expand_as(v.x)),
    "fill": lambda v: aten.fill(v.x, 3.5),
}


def put(x: Tensor, index: Any, value: Any) -> Tensor:
    written = x.clone()
    written[index] = value
    return written


EITHER_ZERO = {
    *(
        "minimum",
        "maximum",
        "amax",
        "amin",
        "max",
        "min",
        "fmax",
        "fmin",
        "max dim",
        "min dim",
        "sort",
    ),
    *("topk", "kthvalue", "median", "median dim", "nanmedian", "nanmedian dim"),
    *("clamp tensor", "clamp min tensor", "clamp max tensor"),
}
"""Those that give one of two zeros: which one depends on the layout in torch itself."""
FUNCTIONS = {
    **EXACT,
    **{name: function for name, (function, _) in (ROUNDED | ROUNDED_TO_SIZE).items()},
    **MOVED,
}


class Values:
    """Arguments by their names."""

    def __init__(self, x: Tensor, y: Tensor, k: Tensor, n: Tensor, a: Tensor, b: Tensor) -> None:
        self.x, self.y, self.k, self.n, self.a, self.b = x, y, k, n, a, b
        self.s, self.u = (t.nan_to_num(0.0, 3.0, -3.0).clamp(-30, 30) for t in (x, y.expand_as(x)))
        self.f, self.g = x.flatten(0, -2), k.flatten(0, -2)
        self.p, self.q = self.g[:4, 0], n.flatten(0, -2)[:4, -1]
        self.cubes = self.s if self.s.dim() == 3 else self.s[None]
        self.m = self.s.flatten(0, -2)[:1].t().expand(-1, self.s[..., 0].numel())


LAYOUTS = ["contiguous", "transposed", "broadcast", "three axes", "short axes", "wide"]


def arguments(layout: str, seed: int, odd: bool) -> list[Tensor]:
    """Tensors of a layout, filled with normal numbers and, if ``odd``, with the oddest ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = {"three axes": (4, 5, 6), "short axes": (16, 4, 4), "wide": (7, 40)}.get(layout, (4, 6))
    if layout == "transposed":
        shape = (6, 4)

    def floats(*size: int) -> Tensor:
        value = torch.randn(size, generator=generator) * 2.0
        if odd:
            chosen = torch.randint(0, len(ODD), size, generator=generator)
            value = torch.where(
                torch.rand(size, generator=generator) < 0.5, torch.tensor(ODD)[chosen], value
            )
        return value

    x, y = floats(*shape), floats(*shape)
    k, n = (torch.randint(0, 4, shape, generator=generator) for _ in range(2))
    a, b = (torch.rand(shape, generator=generator) < 0.5 for _ in range(2))
    if layout == "transposed":
        x, y, k, n, a, b = (value.t() for value in (x, y, k, n, a, b))
    if layout == "broadcast":
        y = y[:1]
    return [x, y, k, n, a, b]


def everything(*tensors: Tensor) -> dict[str, Tensor]:
    values = Values(*tensors)
    return {name: function(values) for name, function in FUNCTIONS.items()}


@functools.cache
def compiled(layout: str) -> NativeFunction:
    return NativeFunction(everything)


def compare(name: str, got: Tensor, expected: Tensor, largest: float) -> None:
    assert got.shape == expected.shape, name
    assert got.dtype == expected.dtype, name
    if not expected.is_floating_point() or name in EXACT or name in MOVED:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=name)
        if expected.is_floating_point() and name not in EITHER_ZERO:
            zero = expected == 0.0
            assert torch.equal(got[zero].signbit(), expected[zero].signbit()), f"sign of {name}"
        return
    eps = torch.finfo(expected.dtype).eps
    if name in ROUNDED:
        allowed = {"rtol": ROUNDED[name][1] * eps, "atol": 1e-44}
    else:
        allowed = {
            "rtol": ROUNDED_TO_SIZE[name][1] * eps,
            "atol": ROUNDED_TO_SIZE[name][1] * eps * max(1.0, largest),
        }
    torch.testing.assert_close(
        got, expected, **allowed, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), odd=st.booleans())
def test_native_code_computes_what_torch_computes(layout: str, seed: int, odd: bool) -> None:
    tensors = arguments(layout, seed, odd)
    expected = everything(*tensors)
    values = Values(*tensors)
    largest = float(values.s.abs().max() * values.u.abs().max().clamp(min=1.0)) * 6
    for name, got in compiled(layout)(*tensors).items():
        compare(name, got, expected[name], largest)


CHOICES: dict[str, Any] = {
    "where": lambda v: torch.where(v.a, v.x, v.y),
    "where of comparisons": lambda v: torch.where((v.x > 0) & (v.y < 1), v.x, v.y),
    "threshold backward": lambda v: aten.threshold_backward(v.y, v.x, 0),
    "masked fill": lambda v: v.x.masked_fill(v.a, -1.0),
    "clamp": lambda v: v.x.clamp(-1.0, 2.0),
    "clamp tensor": lambda v: v.x.clamp(-v.y.abs(), v.y.abs()),
    "relu": lambda v: v.x.relu(),
    "logical and": lambda v: torch.logical_and(v.b, v.a),
    "elu backward": lambda v: aten.elu_backward(v.s, 1.3, 1.0, 1.0, False, v.u),
    "scatter": lambda v: v.x.scatter(-1, v.n[..., :1].clamp_max(1), v.y[..., :1]),
    "select scatter": lambda v: v.x.select_scatter(v.y[0], 0, 1),
    "slice scatter": lambda v: v.x.slice_scatter(v.x[1:3] * 2, 0, 1, 3),
    "select backward": lambda v: aten.select_backward(v.x[0], v.x.shape, 0, 1),
    "slice backward": lambda v: aten.slice_backward(v.x[1:3], v.x.shape, 0, 1, 3, 1),
    "pad": lambda v: functional.pad(v.x, (1, 2, 0, 1), value=-1.0),
    "crop": lambda v: functional.pad(v.x, (-1, 0, 1, -1)),
}


def choices(*tensors: Tensor) -> dict[str, Tensor]:
    """Each choice for another number of rows, so that it has nests of its own."""
    some = (Values(*(tensor[:rows] for tensor in tensors)) for rows in range(8, 8 + len(CHOICES)))
    return {name: CHOICES[name](values) for name, values in zip(CHOICES, some, strict=True)}


@pytest.mark.parametrize("shape", [(32, 4, 4), (32, 3, 7, 7)], ids=str)
def test_choices_in_short_loops_are_those_of_torch(shape: tuple[int, ...]) -> None:
    """Gcc 12 computes some of them wrongly where it may skip the load of one side."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    k, n = (torch.randint(0, 3, shape, generator=generator) for _ in range(2))
    a, b = (torch.rand(shape, generator=generator) < 0.5 for _ in range(2))
    expected = choices(x, y, k, n, a, b)
    for name, got in NativeFunction(choices)(x, y, k, n, a, b).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_places_of_a_sort_that_may_order_equal_numbers_otherwise_are_refused() -> None:
    x = torch.tensor([[1.0, 0.0, 1.0]])
    assert torch.equal(NativeFunction(lambda x: x.sort().values)(x), x.sort().values)
    for places in (
        lambda x: x.sort().indices,
        lambda x: x.topk(2).indices,
        lambda x: x.kthvalue(2).indices,
        lambda x: x.median(-1).indices,
        lambda x: x.nanmedian(-1).indices,
    ):
        with pytest.raises(UnsupportedError, match="stable=True"):
            NativeFunction(places)(x)
    with pytest.raises(UnsupportedError, match="sorted=False"):
        NativeFunction(lambda x: x.topk(2, sorted=False).values)(x)


def gradients_of_sorts(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Of stable sorts, along every axis and in both directions."""
    found: list[Tensor] = []
    for dim in (0, 1, -1):
        for descending in (False, True):
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                ordered = y.sort(stable=True, dim=dim, descending=descending).values
                found += torch.autograd.grad((ordered * ordered * weight).sum(), y)
    return found


def test_gradients_of_stable_sorts_are_those_of_torch() -> None:
    native = NativeFunction(gradients_of_sorts)
    nan, weight = float("nan"), torch.arange(12.0).reshape(3, 4) - 4.0
    for x in (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1.0, 0.0, 1.0, -0.0], [1.0, 0.0, 2.0, 3.0], [nan, 0.0, nan, 1.0]]),
    ):
        expected = gradients_of_sorts(x, weight)
        for got, one in zip(native(x, weight), expected, strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=0, equal_nan=True)
            number = ~one.isnan()
            assert torch.equal(got[number].signbit(), one[number].signbit())


def test_a_scatter_to_the_places_of_a_sort_of_another_shape_is_refused() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    for scattered in (
        lambda x: torch.zeros(2, 4).scatter(1, x.argsort(stable=True), x),  # leaves places out
        lambda x: torch.zeros(3, 3).scatter(0, x.argsort(stable=True), x),  # along another axis
    ):
        with pytest.raises(UnsupportedError, match="several elements"):
            NativeFunction(scattered)(x)


RELAID: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: functional.layer_norm(x, (6,)),
    "group norm": lambda x: functional.group_norm(x, 2),
    "softmax": lambda x: x.softmax(1),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "sort": torch.msort,
    "sort inside": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(3, 1).values,
    "triangle": lambda x: x.triu(),
    "known": lambda x: torch.isin(x, torch.tensor([0.0])),
    "cumulated": lambda x: x.cumsum(1),
}


@pytest.mark.parametrize("axes", [*itertools.permutations(range(3))], ids=str)
def test_results_that_lie_otherwise_in_memory_than_those_of_torch_can_be_viewed(
    axes: tuple[int, int, int],
) -> None:
    """Simpler operations in the place of others keep the layout of their arguments."""

    def views(x: Tensor) -> list[Tensor]:
        x = x.permute(axes)
        results = [function(x) for function in RELAID.values()]
        return [*(y.flatten(1) for y in results), *(y.flatten(0, 1).t().flatten() for y in results)]

    shape = [(3, 4, 6)[axes.index(axis)] for axis in range(3)]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(NativeFunction(views)(x), views(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_axis_of_a_number_is_refused_in_words() -> None:
    for function in (
        lambda x: x.flip(0),
        lambda x: x.argmax(0),
        lambda x: x.scatter(0, torch.tensor(0), x),
    ):
        with pytest.raises(UnsupportedError, match="of a number"):
            NativeFunction(function)(torch.tensor(1.0))


ORDERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "topk": lambda x, dim: x.topk(2, dim).values,
    "topk of all": lambda x, dim: x.topk(x.shape[dim], dim).values,
    "topk smallest": lambda x, dim: x.topk(3, dim, largest=False).values,
    "kthvalue": lambda x, dim: x.kthvalue(3, dim).values,
    "kthvalue kept": lambda x, dim: x.kthvalue(1, dim, keepdim=True).values,
    "median": lambda x, dim: x.median(dim).values,
    "median kept": lambda x, dim: x.median(dim, keepdim=True).values,
    "median of all": lambda x, _: x.median(),
    "nanmedian": lambda x, dim: x.nanmedian(dim).values,
    "nanmedian kept": lambda x, dim: x.nanmedian(dim, keepdim=True).values,
    "nanmedian of all": lambda x, _: x.nanmedian(),
    "cummax": lambda x, dim: x.cummax(dim).values,
    "cummax place": lambda x, dim: x.cummax(dim).indices,
    "cummin": lambda x, dim: x.cummin(dim).values,
    "cummin place": lambda x, dim: x.cummin(dim).indices,
}


def all_orders(*tensors: Tensor) -> dict[str, Tensor]:
    return {
        f"{name} {number} {dim}": function(x, dim)
        for number, x in enumerate(tensors)
        for dim in range(-x.dim(), 0)
        for name, function in ORDERS.items()
    }


@functools.cache
def compiled_orders(dtype: torch.dtype) -> NativeFunction:
    del dtype  # for each of which there is one
    return NativeFunction(all_orders)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), distinct=st.integers(1, 7))
def test_orders_of_few_distinct_numbers_are_those_of_torch(
    dtype: torch.dtype, seed: int, distinct: int
) -> None:
    """With NaN, infinities, both zeros, and the ends of integers."""
    ends = torch.iinfo(torch.uint8 if dtype.is_floating_point else dtype)
    numbers: list[float] = [ends.max, ends.min, 1, 3, 2, 7, 5]
    if dtype.is_floating_point:
        numbers = [float("nan"), 0.0, -0.0, float("inf"), float("-inf"), 1e-40, 1.5]
    generator = torch.Generator().manual_seed(seed)
    some = torch.tensor(numbers, dtype=dtype)[torch.randperm(7, generator=generator)[:distinct]]
    shapes = [(3, 4), (7,)]
    tensors = [some[torch.randint(0, distinct, shape, generator=generator)] for shape in shapes]
    tensors[0] = tensors[0].t()
    got, expected = compiled_orders(dtype)(*tensors), all_orders(*tensors)
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=name
        )
        if name.startswith("cum") and dtype.is_floating_point and "place" not in name:
            number = ~expected[name].isnan()
            signs = (each[name][number].signbit() for each in (got, expected))
            assert torch.equal(*signs), f"sign of {name}"


def test_a_number_is_in_order() -> None:
    def orders(x: Tensor) -> list[Tensor]:
        cumulated = [*x.cummax(0), *x.cummin(0)]
        return [*cumulated, x.sort().values, x.topk(1).values, x.median(0).values, x.median()]

    x = torch.tensor(2.5)
    for got, expected in zip(NativeFunction(orders)(x), orders(x), strict=True):
        assert torch.equal(got, expected)


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def of_integers(x: Tensor, y: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Quotients and remainders, of which the first are of -1 too, and shifts by any number."""
    return {
        "floor": x // y,
        "remainder": x % y,
        "fmod": torch.fmod(x, y),
        "trunc": torch.div(x, y.clamp(min=1), rounding_mode="trunc"),
        "trunc of half": torch.div(x >> 1, y, rounding_mode="trunc"),
        "true": x / y,
        "by one": x // y[:1],
        "of another type": x % y.to(torch.int64),
        "floor by -1": x // -1 if x.dtype.is_signed else x,
        "left": x << shift,
        "right": x >> shift,
        "left by 2": x << 2,
        "right by 2": x >> 2,
        "left of 5": torch.bitwise_left_shift(5, shift),
    }


@functools.cache
def compiled_integers(dtype: torch.dtype) -> NativeFunction:
    del dtype  # for each of which there is one
    return NativeFunction(of_integers)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@settings(max_examples=50)
@given(data=st.data())
def test_integers_are_divided_and_shifted_as_by_torch(dtype: torch.dtype, data: Any) -> None:
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    ends = [one for one in (low, low + 1, -1, 0, 1, high - 1, high) if low <= one <= high]
    number = st.sampled_from(ends) | st.integers(low, high) | st.integers(max(low, -9), 9)
    some = st.lists(number, min_size=24, max_size=24)
    x, y, shift = (torch.tensor(data.draw(some), dtype=dtype) for _ in range(3))
    small = torch.tensor(
        data.draw(st.lists(st.integers(max(low, -3), 70), min_size=24, max_size=24))
    )
    shift = torch.where(x % 2 == 0, shift, small.to(dtype))
    y = torch.where(y == 0, 1, y).to(dtype)
    got, expected = compiled_integers(dtype)(x, y, shift), of_integers(x, y, shift)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", INTEGERS[:4], ids=str)
def test_the_least_integer_by_minus_one_does_not_end_the_process(dtype: torch.dtype) -> None:
    """As eager calls of int64 and int32 do."""
    x, y = (torch.full((3,), one, dtype=dtype) for one in (torch.iinfo(dtype).min, -1))
    native = NativeFunction(lambda x, y: torch.div(x, y, rounding_mode="trunc"))
    native(torch.ones_like(x), y)  # the first call runs eagerly, too
    assert torch.equal(native(x, y), x // y)


DIVISIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "floor": lambda x, y: x // y,
    "trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "remainder": lambda x, y: x % y,
    "fmod": torch.fmod,
    "of a number": lambda _, y: 7 // y,
    "remainder of a number": lambda _, y: 7 % y,
    "by one of all": lambda x, y: x // y[1],
    "not chosen": lambda x, y: torch.where(y != 0, x // y, 0),
    "zero in 32 bits": lambda x, y: x.int() // torch.where(y == 0, 2**32, y)[1],
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_an_integer_divided_by_zero_is_the_error_that_it_is_in_torch(name: str) -> None:
    function, x = DIVISIONS[name], torch.tensor([6, -7, 8])
    good, bad = torch.tensor([2, 3, -4]), torch.tensor([2, 0, -4])
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        function(x, bad)
    native = NativeFunction(function)
    for _ in range(2):
        assert torch.equal(native(x, good), function(x, good))
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            native(x, bad)


def test_the_first_error_of_a_call_is_raised() -> None:
    def both(x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return x // k, x[k]

    native, x = NativeFunction(both), torch.tensor([4, 5, 6])
    native(x, torch.tensor([1, 2, 1]))
    with pytest.raises(IndexError):
        native(x, torch.tensor([1, 7, 1]))
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        native(x, torch.tensor([7, 0, 1]))


def test_a_map_of_rows_divides_by_zero_as_torch_does() -> None:
    native = NativeMap(lambda rows, _: rows[0] // rows[1])
    x, y = torch.arange(4096), torch.arange(1, 4097)
    assert torch.equal(native((x, y), ()), x // y)
    y[-1] = 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        native((x, y), ())
    y[-1] = 3
    assert torch.equal(native((x, y), ()), x // y)


DECIMALS = [-400, -39, -2, -1, 0, 1, 2, 3, 7, 39, 309]


@functools.cache
def compiled_rounding() -> NativeFunction:
    return NativeFunction(rounding)


def rounding(x: Tensor) -> list[Tensor]:
    return [y.round(decimals=each) for y in (x, x.double() * 1.1) for each in DECIMALS]


@settings(max_examples=50)
@given(st.lists(st.floats(width=32) | st.sampled_from(ODD), min_size=16, max_size=16))
def test_decimals_are_rounded_as_by_torch(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    for got, expected in zip(compiled_rounding()(x), rounding(x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        number = ~expected.isnan()
        assert torch.equal(got[number].signbit(), expected[number].signbit())


@pytest.mark.parametrize("value", [-1, 3])
def test_a_class_that_does_not_exist_is_an_error(value: int) -> None:
    native = NativeFunction(lambda k: functional.one_hot(k, 3))
    assert torch.equal(native(torch.tensor([2, 0])), torch.tensor([[0, 0, 1], [1, 0, 0]]))
    with pytest.raises(IndexError):
        native(torch.tensor([0, value]))


@pytest.mark.parametrize("masked", ["bool", "causal"])
def test_attention_and_its_gradient_are_those_of_torch(masked: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 5, 8, generator=generator)
    allowed = torch.eye(5, dtype=torch.bool) | (torch.rand(5, 5, generator=generator) < 0.5)
    mask = allowed if masked == "bool" else None
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def attends(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            y = functional.scaled_dot_product_attention(
                heads, heads * 0.5, heads.tanh(), mask, is_causal=masked == "causal"
            )
            y = layer(y.transpose(1, 2).flatten(2))
            return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    for got, expected in zip(NativeFunction(attends)(tokens), attends(tokens), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_features_of_attention_of_several_heads_are_those_of_torch() -> None:
    """The layer's result lies in memory with the tokens first, which a norm keeps."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 3, 8, generator=generator)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    norm = torch.nn.LayerNorm(8)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = norm(attention(x, x, x, need_weights=False)[0]).flatten(1)
            return y.detach(), torch.autograd.grad((y**3).sum(), x)[0]

    for got, expected in zip(NativeFunction(features)(tokens), features(tokens), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_native_alone_too(name: str) -> None:
    """Together with others a graph is made simpler for their sake."""
    function = FUNCTIONS[name]
    example = tuple(arguments("contiguous", 0, False))
    traced = Traced(lambda *tensors: function(Values(*tensors)), example, functional=True)
    translate(traced.graph, "body", shared=True)


def test_every_operation_is_tested() -> None:
    graph = Traced(everything, tuple(arguments("contiguous", 0, False)), functional=True).graph
    used = {str(node.target).removeprefix("aten.") for node in graph.graph.nodes}
    elsewhere = {name for name in OPERATIONS if "recurrence" in name}  # test_recurrences
    assert set(OPERATIONS) - used - elsewhere - used_operations() == set()
    layers = {name for name in OWN if name.startswith(("native_", "embedding", "var_mean"))}
    assert set(OWN) - used - layers == set()  # layers: test_convolutions and test_loops
