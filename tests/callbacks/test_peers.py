"""What a rank makes of the files of the others."""

import subprocess
import threading
import time

import pytest

from esper_lightning.callbacks.peers import Peers, end_of_run, keep_launcher_from_killing
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.report import read_report, write_report


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path)


def test_a_peer_that_failed(layout):
    end_of_run()
    other = Peers(layout, 1, 2)
    other.tell("running")
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() is None
    other.tell("failed", saved=True)
    assert peers.first_failure() == (1, "it failed")


@pytest.mark.parametrize("state", ["failed", "running"])
def test_one_that_failed_in_the_run_before_does_not_count(layout, state):
    gone = subprocess.Popen(["true"])
    gone.wait()
    Peers(layout, 1, 2).tell(state)
    path = layout.rank(1).process
    write_report(path, {**read_report(path), "pid": gone.pid})
    assert Peers(layout, 0, 2).first_failure() is not None
    end_of_run()
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() is None
    started = time.monotonic()
    peers.wait_until_saved(5.0)
    assert time.monotonic() - started < 1.0


def alter(layout, rank, **fields):
    path = layout.rank(rank).process
    write_report(path, {**read_report(path), **fields})


def test_one_that_vanished_is_noticed_and_one_that_finished_before_is_not(layout):
    end_of_run()
    gone = subprocess.Popen(["true"])
    gone.wait()
    Peers(layout, 1, 2).tell("running")
    alter(layout, 1, pid=gone.pid)
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() == (1, "its process vanished")
    alter(layout, 1, state="finished")
    assert peers.first_failure() is None


def test_one_that_cannot_be_seen_from_here_is_taken_to_live(layout):
    end_of_run()
    Peers(layout, 1, 2).tell("running")
    alter(layout, 1, host="elsewhere", pid=1)
    peers = Peers(layout, 0, 2)
    assert peers.first_failure() is None
    started = time.monotonic()
    peers.wait_until_saved(0.3)
    assert 0.3 <= time.monotonic() - started < 2.0


def test_clocks_of_other_hosts_may_be_late(layout):
    end_of_run()
    Peers(layout, 1, 2).tell("failed")
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
    other.tell("failed")
    saves = threading.Timer(0.3, lambda: other.tell("failed", saved=True))
    saves.start()
    started = time.monotonic()
    peers.wait_until_saved(20.0)
    assert 0.2 < time.monotonic() - started < 10.0
    saves.join()


def test_nobody_waits_for_the_dead_or_for_itself(layout):
    end_of_run()
    gone = subprocess.Popen(["true"])
    gone.wait()
    Peers(layout, 1, 2).tell("running")
    alter(layout, 1, pid=gone.pid)
    peers = Peers(layout, 0, 2)
    peers.tell("running")
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
