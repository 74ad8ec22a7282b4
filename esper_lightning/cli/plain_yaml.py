"""YAML without surprises: no key stands twice in a mapping, and every value is finite.

Events of the parser are inspected before any value is built, because a few events can describe
values that fill all memory.

What is written can be read again: a default that YAML cannot hold is left out.
"""

import contextlib
import itertools
import warnings
from collections.abc import Generator, Iterable
from enum import Enum
from typing import Any, cast

import yaml

__all__ = ["SurpriseError", "dump_plain", "leaving_out", "place", "refuse_surprises"]

_DEEPEST, _MOST_VALUES = 50, 100_000
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_NOT_DATA = "Unable to serialize instance "
"""Begin of the text, and of a warning, that jsonargparse has in place of a value."""


class SurpriseError(ValueError):
    """YAML whose meaning is not what it seems, or has no end."""


def refuse_surprises(text: str) -> None:
    """Refuse YAML that PyYAML accepts silently, although its meaning is a surprise.

    Raises:
        SurpriseError: If a key stands twice in a mapping, if a dotted key stands beside its own
            group, which would replace it, if a text holds a NUL byte, which no path may, or if
            nesting or aliases make more values than a program can build. The error has line and
            column.
        yaml.YAMLError: If the text is not YAML.
    """
    opened: list[_Collection] = []
    values: dict[str, int] = {}  # number of values of each anchor, with those of its aliases
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
            text = str(getattr(event, "value", ""))
            if "\0" in text:
                raise SurpriseError(f"{where}: the text {text!r} holds a NUL byte.")
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
    """Line and column of a mark, in the form that follows the name of a file."""
    return f":{mark.line + 1}:{mark.column + 1}"


def dump_plain(data: Any) -> str:
    """Settings as YAML; a member of an enum that is text or a number is written as such.

    Values that YAML cannot hold are left out. They are defaults of a class, which has them again:
    whatever a user chose came from YAML, or from a word.

    Args:
        data: Settings by their names.
    """
    return yaml.dump(_held(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


@contextlib.contextmanager
def leaving_out() -> Generator[None]:
    """A context in which jsonargparse does not warn of values that YAML cannot hold."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", rf"\s*{_NOT_DATA}")
        yield


def _held(data: Any) -> Any:
    """Data without the entries of mappings, at all depths, that YAML cannot hold."""
    if isinstance(data, dict):
        entries = cast(dict[Any, Any], data).items()
        return {name: _held(value) for name, value in entries if not _is_no_data(value)}
    return [_held(value) for value in cast(list[Any], data)] if isinstance(data, list) else data


def _is_no_data(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_NOT_DATA)


class _Dumper(yaml.SafeDumper):
    """A dumper that also writes text and numbers whose class derives from one of YAML's."""


def _add(kind: type) -> None:
    """Write values as those of the class of YAML that their own class derives from."""

    def represent(dumper: _Dumper, value: Any) -> yaml.Node:
        plain = value.value if isinstance(value, Enum) else value
        return dumper.represent_data(kind(plain))

    _Dumper.add_multi_representer(kind, represent)


for _kind in (str, int, float):
    _add(_kind)


class _Collection:
    """A mapping or sequence that the parser has entered and not left."""

    def __init__(self, event: yaml.CollectionStartEvent) -> None:
        self.anchor: str | None = event.anchor
        self.values = 1
        self._is_mapping = isinstance(event, yaml.MappingStartEvent)
        self._entries, self._keys = 0, set[str]()
        self._dotted: dict[str, tuple[str, str]] = {}  # a dotted key and its place, by its group

    def take(self, event: yaml.NodeEvent, where: str) -> None:
        """Count the next key, value or entry, and inspect keys.

        Raises:
            SurpriseError: If a key stands here again, or a dotted key stands beside its group.
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
