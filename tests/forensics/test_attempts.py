"""Attempts in a run directory: listed once, blamed on one rank, and compared."""

import pytest

from esper_lightning.forensics.attempts import (
    Attempt,
    list_attempt,
    read_attempts,
    same_deaths,
)
from esper_lightning.forensics.layout import RunLayout
from tests.reports import write_report

AT = ["Traceback (most recent call last):", '  File "env.py", line 3, in step', "    fails()"]


@pytest.fixture
def leave(tmp_path):
    """Leave the files of an attempt of one rank, as a later attempt finds them."""

    def leave(number, rank=0, *, state="failed", run=None, directory=tmp_path, **report):
        files = RunLayout(directory).rank(rank)
        began_s = 1000.0 * number
        process = {"rank": rank, "world_size": 2, "host": "elsewhere", "pid": 7, "run": run}
        process |= {"started_s": began_s, "changed_s": began_s + 50.0}
        write_report(files.process, {**process, "state": state})
        files.crash.unlink(missing_ok=True)
        if report:
            error = {"type": "RuntimeError", "message": "injected", "traceback": AT}
            died = {"cause": "exception", "time_s": began_s + 10.0, "error": error, "iteration": 25}
            write_report(files.crash, {**process, **died, **report})
        return files

    return leave


def attempt(**known):
    died = {"state": "failed", "cause": "exception", "iteration": 25, "what": "E: x", "place": "p"}
    return Attempt(**{**died, **known})


def test_an_attempt_is_listed_once_when_the_next_begins(leave, tmp_path):
    for number in (1, 2):
        files = leave(number, cause="exception")
        list_attempt(files)
        list_attempt(files)  # as after a run that was refused
    leave(3, state="running")
    found = read_attempts([tmp_path])
    assert [each.started_s for each in found] == [1000.0, 2000.0, 3000.0]
    assert [each.state for each in found] == ["failed", "failed", "running"]
    first = found[0]
    assert (first.iteration, first.what) == (25, "RuntimeError: injected")
    assert first.place == 'File "env.py", line 3, in step'
    assert first.own_frames == ("env.py:3, in step",)
    assert first.ended_s == 1010.0


def test_a_running_attempt_is_not_listed(leave):
    files = leave(1, state="running")
    list_attempt(files)
    assert not files.attempts.exists()


def test_a_report_of_another_attempt_says_nothing_of_this_one(leave, tmp_path):
    files = leave(1, cause="exception")
    report = files.crash.read_bytes()
    leave(2, state="finished")
    files.crash.write_bytes(report)
    (found,) = read_attempts([tmp_path])
    assert (found.state, found.cause, found.what) == ("finished", None, None)


def test_an_attempt_is_blamed_on_the_rank_that_failed_for_a_reason_of_its_own(leave, tmp_path):
    leave(1, 0, run="a", cause="peer", time_s=1005.0)
    leave(1, 1, run="a", cause="exception", time_s=1009.0)
    (found,) = read_attempts([tmp_path])
    assert found.rank == 1


def test_ranks_of_two_hosts_are_one_attempt(leave, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    leave(1, 0, run="a", directory=here, cause="peer")
    leave(1, 1, run="a", directory=there, cause="exception")
    (found,) = read_attempts([here, there])
    assert found.rank == 1


def test_the_same_death_is_counted_over_attempts():
    assert same_deaths([attempt()]) == 1
    assert same_deaths([attempt(), attempt(), attempt()]) == 3
    killed = attempt(cause="vanished", iteration=20, what="")
    assert same_deaths([attempt(), killed, attempt()]) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"iteration": 24},
        {"what": "F: x"},
        {"place": "q"},
        {"own_frames": ("train.py:3, in step",)},
        {"cause": "native"},
        {"state": "finished"},
    ],
)
def test_another_death_is_not_counted(other):
    assert same_deaths([attempt(**other), attempt()]) == 1


def test_an_attempt_that_came_further_proves_that_the_death_is_not_certain():
    further = attempt(cause="vanished", iteration=40)
    assert same_deaths([attempt(), further, attempt()]) == 1
    assert same_deaths([attempt(), attempt(state="finished"), attempt()]) == 1


def test_which_rank_died_first_of_an_error_of_all_decides_nothing(leave, tmp_path):
    for number, late in ((1, 0), (2, 1)):
        for rank in (0, 1):
            time_s = 1000.0 * number + 10 + (rank == late)
            list_attempt(leave(number, rank, run=f"{number}", time_s=time_s))
    found = read_attempts([tmp_path])
    assert [each.rank for each in found] == [1, 0]
    assert same_deaths(found) == 2
    assert "ranks" not in found[0].to_dict()


def test_a_death_of_one_rank_is_not_that_of_another(leave, tmp_path):
    for number in (1, 2):
        for rank in (0, 1):
            cause = "exception" if rank == number % 2 else "peer"
            list_attempt(leave(number, rank, run=f"{number}", cause=cause))
    assert same_deaths(read_attempts([tmp_path])) == 1


@pytest.mark.parametrize("cause", ["vanished", "signal", "peer", "hang", "exit"])
def test_a_death_from_outside_never_counts(cause):
    assert same_deaths([attempt(cause=cause), attempt(cause=cause)]) == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("<object at 0x7f01>", "<object at 0x7fAB>"),
        ("no file /tmp/tmp63bwk/a.xml", "no file /tmp/tmpq1z_/a.xml"),
        ("worker 793 failed after 3.58 s", "worker 32191 failed after 12.0 s"),
    ],
)
def test_a_message_does_not_tell_deaths_apart(one, other):
    assert same_deaths([attempt(what=f"E: {one}"), attempt(what=f"E: {other}")]) == 2
    assert same_deaths([attempt(what=f"E1: {one}"), attempt(what=f"E2: {one}")]) == 1


def test_no_attempts_have_no_same_death():
    assert same_deaths([]) == 0
