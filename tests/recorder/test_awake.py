"""The clock stands still while the process is suspended, and nobody takes waiting for that."""

import os
import signal
import time

import pytest

from esper_lightning.recorder import awake as module
from esper_lightning.recorder.awake import awake_s


@pytest.fixture
def clock(monkeypatch):
    """A clock of its own, and how to let time pass: seconds, and seconds of computing."""
    now = {"wall": 100.0, "cpu": 7.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(module, "_cpu_of_main_thread_s", lambda: now["cpu"])

    def passes(wall, cpu=0.0):
        now["wall"] += wall
        now["cpu"] += cpu

    return module._AwakeClock(), passes


def test_time_in_which_nobody_looked_at_the_clock_does_not_count(clock):
    clock, passes = clock
    began = clock()
    for step in (0.1, 0.4, 300.0, 0.1):
        passes(step)
        clock()
    assert clock() - began == pytest.approx(0.1 + 0.4 + 0.1 + 0.1)


@pytest.mark.parametrize(
    ("is_watched", "cpu", "expected"),
    [(True, 0.1, 0.2), (True, 200.0, 300.1), (False, 0.1, 300.1)],
    ids=["suspended", "a thread computed and held the GIL", "nobody watched"],
)
def test_metrics_leave_out_only_time_that_was_certainly_suspended(clock, is_watched, cpu, expected):
    clock, passes = clock
    with clock.watched():
        pass
    began = clock.measured()
    if is_watched:
        watched = clock.watched()
        watched.__enter__()
    passes(0.1, 0.1)
    clock.measured()
    passes(300.0, cpu)
    assert clock.measured() - began == pytest.approx(expected)


def test_a_stopped_process_has_not_spent_the_time(tmp_path):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with awake_s.watched():
            began, wall = awake_s.measured(), time.monotonic()
            while time.monotonic() - wall < 1.6:
                awake_s()
                time.sleep(0.05)
        os.write(write, b"%f" % (awake_s.measured() - began))
        os._exit(0)
    time.sleep(0.2)
    os.kill(child, signal.SIGSTOP)
    time.sleep(1.2)
    os.kill(child, signal.SIGCONT)
    os.waitpid(child, 0)
    assert 0.2 < float(os.read(read, 100)) < 1.0
