"""YAML without surprises: a key stands once in a mapping, and everything has an end.

Events are looked at before anything is built: they cost nothing where the values cost the world.
"""

import itertools
from collections.abc import Iterable
from typing import Any, cast

import yaml

__all__ = ["SurpriseError", "place", "refuse_surprises"]

_DEEPEST, _MOST_VALUES = 50, 100_000
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class SurpriseError(ValueError):
    """YAML whose meaning is not what it seems, or has no end."""


def refuse_surprises(text: str) -> None:
    """Refuse what PyYAML takes without a word.

    Raises:
        SurpriseError: If a key stands twice in a mapping, or with a dot beside the group that it is
            of, which would take its place; or if what is nested or repeated by anchors has no end
            that a program could live to see; with line and column.
        yaml.YAMLError: If it is not YAML.
    """
    opened: list[_Collection] = []
    values: dict[str, int] = {}  # behind each anchor, with what its aliases repeat
    total = 0
    for event in cast(Iterable[Any], yaml.parse(text, Loader=_LOADER)):
        if isinstance(event, yaml.CollectionEndEvent):
            closed = opened.pop()
            if closed.anchor is not None:
                values[closed.anchor] = closed.values
            if opened:
                opened[-1].values += closed.values
        elif isinstance(event, yaml.NodeEvent):
            where = place(event.start_mark)
            if opened:
                opened[-1].take(event, where)
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append(_Collection(event))
                _require_end(len(opened) <= _DEEPEST, where, f"nested more than {_DEEPEST} deep")
                continue
            is_alias = isinstance(event, yaml.AliasEvent)
            ends = not (is_alias and any(one.anchor == event.anchor for one in opened))
            _require_end(ends, where, f"*{event.anchor} is a part of itself")
            repeated = values.get(event.anchor, 1) if is_alias else 1
            total += repeated
            _require_end(total <= _MOST_VALUES, where, f"more than {_MOST_VALUES:,} values")
            if opened:
                opened[-1].values += repeated


def place(mark: Any) -> str:
    """Line and column, to follow the name of a file."""
    return f":{mark.line + 1}:{mark.column + 1}"


class _Collection:
    """A mapping or sequence whose end has not come."""

    def __init__(self, event: yaml.CollectionStartEvent) -> None:
        self.anchor: str | None = event.anchor
        self.values = 1
        self._is_mapping = isinstance(event, yaml.MappingStartEvent)
        self._entries, self._keys = 0, set[str]()
        self._dotted: dict[str, tuple[str, str]] = {}  # by each of their groups: key and place

    def take(self, event: yaml.NodeEvent, where: str) -> None:
        """Take the next key, value or entry.

        Raises:
            SurpriseError: If it is a key that was there before, or one of a key and its group is.
        """
        is_key = self._is_mapping and self._entries % 2 == 0
        self._entries += 1
        if not is_key or not isinstance(event, yaml.ScalarEvent):
            return
        key: str = event.value
        if key in self._keys:
            raise SurpriseError(f"{where}: the key {key!r} stands here again.")
        self._keys.add(key)
        _require_end(key.count(".") < _DEEPEST, where, f"nested more than {_DEEPEST} deep")
        groups = list(itertools.accumulate(key.split("."), "{}.{}".format))[:-1]
        for group in groups:
            self._dotted.setdefault(group, (key, where))
        clashes = (one for one in (*groups, key) if one in self._keys and one in self._dotted)
        group = next(clashes, None)
        if group is not None:
            dotted, where = self._dotted[group]
            name = dotted.removeprefix(f"{group}.")
            raise SurpriseError(
                f"{where}: the key {dotted!r} stands beside {group!r}: write {name!r} below it."
            )


def _require_end(ok: bool, where: str, what: str) -> None:
    if not ok:
        raise SurpriseError(f"{where}: {what}.")
