"""Duration and result of ``make demo`` in a fresh clone, with nothing compiled yet.

Writes ``results/demo.md``.

At the smallest size the clone uses this interpreter's packages in place of an environment of its
own.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conditions import ROOT, benchmark_parser, results

PRINTED = re.compile(
    r"CartPole: mean return (?P<reached>.*) \(std .*\) over (?P<episodes>\d+) .* episodes\n"
    r"Trained for (?P<env_steps>[\d,]+) env steps in (?P<seconds>.*) s: (?P<speed>.*)\n"
)
COPIED = ("Makefile", "configs", "constraints.txt", "esper_lightning", "pyproject.toml")


def measure(options: argparse.Namespace, clone: Path) -> list[str]:
    """Run ``make demo`` in a clone, and make a table of what the command prints."""
    command = ["make", "demo", f"PYTHON={sys.executable}"]
    if options.smallest:
        command.append(f"BIN={borrow(clone, options.settings)}")
    else:
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    start = time.monotonic()
    # A fresh machine has compiled nothing yet.
    env = {**os.environ, "XDG_CACHE_HOME": str(clone / ".cache")}
    done = subprocess.run(
        command, cwd=clone, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    took_s = time.monotonic() - start
    printed = PRINTED.search(done.stdout)
    assert printed is not None, done.stdout
    episodes = f"{printed['episodes']} deterministic evaluation episodes"
    training = f"{printed['seconds']} s, {printed['speed']}"
    return [
        "| | |",
        "| --- | --- |",
        f"| `make demo`, whole, with the virtual environment made | {took_s:.0f} s |",
        f"| of it training, {printed['env_steps']} env steps of CartPole | {training} |",
        f"| mean return of {episodes} after it | {printed['reached']} |",
    ]


def borrow(clone: Path, settings: str) -> Path:
    """Copy the tree as it is; returns a folder of commands, with an ``esper`` of other settings."""
    commands = clone / ".venv"
    commands.mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    script = f'#!/bin/sh\nexec "{sys.executable}" -m esper_lightning.cli.main "$@" {settings}\n'
    (commands / "esper").write_text(script)
    (commands / "esper").chmod(0o755)
    (commands / ".made").touch()
    return commands


def parser() -> argparse.ArgumentParser:
    settings = "--model.env.num_envs 4 --model.total_env_steps 256 --model.eval_episodes 2"
    parser = benchmark_parser(__doc__, {"settings": settings})
    parser.set_defaults(settings="")
    return parser


def main() -> None:
    options = parser().parse_args()
    with (
        results(__file__, options, threads="nothing else running") as files,
        tempfile.TemporaryDirectory() as folder,
    ):
        files.write("`make demo` in a fresh clone", measure(options, Path(folder) / "clone"))


if __name__ == "__main__":
    main()
