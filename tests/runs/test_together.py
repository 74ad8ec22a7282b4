"""Runs that start together do not collide: each has a directory, and all its rows."""

import json
from pathlib import Path

import pytest

from tests import forked

PROGRAM = Path(__file__).with_name("together.py")
ITERATIONS = 4


def start(folder, count, rounds, *arguments):
    done = forked.run([PROGRAM, folder, count, rounds, *arguments], timeout=1100)
    assert done.returncode == 0, done.stderr
    return [[int(status) for status in line.split()] for line in done.stdout.splitlines()]


def histories(folder):
    paths = folder.rglob("rank0/history.jsonl")
    return {
        path.parents[1]: [json.loads(line)["iteration"] for line in path.read_text().splitlines()]
        for path in paths
    }


def seeds(directories):
    texts = [(directory / "config.yaml").read_text().splitlines() for directory in directories]
    return sorted(next(line for line in text if "seed:" in line) for text in texts)


@pytest.mark.parametrize(
    ("rounds", "logger"),
    [
        (1, []),
        (1, ["--trainer.logger", "false"]),
        pytest.param(20, [], marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_runs_started_at_the_same_instant_have_a_directory_each_and_every_row(
    tmp_path, rounds, logger
):
    count = 8 if rounds > 1 else 4
    assert start(tmp_path, count, rounds, *logger) == [[0] * count] * rounds
    found = histories(tmp_path)
    assert len(found) == count * rounds
    assert all(rows == list(range(1, ITERATIONS + 1)) for rows in found.values())
    assert {path.parent for path in found} == {tmp_path / "runs" / "cartpole"}
    assert len(set(seeds(found))) == count * rounds
    assert not list(tmp_path.rglob("*.tmp"))


def test_of_runs_with_one_directory_the_first_is_untouched_and_the_others_are_one_line(tmp_path):
    [statuses] = start(tmp_path, 3, 1, "--run_dir", "mine")
    assert sorted(statuses) == [0, 2, 2]
    assert histories(tmp_path) == {tmp_path / "mine": list(range(1, ITERATIONS + 1))}
    for number, status in enumerate(statuses):
        said = [
            line
            for line in (tmp_path / f"out{number}.txt").read_text().splitlines()
            if line.startswith("esper: error:")
        ]
        assert len(said) == (status == 2)
        assert all("is running. Choose another run directory" in line for line in said)
