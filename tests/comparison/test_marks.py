"""Marks of a run that trains: means of returns at each tenth of the budget."""

import json

import pytest

from esper_lightning.comparison.marks import Mark, Marks
from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RunLayout


@pytest.fixture
def run(tmp_path):
    layout = RunLayout(tmp_path)
    layout.rank(0).history.parent.mkdir()
    layout.config.write_text(json.dumps({"model": {"total_env_steps": 1000}}))
    return layout


def append(run, *rows, end=b""):
    rows = [{"env_steps": at, "rollout/episode_return_mean": value} for at, value in rows]
    with run.rank(0).history.open("ab") as file:
        file.write(encode_rows(rows) + end)


def test_a_mark_is_the_mean_of_the_returns_since_the_mark_before(run, tmp_path):
    marks = Marks(tmp_path)
    assert marks.passed() == []
    append(run, (50, 1.0), (100, 3.0), (150, 4.0))
    assert marks.passed() == [Mark(10, 2.0)]
    append(run, (200, 6.0), (250, 1.0))
    assert marks.passed() == [Mark(20, 5.0)]
    assert marks.passed() == []


def test_of_marks_between_two_rows_the_last_counts_and_the_end_is_none(run, tmp_path):
    append(run, (450, 7.0), (1000, 9.0))
    assert Marks(tmp_path).passed() == [Mark(40, 7.0)]


def test_where_no_episode_has_ended_there_is_no_mark(run, tmp_path):
    append(run, (100, None), (150, float("nan")), (200, 5.0))
    assert Marks(tmp_path).passed() == [Mark(20, 5.0)]


def test_a_row_that_is_being_written_is_read_when_it_is_whole(run, tmp_path):
    marks = Marks(tmp_path)
    append(run, (50, 1.0), end=b'{"env_steps": 1')
    assert marks.passed() == []
    append(run, end=b'00, "rollout/episode_return_mean": 3.0}\n')
    assert marks.passed() == [Mark(10, 2.0)]


def test_a_run_without_a_budget_has_no_marks(run, tmp_path):
    run.config.write_text(json.dumps({"model": {"total_env_steps": None}}))
    append(run, (100, 1.0))
    assert Marks(tmp_path).passed() == []
