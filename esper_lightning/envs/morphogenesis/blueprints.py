"""What can be grown: residuals ``f`` of seeds ``h + alpha * f(h)``, for several hosts at once.

Axes: ``M`` image, ``N`` host, ``C`` channel of one host, ``P`` parameter of a seed. Activations are
``[M, N*C, H, W]`` in ``channels_last``, where the hosts are groups of a convolution. A seed's
parameters are the first entries of a row ``[P]`` that is as long as the largest blueprint needs.

Blueprints of one family run together: their parameters make kernels of one shape, chosen row by row
with ``where``. Means and products with a channel's factor go through pooling, convolution,
interpolation and batched products, whose sums round alike however many hosts there are; plain
reductions do not. Every ``f`` starts near 0 and with a gradient in all its parts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from esper_lightning.core.shapes import Float, Int
from esper_lightning.envs.morphogenesis.layout import split_columns, unflatten

__all__ = [
    "BLUEPRINTS",
    "FAMILIES",
    "Part",
    "affine",
    "count_parameters",
    "image_mean",
    "parts",
    "residual",
]

BLUEPRINTS = (
    "norm",
    "attention",
    "depthwise",
    "conv_light",
    "conv_heavy",
    "bottleneck",
    "low_rank",
)
FAMILIES: dict[str, tuple[str, ...]] = {
    "norm": ("norm",),
    "attention": ("attention",),
    "conv": ("depthwise", "conv_light", "low_rank"),
    "double": ("conv_heavy", "bottleneck"),
}
_SMALL = 0.1  # factor of a residual at the start: LayerScale (Touvron et al. 2021)


class Part(NamedTuple):
    """One parameter tensor of a seed, drawn from a normal distribution."""

    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


def parts(name: str, channels: int) -> dict[str, Part]:
    """The parameters of a blueprint, in the order of its row.

    ``norm``: scale and shift of the layer norm of all channels. ``attention``: squeeze and excite
    (Hu et al. 2018). ``depthwise``: separable, a kernel a channel and a matrix between channels.
    ``conv_light``: a 3x3 convolution. ``conv_heavy``: two. ``bottleneck``: 1x1 to a quarter of the
    channels, 3x3 back. ``low_rank``: 3x3 to a quarter of the channels and 1x1 back, nothing
    between. All convolutions with bias, a ``relu`` after each but within the factored ones, and a
    scale for each channel. A quarter is at least 4: of two units after a ``relu`` both may be dead.
    """
    c, quarter, half = channels, max(4, channels // 4), max(2, channels // 2)
    bias, scale = Part((c,)), Part((c,), mean=_SMALL)
    dense = Part((c, c, 3, 3), std=_he(9 * c))
    table: dict[str, dict[str, Part]] = {
        "norm": {"scale": scale, "bias": bias},
        "attention": {
            "squeeze": Part((half, c), std=_he(c)),
            "squeeze_bias": Part((half,)),
            "excite": Part((c, half), std=_SMALL * _he(half)),
            "bias": bias,
        },
        "depthwise": {
            "bias": bias,
            "scale": scale,
            "depth": Part((c, 3, 3), std=1 / 3),
            "point": Part((c, c), std=_he(c)),
        },
        "conv_light": {"bias": bias, "scale": scale, "kernel": dense},
        "low_rank": {
            "bias": bias,
            "scale": scale,
            "basis": Part((quarter, c, 3, 3), std=_he(9 * c)),
            "mix": Part((c, quarter), std=quarter**-0.5),
        },
        "conv_heavy": {
            "bias": bias,
            "scale": scale,
            "inner": dense,
            "inner_bias": bias,
            "kernel": dense,
        },
        "bottleneck": {
            "bias": bias,
            "scale": scale,
            "inner": Part((quarter, c), std=_he(c)),
            "inner_bias": Part((quarter,)),
            "kernel": Part((c, quarter, 3, 3), std=_he(9 * quarter)),
        },
    }
    return table[name]


def count_parameters(name: str, channels: int) -> int:
    """What a seed of this blueprint really has."""
    return sum(part.size for part in parts(name, channels).values())


def residual(
    family: str,
    names: Sequence[str],
    h: Float[Tensor, "M NC H W"],
    row: Float[Tensor, "N P"],
    kind: Int[Tensor, " N"],
    gate: Float[Tensor, " N"],
) -> Float[Tensor, "M NC H W"]:
    """``gate * f(h)``.

    Args:
        family: Of all the seeds.
        names: The blueprints that occur among them.
        h: Where the seeds sit.
        row: Their parameters.
        kind: Their blueprints, as positions in ``BLUEPRINTS``.
        gate: Factor of each.
    """
    hosts = row.shape[0]
    channels = h.shape[1] // hosts
    pieces = [(name, _unpack(row, parts(name, channels))) for name in names]
    if family == "norm":
        scale, bias = (pieces[0][1][what] * gate.unsqueeze(1) for what in ("scale", "bias"))
        # Given scale and bias, its backward pass on a CPU crashes where ``h`` needs no gradient.
        return _scale(functional.group_norm(h, hosts), scale, bias)
    if family == "attention":
        return h * functional.interpolate(_excitation(h, pieces[0][1], gate), size=h.shape[2:])
    # All members of a family have these two in the same place.
    bias, scale = pieces[0][1]["bias"], pieces[0][1]["scale"] * gate.unsqueeze(1)
    if family == "double":
        kernel, inner_bias = (
            _choose(kind, [(name, make(part)) for name, part in pieces])
            for make in (_inner_kernel, _inner_bias)
        )
        h = _convolve(h, kernel, inner_bias)
    kernel = _choose(kind, [(name, _kernel(name, part)) for name, part in pieces])
    return _scale(_convolve(h, kernel, bias), scale)


def image_mean(h: Float[Tensor, "M NC H W"], hosts: int) -> Float[Tensor, "N M C"]:
    """Mean over each image."""
    mean = functional.avg_pool2d(h, (h.shape[2], h.shape[3])).flatten(1)
    return unflatten(mean, 1, (hosts, -1)).transpose(0, 1)  # [M, N*C] -> [N, M, C]


def affine(
    x: Float[Tensor, "N M C"], weight: Float[Tensor, "N C K"], bias: Float[Tensor, "N K"]
) -> Float[Tensor, "N M K"]:
    """A linear layer for each host; the bias is the weight of a feature that is always 1."""
    return torch.bmm(
        functional.pad(x, (0, 1), value=1.0), torch.cat((weight, bias.unsqueeze(1)), dim=1)
    )


def _scale(
    h: Float[Tensor, "M NC H W"],
    scale: Float[Tensor, "N C"],
    bias: Float[Tensor, "N C"] | None = None,
) -> Float[Tensor, "M NC H W"]:
    shift = None if bias is None else bias.flatten()
    return functional.conv2d(h, scale.view(-1, 1, 1, 1), shift, groups=h.shape[1])


def _excitation(
    h: Float[Tensor, "M NC H W"], part: dict[str, Tensor], gate: Float[Tensor, " N"]
) -> Float[Tensor, "M NC 1 1"]:
    """A factor for each channel: ``2 * sigmoid(z) - 1``, 0 where the excitation is."""
    mean = image_mean(h, gate.shape[0])
    squeezed = affine(mean, part["squeeze"].mT, part["squeeze_bias"]).relu()
    z = affine(squeezed, part["excite"].mT, part["bias"])
    factor = (0.5 * z).tanh() * gate[:, None, None]
    return factor.transpose(0, 1).flatten(1)[:, :, None, None]  # [N, M, C] -> [M, N*C, 1, 1]


def _convolve(
    h: Float[Tensor, "M NC H W"], kernel: Float[Tensor, "N C C 3 3"], bias: Float[Tensor, "N C"]
) -> Float[Tensor, "M NC H W"]:
    groups = kernel.shape[0]
    return functional.conv2d(
        h, kernel.flatten(0, 1), bias.flatten(), padding=1, groups=groups
    ).relu()


def _kernel(name: str, part: dict[str, Tensor]) -> Float[Tensor, "N C C 3 3"]:
    if name == "depthwise":
        return part["point"][:, :, :, None, None] * part["depth"].unsqueeze(1)
    if name == "low_rank":
        return unflatten(torch.bmm(part["mix"], part["basis"].flatten(2)), 2, (-1, 3, 3))
    return _pad(part["kernel"], 2, part["kernel"].shape[1])


def _inner_kernel(part: dict[str, Tensor]) -> Float[Tensor, "N C C 3 3"]:
    inner = part["inner"]
    if inner.dim() == 3:  # 1x1: only the middle of the kernel
        inner = functional.pad(inner[:, :, :, None, None], (1, 1, 1, 1))
    return _pad(inner, 1, inner.shape[2])


def _inner_bias(part: dict[str, Tensor]) -> Float[Tensor, "N C"]:
    return _pad(part["inner_bias"], 1, part["bias"].shape[1])


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros after the end of an axis, up to ``size``."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))


def _choose(kind: Int[Tensor, " N"], options: list[tuple[str, Tensor]]) -> Tensor:
    """Row by row the option of that blueprint."""
    _, chosen = options[0]
    for name, tensor in options[1:]:
        mine = (kind == BLUEPRINTS.index(name)).view(-1, *[1] * (tensor.dim() - 1))
        chosen = torch.where(mine, tensor, chosen)
    return chosen


def _unpack(row: Float[Tensor, "N P"], layout: dict[str, Part]) -> dict[str, Tensor]:
    sizes = [part.size for part in layout.values()]
    pieces = split_columns(row, [*sizes, row.shape[1] - sum(sizes)])
    return {
        name: unflatten(piece, 1, part.shape)
        for (name, part), piece in zip(layout.items(), pieces, strict=False)
    }


def _he(fan_in: int) -> float:
    return math.sqrt(2.0 / fan_in)
