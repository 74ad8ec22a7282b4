"""What the annotation of a setting says about the plain data of its value."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Union, cast, get_args, get_origin

__all__ = [
    "annotations",
    "dataclass_of",
    "entry_kinds",
    "is_named_by_text",
    "item_kinds",
    "named_by_text",
    "options_of",
]


def annotations(kind: Any) -> dict[str, Any]:
    """Annotations of the fields of a class, by name; empty where a name in them is not known."""
    try:
        return typing.get_type_hints(kind)
    except Exception:  # an annotation as text may hold any expression
        return {}


def options_of(kind: Any) -> tuple[Any, ...]:
    """The annotations of which a value has one: several for a union."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_named_by_text(value: object, kind: Any) -> bool:
    """Whether a value is a member of an enum or a path that text stands for."""
    if isinstance(value, Enum) and value.name not in type(value).__members__:
        return False  # several flags at once
    if isinstance(value, PurePath) and str in options_of(kind):
        return True  # the setting takes the text in its place
    named = named_by_text(kind)
    return named is not None and isinstance(value, named)


def dataclass_of(kind: Any) -> type | None:
    """The dataclass of which an annotation says that a value is; ``None`` if it names not one."""
    found = [option for option in options_of(kind) if dataclasses.is_dataclass(option)]
    return cast(type, found[0]) if len(found) == 1 else None


def entry_kinds(kind: Any) -> tuple[Any, Any]:
    """Annotations of the keys and of the values of a mapping."""
    found = (get_args(option) for option in options_of(kind) if _is_mapping(option))
    return next((args for args in found if len(args) == 2), (object, object))


def _is_mapping(option: Any) -> bool:
    origin = get_origin(option)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def named_by_text(kind: Any) -> type[Enum] | type[PurePath] | None:
    """The enum or path that text means under an annotation; ``None`` if text means itself."""
    options = options_of(kind)
    found = [o for o in options if isinstance(o, type) and issubclass(o, Enum | PurePath)]
    return found[0] if len(found) == 1 and str not in options else None


def item_kinds(kind: Any, count: int) -> list[Any]:
    """Annotations of the items of a sequence.

    Args:
        kind: Annotation of the sequence.
        count: Number of items.
    """
    found = (get_args(option) for option in options_of(kind) if not _is_mapping(option))
    inner = next((args for args in found if args), (object,))
    if inner[-1] is ...:
        return [inner[0]] * count
    return list(inner) if len(inner) == count else [inner[-1]] * count
