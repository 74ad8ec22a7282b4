"""Results files say how they are measured again, and none is written of an unknown state."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.commands import parser_of, wrong

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
FILES = sorted((BENCHMARKS / "results").glob("*.md"))
TINY = """
import pathlib
from conditions import benchmark_parser, results

options = benchmark_parser("Tiny.", {}).parse_args()
with results(__file__, options, threads="one thread") as files:
    pathlib.Path("measured").touch()
    if pathlib.Path("meddle").exists():
        pathlib.Path("README.md").write_text("changed while it measured")
    files.write("Tiny", ["| a |", "| --- |", "| 1 |"])
"""


def faults(path: Path) -> list[str]:
    """Rules that a results file breaks."""
    text = path.read_text()
    head = dict(
        re.findall(r"^- (hardware|versions|commit|command|date): (.*)$", text, re.MULTILINE)
    )
    found = [f"no {name}" for name in HEAD if name not in head]
    if not re.fullmatch(r"[0-9a-f]{7,40}", head.get("commit", "")):
        found.append(f"commit {head.get('commit')}")
    command = head.get("command", "").strip("`")
    script = re.search(r"python (?:benchmarks|scripts)/(\w+)\.py", command)
    if script is None:
        return [*found, f"command {command}"]
    if path.stem != script[1] and not path.stem.startswith(f"{script[1]}_"):
        found.append(f"{command} writes other files")
    return [*found, *filter(None, [wrong(command)])]


HEAD = ("hardware", "versions", "commit", "command", "date")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_results_file_is_of_a_commit_and_names_a_command_that_exists(path):
    assert faults(path) == []


def test_every_other_file_belongs_to_a_results_file():
    stems = [path.stem for path in FILES]
    others = [path for path in (BENCHMARKS / "results").iterdir() if path.suffix != ".md"]
    strange = [p.name for p in others if not any(p.stem.startswith(stem) for stem in stems)]
    assert strange == []


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in sorted(BENCHMARKS.glob("*.py"))
        if p.stem not in ("conditions", "contenders", "zoo_peer")
    ],
    ids=lambda path: path.name,
)
def test_every_benchmark_writes_by_the_one_writer(path):
    options = parser_of(path).parse_args([])
    assert options.output == BENCHMARKS / "results"
    assert options.smallest is False
    source = path.read_text()
    assert "results(__file__, options" in source or "run(__file__, parser()" in source
    assert "-dirty" not in source


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A repository with a benchmark that takes no time; gives what runs it."""
    folder = tmp_path / "repository"
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "README.md").write_text("as committed")
    (folder / ".gitignore").write_text("measured\nmeddle\n__pycache__\n")
    shutil.copy(BENCHMARKS / "conditions.py", folder / "benchmarks")
    (folder / "benchmarks" / "tiny.py").write_text(TINY)
    (folder / "benchmarks" / "results" / "other.md").write_text("other")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.com")
    monkeypatch.chdir(folder)
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *words], check=True)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "3"}
        command = [sys.executable, "benchmarks/tiny.py", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


RESULT = Path("benchmarks/results/tiny.md")


def test_a_results_file_says_what_was_measured_and_how(tiny):
    done = tiny()
    assert done.returncode == 0, done.stderr
    told = RESULT.read_text()
    assert done.stdout == f"{told}\n"
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True)[:12]
    assert told.startswith("# Tiny\n\n- hardware: ")
    assert f"- commit: {commit}\n" in told
    assert "- command: `OMP_NUM_THREADS=3 python benchmarks/tiny.py`\n" in told
    assert "torch" in told


@pytest.mark.parametrize("change", ["README.md", "benchmarks/new.py", "new.txt"])
def test_a_dirty_tree_is_refused_before_anything_is_measured(tiny, change):
    Path(change).write_text("another")
    done = tiny()
    assert done.returncode == 1
    assert "tiny.py must measure a commit" in done.stderr
    assert change in done.stderr
    assert not Path("measured").exists()
    assert not RESULT.exists()


def test_other_results_do_not_make_a_tree_dirty(tiny):
    Path("benchmarks/results/other.md").write_text("made anew")
    RESULT.write_text("old")
    assert tiny().returncode == 0
    assert RESULT.read_text().startswith("# Tiny")


def test_a_tree_that_changes_meanwhile_is_refused(tiny):
    Path("meddle").touch()
    done = tiny()
    assert done.returncode == 1
    assert "README.md" in done.stderr
    assert "| 1 |" in done.stdout  # what took half an hour is shown at least
    assert not RESULT.exists()


def test_a_folder_that_is_no_repository_is_refused(tiny):
    shutil.rmtree(".git")
    done = tiny()
    assert done.returncode == 1
    assert "must be a git repository" in done.stderr
    assert not Path("measured").exists()


def test_the_smallest_size_is_for_any_tree_and_leaves_nothing(tiny):
    Path("README.md").write_text("another")
    done = tiny("--smallest")
    assert done.returncode == 0, done.stderr
    assert "- commit: none: the smallest size" in done.stdout
    assert Path("measured").exists()
    assert not RESULT.exists()
