"""Options of every benchmark, and the writer of results files.

A results file states the conditions of the measurement, and the command that repeats it. A
benchmark refuses a working tree with uncommitted changes: before it measures, and again before it
writes. ``--smallest`` is how the tests run a benchmark, at sizes that measure nothing: its files go
to a folder that is removed, whatever the state of the tree.
"""

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "lightning", "torchmetrics")
# Environment variables that change a measurement.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


class _Smallest(argparse.Action):
    """An option that sets other options to their smallest values; later words may change them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        for name, value in self.const.items():
            assert hasattr(namespace, name), f"{name} is no option of {parser.prog}"
            setattr(namespace, name, value)
        namespace.smallest = True


def benchmark_parser(doc: str | None, smallest: Mapping[str, Any]) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, to which a benchmark adds its own.

    Args:
        doc: Docstring of the benchmark, which is the description of the parser.
        smallest: Values of options under ``--smallest``, by name.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder of the results files (default: %(default)s)",
    )
    parser.add_argument(
        "--smallest",
        action=_Smallest,
        nargs=0,
        const=smallest,
        default=False,
        help="run everything at sizes that measure nothing, and leave no file",
    )
    return parser


class Results:
    """The results files of one call of a benchmark.

    Args:
        script: File of the benchmark; names of its results files begin with the file's name.
        folder: Folder of the results files.
        threads: Words about the number of threads, and about other work on the machine.
        packages: Names of packages that took part, besides our own.
        kept: Whether the files are results; ``False`` for a trial at the smallest size.

    Attributes:
        commit: Commit that is measured.
    """

    def __init__(
        self, script: Path, folder: Path, *, threads: str, packages: Iterable[str], kept: bool
    ) -> None:
        self._script, self._folder, self._kept = script, folder, kept
        self.commit = _commit(script) if kept else "none: the smallest size"
        self._threads, self._packages = threads, (*PACKAGES, *packages)
        self._load = _load()

    def path(self, part: str = "", suffix: str = ".md") -> Path:
        """Path of a results file: of the benchmark, of one of its tables, or of a figure."""
        return self._folder / f"{'_'.join(filter(None, (self._script.stem, part)))}{suffix}"

    def write(self, title: str, lines: Iterable[str], *, part: str = "") -> None:
        """Print a results file, and write it if the tree still has the same commit."""
        text = "\n".join([f"# {title}", "", *self._head(), "", *lines]).rstrip() + "\n"
        print(text, flush=True)
        if self._kept and _commit(self._script) != self.commit:
            sys.exit(f"{self.path(part)} must be of one commit, and {self.commit} is not any more")
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path(part).write_text(text)

    def _head(self) -> list[str]:
        packages = ", ".join(f"{name} {_version(name)}" for name in self._packages)
        variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
        script = self._script.relative_to(ROOT)
        command = shlex.join([*variables, "python", str(script), *sys.argv[1:]])
        return [
            f"- hardware: {_hardware()}, {self._threads}",
            f"- versions: Python {platform.python_version()}, {packages}",
            f"- commit: {self.commit}",
            f"- command: `{command}`",
            f"- date: {datetime.datetime.now(tz=datetime.UTC).date()}",
            f"- load averages: {self._load} at the start, {_load()} at the end",
        ]


@contextmanager
def results(
    script: str, options: argparse.Namespace, *, threads: str, packages: Iterable[str] = ()
) -> Iterator[Results]:
    """Refuse a measurement that could not be repeated; else give the writer of results files.

    Args:
        script: ``__file__`` of the benchmark.
        options: Parsed options of the benchmark.
        threads: Words about the number of threads, and about other work on the machine.
        packages: Names of packages that take part, besides our own.
    """
    given: dict[str, Any] = {"threads": threads, "packages": packages, "kept": not options.smallest}
    path = Path(script).resolve()
    if not options.smallest:
        yield Results(path, options.output, **given)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Results(path, Path(folder), **given)


def _commit(script: Path) -> str:
    """The commit of the working tree, in which only results files may have changed."""
    found = _git("rev-parse", "--short=12", "HEAD")
    but = f":(exclude){RESULTS.relative_to(ROOT)}"
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", ".", but)
    if changed:
        names = ", ".join(line[3:] for line in changed.splitlines()[:3])
        sys.exit(
            f"{script.name} must measure a commit, got changes in {names}. Commit them, or look "
            "at the smallest size with --smallest."
        )
    return found.strip()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{ROOT} must be a git repository, git says: {done.stderr.strip()}")
    return done.stdout


def _hardware() -> str:
    """Processor, number of cores, and GPUs if there are any."""
    models = _named("model name", [Path("/proc/cpuinfo")]) or [platform.processor()]
    gpus = _named("Model", Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return ", ".join([models[0], f"{os.cpu_count()} cores", *gpus])


def _named(name: str, files: Iterable[Path]) -> list[str]:
    """Values of a name in files of the kernel that exist."""
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith(name)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"
