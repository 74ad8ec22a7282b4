"""Splitting and unflattening, with the types that torch's own methods leave open."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor

__all__ = ["split_columns", "split_rows", "unflatten"]


def split_columns(row: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Pieces of the given sizes along axis 1, with one backward pass for all."""
    return cast(tuple[Tensor, ...], row.split(list(sizes), dim=1))  # pyright: ignore[reportUnknownMemberType]


def split_rows(tensor: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Pieces of the given sizes along axis 0, with one backward pass for all."""
    return cast(tuple[Tensor, ...], tensor.split(list(sizes)))  # pyright: ignore[reportUnknownMemberType]


def unflatten(tensor: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """The tensor with one axis split into several."""
    return cast(Tensor, tensor.unflatten(dim, tuple(sizes)))  # pyright: ignore[reportUnknownMemberType]
