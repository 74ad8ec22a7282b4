"""What a rank makes of the files of the others."""

import subprocess
import time

import pytest

from esper_lightning.callbacks.peers import Peers, end_of_run
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
