"""One form for every error about what a user wrote: *Owner.field must rule, got value. Hint.*.

Types are checked against the annotations of dataclass fields and of arguments; ranges are checked
where the settings are defined.
"""

import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin

__all__ = [
    "NonFiniteError",
    "Words",
    "at_least",
    "check_arguments",
    "check_fields",
    "missing_members",
    "one_of",
    "positive",
    "require",
    "require_int",
    "require_local",
    "require_members",
    "require_name",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MISFIT = object()
_LONGEST_VALUE = 160  # characters of an error that show a value


class NonFiniteError(ValueError):
    """A NaN or an infinity with which training cannot continue.

    Attributes:
        phase: Phase of the iteration: ``rollout``, ``update``, or ``training_step``.
        tensors: Names of the tensors that were not finite.
        environments: Indices of the environments concerned, if they are known.
        minibatch: Tensors by name with which the error can be reproduced.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        tensors: Sequence[str] = (),
        environments: Sequence[int] = (),
        minibatch: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.phase, self.tensors, self.environments = phase, list(tensors), list(environments)
        self.minibatch = minibatch


class Words(str):
    """Text that an error shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def require(ok: bool, field: str, rule: str, got: object, hint: str = "") -> None:
    """Raise unless ``ok``.

    Args:
        ok: Whether the value obeys the rule.
        field: Setting as the user knows it, ``Owner.field``.
        rule: Rule for the value, in words that follow "must".
        got: Value that breaks the rule.
        hint: Sentence that helps to choose a better value.

    Raises:
        ValueError: ``{field} must {rule}, got {got}. {hint}``
    """
    if not ok:
        raise ValueError(f"{field} must {rule}, got {_shown(got)}." + (f" {hint}" if hint else ""))


def at_least(field: str, value: int | float | None, least: int, hint: str = "") -> None:
    """Raise if a number is less than ``least``, is infinite, or is NaN.

    Args:
        field: Setting as the user knows it, ``Owner.field``.
        value: Value of the setting; ``None``, which switches a setting off, is not refused.
        least: Least number that is not refused.
        hint: Sentence that helps to choose a better value.

    Raises:
        ValueError: If the number is refused, in the form of ``require``.
    """
    _require_finite(field, value, hint)
    require(value is None or value >= least, field, f"be at least {least}", value, hint)


def positive(field: str, value: int | float | None, hint: str = "") -> None:
    """Raise if a number is not above 0, is infinite, or is NaN.

    Args:
        field: Setting as the user knows it, ``Owner.field``.
        value: Value of the setting; ``None``, which switches a setting off, is not refused.
        hint: Sentence that helps to choose a better value.

    Raises:
        ValueError: If the number is refused, in the form of ``require``.
    """
    _require_finite(field, value, hint)
    require(value is None or value > 0, field, "be positive", value, hint)


def _require_finite(field: str, value: int | float | None, hint: str) -> None:
    ok = value is None or isinstance(value, int) or math.isfinite(value)
    require(ok, field, "be a finite number", value, hint)


def one_of(field: str, value: object, choices: Iterable[object], hint: str = "") -> None:
    """Raise if a value is not one of the choices.

    Args:
        field: Setting as the user knows it, ``Owner.field``.
        value: Value of the setting.
        choices: All values that are not refused, in the order in which the error lists them.
        hint: Sentence that helps to choose a better value.

    Raises:
        ValueError: If the value is refused, in the form of ``require``.
    """
    known = list(choices)
    require(value in known, field, f"be one of {', '.join(map(str, known))}", value, hint)


def require_int(field: str, value: object, *, minimum: int) -> None:
    """Raise unless the value is an integer of at least ``minimum``; a bool is no integer.

    Raises:
        ValueError: If the value is no such integer, in the form of ``require``.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    require(is_int, field, "be an integer", value)
    assert isinstance(value, int)
    at_least(field, value, minimum)


def require_name(field: str, value: str | Path | None, what: str) -> None:
    """Raise if a name is empty or blank, or holds a NUL byte.

    Args:
        field: Setting as the user knows it, ``Owner.field``.
        value: Text of the name; ``None`` where no name is given.
        what: Word for the named thing, with its article.

    Raises:
        ValueError: If the name is refused, in the form of ``require``.
    """
    ok = value is None or (str(value).strip() != "" and "\0" not in str(value))
    require(ok, field, f"name {what}", value)


def require_local(field: str, value: str | Path, what: str) -> None:
    """Raise if a path is empty, or is the address of another machine.

    Args:
        field: Setting as the user knows it.
        value: Path as the user gave it.
        what: Word for the thing at the path, with its article.

    Raises:
        ValueError: If the path is refused, in the form of ``require``.
    """
    require(str(value) != "", field, f"name {what}", value)
    require("://" not in str(value), field, f"name {what} on this machine", str(value))


def missing_members(value: object, members: Iterable[str]) -> list[str]:
    """Names of the members of an interface that an object lacks.

    A member that is inherited from a protocol is missing, because it has no code.

    Args:
        value: Object that should have the members.
        members: Names of methods and attributes.
    """

    def has(name: str) -> bool:
        owner = next((kind for kind in type(value).__mro__ if name in vars(kind)), None)
        # typing.is_protocol, of Python 3.13
        return hasattr(value, name) and not getattr(owner, "_is_protocol", False)

    return [name for name in members if not has(name)]


def require_members(field: str, value: object, members: Iterable[str], rule: str) -> None:
    """Raise if an object lacks a member of an interface.

    Args:
        field: Name of the object as the user knows it.
        value: Object that should have the members.
        members: Names of methods and attributes.
        rule: Rule for the object, in words that follow "must".

    Raises:
        ValueError: If a member is missing, in the form of ``require``; the error names each.
    """
    missing = missing_members(value, members)
    got = Words(f"{type(value).__name__} without {', '.join(missing)}")
    require(not missing, field, rule, got)


def check_fields(
    settings: Any, rules: Mapping[str, str] | None = None, *, owner: str | None = None
) -> None:
    """Check the type of every field of a frozen dataclass; for ``__post_init__``.

    A value that means the same is converted to the type of the annotation: a list to a tuple, an
    integer to a float where the annotation asks for a float, a scalar of NumPy to one of Python.
    Fields with annotations of other kinds than the settings of this package have are not checked.

    Args:
        settings: Instance of the dataclass.
        rules: Rule to show instead of the words for the annotation, by name of the field.
        owner: Name in errors; the class of the settings by default.

    Raises:
        ValueError: If a value has another type; the error names the first such field.
    """
    owner = owner or type(settings).__name__
    for field in dataclasses.fields(settings):
        rule = (rules or {}).get(field.name)
        value = getattr(settings, field.name)
        fitted = _fit(f"{owner}.{field.name}", value, field.type, rule)
        if fitted is not value:
            object.__setattr__(settings, field.name, fitted)


def check_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function or an ``__init__`` so that its arguments are checked like fields.

    The function gets the values that ``check_fields`` would have stored. Errors name the function,
    or the class of the ``__init__``; this is also true of the ``TypeError`` for an argument that is
    missing or unknown.
    """
    owner = function.__qualname__.removesuffix(".__init__")
    signature, kinds = inspect.signature(function), function.__annotations__

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{owner}(): {error}") from None
        for name, value in bound.arguments.items():
            if name in kinds and signature.parameters[name].kind not in _VARIADIC:
                bound.arguments[name] = _fit(f"{owner}.{name}", value, kinds[name], None)
        return function(*bound.args, **bound.kwargs)

    return checked


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _shown(value: object) -> str:
    """A value as text on one line, shortened where the text is long."""
    try:
        text = repr(value)
    except Exception:  # a foreign class, or an integer of too many digits, may raise anything
        return f"a {type(value).__name__} that cannot be shown"
    if "\n" in text:
        text = " ".join(text.split())
    if isinstance(value, str) or len(text) <= _LONGEST_VALUE:
        return text
    return text[:_LONGEST_VALUE] + "..."


def _fit(field: str, value: object, kind: Any, rule: str | None) -> Any:
    """``value`` converted to the type of its annotation.

    Raises:
        ValueError: If the value has another type.
    """
    fitted = _fitted(value, kind)
    if fitted is _MISFIT and isinstance(value, int) and {kind, *get_args(kind)} & {int, float}:
        require(-(2**63) <= value < 2**63, field, "fit into 64 bits", value)
    require(fitted is not _MISFIT, field, rule or f"be {_in_words(kind)}", value)
    return fitted


def _fitted(value: Any, kind: Any) -> Any:
    """``value`` converted to ``kind``, or ``_MISFIT``."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    origin = get_origin(kind)
    if origin in _FITTED_GENERICS:
        return _FITTED_GENERICS[origin](value, get_args(kind))
    if kind in _FITTED_SCALARS:
        return _FITTED_SCALARS[kind](value)
    if kind in _CLASSES or dataclasses.is_dataclass(kind) or _is_of_torch(kind):
        return value if isinstance(value, cast(type, kind)) else _MISFIT
    return value


def _is_of_torch(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__ == "torch"


def _fitted_union(value: Any, options: tuple[Any, ...]) -> Any:
    fits = (_fitted(value, option) for option in options)
    return next((fitted for fitted in fits if fitted is not _MISFIT), _MISFIT)


def _fitted_choice(value: Any, options: tuple[Any, ...]) -> Any:
    same = (choice for choice in options if type(choice) is type(value) and choice == value)
    return next(same, _MISFIT)


def _fitted_tuple(value: Any, options: tuple[Any, ...]) -> Any:
    if not isinstance(value, tuple | list):
        return _MISFIT
    items = cast(Sequence[Any], value)
    kinds = [options[0]] * len(items) if options[-1] is ... else list(options)
    if len(kinds) != len(items):
        return _MISFIT
    fits = tuple(_fitted(item, kind) for item, kind in zip(items, kinds, strict=True))
    return _MISFIT if any(fitted is _MISFIT for fitted in fits) else fits


def _fitted_dict(value: Any, options: tuple[Any, ...]) -> Any:
    if not isinstance(value, dict):
        return _MISFIT
    entries = cast(dict[Any, Any], value)
    pairs = [(_fitted(key, options[0]), _fitted(item, options[1])) for key, item in entries.items()]
    return _MISFIT if any(part is _MISFIT for pair in pairs for part in pair) else entries


def _fitted_int(value: Any) -> Any:
    fits = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return int(value) if fits else _MISFIT


def _fitted_float(value: Any) -> Any:
    number = value if isinstance(value, float) else _fitted_int(value)
    return number if number is _MISFIT else float(number)


_FITTED_GENERICS: dict[Any, Callable[[Any, tuple[Any, ...]], Any]] = {
    Union: _fitted_union,
    types.UnionType: _fitted_union,
    Literal: _fitted_choice,
    tuple: _fitted_tuple,
    dict: _fitted_dict,
}
_FITTED_SCALARS: dict[Any, Callable[[Any], Any]] = {
    int: _fitted_int,
    float: _fitted_float,
    str: lambda value: str.__str__(value) if isinstance(value, str) else _MISFIT,
    None: lambda value: value if value is None else _MISFIT,
}
_CLASSES = (bool, type(None), Path)
_WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    Path: "a path",
    None: "None",
    type(None): "None",
}
_PLURALS: dict[Any, str] = {int: "integers", float: "finite numbers", str: "strings"}


def _in_words(kind: Any) -> str:
    """The type that an annotation asks for, in words that follow "be"."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(option) for option in options))
    if origin is Literal:
        return "one of " + ", ".join(map(str, options))
    if origin is tuple:
        count = "" if options[-1] is ... else f"{len(options)} "
        name = getattr(options[0], "__name__", str(options[0]))
        return f"a tuple of {count}{_PLURALS.get(options[0], name)}"
    return _WORDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
