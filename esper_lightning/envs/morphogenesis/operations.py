"""Operations of host networks, for several hosts at once.

Axes: ``N`` host, ``M`` image, ``C`` and ``O`` channels of one host before and after. Activations
are ``[N, M, H, W, C]``: a host is one block of memory, so hosts are gathered at once, and an
operation on one host rounds alike whatever hosts are beside it. Convolutions of larger images are
computed as ``[M, N*C, H, W]`` in ``channels_last``, with the hosts as groups.
"""

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from esper_lightning.core.constants import made_to_keep
from esper_lightning.core.shapes import Float, Shaped
from esper_lightning.envs.morphogenesis.layout import unflatten

__all__ = [
    "affine",
    "as_rows",
    "convolve",
    "convolve_images_first",
    "hosts_first",
    "image_mean",
    "normalise_pooled",
    "standardise",
]


def affine(
    x: Float[Tensor, "N M C"], weight: Float[Tensor, "N C O"], bias: Float[Tensor, "N O"] | None
) -> Float[Tensor, "N M O"]:
    """A linear layer for each host."""
    # The rounding of a batched product depends on the addresses of its matrices, modulo 16 bytes.
    # Zeros make the matrix of each host, and its gradient, a multiple of 4 numbers.
    (rows, inputs), out = x.shape[1:], weight.shape[2]
    more_rows = -rows % 4 if rows * inputs % 4 or rows * out % 4 else 0
    more_out = -out % 4 if inputs * out % 4 else 0
    x = functional.pad(x, (0, 0, 0, more_rows)) if more_rows else x
    if more_out:
        weight = functional.pad(weight, (0, more_out))
        bias = None if bias is None else functional.pad(bias, (0, more_out))
    y = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)
    return y[:, :rows, :out].contiguous() if more_rows or more_out else y


def as_rows(channel: Float[Tensor, "N C"]) -> Float[Tensor, "N 1 1 1 C"]:
    """A number for each channel, in a shape that broadcasts with ``[N, M, H, W, C]``."""
    return channel.reshape(channel.shape[0], 1, 1, 1, -1)


def image_mean(h: Float[Tensor, "N M H W C"]) -> Float[Tensor, "N M C"]:
    """Mean over each image."""
    return h.flatten(2, 3).sum(2) / (h.shape[2] * h.shape[3])


def convolve(
    h: Float[Tensor, "N M H W C"],
    kernel: Float[Tensor, "N O C side side"],
    bias: Float[Tensor, "N O"] | None,
) -> Float[Tensor, "N M H W O"]:
    """A convolution for each host, with zeros around the image."""
    hosts, images, height, width, _ = h.shape
    out, side = kernel.shape[1], kernel.shape[-1]
    if side == 1:
        y = affine(h.flatten(1, 3), kernel.flatten(2).mT, bias)
    elif max(height, width) <= side // 2 + 1:
        # Each pixel reaches each other: the convolution is one matrix, [N, H*W*C, H*W*O].
        places = height * width
        taps = _taps(height, width, side, h.dtype, h.device).expand(hosts, -1, -1)
        matrix = unflatten(affine(kernel.flatten(3).flatten(1, 2), taps, None), 1, (out, -1))
        matrix = unflatten(matrix, 3, (places, places)).permute(0, 4, 2, 3, 1)
        wide = None if bias is None else bias.repeat(1, places)
        y = affine(h.flatten(2), matrix.flatten(3).flatten(1, 2), wide)
    else:
        return hosts_first(convolve_images_first(h, kernel, bias), hosts)
    return y.view(hosts, images, height, width, out)


def convolve_images_first(
    h: Float[Tensor, "N M H W C"],
    kernel: Float[Tensor, "N O C side side"],
    bias: Float[Tensor, "N O"] | None,
) -> Float[Tensor, "M NO H W"]:
    """A convolution for each host as one grouped convolution, in ``channels_last``."""
    return functional.conv2d(
        images_first(h),
        kernel.flatten(0, 1),
        None if bias is None else bias.flatten(),
        padding=kernel.shape[-1] // 2,
        groups=kernel.shape[0],
    )


def images_first(h: Float[Tensor, "N M H W C"]) -> Float[Tensor, "M NC H W"]:
    """Hosts as channels, in ``channels_last``."""
    return cast(Tensor, cast(Any, _ImagesFirst.apply)(h))


def hosts_first(h: Float[Tensor, "M NC H W"], hosts: int) -> Float[Tensor, "N M H W C"]:
    """The inverse of ``images_first``."""
    return cast(Tensor, cast(Any, _HostsFirst.apply)(h, hosts))


class _ImagesFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.hosts = h.shape[0]
        return _join(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _hosts_first_view(grads[0], ctx.hosts).contiguous()


class _HostsFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, hosts: int) -> Tensor:  # noqa: ARG004
        return _hosts_first_view(h, hosts).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return _join(grads[0]), None


def _join(h: Tensor) -> Tensor:
    # On a CPU this is two to three times as fast as a copy of the permuted tensor.
    joined = h[0].contiguous() if h.shape[0] == 1 else torch.cat(h.unbind(0), dim=-1)
    return joined.permute(0, 3, 1, 2)


def standardise(
    h: Float[Tensor, "N M H W C"], eps: float
) -> tuple[Tensor, Float[Tensor, "N C"], Float[Tensor, "N C"]]:
    """Batch norm without scale and shift; also returns mean and unbiased variance."""
    flat = h.flatten(1, 3)
    count = flat.shape[1]
    mean = flat.sum(1, keepdim=True) / count
    centred = flat - mean
    variance = (centred * centred).sum(1, keepdim=True) / count
    y = (centred * (variance + eps).rsqrt()).view_as(h)
    unbiased = variance.detach() * (count / max(1, count - 1))
    return y, mean.detach().squeeze(1), unbiased.squeeze(1)


def normalise_pooled(
    h: Float[Tensor, "M NC H W"],
    scale: Float[Tensor, "N C"],
    shift: Float[Tensor, "N C"],
    pool: int,
    eps: float,
) -> tuple[Float[Tensor, "N M Hp Wp C"], Float[Tensor, "N C"], Float[Tensor, "N C"]]:
    """Batch norm, max pooling and relu, computed only for the numbers that the pooling selects.

    ``scale`` must not be negative: the largest scaled number is then the largest number, scaled.
    The backward pass overwrites ``h``, which must be the output of a convolution (whose backward
    pass needs its input alone). Also returns mean and unbiased variance.
    """
    apply = cast(Any, _NormalisePooled.apply)
    return cast(tuple[Tensor, Tensor, Tensor], apply(h, scale, shift, pool, eps))


class _NormalisePooled(torch.autograd.Function):
    """The gradient is linear in the input, with one more term where the pooling selected."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, scale: Tensor, shift: Tensor, pool: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        hosts, count = scale.shape[0], h.numel() // h.shape[1]
        mean, variance = _mean_and_variance(h)
        mean, variance = mean.view_as(scale), variance.view_as(scale)
        rate = (variance + eps).rsqrt()
        picked, index = functional.max_pool2d(h, pool, return_indices=True)
        picked, factor = _hosts_first_view(picked, hosts), scale * rate
        y = torch.empty(picked.shape, dtype=h.dtype, device=h.device)
        torch.addcmul(as_rows(shift - factor * mean), picked, as_rows(factor), out=y).relu_()
        ctx.save_for_backward(h, index, picked, y, mean, rate, factor)
        unbiased = variance * (count / max(1, count - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        h, index, picked, y, mean, rate, factor = ctx.saved_tensors
        count = h.numel() // h.shape[1]
        grad = torch.ops.aten.threshold_backward(grads[0], y, 0.0)
        shift_grad = grad.flatten(1, 3).sum(1)
        scale_grad = rate * ((grad * picked).flatten(1, 3).sum(1) - mean * shift_grad)
        slope = factor * rate * scale_grad / -count
        offset = factor * shift_grad / -count - slope * mean
        # In place: no other operation needs the input, and fresh memory costs more than the sums.
        torch.addcmul(offset.view(1, -1, 1, 1), h, slope.view(1, -1, 1, 1), out=h)
        sparse = _join(grad * as_rows(factor))
        _pixels(h).scatter_add_(1, _pixels(index), _pixels(sparse))
        return h, scale_grad, shift_grad, None, None


def _mean_and_variance(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    if h.device.type == "cpu":
        return torch.batch_norm_update_stats(h, None, None, 0.0)
    variance, mean = torch.var_mean(h, (0, 2, 3), correction=0)  # which Inductor knows
    return mean, variance


def _hosts_first_view(h: Tensor, hosts: int) -> Tensor:
    return unflatten(h.permute(0, 2, 3, 1), 3, (hosts, -1)).permute(3, 0, 1, 2, 4)


def _pixels(h: Shaped[Tensor, "M NC H W"]) -> Shaped[Tensor, "M HW NC"]:
    return h.permute(0, 2, 3, 1).flatten(1, 2)


@cache
def _taps(height: int, width: int, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[side*side, out*in]``: 1 where a tap takes the pixel ``in`` to the pixel ``out``."""
    with made_to_keep():
        row = torch.arange(height, device=device).repeat_interleave(width)
        column = torch.arange(width, device=device).repeat(height)
        down, right = (axis - axis.unsqueeze(1) + side // 2 for axis in (row, column))  # [out, in]
        tap = (down * side + right).flatten()
        return (tap == torch.arange(side * side, device=device).unsqueeze(1)).to(dtype)
