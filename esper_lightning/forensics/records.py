"""Records that are stored as JSON objects, and are read even if entries are wrong or missing.

A record is a frozen dataclass. The type of a field decides how the field is read: ``X | None``,
``tuple[X, ...]``, ``Mapping[str, X]`` or ``bool``, in which ``X`` is a plain type, ``EpochSeconds``
or another record. A value of another type counts as absent, and an absent field has the empty value
of its type: ``None``, ``()``, ``{}`` or ``False``.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Self,
    TypeGuard,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

__all__ = ["NOT_STORED", "EpochSeconds", "Record", "earlier_key", "stored_as"]

EpochSeconds = Annotated[float, "seconds since the epoch"]
"""A time; a number that can be no time of a run is read as absent."""

_LATEST_S = 1e11
_KEY, _EARLIER_KEY, _ABSENT = "key", "earlier key", object()
NOT_STORED = {"stored": False}
"""Metadata of a field that is in no JSON object; it has its default in a record that was read."""


def stored_as(key: str) -> dict[str, str]:
    """Metadata of a field whose key in JSON is not its name."""
    return {_KEY: key}


def earlier_key(key: str) -> dict[str, str]:
    """Metadata of a field that earlier versions wrote under another key."""
    return {_EARLIER_KEY: key}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON object with known fields.

    Attributes:
        unknown: Entries whose keys are no field of this version, as they were read.
    """

    unknown: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON object: every field, ``null`` where its value is not known."""
        known = {key: _plain(getattr(self, name)) for name, key, _, _ in _fields(type(self))}
        return known | {key: entry for key, entry in self.unknown.items() if key not in known}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The record in a JSON object, without the values that are not of their field's type.

        Args:
            content: JSON object that any version has written.
        """
        values: dict[str, Any] = {}
        unknown = dict(content)
        for name, key, earlier, hint in _fields(cls):
            found = [unknown.pop(k) for k in (key, earlier) if k is not None and k in unknown]
            fitting = (_fitting(value, hint) for value in found)
            values[name] = next((v for v in fitting if v is not _ABSENT), _empty(hint))
        return cls(**values, unknown=unknown)


@functools.cache
def _fields(cls: type[Record]) -> list[tuple[str, str, str | None, Any]]:
    """Name, key, earlier key and type of each field that is stored, but ``unknown``."""
    hints = get_type_hints(cls, include_extras=True)
    return [
        (
            field.name,
            field.metadata.get(_KEY, field.name),
            field.metadata.get(_EARLIER_KEY),
            hints[field.name],
        )
        for field in dataclasses.fields(cls)
        if field.name != "unknown" and field.metadata.get("stored", True)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value).items()
        return {str(key): _plain(entry) for key, entry in entries}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in cast(list[Any], value)]
    return value


def _empty(hint: Any) -> Any:
    kind = get_origin(hint) or hint
    return None if kind in (Union, UnionType) else {} if kind is Mapping else kind()


def _fitting(value: Any, hint: Any) -> Any:
    """The content of a value that fits a type: all, some entries of a container, or ``_ABSENT``."""
    kind, of = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return value
    if kind in (Union, UnionType):
        found = (_fitting(value, choice) for choice in of)
        return next((v for v in found if v is not _ABSENT), _ABSENT)
    if kind is tuple and isinstance(value, list):
        entries = (_fitting(entry, of[0]) for entry in cast(list[Any], value))
        return tuple(entry for entry in entries if entry is not _ABSENT)
    if not isinstance(value, dict):
        return value if _is_of(value, kind, hint) else _ABSENT
    content = cast(dict[str, Any], value)
    if kind is Mapping:
        fitting = {key: _fitting(entry, of[1]) for key, entry in content.items()}
        return {key: entry for key, entry in fitting.items() if entry is not _ABSENT}
    return kind.from_dict(content) if _is_record(kind) else _ABSENT


def _is_record(kind: object) -> TypeGuard[type[Record]]:
    return isinstance(kind, type) and issubclass(kind, Record)


def _is_of(value: Any, kind: Any, hint: Any) -> bool:
    """Whether a value that is no container is of a type; a bool is no number."""
    if isinstance(value, bool) or kind is bool:
        return kind is type(value)
    if kind in (NoneType, str, int):
        return isinstance(value, kind)
    is_number = isinstance(value, int | float)
    if hint == EpochSeconds:
        return is_number and 0 <= value < _LATEST_S
    return kind is float and is_number
