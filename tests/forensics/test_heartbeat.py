"""Signs of life of processes that cannot be seen: whoever looks needs no clock but its own."""

import os
import threading
import time

import pytest

from esper_lightning.forensics.heartbeat import Pulse, beat, last_sign_s, silent


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "process.json"
    path.touch()
    return path


@pytest.fixture
def living(path):
    """A thread that gives signs of life by a clock that is five minutes late."""
    ended = threading.Event()

    def live():
        while not ended.wait(0.02):
            sign_s = time.time() - 300.0
            os.utime(path, (sign_s, sign_s))

    thread = threading.Thread(target=live)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_a_pulse_counts_from_the_latest_sign(path):
    pulse = Pulse(path)
    time.sleep(0.1)
    assert pulse.silent_s() >= 0.1
    beat(path)
    assert pulse.silent_s() < 0.1


def test_one_that_beats_is_found_whatever_its_clock_says(path, living):
    other = path.with_name("silent")
    other.touch()
    started = time.monotonic()
    assert silent([path], wait_s=5.0) == set()
    assert time.monotonic() - started < 2.0
    assert silent([other, path], wait_s=0.5) == {other}


def test_one_that_does_not_beat_is_waited_for_unless_it_ended_long_ago(path):
    started = time.monotonic()
    assert silent([path], wait_s=0.3) == {path}
    assert time.monotonic() - started >= 0.3
    os.utime(path, (1.0, 1.0))
    started = time.monotonic()
    paths = {path, path.with_name("missing")}
    assert silent(paths, wait_s=5.0) == paths
    assert time.monotonic() - started < 1.0


def test_a_file_that_is_missing_gives_no_sign(tmp_path):
    beat(tmp_path / "missing")
    assert last_sign_s(tmp_path / "missing") is None
    assert Pulse(tmp_path / "missing").silent_s() < 1.0
