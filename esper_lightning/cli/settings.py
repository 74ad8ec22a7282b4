"""Settings of ``esper fit`` and ``esper evaluate``, read by jsonargparse from YAML and arguments.

An error of jsonargparse addresses authors of parsers: it has up to a thousand characters about
types. This file turns it into *field must rule, got value. Hint.*, with the choices.
"""
# jsonargparse and PyYAML are untyped.
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false

import argparse
import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import jsonargparse._util
import yaml
from jsonargparse import Namespace, get_loader, set_dumper, set_loader
from jsonargparse._actions import _ActionConfigLoad  # pyright: ignore[reportPrivateUsage]
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from esper_lightning.cli.allowed import choices_of, listed, literals_of, rule_of
from esper_lightning.cli.errors import nearest
from esper_lightning.cli.plain_yaml import (
    SurpriseError,
    dump_plain,
    leaving_out,
    place,
    refuse_surprises,
)
from esper_lightning.cli.setting_help import HELP_TRAINER, HelpTrainer, with_groups

__all__ = ["SettingsError", "SettingsParser"]

_MODE = "plain yaml"
_MOST_BYTES = 10_000_000
_READING: Any = getattr(jsonargparse._util, "config_load_stack", None)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
_BY_NAME = "must hold settings by their names, or name a file with some"
_COMMAND = re.compile(r"^(fit|evaluate|bench)\.")
_BAD_CLASS = re.compile(r"Problem with given class_path '(\S*?)': (.*?)(?: - |Given value|$)")
_NO_TEXT = re.compile(r"(?:argument of type|unhashable type:) ('\w+')")
_NO_SETTINGS = ("help", "help_trainer", "print_config")
_HINTS = {"model.env": " Name one, or a config that does: --config configs/cartpole.yaml"}


class SettingsError(argparse.ArgumentError):
    """A mistake in the settings.

    Attributes:
        key: Name of the setting, as far as it is known; empty if the mistake is not in a setting.
        says: Text that follows the key.
    """

    def __init__(self, key: str, says: str) -> None:
        super().__init__(None, f"{key}{says}" if key else says.lstrip(": "))
        self.key, self.says = key, says


class FileError(SettingsError):
    """A file with settings that cannot be read; the text begins with the file's name."""

    def __init__(self, says: str) -> None:
        super().__init__("", says)


class SettingsParser(LightningArgumentParser):
    """Lightning's parser, with short errors, and YAML in which no key stands twice.

    Attributes:
        shows_lightnings: Whether the help is of Lightning's settings.
    """

    shows_lightnings = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settings: dict[str, Any] = {"parser_mode": _MODE, **kwargs}
        super().__init__(*args, **settings)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a ``SettingsError``."""
        raise _explain(self, message, ex) from ex

    def with_flags(self, words: Sequence[str]) -> list[str]:
        """Words in which a switch without a value, such as ``--dry_run``, is followed by ``true``.

        A switch is a setting that may be true or false.

        Args:
            words: Words of a command line, from the name of the command on.
        """
        kinds = {action.dest: _typehint(action) for action in _actions(self)}
        given: list[str] = []
        for word, after in zip(words, [*words[1:], "--"], strict=True):
            kind = kinds.get(word.removeprefix("--")) if word.startswith("--") else None
            is_word = after.startswith("-") and not after[1:2].isdigit()  # and no negative number
            is_bare = is_word and bool in (kind, *get_args(kind))
            given += [word, "true"] if is_bare else [word]
        return given

    @override
    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Describe the settings of this package, or those of Lightning where these were asked for.

        The parser of a class describes all of them.
        """
        if not any(isinstance(action, HelpTrainer) for action in self._actions):
            return super().format_help(*args, **kwargs)
        with with_groups(self, lightnings=self.shows_lightnings):
            shown = super().format_help(*args, **kwargs)
        more = f"\n{HELP_TRAINER} shows the settings of Lightning's Trainer (trainer.*).\n"
        return shown if self.shows_lightnings else shown + more

    @override
    def dump(self, *args: Any, **kwargs: Any) -> str:
        """Settings as YAML, without a warning of a default that YAML cannot hold."""
        with leaving_out():
            return super().dump(*args, **kwargs)

    @override
    def parse_string(self, *args: Any, **kwargs: Any) -> Namespace:
        """Read settings, and refuse a group (``model``, ``trainer``) without names of settings."""
        config = super().parse_string(*args, **kwargs)
        groups = [one.dest for one in _actions(self) if isinstance(one, _ActionConfigLoad)]
        for name in sorted(groups):  # a group before the groups in it
            got = config.get(name, Namespace())
            if not isinstance(got, Namespace):
                raise SettingsError(name, f" {_BY_NAME}, got {str(got)!r}.")
        return config

    @override
    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a config file, and name the file in every error about it."""
        try:
            _refuse_huge(Path(str(path)))
            config = super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise SettingsError("", f"{path} must be text in UTF-8: {error.reason}.") from error
        except (SettingsError, SurpriseError) as error:
            names_file = isinstance(error, FileError)
            if names_file or getattr(error, "key", "") not in ("", "--config"):
                raise
            raise SettingsError("", f"{path}{getattr(error, 'says', error)}") from error
        except ValueError as error:  # for example an integer of too many digits
            raise SettingsError("", f"{path} cannot be read: {error}.") from error
        known = {action.dest.partition(".")[0] for action in _actions(self)}
        for name in vars(config).keys() - known:
            raise SettingsError("", f"{path}: {name!r} is no setting.{nearest(name, known)}")
        return config


def _explain(parser: SettingsParser, message: str, cause: BaseException | None) -> SettingsError:
    """The ``SettingsError`` of a message of jsonargparse.

    Args:
        parser: Parser that found the mistake: that of the command, or of a class below it.
        message: Message of jsonargparse.
        cause: Exception behind the message. A parser below raises a ``SettingsError``.
    """
    text = " ".join(message.split())
    match = re.match(r'Parser key "([^"]+)"(?: element \d+)?: ?(.*)', text)
    key, text = (match[1], match[2]) if match else ("", text)
    while match := re.match(r'Unable to load config .*? - Parser key "([^"]+)": ?(.*)', text):
        key, text = match[1], match[2]  # the mistake in the file that the setting names
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
    """The mistake that an error in the chain of causes names; ``None`` if none names one.

    The errors are those of a nested parser (of a class or of a file) and of YAML.

    Args:
        key: Setting that the outer parser was reading; empty for none.
        cause: Error that made the outer parser fail.
    """
    is_file = key in ("", "config")
    owner = "--config" if key == "config" else key
    for error in _chain(cause):
        if isinstance(error, FileError):
            return FileError(error.says)
        if isinstance(error, SettingsError):
            names = [name for name in ("" if is_file and error.key else owner, error.key) if name]
            return SettingsError(".".join(names), error.says)
        if isinstance(error, SurpriseError):
            return SettingsError(owner, str(error))
        if isinstance(error, yaml.YAMLError) and is_file:
            return SettingsError(owner, _of_yaml(error))
    return None


def _of_yaml(error: yaml.YAMLError) -> str:
    """An error of PyYAML in the form that follows the name of a file."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return f"{'' if mark is None else place(mark)}: not valid YAML: {problem}."


def _explain_name(parser: SettingsParser, text: str) -> SettingsError:
    """The error for a setting that is missing or unknown."""
    if match := re.match(r"the following arguments are required: ([^, ]+)", text):
        name = _COMMAND.sub("", match[1])
        hint = _HINTS.get(name, "")
        return SettingsError(name, f" must be given.{hint}")
    if match := re.match(r"unrecognized arguments:(?: (\S+)|$)", text):
        name = (match[1] or "").partition("=")[0]
        if name == "--":
            rule = "must be followed by the name of a setting (--model.seed, for example)"
            return SettingsError("", f": '--' {rule}, got {match[1]!r}.")
        if not name.startswith("--"):
            return SettingsError(
                "", f": {match[1] or ''!r} is no setting: their names begin with --."
            )
        name = name[2:]
    elif match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", text):
        name = _COMMAND.sub("", f"{match[1]}.{match[2]}")
    elif match := re.search(r"[Oo]ption '(\S+)'( is not accepted|$)", text):
        name = _COMMAND.sub("", match[1])
    elif match := re.match(r"Key must be a string, got: (.*?)\.?$", text):
        return SettingsError("", f": {match[1]} is no setting: their names are text.")
    else:
        return SettingsError("", f": {text}")
    return SettingsError(name, f" is no setting.{_nearest_setting(parser, name)}")


def _nearest_setting(parser: SettingsParser, name: str) -> str:
    """A sentence with the setting whose name is nearest; empty if none is near.

    Settings of the same group come first, because a misspelt word is mostly the last.
    """
    group = name.rpartition(".")[0]
    names = [action.dest for action in _actions(parser) if action.dest not in _NO_SETTINGS]
    beside = [other for other in names if other.rpartition(".")[0] == group]
    return nearest(name, beside) or nearest(name, names)


def _explain_value(parser: SettingsParser, key: str, text: str) -> SettingsError:
    """The error for a value of the wrong type: the rule, the value, and the nearest choices."""
    typehint: Any = next((_typehint(one) for one in _actions(parser) if one.dest == key), None)
    value, below = _value(text)
    choices = choices_of(typehint)
    if below:
        return _explain_below(key, below, value, text, None if choices else rule_of(typehint))
    refused = _explain_class(key, text)
    if refused is not None:
        return refused
    ambiguous = re.search(r"Multiple subclasses with name .*?(?= - |$)", text)
    if ambiguous or typehint is None:
        return SettingsError(key, f": {ambiguous[0] if ambiguous else text}")
    known = f" Known are {listed(choices)}, or an import path." if choices else ""
    if choices and (match := _NO_TEXT.search(text)):
        says = f" must be {rule_of(typehint)}, got a value of type {match[1]}.{known}"
        return SettingsError(f"{key}.class_path", says)
    if value is None:
        return SettingsError(key, f" must be {rule_of(typehint)}: {text}.{known}")
    hint = nearest(value, choices or map(str, literals_of(typehint))) + known
    return SettingsError(key, f" must be {rule_of(typehint)}, got {value!r}.{hint}")


def _explain_below(
    key: str, below: str, value: str | None, text: str, rule: str | None
) -> SettingsError:
    """The error for a setting below one that has none.

    Args:
        key: Setting that has none.
        below: Name of the setting below it.
        value: Value of the setting below it.
        text: Message of jsonargparse.
        rule: Rule for the value of ``key``; ``None`` if it names a class, which has settings.
    """
    if rule is not None:
        return SettingsError(key, f" must be {rule}, and has no setting {below!r}.")
    rule = f"must follow the name of a class that has it (--{_COMMAND.sub('', key)} NAME)"
    of_a_class = "Subclass types expect" not in text
    says = f" {rule}, got {value!r}." if of_a_class else f": {text}"
    return SettingsError(f"{key}.{below}", says)


def _explain_class(key: str, text: str) -> SettingsError | None:
    """The error for a group of settings, or for a class; ``None`` if the text is about neither."""
    if match := re.search(r"Unable to load config ['\"](.*?)['\"]", text):
        return SettingsError(key, f" {_BY_NAME}, got {match[1]!r}.")
    if match := _BAD_CLASS.search(text):
        reason = match[2].strip()
        if reason.endswith("has no attribute 'keys'"):
            return SettingsError(f"{key}.init_args", " must hold settings by their names.")
        if re.match(r"\S+ (?:must|is no setting)\b", reason):  # a parser below has explained it
            return SettingsError(f"{key}.{reason}", "")
        hint = (
            " Install it, or add its folder to PYTHONPATH."
            if reason.startswith("No module named")
            else ""
        )
        rule = f"must name a class that can be imported, got {match[1]!r}: {reason}.{hint}"
        return SettingsError(key, f" {rule}")
    if match := re.search(r"Expected an instantiatable class, but (\S+) is abstract", text):
        lacks = ", ".join(sorted(getattr(_locate(match[1]), "__abstractmethods__", ())))
        rule = f"must name a class that can be built, got {match[1]!r}. It lacks {lacks}."
        return SettingsError(key, f" {rule}")
    return None


def _value(text: str) -> tuple[str | None, str]:
    """The value that the user gave, if the text has it, and the key of the setting below it."""
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


def _locate(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name, None) if module else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _actions(parser: SettingsParser) -> Iterator[argparse.Action]:
    """Actions of a parser and of the commands below it."""
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
    try:
        refuse_surprises(text)
        return _load_yaml(text)
    except (SurpriseError, yaml.YAMLError) as error:
        file = _file_of(text)
        if file is None:
            raise
        says = str(error) if isinstance(error, SurpriseError) else _of_yaml(error)
        raise FileError(f"{file}{says}") from error


def _file_of(text: str) -> str | None:
    """Name of the file that jsonargparse is reading; ``None`` if the text is not its content.

    The text may be another one, because files may name further files, and settings in them may be
    texts that are YAML again.
    """
    reading = () if _READING is None else _READING.get()
    if not reading:
        return None
    path, name = reading[-1]
    try:
        return name if Path(path).read_text() == text else None
    except (OSError, ValueError):  # a remote file
        return None


set_loader(_MODE, _load, exceptions=(yaml.YAMLError,))
set_dumper(_MODE, dump_plain)
