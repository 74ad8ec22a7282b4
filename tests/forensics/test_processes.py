"""Whether a process is alive, by its identifier and start time, if it can be seen at all."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from esper_lightning.forensics import processes
from esper_lightning.forensics.processes import ProcessIdentity, identify, is_alive, same_process


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with process:
        yield process
        process.kill()


def test_a_process_is_alive_until_it_ends_and_a_zombie_is_dead(child):
    identity = identify(child.pid)
    assert is_alive(identity) is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table
    assert is_alive(identity) is False
    child.wait()
    assert is_alive(identity) is False


def test_an_identifier_that_another_process_has_by_now_is_not_the_process(child):
    identity = identify(child.pid)
    assert is_alive(replace(identity, start_ticks=identity.start_ticks - 1)) is False
    assert is_alive(replace(identity, boot="of another boot")) is False
    assert is_alive(ProcessIdentity(pid=child.pid, host=identity.host)) is True  # of version 0.1


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"pid_namespace": 1}])
def test_what_cannot_be_seen_from_here_is_not_known(change):
    assert is_alive(replace(identify(os.getpid()), **change)) is None


@pytest.mark.parametrize("pid", [None, 0, -1, True, "7", 1.0, 1 << 40])
def test_what_is_no_process_identifier_is_not_alive(pid, monkeypatch, tmp_path):
    content = identify(os.getpid()).to_dict() | {"pid": pid}
    assert is_alive(ProcessIdentity.from_dict(content)) is False
    earlier = ProcessIdentity.from_dict({"pid": pid, "host": content["host"]})  # no start_ticks
    assert is_alive(earlier) is False
    monkeypatch.setattr(processes, "_PROC", tmp_path)  # where there is no /proc
    assert is_alive(earlier) is False


def test_records_of_one_process_agree_in_what_both_have():
    mine = identify(os.getpid())
    assert same_process(mine, mine)
    assert same_process(ProcessIdentity(pid=mine.pid), mine)
    assert not same_process(replace(mine, start_ticks=1), mine)
