"""Tensors in nested containers: tuples (named or not), lists and mappings."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from esper_lightning.core.types import Observation

__all__ = ["kind", "leaves", "map_obs", "map_tree", "named_tensors", "rebuild"]

_SEQUENCES = (tuple, list)


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a tree of mappings, lists and tuples, with its path: ``"layers.0.weight"``.

    Named tuples give the names of their fields.

    Args:
        tree: Containers that hold the tensors; values that are no tensors are skipped.
        name: Path of the tree itself.
    """
    if isinstance(tree, Tensor):
        yield name, tree
        return
    parts: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        parts = list(cast(Mapping[Any, Any], tree).items())
    elif isinstance(tree, list | tuple):
        values = cast(Sequence[Any], tree)
        fields: Iterable[Any] = getattr(values, "_fields", range(len(values)))
        parts = list(zip(fields, values, strict=True))
    for key, value in parts:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def leaves(tree: Any) -> list[Tensor]:
    """Every tensor of a tree, in order; mappings by sorted key, numbers and ``None`` skipped.

    Raises:
        ValueError: If the tree holds a value that is neither a tensor, a number, a string, ``None``
            nor a container.
    """
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def kind(tree: Any) -> Hashable:
    """Everything about a tree but the numbers of its tensors, equal for trees of the same kind.

    That is the shapes and dtypes of the tensors, the types and keys of the containers in their
    order, and every value that is no tensor.

    Raises:
        ValueError: As for ``leaves``.
    """
    parts: list[Any] = []
    _describe(tree, parts)
    return tuple(parts)


def rebuild(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """``tree`` with its tensors replaced by ``tensors``, in order."""
    return _replace(tree, iter(tensors))


def map_tree(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to every tensor."""
    return rebuild(tree, map(function, leaves(tree)))


def map_obs(function: Callable[..., Tensor], obs: Observation, *others: Observation) -> Observation:
    """Apply ``function`` to an observation, or to every group with the same group of ``others``."""
    if isinstance(obs, Tensor):
        return function(obs, *others)
    groups = cast(tuple[dict[str, Tensor], ...], others)
    return {
        name: function(value, *(other[name] for other in groups)) for name, value in obs.items()
    }


def _gather(tree: Any, found: list[Tensor]) -> None:
    # Iterations walk many small trees: plain tensors are known by their type, without a call.
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, _SEQUENCES):
        for part in cast(Sequence[Any], tree):
            if type(part) is Tensor:
                found.append(part)
            elif part is not None:
                _gather(part, found)
    elif isinstance(tree, Mapping):
        mapping = cast(Mapping[Any, Any], tree)
        for key in sorted(mapping):  # equal mappings may be ordered differently
            _gather(mapping[key], found)
    elif not (tree is None or isinstance(tree, bool | int | float | str)):
        rule = "Trees of tensors must be made of tuples, lists and mappings"
        raise ValueError(f"{rule}, got {type(tree).__name__!r}.")


def _describe(tree: Any, parts: list[Any]) -> None:
    if isinstance(tree, Tensor):
        parts.append(tree.shape)
        parts.append(tree.dtype)
    elif tree is None:
        parts.append(None)
    elif isinstance(tree, _SEQUENCES):
        values = cast(Sequence[Any], tree)
        parts.append(type(values))
        parts.append(len(values))
        for part in values:
            _describe(part, parts)
    elif isinstance(tree, Mapping):
        mapping = cast(Mapping[Any, Any], tree)
        parts.append(tuple(mapping))
        for part in mapping.values():
            _describe(part, parts)
    elif isinstance(tree, bool | int | float | str):
        parts.append(repr(tree))  # so 1, 1.0 and True differ, and NaN equals itself
    else:
        leaves(tree)  # which refuses it


def _replace(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, _SEQUENCES):
        parts = [
            next(tensors)
            if type(part) is Tensor
            else None
            if part is None
            else _replace(part, tensors)
            for part in cast(Sequence[Any], tree)
        ]
        kind = cast(Any, type(cast(Any, tree)))
        if isinstance(tree, list):
            return parts
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    if isinstance(tree, Mapping):
        mapping = cast(Mapping[Any, Any], tree)
        replaced = {key: _replace(mapping[key], tensors) for key in sorted(mapping)}
        return {key: replaced[key] for key in mapping}
    return tree
