"""Runs one dying program in a session of its own, and reads the files that it left."""

import contextlib
import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RankLayout, RunLayout
from tests import forked
from tests.crash.cases import RankCase
from tests.reports import read_report

PROGRAM = Path(__file__).with_name("program.py")
RANKS = Path(__file__).with_name("ranks.py")
FAILING_OPERATOR = b"aten::special_erfcx"
_LIMIT_S = 60.0
_LEAVING_S = 4.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a program as seen from outside."""

    status: int | None  # None: it had to be killed
    stderr: str
    directory: Path
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def rank(self, rank: int = 0) -> RankLayout:
        return RunLayout(self.directory).rank(rank)

    def report(self, rank: int = 0) -> dict[str, Any] | None:
        return read_report(self.rank(rank).crash)

    def traces(self) -> list[bytes]:
        """Contents of all traces; each of them is whole JSON."""
        return [read_trace(path) for path in sorted(self.directory.rglob("*.pt.trace.json*"))]

    def rows(self, rank: int = 0) -> list[int]:
        return [row["iteration"] for row in read_json_lines(self.rank(rank).history)]

    def truth(self, rank: int = 0) -> int:
        path = self.directory / f"truth{rank}"
        return len(path.read_bytes()) if path.exists() else 0

    def state(self) -> dict[str, Any]:
        path = self.directory / "state.json"
        return json.loads(path.read_text()) if path.exists() else {}


def read_trace(path: Path) -> bytes:
    """The content of a trace, which must be whole JSON."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    json.loads(content)
    return content


def run(case: dict[str, Any], directory: Path) -> Outcome:
    """Let the program die, at most a minute long."""
    directory.mkdir(parents=True, exist_ok=True)
    words = [str(PROGRAM), json.dumps({**case, "directory": str(directory)})]
    more = case.get("environment", {})
    if any(name.startswith("PYTHON") for name in more):  # Python reads them as it starts
        return _watch(functools.partial(_start, words, more), directory)
    how = {"env": {**os.environ, **forked.QUIET, **more}, "new_session": True}
    return _watch(lambda output: forked.start(words, output=output, **how), directory)


def run_ranks(case: RankCase, directory: Path) -> Outcome:
    """Let one of two ranks die, at most a minute long."""
    directory.mkdir(parents=True, exist_ok=True)
    launcher, strategy = [], case.strategy
    if strategy == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        strategy = "ddp"
    program = [str(RANKS), case.fault, strategy, str(directory), str(case.rank)]
    return _watch(functools.partial(_start, [*launcher, *program], {}), directory)


def _start(
    words: list[str], variables: dict[str, str], output: IO[bytes]
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, **forked.QUIET, **variables},
        start_new_session=True,
        preexec_fn=_as_from_a_terminal,  # noqa: PLW1509 - two system calls
    )


def _watch(
    start: "Callable[[IO[bytes]], subprocess.Popen[bytes] | forked.Forked]", directory: Path
) -> Outcome:
    started = time.monotonic()
    with (directory / "stderr").open("wb") as stderr:
        # A process of its own writes it: the program may have forbidden itself to write files.
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=stderr)
        assert writer.stdin is not None
        process = start(writer.stdin)
        writer.stdin.close()
        try:
            status = process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            status = None
    seconds = time.monotonic() - started
    alive = _still_there(process.pid, directory)
    for number in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    writer.wait(_LIMIT_S)
    temporary = [str(p) for p in directory.rglob("*") if p.name.endswith((".tmp", ".part"))]
    temporary += [str(p) for p in directory.rglob(".*.json")]
    return Outcome(
        status=status,
        stderr=(directory / "stderr").read_text(errors="replace"),
        directory=directory,
        leftovers=[*(f"process {number}" for number in alive), *temporary],
        seconds=seconds,
    )


def _as_from_a_terminal() -> None:
    """Shells start background jobs with these two signals ignored, as a test run may be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def _still_there(session: int, directory: Path) -> list[int]:
    """Processes that the program started and that do not end by themselves."""
    end = time.monotonic() + _LEAVING_S
    while True:
        found = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _belongs(entry, session, directory)
        ]
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def _belongs(entry: Path, session: int, directory: Path) -> bool:
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
        command = (entry / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return fields[0] != "Z" and (int(fields[3]) == session or str(directory) in command)
