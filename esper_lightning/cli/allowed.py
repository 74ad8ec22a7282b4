"""Values that a setting may have, in the words of a user, read from the setting's type."""
# A type may be any object.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["choices_of", "listed", "literals_of", "rule_of"]

_LONGEST_LIST = 90  # characters of a list of choices
_OURS = ("esper_lightning.", "lightning.pytorch.")
_PLURALS = {int: " of integers", float: " of numbers", str: " of texts"}
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
}


def rule_of(typehint: Any) -> str:
    """The rule for values of a type, in words that follow *must be*."""
    rules: list[str] = []
    classes: list[str] = []
    literals = [str(value) for value in literals_of(typehint)]
    if literals:
        rules.append(f"one of {listed(list(dict.fromkeys(literals)))}")
    for one in _members(typehint):
        origin, inner = typing.get_origin(one) or one, typing.get_args(one)
        if origin in _WORDS:
            rules.append(_WORDS[origin] + (_PLURALS.get(inner[0], "") if inner else ""))
        elif inspect.isclass(origin) and not inner:
            classes.append(origin.__name__)
    if classes:
        rules.insert(0, f"the name of a class of {' or '.join(classes)}")
    return ", or ".join(dict.fromkeys(rules)) or "of another type"


def _members(typehint: Any) -> Iterator[Any]:
    if typing.get_origin(typehint) in (typing.Union, types.UnionType):
        for one in typing.get_args(typehint):
            yield from _members(one)
    else:
        yield typehint


def literals_of(typehint: Any) -> list[Any]:
    """Single values that a type allows: those of its ``Literal`` members."""
    members = (one for one in _members(typehint) if typing.get_origin(one) is typing.Literal)
    return [value for one in members for value in typing.get_args(one)]


def choices_of(typehint: Any) -> list[str]:
    """Names of public classes that a setting of a type may name, those of this package first."""
    kinds: dict[str, str] = {}
    for member in _members(typehint):
        for kind in (member, *typing.get_args(member)):
            if inspect.isclass(kind) and kind.__module__.startswith(_OURS):
                kinds |= {k.__name__: k.__module__ for k in _subclasses(kind) if _is_public(k)}
    return sorted(kinds, key=lambda name: (not kinds[name].startswith(_OURS[0]), name))


def _subclasses(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield from _subclasses(one)
        yield one


def _is_public(kind: type) -> bool:
    names = kind.__module__.split(".")
    packages = (sys.modules.get(".".join(names[:k])) for k in range(1, len(names)))
    known = any(kind.__name__ in getattr(package, "__all__", ()) for package in packages)
    return known and kind.__module__.startswith(_OURS) and not inspect.isabstract(kind)


def listed(names: list[str]) -> str:
    """Names joined by commas, cut after as many as fit in an error of one line."""
    text = ", ".join(names)
    if len(text) <= _LONGEST_LIST:
        return text
    return text[: text.rindex(", ", 0, _LONGEST_LIST)] + ", ..."
