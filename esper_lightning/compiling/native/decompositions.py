"""Operations that are replaced by simpler ones before a graph is translated."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.tracing import allow_other_strides

__all__ = ["OF_TORCH", "OWN", "decompose"]

OF_TORCH = (
    *("native_layer_norm", "native_layer_norm_backward"),
    *("native_group_norm", "native_group_norm_backward"),
    *("native_batch_norm", "native_batch_norm_backward", "var_mean", "repeat"),
    *("leaky_relu", "leaky_relu_backward", "_prelu_kernel", "_prelu_kernel_backward"),
    *("hardtanh", "hardtanh_backward", "hardswish", "hardswish_backward"),
    *("hardsigmoid", "hardsigmoid_backward", "mish", "mish_backward"),
    *("_softmax", "_softmax_backward_data", "pixel_shuffle", "pixel_unshuffle"),
    *("_safe_softmax", "glu", "glu_backward", "mse_loss", "mse_loss_backward", "huber_loss"),
    *("huber_loss_backward", "smooth_l1_loss", "smooth_l1_loss_backward", "nll_loss_forward"),
    *("nll_loss_backward", "binary_cross_entropy_with_logits", "log_sigmoid_forward"),
)
"""Names of operations that torch itself decomposes as is needed here."""

_OPEN = ("sort.default", "topk.default", "kthvalue.default", "median.dim", "nanmedian.dim")
"""Operations whose second result is open where numbers are equal."""

_LONGEST = 64
"""Greatest extent of an axis whose elements are compared, or summed up, one by one."""


def decompose(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with simpler operations in the place of others; the same if it has none of those.

    Args:
        graph: Graph from ``make_fx``; its views may become reshapes.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - imports sympy

    names = [str(node.target).removeprefix("aten.") for node in graph.graph.nodes]
    if not any(name in OWN or name.split(".")[0] in OF_TORCH for name in names):
        return graph
    for name, node in zip(names, graph.graph.nodes, strict=True):
        if name in _OPEN and any(user.args[1] == 1 for user in node.users):
            operation = name.split(".")[0]
            raise UnsupportedError(
                f"the places of equal numbers in {operation}, which torch leaves open"
                " (those of sort with stable=True are known)"
            )
    _gather_gradients_of_sorts(graph)
    allow_other_strides(graph)
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    example = [torch.empty(value.shape, dtype=value.dtype) for value in inputs]
    # As in ``tracing``: nothing is computed, and tensors that a function holds are real.
    fake: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    with torch.no_grad():
        simpler = make_fx(graph, decomposition_table=_table(), **fake)(*example)
    simpler.graph.eliminate_dead_code()
    return simpler


def _gather_gradients_of_sorts(graph: fx.GraphModule) -> None:
    """Let what is scattered to all places of a sort be gathered instead, by the inverse order.

    The gradient of a sort is such a scatter, and what sorts the places is their inverse.
    """
    aten, nodes = torch.ops.aten, graph.graph
    for node in nodes.find_nodes(op="call_function", target=aten.scatter.src):
        (_, dim, places, source), shape = node.args, node.meta["val"].shape
        sort: Any = (*places.args, None)[0]
        if getattr(sort, "target", None) is not aten.sort.stable:
            continue
        axes = {axis % max(1, len(shape)) for axis in (dim, sort.kwargs.get("dim", -1))}
        if len(axes) == 1 and places.args[1] == 1 and places.meta["val"].shape == shape:
            how = {"stable": True, "dim": dim}
            with nodes.inserting_before(node):
                inverse = nodes.call_function(aten.argsort.stable, (places,), how)
                gathered = nodes.call_function(aten.gather.default, (source, dim, inverse))
            node.replace_all_uses_with(gathered)


@functools.cache
def _table() -> dict[Any, Callable[..., Any]]:
    from torch import _decomp  # noqa: PLC0415 - imports sympy

    aten, decompositions = torch.ops.aten, cast("Any", _decomp)
    table = decompositions.get_decompositions([getattr(aten, name) for name in OF_TORCH])
    for name, function in OWN.items():
        table[functools.reduce(getattr, name.split("."), aten)] = function
    return table


def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(range(x.dim())) if dim is None else dim
    variance = x.var(axes, correction=correction, keepdim=keepdim)
    return variance, x.mean(axes, keepdim=keepdim)


def _embedding(weight: Tensor, indices: Tensor, *_: Any) -> Tensor:
    rows = weight.index_select(0, indices.reshape(-1))  # a negative index is an error
    return rows.reshape(*indices.shape, weight.shape[1])


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


def _largest(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amax(dim, keepdim=keepdim), x.argmax(dim, keepdim=keepdim)


def _smallest(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin(dim, keepdim=keepdim), x.argmin(dim, keepdim=keepdim)


def _accumulate(
    x: Tensor, dim: int, dtype: torch.dtype | None, combine: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The first element of an axis, the first two combined, and so on, in float64 as torch does."""
    kind = dtype or (x.dtype if x.is_floating_point() else torch.int64)
    if not x.dim():
        return x.to(kind)
    wide = torch.float64 if kind.is_floating_point else kind
    elements = x.to(kind).to(wide).unbind(_short(x, dim))
    return torch.stack([*itertools.accumulate(elements, combine)], dim).to(kind)


def _short(x: Tensor, dim: int) -> int:
    if x.shape[dim] > _LONGEST:
        raise UnsupportedError(f"one by one, the {x.shape[dim]} elements of an axis")
    return dim


def _cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return _accumulate(x, dim, dtype, torch.add) + 0  # no -0.0: torch begins with 0.0


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return _accumulate(x, dim, dtype, torch.mul)


def _extremes(
    x: Tensor, dim: int, beats: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The extreme of the first elements of an axis: NaN if there is one, and the last of equals."""
    if not x.dim():
        return x.clone(), x.new_zeros((), dtype=torch.int64)
    first, *others = x.unbind(_short(x, dim))
    values, places = [first], [torch.zeros_like(first, dtype=torch.int64)]
    for number, one in enumerate(others, start=1):
        taken = one.isnan() | (~values[-1].isnan() & beats(one, values[-1]))
        values.append(torch.where(taken, one, values[-1]))
        places.append(torch.where(taken, number, places[-1]))
    return torch.stack(values, dim), torch.stack(places, dim)


def _cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _extremes(x, dim, torch.ge)


def _cummin(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return _extremes(x, dim, torch.le)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _in_order(x, dim, descending=descending)


def _stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    del stable  # this sort always is
    return _in_order(x, dim, descending=descending)


def _topk(
    x: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002 - the name in torch
) -> tuple[Tensor, Tensor]:
    if not sorted:
        raise UnsupportedError("a topk in any order (sorted=False)")
    return _in_order(x, dim, descending=largest, end=k)


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, places = _in_order(x, dim, first=k - 1, end=k)
    if keepdim or not x.dim():
        return values, places
    return values.squeeze(dim), places.squeeze(dim)


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """The lower one of two in the middle; NaN if there is one."""
    middle = (x.shape[dim] + 1) // 2 if x.dim() else 1
    values, places = _kthvalue(x, middle, dim, keepdim)
    if x.is_floating_point():
        values = values.masked_fill(x.isnan().any(dim, keepdim), math.nan)
    return values, places


def _median_of_all(x: Tensor) -> Tensor:
    return _median(x.reshape(-1), 0)[0]


def _nanmedian(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, places = _in_order(x, dim)
    if not x.dim():
        return values, places
    number = (~x.isnan()).sum(dim, keepdim=True)
    middle = (number - 1).clamp(min=0) // 2
    values, places = values.gather(dim, middle), places.gather(dim, middle)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def _nanmedian_of_all(x: Tensor) -> Tensor:
    return _nanmedian(x.reshape(-1), 0)[0]


def _in_order(
    x: Tensor, dim: int, *, descending: bool = False, first: int = 0, end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Elements of an axis in the order of a stable sort, and their places.

    The rank of an element is the number of elements that come before it; NaN is the largest.

    Args:
        x: Tensor.
        dim: Axis.
        descending: Whether the largest element comes first.
        first: Rank of the first element of the result.
        end: Rank behind that of the last one; by default the extent of the axis.
    """
    if not x.dim():
        return x.clone(), x.new_zeros((), dtype=torch.int64)
    rows = x.movedim(_short(x, dim), -1)
    one, other = rows[..., :, None], rows[..., None, :]
    places = torch.arange(rows.shape[-1], dtype=torch.int32)  # more of them fit a vector
    after = (one > other) | (one.isnan() & ~other.isnan())
    before = (one < other) | (~one.isnan() & other.isnan())
    earlier = places[:, None] > places
    comes_first = (before if descending else after) | (~after & ~before & earlier)
    rank = comes_first.sum(-1, dtype=torch.int32)
    wanted = rank[..., None, :] == places[first:end, None]
    index = torch.where(wanted, places, 0).sum(-1, dtype=torch.int32).long()
    return rows.gather(-1, index).movedim(-1, dim), index.movedim(-1, dim)


def _triangle(x: Tensor, diagonal: int, *, upper: bool) -> Tensor:
    rows, columns = (torch.arange(extent) for extent in x.shape[-2:])
    offset = columns - rows[:, None]
    kept = offset >= diagonal if upper else offset <= diagonal
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def _triu(x: Tensor, diagonal: int = 0) -> Tensor:
    return _triangle(x, diagonal, upper=True)


def _tril(x: Tensor, diagonal: int = 0) -> Tensor:
    return _triangle(x, diagonal, upper=False)


def _cross(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    shape: torch.Size = cast("Any", torch).broadcast_shapes(x.shape, y.shape)
    (a, b, c), (d, e, f) = x.expand(shape).unbind(dim), y.expand(shape).unbind(dim)
    return torch.stack([b * f - c * e, c * d - a * f, a * e - b * d], dim)


def _nansum(
    x: Tensor,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    axes = list(range(x.dim())) if dim is None else dim
    return torch.where(x.isnan(), 0, x).sum(axes, keepdim=keepdim, dtype=dtype)


def _count_nonzero(x: Tensor, dim: list[int] | int | None = None) -> Tensor:
    return (x != 0).sum(dim)


def _trace(x: Tensor) -> Tensor:
    return x.diagonal().sum()


def _isin(x: Tensor, known: Tensor, *, assume_unique: bool = False, invert: bool = False) -> Tensor:
    del assume_unique  # a promise of the caller
    known = known.reshape(-1)
    _short(known, 0)
    return (x[..., None] == known).any(-1) ^ invert


def _bucketize(
    x: Tensor, boundaries: Tensor, *, out_int32: bool = False, right: bool = False
) -> Tensor:
    _short(boundaries, 0)
    above = boundaries > x[..., None] if right else boundaries >= x[..., None]
    return (~above).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _empty_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.zeros_like(x, dtype=dtype)  # whatever numbers are right


def _constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What depends on no tensor is computed by torch, while the graph is made."""

    def compute(*args: Any, **kwargs: Any) -> Tensor:
        from torch._subclasses import fake_tensor  # noqa: PLC0415 - imports sympy
        from torch.fx.experimental import proxy_tensor  # noqa: PLC0415 - imports sympy

        with proxy_tensor.disable_proxy_modes_tracing(), fake_tensor.unset_fake_temporarily():
            return function(*args, **kwargs)

    return compute


OWN: dict[str, Callable[..., Any]] = {
    # Those of torch ask for strides of memory, and for operations below its own.
    "native_group_norm.default": _group_norm,
    "native_layer_norm.default": _layer_norm,
    "var_mean.correction": _var_mean,
    "embedding.default": _embedding,
    "embedding_dense_backward.default": _embedding_backward,
    "max.dim": _largest,
    "min.dim": _smallest,
    "cumsum.default": _cumsum,
    "cumprod.default": _cumprod,
    "cummax.default": _cummax,
    "cummin.default": _cummin,
    "kthvalue.default": _kthvalue,
    "median.default": _median_of_all,
    "median.dim": _median,
    "nanmedian.default": _nanmedian_of_all,
    "nanmedian.dim": _nanmedian,
    "sort.default": _sort,
    "sort.stable": _stable_sort,
    "topk.default": _topk,
    "triu.default": _triu,
    "tril.default": _tril,
    "linalg_cross.default": _cross,
    "nansum.default": _nansum,
    "count_nonzero.dim_IntList": _count_nonzero,
    "count_nonzero.default": _count_nonzero,
    "trace.default": _trace,
    "empty_like.default": _empty_like,
    "isin.Tensor_Tensor": _isin,
    "bucketize.Tensor": _bucketize,
    "linspace.default": _constant(torch.linspace),
    "eye.default": _constant(torch.eye),
    "eye.m": _constant(torch.eye),
}
"""This module's own replacements, by torch's name of the overload without ``aten.``."""
