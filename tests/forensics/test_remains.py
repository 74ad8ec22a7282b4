"""The remains of the latest run in a directory, and the rank that failed first."""

import os
import threading
import time

import pytest

from esper_lightning.forensics.attempts import read_attempts
from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.remains import LAST_ROWS, collectives_of, examine, first_failure
from tests.reports import read_report, write_report


@pytest.fixture
def make_rank(tmp_path):
    def make(rank, *, started_s=1000.0, world_size=2, state="finished", crash=None, rows=1):
        files = RunLayout(tmp_path).rank(rank)
        process = {"rank": rank, "world_size": world_size, "host": "elsewhere", "pid": 7}
        write_report(files.process, {**process, "started_s": started_s, "state": state})
        files.history.write_bytes(encode_rows({"iteration": k + 1} for k in range(rows)))
        if crash is not None:
            write_report(files.crash, {"rank": rank, "time_s": started_s + 10.0, **crash})

    return make


def ranks(tmp_path):
    return [remains.rank for remains in examine(tmp_path)]


def test_ranks_of_an_earlier_run_take_no_part(make_rank, tmp_path):
    make_rank(0, started_s=2000.0, world_size=1)
    make_rank(1, started_s=1000.0)
    assert ranks(tmp_path) == [0]
    make_rank(1, started_s=1995.0, world_size=1)  # soon before, of a run that had more ranks
    assert ranks(tmp_path) == [0]
    make_rank(0, started_s=2000.0)
    make_rank(1, started_s=1995.0)
    assert ranks(tmp_path) == [0, 1]


def test_the_last_rows_are_kept_and_all_are_counted(make_rank, tmp_path):
    make_rank(0, rows=100)
    history = RunLayout(tmp_path).rank(0).history
    with history.open("ab") as file:
        file.write(b"nonsense\n[]\n")
    (remains,) = examine(tmp_path)
    assert (remains.rows, remains.damaged_rows) == (100, 2)
    assert [row["iteration"] for row in remains.history] == list(range(101 - LAST_ROWS, 101))


@pytest.mark.parametrize("lives", [True, False])
def test_a_process_of_another_host_vanished_when_it_gives_no_sign_of_life(
    make_rank, tmp_path, lives, monkeypatch
):
    monkeypatch.setattr("esper_lightning.forensics.heartbeat.GONE_S", 0.3)
    files = RunLayout(tmp_path).rank(0)
    make_rank(0, state="running")
    assert examine(tmp_path)[0].state == "running"  # of an earlier version, without such signs
    write_report(files.process, {**read_report(files.process), "beat_s": 1.0})
    sign = threading.Timer(0.15, lambda: os.utime(files.process))
    if lives:
        sign.start()
    assert examine(tmp_path)[0].state == ("running" if lives else "vanished")
    sign.cancel()


@pytest.mark.parametrize(("silent_s", "state"), [(5.0, "running"), (100.0, "vanished")])
def test_the_list_of_attempts_does_not_wait_for_a_sign_of_life(
    make_rank, tmp_path, silent_s, state
):
    files = RunLayout(tmp_path).rank(0)
    make_rank(0, state="running")
    write_report(files.process, {**read_report(files.process), "beat_s": 1.0})
    sign_s = time.time() - silent_s
    os.utime(files.process, (sign_s, sign_s))
    assert read_attempts([tmp_path])[0].state == state


def test_who_failed_for_a_reason_of_its_own_failed_first(make_rank, tmp_path):
    make_rank(0, state="failed", crash={"cause": "peer", "time_s": 1005.0})
    make_rank(1, state="failed", crash={"cause": "exception", "time_s": 1009.0})
    assert first_failure(examine(tmp_path)).rank == 1


@pytest.mark.parametrize("others", ["hang", "peer"])
def test_of_a_hang_the_rank_that_others_wait_for_failed_first(make_rank, tmp_path, others):
    for rank in (0, 1, 2):
        cause = "hang" if rank == 0 else others
        make_rank(rank, world_size=3, state="failed", crash={"cause": cause, "time_s": 1010 + rank})
        entry = {"collective_seq_id": 5, "record_id": 5, "retired": rank == 2}
        entries = [{**entry, "collective_seq_id": 5 - (rank == 2)}]
        write_report(RunLayout(tmp_path).rank(rank).collectives, {"entries": entries})
    assert first_failure(examine(tmp_path)).rank == 2
    RunLayout(tmp_path).rank(2).collectives.unlink()
    assert first_failure(examine(tmp_path)).rank == 0  # nobody knows who is late


def test_the_collectives_in_the_rings_count_where_a_rank_left_no_other_record(make_rank, tmp_path):
    for rank in (0, 1):
        make_rank(rank)
        ring = PhaseRing(RunLayout(tmp_path).rank(rank).phases)
        with ring.collective("all_reduce"):
            pass
    entry = {"collective_seq_id": 50, "record_id": 50, "retired": True}
    write_report(RunLayout(tmp_path).rank(0).collectives, {"entries": [entry]})
    found = collectives_of(examine(tmp_path))
    assert [found[rank].reached for rank in (0, 1)] == [1, 1]
    write_report(RunLayout(tmp_path).rank(1).collectives, {"entries": [entry]})
    found = collectives_of(examine(tmp_path))
    assert [found[rank].reached for rank in (0, 1)] == [50, 50]


def test_of_a_process_that_vanished_its_peers_know_at_once(make_rank, tmp_path):
    make_rank(0, state="failed", crash={"cause": "exception", "time_s": 1009.0})
    make_rank(1, state="failed", crash={"cause": "vanished", "time_s": 1010.0})
    assert first_failure(examine(tmp_path)).rank == 1


@pytest.mark.parametrize("state", ["finished", "running"])
def test_a_hang_after_which_a_run_went_on_is_no_death(make_rank, tmp_path, state):
    make_rank(0, state=state, crash={"cause": "hang"})
    assert first_failure(examine(tmp_path)) is None
    make_rank(0, state="failed", crash={"cause": "hang"})
    assert first_failure(examine(tmp_path)).rank == 0
