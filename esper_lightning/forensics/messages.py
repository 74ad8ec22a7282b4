"""Messages of errors without what differs from run to run. Standard library only."""

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["comparable"]

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def comparable(message: str, directories: Iterable[Path] = ()) -> str:
    """A message with one sign for every number and address, and one name for run directories.

    An error may name a process, a time, an object or a file of its run, and is the same all the
    same.

    Args:
        message: Message of an error.
        directories: Run directories. A path that ends with the name of one of them counts as that
            directory: the message may have it relative, and the run may have been moved since.
    """
    names = sorted({re.escape(path.name) for path in directories if path.name}, key=len)
    if names:
        longest_first = "|".join(reversed(names))
        pattern = rf"(?<![\w./~-])(?:[\w./~-]*/)?(?:{longest_first})(?![\w-])"
        message = re.sub(pattern, "RUN_DIR", message)
    return _NUMBER.sub("#", message)
