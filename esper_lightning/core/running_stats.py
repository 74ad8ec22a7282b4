"""Mean and variance of a stream of batches: frozen within a rollout, part of the checkpoint."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper_lightning.core.ranks import SINGLE_RANK, Ranks
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.spaces import Box, ObsSpace
from esper_lightning.core.types import Observation

__all__ = ["Moments", "ObsNormalizer", "RunningStats", "merge_moments", "normalized_space"]


def merge_moments(
    count: Float[Tensor, ""],
    mean: Float[Tensor, "*O"],
    variance: Float[Tensor, "*O"],
    other_count: Float[Tensor, ""],
    other_mean: Float[Tensor, "*O"],
    other_variance: Float[Tensor, "*O"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "*O"], Float[Tensor, "*O"]]:
    """Count, mean and biased variance of the union of two sets (Chan, Golub, LeVeque 1979)."""
    total = count + other_count
    weight = other_count / total.clamp(min=1.0)  # 0 where both sets are empty
    shift = other_mean - mean
    merged_mean = mean + shift * weight
    merged = (
        variance * (1.0 - weight)
        + other_variance * weight
        + shift.square() * weight * (1.0 - weight)
    )
    return total, merged_mean, merged


class Moments(NamedTuple):
    """Mean and biased variance of each component of ``[..., *O]`` batches."""

    number: Float[Tensor, ""]  # of rows
    mean: Float[Tensor, "*O"]
    variance: Float[Tensor, "*O"]

    @classmethod
    def of(
        cls,
        batch: Float[Tensor, "..."],
        shape: tuple[int, ...] = (),
        *,
        where: Bool[Tensor, "..."] | None = None,
    ) -> "Moments":
        """Moments of a batch ``[..., *O]``, where ``shape`` is ``*O``; in double precision.

        With ``where``, moments of the numbers ``[...]`` at which ``where`` is True; all zero if
        there is no such number.
        """
        rows = batch.reshape(-1, *shape).double()
        if where is not None:
            assert shape == ()
            chosen = where.reshape(-1)
            number = chosen.sum().double()
            at_least_1 = number.clamp(min=1.0)
            mean = torch.where(chosen, rows, 0.0).sum() / at_least_1
            spread = torch.where(chosen, rows - mean, 0.0).square().sum()
            return cls(number, mean, spread / at_least_1)
        number = torch.full((), rows.shape[0], dtype=torch.float64, device=rows.device)
        return cls(number, rows.mean(0), rows.var(0, correction=0))

    def merged(self, *others: "Moments", where: Bool[Tensor, ""] | None = None) -> "Moments":
        """Moments merged with others; unchanged if ``where`` is given and False."""
        merged = self
        for other in others:
            merged = Moments(*merge_moments(*merged, *other))
        if where is None:
            return merged
        return Moments(
            *(torch.where(where, new, old) for new, old in zip(merged, self, strict=True))
        )

    def normalize(self, batch: Float[Tensor, "..."], *, clip: float) -> Float[Tensor, "..."]:
        """``(batch - mean) / std``, clamped to ``[-clip, clip]``, in the dtype of ``batch``."""
        mean, std = self.mean.to(batch.dtype), (self.variance + 1e-8).sqrt().to(batch.dtype)
        return ((batch - mean) / std).clamp(-clip, clip)

    def scale(self, batch: Float[Tensor, "..."], *, clip: float) -> Float[Tensor, "..."]:
        """``batch / std``, clamped to ``[-clip, clip]``.

        The mean is not subtracted, so that signs retain their meaning.
        """
        std = (self.variance + 1e-8).sqrt().to(batch.dtype)
        return (batch / std).clamp(-clip, clip)


class RunningStats(nn.Module):
    """Moments of a stream of batches, in double precision, as a module that is checkpointed.

    Before the first ``update`` the statistics are the identity (mean 0, variance 1). They change
    only in ``update`` and ``keep``: a caller that calls these methods only between rollouts has
    frozen statistics within each rollout.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))

    @property
    def moments(self) -> Moments:
        """Current moments."""
        return Moments(self.count, self.mean, self.variance)

    @torch.no_grad()
    def keep(self, moments: Moments) -> None:
        """Store ``moments`` as the current moments."""
        for buffer, value in zip(self.moments, moments, strict=True):
            if buffer is not value:
                buffer.copy_(value)

    def update(self, *batches: Moments, where: Bool[Tensor, ""] | None = None) -> None:
        """Merge the moments of batches into the current moments: see ``Moments.merged``."""
        self.keep(self.moments.merged(*batches, where=where))

    def normalize(self, batch: Float[Tensor, "..."], *, clip: float) -> Float[Tensor, "..."]:
        """``batch`` normalised by the current moments: see ``Moments.normalize``."""
        return self.moments.normalize(batch, clip=clip)

    def scale(self, batch: Float[Tensor, "..."], *, clip: float) -> Float[Tensor, "..."]:
        """``batch`` scaled by the current moments: see ``Moments.scale``."""
        return self.moments.scale(batch, clip=clip)


class ObsNormalizer(nn.Module):
    """Running statistics of an observation, or of each group of a grouped observation.

    The state dict contains the names of the groups.
    """

    def __init__(self, space: ObsSpace, *, clip: float) -> None:
        super().__init__()
        boxes = {"obs": space} if isinstance(space, Box) else space
        self._clip = clip
        # The prefix keeps groups from taking the names of a module's own attributes.
        stats = {f"group_{name}": RunningStats(box.shape) for name, box in boxes.items()}
        self._stats = nn.ModuleDict(stats)

    def forward(self, obs: Observation) -> Observation:
        """Observations ``[..., *O]``, shifted, scaled and clipped by the current statistics."""
        if isinstance(obs, Tensor):
            return self._of("obs").normalize(obs, clip=self._clip)
        return {
            name: self._of(name).normalize(value, clip=self._clip) for name, value in obs.items()
        }

    @torch.no_grad()
    def update(
        self,
        obs: Observation,
        ranks: Ranks = SINGLE_RANK,
        *,
        where: Bool[Tensor, ""] | None = None,
    ) -> None:
        """Update the statistics with a batch ``[..., *O]`` and the batches of the other ranks.

        The statistics stay as they are if ``where`` is given and False.
        """
        groups = {"obs": obs} if isinstance(obs, Tensor) else obs
        batch = {name: _moments(v, self._of(name).mean.shape) for name, v in groups.items()}
        everywhere = ranks.gather(batch)
        for name in groups:
            self._of(name).update(*(one[name] for one in everywhere), where=where)

    def _of(self, name: str) -> RunningStats:
        stats = self._stats[f"group_{name}"]
        assert isinstance(stats, RunningStats)
        return stats


def _moments(batch: Tensor, shape: tuple[int, ...]) -> Moments:
    """Moments of a batch; of images one step at a time, because doubles take eight times more."""
    if batch.dtype != torch.uint8 or batch.dim() == len(shape) + 1:
        return Moments.of(batch, shape)
    first, *others = (Moments.of(step.double(), shape) for step in batch)
    return first.merged(*others)


def normalized_space(space: ObsSpace, *, clip: float) -> ObsSpace:
    """The space of observations that an ``ObsNormalizer`` has normalised."""
    if isinstance(space, Box):
        return Box(space.shape, low=-clip, high=clip)
    return {name: Box(box.shape, low=-clip, high=clip) for name, box in space.items()}
