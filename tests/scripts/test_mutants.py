"""The list of mutants fits the package, and the script distinguishes killed from living mutants."""

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "mutants.py"
spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
assert spec is not None
assert spec.loader is not None
mutants = importlib.util.module_from_spec(spec)
sys.modules["mutants"] = mutants
spec.loader.exec_module(mutants)
LISTED = mutants.read_mutants()
TRUNK = ("ppo", "training", "callbacks", "recorder", "forensics", "comparison", "core")


def test_every_mutant_still_applies_and_names_tests_that_exist():
    assert [flaw for mutant in LISTED for flaw in mutants.flaws(mutant)] == []


def test_mutants_differ_and_are_of_every_part_of_the_trunk():
    count = Counter(Path(mutant.file).parts[0] for mutant in LISTED)
    assert min(count[part] for part in TRUNK) >= 25
    assert len(LISTED) >= 150
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in LISTED}) == len(LISTED)
    assert all(mutant.why.endswith(".") for mutant in LISTED)


def written(**fields) -> str:
    lines = [f"{name} = {value!r}" for name, value in fields.items()]
    return "\n".join(["[[mutant]]", "file = 'sums.py'", "why = 'It.'", *lines]) + "\n"


KILLED = {"old": "a + b", "new": "a - b", "killed_by": ["tests/test_sums.py::test_sum"]}
ALIVE = {"old": "c * 1", "new": "c * 2", "killed_by": ["tests/test_sums.py::test_sum"]}
ENDLESS = {"old": "n > 9", "new": "n > 99", "killed_by": ["tests/test_sums.py::TestMore"]}
DEAD_PROCESS = {
    "old": "n = 0",
    "new": "__import__('os').abort()",
    "killed_by": ENDLESS["killed_by"],
}
EQUIVALENT = {"old": "c * 1", "new": "1 * c", "equivalent": "Products commute."}


@pytest.fixture
def tree(tmp_path) -> Path:
    """A package with a test or two."""
    root = tmp_path / "tree"
    for folder in ("esper_lightning", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "esper_lightning" / "sums.py").write_text(
        "import time\n\n\ndef sum_of(a, b, c):\n    return a + b + 0 * (c * 1)\n\n\n"
        "def count():\n    n = 0\n    while not n > 9:\n        n += 1\n"
        "        time.sleep(0.0 if n < 10 else 9.0)\n    return n\n"
    )
    (root / "tests" / "test_sums.py").write_text(
        "import pytest\nfrom esper_lightning import sums\n\n\n"
        "def test_sum(tmp_path):\n    assert sums.sum_of(1, 2, 3) == 3\n\n\n"
        "class TestMore:\n    def test_count(self):\n        assert sums.count() == 10\n\n\n"
        "@pytest.mark.slow\ndef test_slow():\n    assert sums.sum_of(0, 0, 5) == 1\n"
    )
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['slow: by hand']\n")
    return root


def tried(tree, *entries, limit="60", more=()) -> tuple[int, list[str]]:
    listed = tree / "mutants.toml"
    listed.write_text("".join(written(**entry) for entry in entries))
    words = [sys.executable, SCRIPT, "--mutants", listed, "--root", tree, "--limit", limit]
    done = subprocess.run(
        [*map(str, words), "--import-nothing", *more], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def test_the_dead_are_told_from_the_living_and_the_tree_stays_as_it_was(tree):
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    status, lines = tried(tree, KILLED, ALIVE, DEAD_PROCESS, EQUIVALENT)
    assert status == 1
    fates = [line.partition("It.  ")[2] for line in lines[:3]]
    assert set(fates) == {
        "ALIVE",
        "killed by tests/test_sums.py::test_sum",
        "killed by the end of the process (-6)",
    }
    assert lines[3] == "2 killed, 1 alive, 1 equivalent"
    (tree / "mutants.toml").unlink()
    assert {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()} == before


def test_who_never_ends_is_dead(tree):
    status, lines = tried(tree, ENDLESS, limit="4")
    assert status == 0
    assert lines[0].endswith("killed by no end within 4 s")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**KILLED, "old": "a - b"}, "its text occurs 0 times and not once"),
        ({**KILLED, "old": "n", "new": "m"}, "times and not once"),
        ({**KILLED, "new": "a + ("}, "was never closed"),
        ({**KILLED, "new": "a  +  b"}, "it changes no code"),
        ({**KILLED, "killed_by": []}, "it needs tests, or a reason why there are none"),
        ({**EQUIVALENT, "killed_by": KILLED["killed_by"]}, "it needs tests, or a reason"),
        ({**KILLED, "killed_by": ["tests/test_sums.py::test_su"]}, "there is no test"),
        ({**KILLED, "killed_by": ["tests/test_sum.py"]}, "there is no test"),
        ({**KILLED, "killed_by": ["tests/test_sums.py::TestMore::test_sum"]}, "there is no test"),
    ],
)
def test_what_cannot_be_tried_is_said(tree, entry, message):
    mutant = mutants.Mutant(file="sums.py", why="It.", **entry)
    (flaw,) = mutants.flaws(mutant, tree)
    assert flaw.startswith("sums.py: It.: ")
    assert message in flaw
    assert "no such file" in mutants.flaws(mutants.Mutant(file="x.py", why="It.", **entry), tree)[0]


def test_nothing_is_tried_where_a_mutant_does_not_apply(tree):
    status, lines = tried(tree, KILLED, {**KILLED, "old": "a - b"})
    assert (status, len(lines)) == (2, 1)


def test_a_word_of_no_mutant_is_said_and_runs_no_test(tree):
    assert tried(tree, KILLED, more=["--only", "nothing"]) == (
        2,
        ["--only must be a word of a mutant, got 'nothing'."],
    )


def test_a_test_that_fails_without_a_mutant_kills_none(tree):
    path = tree / "tests" / "test_sums.py"
    path.write_text(path.read_text().replace("== 3", "== 4"))
    status, lines = tried(tree, KILLED)
    assert status == 2
    assert lines[-1] == "Without any mutant: tests/test_sums.py::test_sum"


def test_what_is_slow_kills_nobody(tree):
    entry = {**ALIVE, "killed_by": ["tests/test_sums.py::test_slow"]}
    status, lines = tried(tree, entry)
    assert status == 2
    assert lines[-1] == "Without any mutant: no test was run"
