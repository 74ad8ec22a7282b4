"""Errors of every command: one short line on stderr, and exit status 2.

This file imports the standard library only, because ``esper crash`` may need no more.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from esper_lightning.forensics.reading import printable

__all__ = ["CommandParser", "fail", "local_path", "nearest", "one_line"]

LONGEST_LINE = 200
_LONGEST_TEXT = 1 << 16
_LONGEST_WORD, _WORD_START, _WORD_END = 60, 24, 28


class CommandParser(argparse.ArgumentParser):
    """A parser of the standard library that reports a mistake in one line."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print a mistake in the arguments in one line; exit with status 2."""
        message = re.sub(r"^argument ([A-Z_]+): must ", r"\1 must ", message)
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        hint = nearest(unknown[1], self._option_string_actions) if unknown else ""
        fail(f"{message}.{hint}" if hint else message)


def local_path(text: str) -> Path:
    """The type of an argument that names a folder or file of this machine."""
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(f"must name a folder on this machine, got {text!r}.")
    return Path(text)


def fail(mistake: BaseException | str) -> NoReturn:
    """Print one line about a mistake in the settings; exit with status 2."""
    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] - closed at the start
        print(one_line(f"esper: error: {mistake}"), file=sys.stderr)
    sys.exit(2)


def one_line(text: str, limit: int = LONGEST_LINE) -> str:
    """A text as one line of printable characters.

    A line that is too long first loses the middle of its longest words (paths, values), and then
    the end of what comes before its last sentence, which is often the way out.
    A list of what is known is the first to go.
    """
    words = [printable(word) for word in text[:_LONGEST_TEXT].split()]
    line = " ".join(words)
    if len(line) > limit:
        line = " ".join(
            f"{word[:_WORD_START]}...{word[-_WORD_END:]}" if len(word) > _LONGEST_WORD else word
            for word in words
        )
    if len(line) <= limit:
        return line
    before, _, last = line.rpartition(". ")
    keeps = before and len(last) < limit // 2 and not last.startswith("Known are ")
    last = f" {last}" if keeps else ""
    return f"{line[: limit - 3 - len(last)]}...{last}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence with the known word that is most like ``word``; empty if no known word is."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f" The nearest is {found[0]!r}." if found else ""
