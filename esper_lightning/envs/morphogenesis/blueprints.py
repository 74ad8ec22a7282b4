"""Blueprints of seeds: residuals ``f`` of ``h + alpha * f(h)``, for several hosts at once.

Axes: ``N`` host, ``M`` image, ``C`` channel of one host, ``P`` parameter of a seed. A seed's
parameters are the first entries of a row ``[P]`` that is as long as the largest blueprint needs.
Blueprints of one family run together, because their parameters form kernels of one shape. Every
``f`` starts near 0 and with a gradient in all its parameter tensors.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from esper_lightning.core.shapes import Float, Int
from esper_lightning.envs.morphogenesis.layout import split_columns, split_rows, unflatten
from esper_lightning.envs.morphogenesis.operations import affine, as_rows, convolve, image_mean

__all__ = [
    "BLUEPRINTS",
    "FAMILIES",
    "Part",
    "count_parameters",
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
_SMALL = 0.1  # initial factor of a residual: LayerScale (Touvron et al. 2021)


class Part(NamedTuple):
    """One parameter tensor of a seed, whose initial values are normally distributed."""

    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


def parts(name: str, channels: int) -> dict[str, Part]:
    """The parameter tensors of a blueprint, in the order of its row.

    ``norm`` has scale and shift of the layer norm of all channels. ``attention`` is squeeze and
    excite (Hu et al. 2018). ``depthwise`` is a separable convolution, with a kernel for each
    channel and a matrix between channels. ``conv_light`` is one 3x3 convolution, ``conv_heavy`` is
    two. ``bottleneck`` is a 1x1 convolution to a quarter of the channels and a 3x3 convolution
    back. ``low_rank`` is a 3x3 convolution to a quarter of the channels and a 1x1 convolution back,
    with nothing between.

    All convolutions have a bias, a ``relu`` after each (except within the factored convolutions),
    and a scale for each channel. A quarter is at least 4 channels, and so is the squeeze to a half:
    of two units after a ``relu`` both may be dead.
    """
    c, quarter, half = channels, max(4, channels // 4), max(4, channels // 2)
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
    """Number of parameters of a seed of this blueprint, without the padding of its row."""
    return sum(part.size for part in parts(name, channels).values())


def residual(
    family: str,
    names: Sequence[str],
    h: Float[Tensor, "N M H W C"],
    row: Float[Tensor, "N P"],
    kind: Int[Tensor, " N"] | Sequence[int],
    gate: Float[Tensor, " N"],
) -> Float[Tensor, "N M H W C"]:
    """``gate * f(h)``.

    Args:
        family: Family of all the seeds.
        names: Blueprints that occur among the seeds.
        h: Activations to which the seeds are applied.
        row: Parameters of each seed.
        kind: Blueprint of each seed, as a position in ``BLUEPRINTS``; or, where the seeds are in
            the order of ``names``, the number of seeds of each blueprint.
        gate: Factor of each seed.
    """
    channels, factor = h.shape[4], gate.unsqueeze(1)
    if family == "norm":
        part = _unpack(row, parts("norm", channels))
        normed = functional.layer_norm(h, h.shape[2:])
        scale, bias = part["scale"] * factor, part["bias"] * factor
        return torch.addcmul(as_rows(bias), normed, as_rows(scale))
    if family == "attention":
        part = _unpack(row, parts("attention", channels))
        return h * _excitation(h, part, gate)[:, :, None, None]

    def make(what: Callable[[str, dict[str, Tensor]], Tensor]) -> Tensor:
        return _assemble(names, row, channels, kind, what)

    # All members of a family have bias and scale in the same place.
    common = _unpack(row, parts(names[0], channels))
    if family == "double":
        h = convolve(h, make(_inner_kernel), make(_inner_bias)).relu()
    h = convolve(h, make(_kernel), common["bias"]).relu()
    return h * as_rows(common["scale"] * factor)


def _excitation(
    h: Float[Tensor, "N M H W C"], part: dict[str, Tensor], gate: Float[Tensor, " N"]
) -> Float[Tensor, "N M C"]:
    """A factor for each channel: ``2 * sigmoid(z) - 1``, which is 0 where ``z`` is 0."""
    squeezed = affine(image_mean(h), part["squeeze"].mT, part["squeeze_bias"]).relu()
    z = affine(squeezed, part["excite"].mT, part["bias"])
    return (0.5 * z).tanh() * gate[:, None, None]


def _assemble(
    names: Sequence[str],
    row: Float[Tensor, "N P"],
    channels: int,
    kind: Int[Tensor, " N"] | Sequence[int],
    what: Callable[[str, dict[str, Tensor]], Tensor],
) -> Tensor:
    """For each row, the tensor that ``what`` makes of the parameters of the row's blueprint."""
    if not isinstance(kind, Tensor):
        pieces = split_rows(row, kind)
        made = [
            what(name, _unpack(piece, parts(name, channels)))
            for name, piece in zip(names, pieces, strict=True)
        ]
        return made[0] if len(made) == 1 else torch.cat(made)
    chosen = what(names[0], _unpack(row, parts(names[0], channels)))
    for name in names[1:]:
        tensor = what(name, _unpack(row, parts(name, channels)))
        mine = (kind == BLUEPRINTS.index(name)).view(-1, *[1] * (tensor.dim() - 1))
        chosen = torch.where(mine, tensor, chosen)
    return chosen


def _kernel(name: str, part: dict[str, Tensor]) -> Float[Tensor, "N C C 3 3"]:
    if name == "depthwise":
        return part["point"][:, :, :, None, None] * part["depth"].unsqueeze(1)
    if name == "low_rank":
        return unflatten(affine(part["mix"], part["basis"].flatten(2), None), 2, (-1, 3, 3))
    return _pad(part["kernel"], 2, part["kernel"].shape[1])


def _inner_kernel(name: str, part: dict[str, Tensor]) -> Float[Tensor, "N C C 3 3"]:
    inner = part["inner"]
    if name == "bottleneck":  # 1x1: only the middle of the kernel
        inner = functional.pad(inner[:, :, :, None, None], (1, 1, 1, 1))
    return _pad(inner, 1, inner.shape[2])


def _inner_bias(_: str, part: dict[str, Tensor]) -> Float[Tensor, "N C"]:
    return _pad(part["inner_bias"], 1, part["bias"].shape[1])


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Zeros after the end of an axis, up to ``size``."""
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    return functional.pad(tensor, (0, 0) * (tensor.dim() - 1 - dim) + (0, missing))


def _unpack(row: Float[Tensor, "N P"], layout: dict[str, Part]) -> dict[str, Tensor]:
    sizes = [part.size for part in layout.values()]
    pieces = split_columns(row, [*sizes, row.shape[1] - sum(sizes)])
    return {
        name: unflatten(piece, 1, part.shape)
        for (name, part), piece in zip(layout.items(), pieces, strict=False)
    }


def _he(fan_in: int) -> float:
    return math.sqrt(2.0 / fan_in)
