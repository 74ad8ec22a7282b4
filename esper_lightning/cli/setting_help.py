"""``--help`` of the commands that take settings: those of this package, and Lightning's on request.

Lightning's Trainer has forty settings with long texts, most of which no run needs.
"""
# argparse has no public way to choose what its help shows.
# pyright: reportPrivateUsage=false

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

__all__ = ["HELP_TRAINER", "HelpTrainer", "usage_of", "with_groups"]

HELP_TRAINER = "--help_trainer"
_LIGHTNINGS = ("trainer", "data")
_GENERAL = ("help", "help_trainer", "config", "print_config", "seed_everything")


class HelpTrainer(argparse._HelpAction):
    """The option that shows the settings of Lightning's Trainer, and ends the process."""

    @override
    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        parser.shows_lightnings = True
        parser.print_help()
        parser.exit()


def usage_of(command: str) -> str:
    """The first line of the help of a command."""
    return f"esper {command} [--config CONFIG] [--SETTING VALUE ...]"


@contextmanager
def with_groups(parser: argparse.ArgumentParser, *, lightnings: bool) -> Generator[None]:
    """A context in which a parser has only some groups of settings, in the order of their use.

    Args:
        parser: Parser of a command.
        lightnings: Whether Lightning's settings are the ones to show, instead of all others.
    """
    kept = parser._action_groups
    of_others = [group for group in kept if (_kind(group) in _LIGHTNINGS) == lightnings]
    order = ("", "model", "general", *_LIGHTNINGS)
    parser._action_groups = sorted(of_others, key=lambda group: order.index(_kind(group)))
    try:
        yield
    finally:
        parser._action_groups = kept


def _kind(group: Any) -> str:
    """``trainer``, ``data``, ``model``, ``general``, or nothing for settings of the command."""
    names = [action.dest for action in group._group_actions]
    first = names[0].partition(".")[0] if names else "general"
    if first in (*_LIGHTNINGS, "model"):
        return first
    return "general" if first in _GENERAL else ""
