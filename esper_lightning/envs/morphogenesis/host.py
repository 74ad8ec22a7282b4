"""Host networks: blocks of convolution, batch norm, max pooling and relu, then a linear layer.

Axes: ``N`` host, ``M`` image, ``C`` channel, ``K`` class. Pooling comes before relu, which changes
the time but not the result.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.envs.morphogenesis.blueprints import Part
from esper_lightning.envs.morphogenesis.layout import split_columns, unflatten
from esper_lightning.envs.morphogenesis.operations import (
    affine,
    as_rows,
    convolve,
    convolve_images_first,
    hosts_first,
    image_mean,
    normalise_pooled,
    standardise,
)

__all__ = ["BATCH_NORM_MOMENTUM", "Architecture", "Block", "image_loss", "run_block"]

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


@dataclass(frozen=True)
class Architecture:
    """Architecture of a host; a slot follows each block.

    Attributes:
        image: Channels and side of a square image.
        channels: Number of output channels of each block.
        kernels: Side of each block's convolution, odd.
        pools: Factor by which each block reduces the side of the image.
        classes: ``K``, the number of classes.
    """

    image: tuple[int, int]
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    pools: tuple[int, ...]
    classes: int

    @property
    def slots(self) -> int:
        """``S``: number of slots."""
        return len(self.channels)

    def parts(self) -> list[Part]:
        """Parameter tensors in the order of a row: kernel, scale, shift of each block; the head.

        The head starts at zero: a new host gives all classes the same probability.
        """
        inputs = (self.image[0], *self.channels)
        found: list[Part] = []
        for before, after, side in zip(inputs, self.channels, self.kernels, strict=False):
            std = math.sqrt(2.0 / (side**2 * before))
            found.append(Part((after, before, side, side), std=std))
            found += [Part((after,), mean=1.0), Part((after,))]
        return [*found, Part((self.channels[-1], self.classes)), Part((self.classes,))]

    def unpack(self, row: Float[Tensor, "N P"]) -> tuple[list["Block"], Tensor, Tensor]:
        """Blocks, weight ``[N, C, K]`` and bias ``[N, K]`` of the head."""
        layout = self.parts()
        pieces = [
            unflatten(piece, 1, part.shape)
            for piece, part in zip(
                split_columns(row, [p.size for p in layout]), layout, strict=True
            )
        ]
        blocks = [Block(*pieces[3 * i : 3 * i + 3], pool=pool) for i, pool in enumerate(self.pools)]
        return blocks, pieces[-2], pieces[-1]


@dataclass(frozen=True)
class Block:
    """Parameters of one block of ``N`` hosts."""

    kernel: Tensor  # [N, C, C before, side, side]
    scale: Tensor  # [N, C]
    shift: Tensor  # [N, C]
    pool: int

    def first(self, count: int) -> "Block":
        """The parameters of the first ``count`` hosts."""
        if count == self.kernel.shape[0]:
            return self
        return Block(self.kernel[:count], self.scale[:count], self.shift[:count], self.pool)


def run_block(
    h: Float[Tensor, "N M H W _"],
    block: Block,
    running: tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]] | None,
) -> tuple[Float[Tensor, "N M Hp Wp C"], tuple[Tensor, Tensor] | None]:
    """One block: convolution, batch norm, max pooling and relu.

    Args:
        h: Input activations.
        block: Parameters of the block.
        running: Mean and variance to normalise by; ``None`` in training, where those of the batch
            are used.

    Returns:
        Output activations and, in training, mean and unbiased variance ``[N, C]`` of the batch.
    """
    kernel, scale, shift, pool = block.kernel, block.scale, block.shift, block.pool
    if running is not None:
        mean, variance = running
        factor = scale * (variance + BATCH_NORM_EPS).rsqrt()
        kernel = kernel * factor.view(*factor.shape, 1, 1, 1)
        shift = shift - mean * factor
        if pool == 1:
            return convolve(h, kernel, shift).relu(), None
        wide = convolve_images_first(h, kernel, shift)
        return hosts_first(functional.max_pool2d(wide, pool), kernel.shape[0]).relu(), None
    if pool > 1:
        # If the sign goes into the kernel, the largest scaled number is the largest number, scaled.
        sign = torch.where(scale.detach() < 0, -1.0, 1.0).to(scale.dtype)
        wide = convolve_images_first(h, kernel * sign.view(*sign.shape, 1, 1, 1), None)
        h, mean, variance = normalise_pooled(wide, scale * sign, shift, pool, BATCH_NORM_EPS)
        return h, (mean * sign, variance)
    h, mean, variance = standardise(convolve(h, kernel, None), BATCH_NORM_EPS)
    h = torch.addcmul(as_rows(shift), h, as_rows(scale)).relu()
    return h, (mean, variance)


def image_loss(
    h: Float[Tensor, "N M H W C"],
    weight: Float[Tensor, "N C K"],
    bias: Float[Tensor, "N K"],
    label: Int[Tensor, "N M"],
    class_mask: Bool[Tensor, "N K"] | None,
) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N M"]]:
    """Cross-entropy in nats of each image, and whether it is classified right (1 or 0).

    A host predicts only classes of its mask. The loss of an image of another class is infinite.
    """
    logits = affine(image_mean(h), weight, bias)
    if class_mask is not None:
        logits = logits.masked_fill(~class_mask.unsqueeze(1), -math.inf)
    picked = logits.log_softmax(2).gather(2, label.unsqueeze(2)).squeeze(2)
    right = (logits.detach().argmax(2) == label).to(logits.dtype)
    return -picked, right
