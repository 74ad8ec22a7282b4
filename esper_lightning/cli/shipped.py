"""Configs of the package, which ``--config`` names without a path: ``--config hopper``."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from esper_lightning.cli.errors import fail, nearest

FOLDER = Path(__file__).parents[1] / "configs"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def names() -> list[str]:
    """Names of the shipped configs, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def with_paths(words: Sequence[str]) -> list[str]:
    """The words of a command, with the path of each shipped config in place of its name.

    A file of the current directory comes before a shipped config of the same name. Ends the process
    with one line if there is neither.
    """
    found: list[str] = []
    for before, word in pairwise(["", *words]):
        if before == "--config":
            found.append(_path(word))
        elif word.startswith("--config="):
            found.append(f"--config={_path(word.removeprefix('--config='))}")
        else:
            found.append(word)
    return found


def _path(value: str) -> str:
    if not _NAME.fullmatch(value) or Path(value).exists():
        return value
    known = names()
    if value not in known:
        hint = nearest(value, known) or f" Shipped are: {', '.join(known)}."
        fail(f"--config must name a file or a shipped config, got {value!r}.{hint}")
    return str(FOLDER / f"{value}.yaml")
