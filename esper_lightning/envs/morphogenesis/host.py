"""Host networks: blocks of convolution, batch norm, max pooling and relu, then a linear layer.

Axes: ``M`` image, ``N`` host, ``C`` channel of one host, ``K`` class. Activations are
``[M, N*C, H, W]`` in ``channels_last``: hosts are groups of a convolution, and batch norm over
``N*C`` channels is ``N`` independent ones. Pooling comes before relu, which changes nothing but the
time it takes.
"""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from esper_lightning.core.shapes import Float, Int, Shaped
from esper_lightning.envs.morphogenesis.blueprints import Part, affine, image_mean
from esper_lightning.envs.morphogenesis.layout import split_columns, unflatten

__all__ = ["Architecture", "Block", "gather_hosts", "host_input", "image_loss", "run_block"]

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


@dataclass(frozen=True)
class Architecture:
    """What a host looks like; a slot follows each block.

    Attributes:
        image: Channels and side of a square image.
        channels: Of each block.
        kernels: Side of each block's convolution, odd.
        pools: Factor by which each block reduces the side.
        classes: ``K``.
    """

    image: tuple[int, int]
    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    pools: tuple[int, ...]
    classes: int

    @property
    def slots(self) -> int:
        """``S``."""
        return len(self.channels)

    def parts(self) -> list[Part]:
        """Parameters in the order of a host's row: per block kernel, scale, shift; then the head.

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

    def of(self, host: Int[Tensor, " E"]) -> "Block":
        """The same for some hosts, cut off from gradients."""
        kernel, scale, shift = (
            tensor.detach().index_select(0, host)
            for tensor in (self.kernel, self.scale, self.shift)
        )
        return Block(kernel, scale, shift, self.pool)


def run_block(
    h: Float[Tensor, "M _ H W"],
    block: Block,
    mean: Float[Tensor, "N C"] | None,
    variance: Float[Tensor, "N C"] | None,
    *,
    training: bool,
) -> Float[Tensor, "M NC Hp Wp"]:
    """One block.

    Args:
        h: What comes in.
        block: Parameters.
        mean: Running mean of the batch norm: updated in place when training, unless ``None``; used
            otherwise.
        variance: Likewise.
        training: Whether to normalise by the statistics of ``h`` itself.
    """
    kernel, shift = block.kernel, block.shift
    padding = kernel.shape[-1] // 2
    if training:
        h = functional.conv2d(h, kernel.flatten(0, 1), padding=padding, groups=kernel.shape[0])
        h = functional.batch_norm(
            h,
            None if mean is None else mean.view(-1),
            None if variance is None else variance.view(-1),
            block.scale.flatten(),
            shift.flatten(),
            training=True,
            momentum=BATCH_NORM_MOMENTUM,
            eps=BATCH_NORM_EPS,
        )
    else:
        assert mean is not None
        assert variance is not None
        factor = block.scale * (variance + BATCH_NORM_EPS).rsqrt()
        kernel = kernel * factor[:, :, None, None, None]
        shift = shift - mean * factor
        groups = kernel.shape[0]
        h = functional.conv2d(
            h, kernel.flatten(0, 1), shift.flatten(), padding=padding, groups=groups
        )
    if block.pool > 1:
        h = functional.max_pool2d(h, block.pool)
    return h.relu()


def gather_hosts(
    h: Float[Tensor, "M NC H W"], hosts: int, index: Int[Tensor, " E"]
) -> Float[Tensor, "M EC H W"]:
    """Some of the hosts of an activation."""
    grouped = unflatten(h.permute(0, 2, 3, 1), 3, (hosts, -1))  # [M, H, W, N, C]
    return grouped.index_select(3, index).flatten(3).permute(0, 3, 1, 2)


def host_input(image: Shaped[Tensor, "M H W N C"]) -> Float[Tensor, "M NC H W"]:
    """Images of each host as an activation."""
    return image.contiguous().flatten(3).permute(0, 3, 1, 2)


def image_loss(
    h: Float[Tensor, "M NC H W"],
    weight: Float[Tensor, "N C K"],
    bias: Float[Tensor, "N K"],
    label: Int[Tensor, "N M"],
) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N M"]]:
    """Cross-entropy in nats of each image, and whether it is classified right (1 or 0)."""
    logits = affine(image_mean(h, weight.shape[0]), weight, bias)
    picked = logits.log_softmax(2).gather(2, label.unsqueeze(2)).squeeze(2)
    right = (logits.detach().argmax(2) == label).to(logits.dtype)
    return -picked, right
