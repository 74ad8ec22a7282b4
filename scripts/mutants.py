"""Break the package in small ways, and check that the fast tests notice each of them.

``--only gae`` tries mutants whose file or reason holds the word, ``--list`` prints all of them.
Without either, every mutant of ``tests/mutants.toml`` is tried (``make mutants``).

A mutant replaces one text of one file by another, in a copy of the tree and never in the tree
itself. The tests that the mutant names are run against the copy, without those marked ``slow``; the
first failure kills the mutant. Tests that do not end in time kill it, too, because a test run would
hang. The exit status is 1 if a mutant survives, and 2 if a mutant no longer applies, names a test
that does not exist, or names a test that fails without the mutant.

Importing torch and Lightning takes longer than most of the tests. This process imports them once,
and forks a process for each mutant, which imports the package anew.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MUTANTS = ROOT / "tests" / "mutants.toml"
PACKAGE = "esper_lightning"
NOT_COPIED = (".git", ".venv", ".*cache", "*.egg-info")
NOT_COPIED_OF_ROOT = ("runs", "lightning_logs", "build", "dist")  # tests have a folder runs, too
IMPORTED_ONCE = (
    *("pytest", "hypothesis.extra.numpy", "xdist", "pytest_timeout", "jaxtyping", "beartype.claw"),
    *("torch", "lightning.pytorch", "torchmetrics", "tensorboard.backend.event_processing"),
    *("yaml", "scipy.stats", "gymnasium", "stable_baselines3", "matplotlib.figure"),
)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One wrong version of the package.

    Attributes:
        file: Path of the changed file, below the package.
        old: Text that occurs once in the file.
        new: Text that replaces the old one.
        why: Behaviour that goes wrong.
        killed_by: Test files, classes or functions, as pytest names them, without parameters.
        equivalent: Reason why no test can notice the mutant; empty if a test must.
    """

    file: str
    old: str
    new: str
    why: str
    killed_by: tuple[str, ...] = ()
    equivalent: str = ""

    @property
    def title(self) -> str:
        """File and reason in one line."""
        return f"{self.file}: {self.why}"


def read_mutants(path: Path = MUTANTS) -> list[Mutant]:
    """Mutants of a list, in its order."""
    entries = tomllib.loads(path.read_text())["mutant"]
    return [
        Mutant(**{**entry, "killed_by": tuple(entry.get("killed_by", ()))}) for entry in entries
    ]


def flaws(mutant: Mutant, root: Path = ROOT) -> list[str]:
    """Reasons why a mutant cannot be tried; empty if it can."""
    path = root / PACKAGE / mutant.file
    if not path.is_file():
        return [f"{mutant.title}: no such file"]
    found: list[str] = []
    text = path.read_text()
    times = text.count(mutant.old)
    if times != 1:
        return [f"{mutant.title}: its text occurs {times} times and not once"]
    try:
        ast.parse(mutated(mutant, root))
    except SyntaxError as error:
        found.append(f"{mutant.title}: {error}")
    if mutant.old.split() == mutant.new.split():
        found.append(f"{mutant.title}: it changes no code")
    if bool(mutant.killed_by) == bool(mutant.equivalent):
        found.append(f"{mutant.title}: it needs tests, or a reason why there are none")
    missing = [test for test in mutant.killed_by if not _exists(test, root)]
    return found + [f"{mutant.title}: there is no test {test}" for test in missing]


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The text of the whole file with the mutant in it."""
    return (root / PACKAGE / mutant.file).read_text().replace(mutant.old, mutant.new)


@functools.cache
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _exists(test: str, root: Path) -> bool:
    """Whether the text of a test file has a test of this name."""
    name, *parts = test.split("::")
    path = root / name
    if not path.is_file():
        return False
    body: Sequence[ast.stmt] = _parsed(path.read_text()).body
    for part in parts:
        named = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part
        ]
        if not named:
            return False
        body = named[0].body
    return True


# Trials.


@dataclass
class Trial:
    """One run of tests on a copy of the tree.

    Attributes:
        mutant: Mutant that is tried; ``None`` for the tree as it is.
        killed: Whether a test failed.
        by: The first test that failed, or how the run ended.
        seconds: Duration of the run.
        log: Output of the run.
    """

    mutant: Mutant | None
    killed: bool = False
    by: str = ""
    seconds: float = 0.0
    log: str = ""


@dataclass
class _Copy:
    """A copy of the tree, for one run of tests at a time."""

    root: Path
    trial: Trial = field(default_factory=lambda: Trial(None))
    pid: int = 0
    began_s: float = 0.0
    limit_s: float = 0.0


class Laboratory:
    """Copies of a tree, and processes that run tests in them.

    Args:
        root: The tree, which is read and never written.
        folder: Folder of the copies.
        jobs: Number of processes at a time.
    """

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self._root, self._folder, self._jobs = root, folder, jobs
        self._free = [_Copy(folder / "0")]
        self._busy: list[_Copy] = []
        self._written = 0
        anywhere = shutil.ignore_patterns(*NOT_COPIED)

        def ignored(parent: str, names: list[str]) -> set[str]:
            of_root = set(NOT_COPIED_OF_ROOT) if Path(parent) == root else set[str]()
            return {*anywhere(parent, names), *of_root.intersection(names)}

        shutil.copytree(root, folder / "0", ignore=ignored, symlinks=True)

    def check(self, tests: Sequence[str], *, limit_s: float) -> Trial:
        """Run tests on the tree as it is, before the first mutant; its bytecode is kept."""
        self._start(self._free.pop(), Trial(None), tests, limit_s)
        while not (ended := self._ended()):
            pass
        shutil.rmtree(self._folder / "0" / "tmp", ignore_errors=True)  # pipes cannot be copied
        for number in range(1, self._jobs):
            shutil.copytree(self._folder / "0", self._folder / str(number), symlinks=True)
            self._free.append(_Copy(self._folder / str(number)))
        return ended[0].trial

    def run(self, mutants: Sequence[Mutant], *, limit_s: float) -> Iterator[Trial]:
        """Try mutants, and yield each trial when it ends."""
        waiting = list(mutants)
        try:
            while waiting or self._busy:
                while waiting and self._free:
                    mutant = waiting.pop(0)
                    copy = self._free.pop()
                    self._write(copy.root / PACKAGE / mutant.file, mutated(mutant, self._root))
                    self._start(copy, Trial(mutant), mutant.killed_by, limit_s)
                for copy in self._ended():
                    assert copy.trial.mutant is not None
                    place = Path(PACKAGE) / copy.trial.mutant.file
                    self._write(copy.root / place, (self._root / place).read_text())
                    yield copy.trial
        finally:
            for copy in self._busy:
                _kill(copy.pid)

    def _write(self, path: Path, text: str) -> None:
        """Write a file with a time of its own.

        Python recognises a changed file by its length and by the second in which it was written.
        """
        path.write_text(text)
        self._written += 1
        age = path.stat().st_mtime + self._written
        os.utime(path, (age, age))

    def _start(self, copy: _Copy, trial: Trial, tests: Sequence[str], limit_s: float) -> None:
        copy.trial, copy.began_s, copy.limit_s = trial, time.monotonic(), limit_s
        sys.stdout.flush()
        copy.pid = os.fork()
        if copy.pid == 0:
            try:
                os.setsid()
                _run_tests(copy.root, tests, keeps_bytecode=trial.mutant is None)
            except BaseException:
                traceback.print_exc()
            os._exit(70)  # never return into the loop of the parent
        self._busy.append(copy)

    def _ended(self) -> list[_Copy]:
        """Copies whose process has ended since the last call, or was killed at its time limit."""
        time.sleep(0.05)
        ended: list[_Copy] = []
        for copy in list(self._busy):
            seconds = time.monotonic() - copy.began_s
            pid, status = os.waitpid(copy.pid, os.WNOHANG)
            if pid == 0 and seconds < copy.limit_s:
                continue
            _kill(copy.pid)  # with the processes that it has started
            if pid == 0:
                os.waitpid(copy.pid, 0)
                copy.trial.killed, copy.trial.by = True, f"no end within {copy.limit_s:.0f} s"
            else:
                _judge(copy, os.waitstatus_to_exitcode(status))
            copy.trial.seconds = seconds
            copy.trial.log = (copy.root / "log.txt").read_text(errors="replace")
            self._busy.remove(copy)
            self._free.append(copy)
            ended.append(copy)
        return ended


def _judge(copy: _Copy, status: int) -> None:
    trial = copy.trial
    result = copy.root / "result.json"
    failed = json.loads(result.read_text()) if result.exists() else None
    result.unlink(missing_ok=True)
    if status in (0, 5) or (status == 4 and failed is None):
        trial.by = {0: "", 4: "no such test", 5: "no test was run"}[status]
    else:
        trial.killed, trial.by = True, failed or f"the end of the process ({status})"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _run_tests(root: Path, tests: Sequence[str], *, keeps_bytecode: bool) -> None:
    """Run tests in a forked process, and end that process."""
    log = os.open(root / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)  # for the processes that tests start
    if not keeps_bytecode:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import pytest  # noqa: PLC0415 - the parent has imported it

    class Witness:
        """A plugin of pytest that writes the first failure to a file."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            self._note(report)

        def pytest_collectreport(self, report: Any) -> None:
            self._note(report)

        def _note(self, report: Any) -> None:
            result = Path(root / "result.json")
            if report.failed and not result.exists():
                result.write_text(json.dumps(report.nodeid))

    temporary = str(root / "tmp")
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["--basetemp", temporary, "-o", "tmp_path_retention_policy=none"]
    options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    os._exit(pytest.main([*options, *tests], plugins=[Witness()]))


# The command line.


def parser() -> argparse.ArgumentParser:
    """The parser of the options."""
    options = argparse.ArgumentParser(description="Break the package, and see the tests notice.")
    options.add_argument("--only", metavar="WORD", help="mutants whose file or reason holds it")
    options.add_argument("--jobs", type=int, default=2, help="processes at a time (%(default)s)")
    options.add_argument("--limit", type=float, default=120.0, help="seconds a mutant has")
    options.add_argument("--list", action="store_true", help="say what there is, and try nothing")
    options.add_argument("--mutants", type=Path, default=MUTANTS, help="the list")
    options.add_argument("--root", type=Path, default=ROOT, help="the tree")
    options.add_argument("--import-nothing", action="store_true", help="no library in advance")
    return options


def main() -> None:
    """Try mutants, and print which of them survive."""
    given = parser().parse_args()
    chosen = [m for m in read_mutants(given.mutants) if not given.only or given.only in m.title]
    if given.list:
        for mutant in chosen:
            print(mutant.title, f"[equivalent: {mutant.equivalent}]" if mutant.equivalent else "")
        count = Counter(Path(mutant.file).parts[0] for mutant in chosen)
        print(f"{len(chosen)} mutants:", ", ".join(f"{n} of {name}" for name, n in count.items()))
        return
    if not chosen:
        print(f"--only must be a word of a mutant, got {given.only!r}.")
        sys.exit(2)
    wrong = [flaw for mutant in chosen for flaw in flaws(mutant, given.root)]
    if wrong:
        print(*wrong, sep="\n")
        sys.exit(2)
    mortal = [mutant for mutant in chosen if not mutant.equivalent]
    for name in () if given.import_nothing else IMPORTED_ONCE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        laboratory = Laboratory(given.root.resolve(), Path(folder), given.jobs)
        tests = sorted({test for mutant in mortal for test in mutant.killed_by})
        sane = laboratory.check(tests, limit_s=30 * given.limit)
        if sane.killed or sane.by:
            print(sane.log, f"Without any mutant: {sane.by}", sep="\n")
            sys.exit(2)
        alive: list[Trial] = []
        for trial in laboratory.run(mortal, limit_s=given.limit):
            assert trial.mutant is not None
            alive += [] if trial.killed else [trial]
            fate = f"killed by {trial.by}" if trial.killed else f"ALIVE {trial.by}".rstrip()
            print(f"{trial.seconds:5.1f} s  {trial.mutant.title}  {fate}", flush=True)
    killed, equivalent = len(mortal) - len(alive), len(chosen) - len(mortal)
    print(f"{killed} killed, {len(alive)} alive, {equivalent} equivalent")
    for trial in alive:
        print(f"ALIVE  {trial.mutant.title if trial.mutant else ''}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
