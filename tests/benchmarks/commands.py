"""Checks of commands that documents name: their files, targets, extras and options exist."""

import contextlib
import io
import re
import runpy
import shlex
import sys
import tomllib
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

from esper_lightning.cli.main import main as esper

ROOT = Path(__file__).parents[2]
MODULE = "esper_lightning.cli.main"
TOOLS = ("pytest", "venv")  # modules of others that documents run
VARIABLE = re.compile(r"[A-Z_]+=\S*")


def wrong(command: str) -> str | None:
    """The reason why a command cannot run; ``None`` if it can. To be called in ROOT."""
    words = shlex.split(command, comments=True)
    while words and VARIABLE.fullmatch(words[0]):
        words.pop(0)
    if "&&" in words:  # commands one after the other
        cut = words.index("&&")
        return wrong(shlex.join(words[:cut])) or wrong(shlex.join(words[cut + 1 :]))
    program, *words = words
    if program in (".", "cd"):
        return None
    if program.startswith("scripts/"):
        return None if (ROOT / program).is_file() else f"{program} is not there"
    known = {"esper": _esper, "make": _make, "pip": _pip, "python": _python}
    known |= {"torchrun": _torchrun, "sbatch": _sbatch}
    return known[program](words) if program in known else f"{program} is not known to this test"


def _python(words: list[str]) -> str | None:
    if words[0] != "-m":
        return _script(ROOT / words[0], words[1:])
    if words[1] in TOOLS:
        return None
    if words[1].startswith("tests."):
        return _script(ROOT / f"{words[1].replace('.', '/')}.py", words[2:])
    return _esper(words[2:]) if words[1] == MODULE else f"python runs no {words[1]}"


def _torchrun(words: list[str]) -> str | None:
    if MODULE not in words:  # the name of an option, as "torchrun --max-restarts"
        return None
    return _esper(words[words.index(MODULE) + 1 :])


def _sbatch(words: list[str]) -> str | None:
    script = next(k for k, word in enumerate(words) if word.endswith(".sh"))
    missing = None if (ROOT / words[script]).is_file() else f"{words[script]} is not there"
    return missing or _esper(["fit", *words[script + 1 :]])


def _script(path: Path, words: list[str]) -> str | None:
    if not path.is_file():
        return f"{path} is not there"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = parser_of(path).parse_args(words)
    except SystemExit:
        return said.getvalue()
    if path.match("scripts/ab.py"):
        configs = [word for config in options.config for word in ("--config", str(config))]
        for variant in options.variant:
            more = shlex.split(variant.partition(":")[2])
            if found := _esper(["fit", *configs, *options.arguments, *more]):
                return found
    return None


@cache
def parser_of(path: Path) -> ArgumentParser:
    """The options of a script, which has a function ``parser``."""
    sys.path.insert(0, str(path.parent))
    try:
        return runpy.run_path(str(path))["parser"]()
    finally:
        sys.path.remove(str(path.parent))


def _esper(words: list[str]) -> str | None:
    """Options of ``fit`` are parsed with their values, those of others by name."""
    if words[0] == "fit":
        asked = [word for word in words if word != "--print_config"]
        return _said((*asked, "--print_config"), shown=False)
    shown = _said((words[0], "--help"), shown=True) or ""
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    missing = [word for word in options if not re.search(rf"{re.escape(word)}\b", shown)]
    return f"esper {words[0]} has no {', '.join(missing)}: {shown[-300:]}" if missing else None


@cache
def _said(words: tuple[str, ...], *, shown: bool) -> str | None:
    """The output of ``esper``; unless it is asked for, only that of a failure."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            esper(list(words))
    except SystemExit as end:
        if end.code:
            return err.getvalue() or f"esper {shlex.join(words)} ends with status {end.code}"
    return out.getvalue() if shown else None


def _make(words: list[str]) -> str | None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing = [word for word in words if "=" not in word and word not in targets]
    return f"the Makefile has no {', '.join(missing)}" if missing else None


def _pip(words: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    wanted = re.findall(r"\[([\w,]+)\]", " ".join(words))
    missing = [name for names in wanted for name in names.split(",") if name not in extras]
    return f"pyproject.toml has no extra {', '.join(missing)}" if missing else None
