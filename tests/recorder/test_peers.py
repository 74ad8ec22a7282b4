"""A rank's conclusions from the files of the other ranks."""

import os
import subprocess
import threading
import time

import pytest
from torch import distributed as dist

from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.processes import identify
from esper_lightning.forensics.rank_record import SCHEMA, ProcessRecord, same_recording
from esper_lightning.recorder.peers import (
    Peers,
    end_of_run,
    keep_launcher_from_killing,
    lost_a_peer,
    meet,
)
from tests import forked
from tests.reports import read_report, write_report


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


def test_a_peer_that_failed(layout):
    end_of_run()
    other = Peers(layout, 1, 2)
    other.report("running")
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() is None
    other.report("failed", saved=True)
    assert peers.first_failure() == (1, "it failed")


@pytest.mark.parametrize("state", ["failed", "running"])
def test_one_that_failed_in_the_run_before_does_not_count(layout, state):
    gone = subprocess.Popen(["true"])
    gone.wait()
    Peers(layout, 1, 2).report(state)
    path = layout.rank(1).process
    write_report(path, {**read_report(path), "pid": gone.pid})
    assert Peers(layout, 0, 2).first_failure() is not None
    end_of_run()
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() is None
    started = time.monotonic()
    peers.wait_until_saved(5.0)
    assert time.monotonic() - started < 1.0


def elsewhere(pid, started_s):
    """A process on another host, of which nothing but its files can be seen."""
    content = {**identify(os.getpid()).to_dict(), "host": "elsewhere", "pid": pid}
    return content | {"started_s": started_s}


@pytest.mark.parametrize("change", ["process", "recording", None])
def test_one_of_an_attempt_that_died_a_moment_ago_is_not_of_this_run(layout, change):
    """Clocks of hosts differ: times do not decide which run a record is of."""
    other = elsewhere(7, time.time())
    met = [meet(1)[0], ProcessRecord.from_dict(other)]
    left = {"process": elsewhere(8, other["started_s"]), "recording": elsewhere(7, 1.0)}
    write_report(layout.rank(1).process, {**left.get(change, other), "state": "failed"})
    peers = Peers(layout, 0, 2, met)
    assert (peers.first_failure() is None) == (change is not None)
    write_report(layout.rank(1).process, {**left.get(change, other), "state": "running"})
    started = time.monotonic()
    peers.wait_until_saved(0.3)
    assert (time.monotonic() - started < 0.2) == (change is not None)


def test_ranks_tell_each_other_who_they_are(layout):
    (mine,) = meet(1)
    assert mine.pid == os.getpid()
    assert meet(2) == []  # without a process group there is nobody to ask
    peers = Peers(layout, 0, 1, [mine])
    assert peers.started_s == mine.started_s
    peers.report("running")
    written = ProcessRecord.load(layout.rank(0).process)
    assert same_recording(written, mine)
    assert written.schema == SCHEMA


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"
LOST = {
    "of gloo": RuntimeError(f"{PAIR} [127.0.0.1]:1"),
    "of gloo, timed out": RuntimeError("[../gloo/transport/tcp/x.cc:8] Timed out waiting 9ms"),
    "of NCCL": dist.DistBackendError("NCCL error ... remote process exited or there was a ..."),
    "of the store": dist.DistNetworkError("recvValue failed: Connection reset by peer"),
}
OWN = {
    "words": RuntimeError("NCCL gloo/transport: Connection closed by peer, said the user"),
    "words of gloo within": RuntimeError(f"my simulator: {PAIR}"),
    "another type": ConnectionResetError("Connection reset by peer"),
    "a mistake with NCCL": dist.DistBackendError("NCCL error: invalid usage. Duplicate GPU"),
    "a mistake with gloo": RuntimeError("[/gloo/allreduce.cc:9] invalid argument"),
}


def raised(error, cause=None):
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


@pytest.mark.parametrize("error", LOST.values(), ids=LOST)
def test_a_connection_that_broke_is_an_effect(error):
    assert lost_a_peer(raised(error))
    assert lost_a_peer(raised(ValueError("in the user's callback"), cause=error))


@pytest.mark.parametrize("error", OWN.values(), ids=OWN)
def test_an_error_with_such_words_is_the_ranks_own(error):
    assert not lost_a_peer(raised(error))
    assert not lost_a_peer(raised(ValueError("in the user's callback"), cause=error))


class UnspeakableError(RuntimeError):
    def __str__(self):
        raise RuntimeError("no words")


def test_an_error_without_words_is_the_ranks_own():
    assert not lost_a_peer(UnspeakableError())
    loop = RuntimeError("one")
    loop.__cause__ = loop
    assert not lost_a_peer(loop)


DIES = """
import sys, torch
from torch import distributed as dist
from datetime import timedelta
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{path}", timedelta(seconds=20), rank=rank, world_size=2)
from esper_lightning.recorder.peers import lost_a_peer, meet
assert [record.pid for record in meet(2)][rank] == __import__("os").getpid()
if rank == 1:
    __import__("os")._exit(0)
try:
    if sys.argv[3] == "work":
        dist.all_reduce(torch.ones(3), async_op=True).wait()
    for _ in range(2):
        dist.all_reduce(torch.ones(3))
except RuntimeError as error:
    print(lost_a_peer(error), error)
"""


@pytest.mark.ddp
@pytest.mark.parametrize("way", ["call", "work"])
def test_a_real_collective_that_lost_its_peer(tmp_path, way):
    said = tmp_path / "said"
    with said.open("wb") as file, (tmp_path / "of the other").open("wb") as other:
        ranks = [
            forked.start(["-c", DIES, rank, tmp_path / "store", way], output=output)
            for rank, output in enumerate((file, other))
        ]
    assert ranks[0].wait(100) == 0
    ranks[1].wait(10)
    assert said.read_text().startswith("True "), said.read_text()


def alter(layout, rank, **fields):
    path = layout.rank(rank).process
    write_report(path, {**read_report(path), **fields})


def test_one_that_vanished_is_noticed_and_one_that_finished_before_is_not(layout):
    end_of_run()
    gone = subprocess.Popen(["true"])
    gone.wait()
    Peers(layout, 1, 2).report("running")
    alter(layout, 1, pid=gone.pid)
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() == peers.first_vanished() == (1, "its process vanished")
    alter(layout, 1, state="finished")
    assert peers.first_failure() is None


def test_one_that_cannot_be_seen_from_here_is_taken_to_live(layout):
    end_of_run()
    Peers(layout, 1, 2).report("running")
    alter(layout, 1, host="elsewhere", pid=1, beat_s=None)  # of an earlier version
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() is None
    started = time.monotonic()
    peers.wait_until_saved(0.3)
    assert 0.3 <= time.monotonic() - started < 2.0


@pytest.mark.parametrize("state", ["running", "failed"])
def test_one_without_a_sign_of_life_is_waited_for_only_while_it_may_be_saving(
    layout, state, monkeypatch
):
    monkeypatch.setattr("esper_lightning.recorder.peers.SILENT_S", 0.2)
    end_of_run()
    Peers(layout, 1, 2).report(state)
    alter(layout, 1, host="elsewhere", pid=1)
    peers = Peers(layout, 0, 2)
    started = time.monotonic()
    peers.wait_until_saved(0.6)
    waited_s = time.monotonic() - started
    assert 0.2 < waited_s < 0.5 if state == "running" else 0.6 <= waited_s < 2.0


def test_one_that_gives_signs_of_life_is_waited_for(layout, monkeypatch):
    monkeypatch.setattr("esper_lightning.recorder.peers.SILENT_S", 0.3)
    monkeypatch.setattr("esper_lightning.recorder.peers.BEAT_S", 0.01)
    end_of_run()
    other = Peers(layout, 1, 2)
    other.report("running")
    alter(layout, 1, host="elsewhere", pid=1)
    peers = Peers(layout, 0, 2)
    ended = threading.Event()

    def live():
        while not ended.wait(0.05):
            other.beat()

    thread = threading.Thread(target=live)
    thread.start()
    started = time.monotonic()
    peers.wait_until_saved(0.7)
    assert time.monotonic() - started >= 0.7
    ended.set()
    thread.join()


def test_silence_counts_from_the_last_sign_that_was_noted(layout):
    end_of_run()
    other = Peers(layout, 1, 2)
    other.report("running")
    alter(layout, 1, host="elsewhere", pid=1)
    peers = Peers(layout, 0, 2)
    peers.first_failure()
    other.beat()
    peers.listen()  # this rank saves its evidence meanwhile
    time.sleep(0.2)
    process = ProcessRecord.load(layout.rank(1).process)
    assert peers._silent_s(1, process) >= 0.2


def test_one_that_has_been_silent_for_long_counts_as_the_first_failure(layout, monkeypatch):
    monkeypatch.setattr("esper_lightning.recorder.peers._SILENT_S", 0.1)
    end_of_run()
    Peers(layout, 1, 2).report("running")
    alter(layout, 1, host="elsewhere", pid=1)
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() is None
    time.sleep(0.15)
    assert peers.first_failure() == (1, "it gave no sign of life for 0.1 s")


def test_clocks_of_other_hosts_may_be_late(layout):
    end_of_run()
    Peers(layout, 1, 2).report("failed")
    peers, started = Peers(layout, 0, 2), time.time() - 3.0
    alter(layout, 1, started_s=started)
    assert peers.first_failure() is None  # of this host: it began before the run did
    alter(layout, 1, started_s=started, host="elsewhere")
    assert peers.first_failure() == (1, "it failed")
    alter(layout, 1, started_s=started - 60.0, host="elsewhere")
    assert peers.first_failure() is None


def test_who_still_saves_is_waited_for_until_it_has(layout):
    end_of_run()
    other, peers = Peers(layout, 1, 2), Peers(layout, 0, 2)
    other.report("failed")
    saves = threading.Timer(0.3, lambda: other.report("failed", saved=True))
    saves.start()
    started = time.monotonic()
    peers.wait_until_saved(20.0)
    assert 0.2 < time.monotonic() - started < 10.0
    saves.join()


def test_nobody_waits_for_the_dead_or_for_itself(layout):
    end_of_run()
    gone = subprocess.Popen(["true"])
    gone.wait()
    Peers(layout, 1, 2).report("running")
    alter(layout, 1, pid=gone.pid)
    peers = Peers(layout, 0, 2)
    peers.report("running")
    started = time.monotonic()
    peers.wait_until_saved(20.0)
    assert time.monotonic() - started < 5.0


def test_evidence_is_saved_before_the_launcher_kills():
    done, end = [], threading.Event()

    class Observer(threading.Thread):
        def run(self):
            end.wait()

        def _terminate_all(self):
            done.append("kills")

    observer = Observer(name="child-process-observer")
    observer.start()
    try:
        keep_launcher_from_killing(lambda: done.append("saves"))
        observer._terminate_all()
    finally:
        end.set()
        observer.join()
    assert done == ["saves", "kills"]
