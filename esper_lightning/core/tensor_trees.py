"""Tensors in nested containers, by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

__all__ = ["named_tensors"]


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a tree of mappings, lists and tuples, with its path: ``"layers.0.weight"``.

    Args:
        tree: What holds the tensors; whatever else is in it is left out.
        name: Path of the tree itself.
    """
    if isinstance(tree, Tensor):
        yield name, tree
        return
    parts: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        parts = list(cast(Mapping[Any, Any], tree).items())
    elif isinstance(tree, list | tuple):
        parts = list(enumerate(cast(Sequence[Any], tree)))
    for key, value in parts:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))
