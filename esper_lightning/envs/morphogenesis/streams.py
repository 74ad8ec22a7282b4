"""Random numbers that are a function of their purpose, not of the numbers sampled before.

Philox 4x32-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*) in int64 tensors
that hold 32-bit words. The key is the seed and the purpose, and the counter is environment,
episode, step and position. An environment therefore samples the same numbers however many other
environments there are.

Axes: ``B`` environment, ``N`` number sampled.
"""

import math
from enum import IntEnum
from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.shapes import Float, Int

__all__ = ["Place", "Purpose", "integers", "normals", "philox", "uniforms", "words_at"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

_Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Purpose(IntEnum):
    """Purpose of random numbers; numbers of different purposes are independent."""

    HOST = 0
    SEED = 1
    BATCHES = 2
    POLICY = 3
    DATA = 4
    KIND = 5
    LABELS = 6


class Place(NamedTuple):
    """Environment, episode and step of random numbers: one stream for each row."""

    env: Int[Tensor, " B"]
    episode: Int[Tensor, " B"]
    step: Int[Tensor, " B"]


def philox(counter: _Words, key: tuple[int, int]) -> _Words:
    """Ten rounds of Philox over 32-bit words, elementwise."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap at 64 bits; the upper word is still right once it is masked.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ k0,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ k1,
            first & _WORD,
        )
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return a, b, c, d


def integers(
    seed: int, purpose: Purpose, place: Place, *, count: int, high: int | Int[Tensor, "B N"]
) -> Int[Tensor, "B N"]:
    """Integers in ``[0, high)``, uniform except for a share of ``high / 2**32``."""
    return _words(seed, purpose, place, count) * high >> 32


def uniforms(seed: int, purpose: Purpose, place: Place, *, count: int) -> Float[Tensor, "B N"]:
    """Uniform float32 numbers in ``[0, 1)``."""
    return (_words(seed, purpose, place, count) >> 8).float() * 2.0**-24


def normals(seed: int, purpose: Purpose, place: Place, *, count: int) -> Float[Tensor, "B N"]:
    """Standard normal numbers in float64 (Box and Muller 1958)."""
    half = (count + 1) // 2
    unit = (_words(seed, purpose, place, 2 * half).double() + 0.5) * 2.0**-32
    radius, angle = (-2.0 * unit[:, :half].log()).sqrt(), math.tau * unit[:, half:]
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]


def words_at(
    seed: int, purpose: Purpose, place: Place, position: Int[Tensor, "B N"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits, each ``[B, N]``, for each position of the streams."""
    rows = [axis.unsqueeze(1) for axis in (place.step, place.episode, place.env)]
    counter = cast(list[Tensor], torch.broadcast_tensors(position, *rows))
    return philox((counter[0], counter[1], counter[2], counter[3]), (seed & _WORD, int(purpose)))


def _words(seed: int, purpose: Purpose, place: Place, count: int) -> Int[Tensor, "B N"]:
    blocks = torch.arange((count + 3) // 4, device=place.env.device)
    words = words_at(seed, purpose, place, blocks.unsqueeze(0))
    return torch.stack(words, dim=2).flatten(1)[:, :count]  # [B, blocks, 4] -> [B, N]
