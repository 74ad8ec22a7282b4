"""Settings of ``esper fit`` and ``esper evaluate`` from YAML and words, by jsonargparse.

What jsonargparse says about a mistake is made for those who write parsers: up to a thousand
characters about types. Here it becomes *field must rule, got value. Hint.*, with the choices.
"""
# jsonargparse and PyYAML are untyped, and what is read here may be anything.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false

import argparse
import ast
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from esper_lightning.cli.errors import nearest
from esper_lightning.cli.plain_yaml import SurpriseError, place, refuse_surprises

__all__ = ["SettingsError", "SettingsParser"]

_MODE = "plain yaml"
_MOST_BYTES = 10_000_000
_LONGEST_LIST = 90  # characters of choices
_OURS = ("esper_lightning.", "lightning.pytorch.")
_COMMAND = re.compile(r"^(fit|evaluate)\.")
_BAD_CLASS = re.compile(r"Problem with given class_path '(\S*?)': (.*?)(?: - |Given value|$)")
_NO_SETTINGS = ("help", "print_config")
_HINTS = {"model.env": " Name one, or a config that does: --config configs/cartpole.yaml"}
_PLURALS = {int: " of integers", float: " of numbers", str: " of texts"}
_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
}


class SettingsError(argparse.ArgumentError):
    """A mistake in the settings.

    Attributes:
        key: The setting, as far as it is known; empty for what is no setting's.
        says: What to say after the key.
    """

    def __init__(self, key: str, says: str) -> None:
        super().__init__(None, f"{key}{says}" if key else says.lstrip(": "))
        self.key, self.says = key, says


class SettingsParser(LightningArgumentParser):
    """Lightning's parser, with short errors, and YAML in which a key stands once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"parser_mode": _MODE, **kwargs}
        super().__init__(*args, **settings)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ``SettingsError``."""
        raise _explain(self, message, ex) from ex

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a config file; its name is in whatever is wrong with it."""
        try:
            _refuse_huge(Path(str(path)))
            config = super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise SettingsError("", f"{path} must be text in UTF-8: {error.reason}.") from error
        except (SettingsError, SurpriseError) as error:
            if getattr(error, "key", "") not in ("", "--config"):
                raise
            raise SettingsError("", f"{path}{getattr(error, 'says', error)}") from error
        except ValueError as error:  # an integer of too many digits, for one
            raise SettingsError("", f"{path} cannot be read: {error}.") from error
        known = {action.dest.partition(".")[0] for action in _actions(self)}
        for name in vars(config).keys() - known:
            raise SettingsError("", f"{path}: {name!r} is no setting.{nearest(name, known)}")
        return config


def _explain(parser: SettingsParser, message: str, cause: BaseException | None) -> SettingsError:
    """What jsonargparse means.

    Args:
        parser: Which met the mistake: of the command, or of a class below it.
        message: Of jsonargparse.
        cause: What it comes from. That of a parser below is a ``SettingsError`` already.
    """
    text = " ".join(message.split())
    match = re.match(r'Parser key "([^"]+)"(?: element \d+)?: ?(.*)', text)
    key, text = (match[1], match[2]) if match else ("", text)
    known = _explain_cause(key, cause)
    if known is not None:
        return known
    if key == "config":
        return SettingsError("", f"--config must name a file with settings: {text}")
    if text.startswith("Unexpected config"):
        rule = "must hold settings by their names (model: ..., trainer: ...)"
        return SettingsError("--config", f" {rule}.")
    return _explain_value(parser, key, text) if key else _explain_name(parser, text)


def _explain_cause(key: str, cause: BaseException | None) -> SettingsError | None:
    """What is known already: by a parser below, or by YAML."""
    is_file = key in ("", "config")
    owner = "--config" if key == "config" else key
    for error in _chain(cause):
        if isinstance(error, SettingsError):
            names = [name for name in ("" if is_file and error.key else owner, error.key) if name]
            return SettingsError(".".join(names), error.says)
        if isinstance(error, SurpriseError):
            return SettingsError(owner, str(error))
        if isinstance(error, yaml.YAMLError) and is_file:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
            return SettingsError(
                owner, f"{'' if mark is None else place(mark)}: not valid YAML: {problem}."
            )
    return None


def _explain_name(parser: SettingsParser, text: str) -> SettingsError:
    """A setting that is missing, or unknown."""
    if match := re.match(r"the following arguments are required: ([^, ]+)", text):
        name = _COMMAND.sub("", match[1])
        hint = _HINTS.get(name, "")
        return SettingsError(name, f" must be given.{hint}")
    if match := re.match(r"unrecognized arguments: (\S+)", text):
        name = match[1].partition("=")[0]
        if not name.startswith("--"):
            return SettingsError("", f": {match[1]!r} is no setting: their names begin with --.")
        name = name[2:]
    elif match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", text):
        name = _COMMAND.sub("", f"{match[1]}.{match[2]}")
    elif match := re.search(r"[Oo]ption '(\S+)'( is not accepted|$)", text):
        name = _COMMAND.sub("", match[1])
    else:
        return SettingsError("", f": {text}")
    return SettingsError(name, f" is no setting.{_nearest_setting(parser, name)}")


def _nearest_setting(parser: SettingsParser, name: str) -> str:
    """Among those of the same group first: what is misspelt is mostly the last word."""
    group = name.rpartition(".")[0]
    names = [action.dest for action in _actions(parser) if action.dest not in _NO_SETTINGS]
    beside = [other for other in names if other.rpartition(".")[0] == group]
    return nearest(name, beside) or nearest(name, names)


def _explain_value(parser: SettingsParser, key: str, text: str) -> SettingsError:
    """What a value must be, and why this one is not."""
    typehint: Any = next((_typehint(one) for one in _actions(parser) if one.dest == key), None)
    value, below = _value(text)
    if below:
        rule = f"must follow the name of a class that has it (--{_COMMAND.sub('', key)} NAME)"
        of_a_class = "Subclass types expect" not in text and bool(_choices(typehint))
        says = f" {rule}, got {value!r}." if of_a_class else f": {text}"
        return SettingsError(f"{key}.{below}", says)
    if match := re.search(r"Unable to load config ['\"](.*?)['\"]", text):
        rule = f"must hold settings by their names, or name a file with some, got {match[1]!r}"
        return SettingsError(key, f" {rule}.")
    if match := _BAD_CLASS.search(text):
        reason = match[2].strip()
        rule = f"must name a class that can be imported, got {match[1]!r}: {reason}."
        return SettingsError(key, f" {rule}")
    if match := re.search(r"Expected an instantiatable class, but (\S+) is abstract", text):
        lacks = ", ".join(sorted(getattr(_locate(match[1]), "__abstractmethods__", ())))
        rule = f"must name a class that can be built, got {match[1]!r}. It lacks {lacks}."
        return SettingsError(key, f" {rule}")
    ambiguous = re.search(r"Multiple subclasses with name .*?(?= - |$)", text)
    if ambiguous or typehint is None or value is None:
        return SettingsError(key, f": {ambiguous[0] if ambiguous else text}")
    choices = _choices(typehint)
    hint = nearest(value, choices or map(str, _literals(typehint)))
    hint += f" Known are {_listed(choices)}." if choices else ""
    return SettingsError(key, f" must be {_rule(typehint)}, got {value!r}.{hint}")


def _value(text: str) -> tuple[str | None, str]:
    """What the user gave, if it says, and below which key of the setting."""
    for pattern in (
        r".*(?:Got|Given) value: ?(.*?)(?: Subclass types expect.*)?$",
        r".*Expected a path but (.*?) ?either not accessible",
        r".*Import path (\S+) does not correspond",
        r".*import path string: ?(.*)$",
    ):
        if match := re.match(pattern, text):
            nested = re.match(r"NestedArg\(key='(.*?)', val=(.*)\)$", match[1])
            if nested is None:
                return match[1], ""
            try:
                return str(ast.literal_eval(nested[2])), nested[1]
            except (ValueError, SyntaxError):
                return nested[2], nested[1]
    return None, ""


def _rule(typehint: Any) -> str:
    """What a value of the type is, in words."""
    rules: list[str] = []
    classes: list[str] = []
    literals = [str(value) for value in _literals(typehint)]
    if literals:
        rules.append(f"one of {_listed(list(dict.fromkeys(literals)))}")
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


def _literals(typehint: Any) -> list[Any]:
    members = (one for one in _members(typehint) if typing.get_origin(one) is typing.Literal)
    return [value for one in members for value in typing.get_args(one)]


def _choices(typehint: Any) -> list[str]:
    """Public classes that may be given for a type by their name alone, ours first."""
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


def _listed(names: list[str]) -> str:
    """As many names as a line takes."""
    text = ", ".join(names)
    if len(text) <= _LONGEST_LIST:
        return text
    return text[: text.rindex(", ", 0, _LONGEST_LIST)] + ", ..."


def _locate(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name, None) if module else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _actions(parser: SettingsParser) -> Iterator[argparse.Action]:
    """Of a parser and the commands below it."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


def _typehint(action: argparse.Action) -> Any:
    return getattr(action, "_typehint", None)


def _refuse_huge(path: Path) -> None:
    try:
        size = path.stat().st_size
    except (OSError, ValueError):  # a remote file, or one that jsonargparse will miss
        return
    if size > _MOST_BYTES:
        raise SurpriseError(f" must be a file of settings, got {size:,} bytes.")


_load_yaml = get_loader("yaml")


def _load(text: str) -> Any:
    refuse_surprises(text)
    return _load_yaml(text)


set_loader(_MODE, _load, exceptions=(yaml.YAMLError,))
