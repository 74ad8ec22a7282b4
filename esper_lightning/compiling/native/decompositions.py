"""Operations that are replaced by simpler ones before a graph is translated."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

__all__ = ["DECOMPOSED", "decompose"]

DECOMPOSED = (
    *("native_layer_norm", "native_layer_norm_backward"),
    *("native_group_norm", "native_group_norm_backward"),
    *("native_batch_norm", "native_batch_norm_backward", "var_mean", "repeat"),
    *("leaky_relu", "leaky_relu_backward", "_prelu_kernel", "_prelu_kernel_backward"),
    *("hardtanh", "hardtanh_backward", "hardswish", "hardswish_backward"),
    *("hardsigmoid", "hardsigmoid_backward", "mish", "mish_backward"),
    *("_softmax", "_softmax_backward_data", "pixel_shuffle", "pixel_unshuffle"),
)
"""Names of these operations."""


def decompose(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with simpler operations in the place of ``DECOMPOSED``; the same if it has none.

    Args:
        graph: Graph from ``make_fx``.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - imports sympy

    if not any(_name(node.target) in DECOMPOSED for node in graph.graph.nodes):
        return graph
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    example = [torch.zeros(value.shape, dtype=value.dtype) for value in values]
    with torch.no_grad():
        simpler = make_fx(graph, decomposition_table=_table())(*example)
    simpler.graph.eliminate_dead_code()
    return simpler


def _name(target: object) -> str:
    return str(target).removeprefix("aten.").split(".", maxsplit=1)[0]


@functools.cache
def _table() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import get_decompositions  # noqa: PLC0415 - imports sympy

    table = get_decompositions([getattr(torch.ops.aten, name) for name in DECOMPOSED])
    # Those of torch ask for strides of memory, and for operations below its own.
    table[torch.ops.aten.native_group_norm.default] = _group_norm
    table[torch.ops.aten.var_mean.correction] = _var_mean
    return cast("dict[Any, Callable[..., Any]]", table)


def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(range(x.dim())) if dim is None else dim
    variance = x.var(axes, correction=correction, keepdim=keepdim)
    return variance, x.mean(axes, keepdim=keepdim)


def _group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    number: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = x.reshape(number, groups, channels // groups * pixels)
    mean, variance = grouped.mean(-1), grouped.var(-1, correction=0)
    scale = (variance + eps).rsqrt()
    y = ((grouped - mean[..., None]) * scale[..., None]).view(number, channels, pixels)
    if weight is not None:
        y = y * weight[:, None]
    if bias is not None:
        y = y + bias[:, None]
    return y.view(x.shape), mean, scale
