"""Operations that are replaced by simpler ones before a graph is translated."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from esper_lightning.compiling.native.values import UnsupportedError

__all__ = ["DECOMPOSED", "decompose"]

DECOMPOSED = (
    *("native_layer_norm", "native_layer_norm_backward"),
    *("native_group_norm", "native_group_norm_backward"),
    *("native_batch_norm", "native_batch_norm_backward", "var_mean", "repeat"),
    *("leaky_relu", "leaky_relu_backward", "_prelu_kernel", "_prelu_kernel_backward"),
    *("hardtanh", "hardtanh_backward", "hardswish", "hardswish_backward"),
    *("hardsigmoid", "hardsigmoid_backward", "mish", "mish_backward"),
    *("_softmax", "_softmax_backward_data", "pixel_shuffle", "pixel_unshuffle"),
    *("embedding", "embedding_dense_backward"),
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
    from torch import _decomp  # noqa: PLC0415 - imports sympy

    aten, decompositions = torch.ops.aten, cast("Any", _decomp)
    table = decompositions.get_decompositions([getattr(aten, name) for name in DECOMPOSED])
    # Those of torch ask for strides of memory, and for operations below its own.
    table[aten.native_group_norm.default] = _group_norm
    table[aten.native_layer_norm.default] = _layer_norm
    table[aten.var_mean.correction] = _var_mean
    table[aten.embedding.default] = _embedding
    table[aten.embedding_dense_backward.default] = _embedding_backward
    return table


def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(range(x.dim())) if dim is None else dim
    variance = x.var(axes, correction=correction, keepdim=keepdim)
    return variance, x.mean(axes, keepdim=keepdim)


def _embedding(weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return weight[indices]


def _embedding_backward(
    gradient: Tensor, indices: Tensor, rows: int, padding: int, by_frequency: bool
) -> Tensor:
    if by_frequency:
        raise UnsupportedError("an embedding whose gradient is scaled by frequency")
    index = indices.reshape(-1, 1)
    chosen = (index == torch.arange(rows)) & (index != padding)
    return chosen.to(gradient.dtype).T @ gradient.reshape(-1, gradient.shape[-1])


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    variance, mean = _var_mean(x, list(range(-len(shape), 0)), correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    y = (x - mean) * scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, scale


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
    shape = [channels // groups * pixels]
    y, mean, scale = _layer_norm(x.reshape(number, groups, *shape), shape, None, None, eps)
    y = y.view(number, channels, pixels)
    y = y if weight is None else y * weight[:, None]
    y = y if bias is None else y + bias[:, None]
    return y.view(x.shape), mean[..., 0], scale[..., 0]
