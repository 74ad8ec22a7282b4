"""The watchdog acts, and ends the process, at the right time."""

import signal
import time

import pytest

from esper_lightning.recorder import watchdog as module
from esper_lightning.recorder.awake import awake_s
from esper_lightning.recorder.watchdog import Arrival, Watchdog


class Run:
    """The state that a watchdog observes, and the alarms that it gave."""

    def __init__(self):
        self.signals, self.failed, self.saving_for_s = [], None, None
        self.others_saving_for_s, self.caught_s, self.unwinds = [], 0.0, True
        self.alarms, self.exits = [], []

    def received(self):
        received, self.signals = self.signals, []
        return [Arrival(number, awake_s(), self.unwinds) for number in received]

    def watched(self, **settings):
        defaults = {"hang_timeout_s": None, "stuck_grace_s": 0.3, "exit_grace_s": 0.5}
        return Watchdog(
            received=self.received,
            caught_s=lambda: self.caught_s,
            renew=lambda: None,
            others_saving_for_s=lambda: self.others_saving_for_s,
            peer=lambda: self.failed,
            act=self.alarms.append,
            saving_for_s=lambda: self.saving_for_s,
            **{**defaults, **settings},
        )


@pytest.fixture
def run(monkeypatch):
    run = Run()
    monkeypatch.setattr(module.os, "_exit", run.exits.append)
    monkeypatch.setattr(module, "end_by", lambda number: run.exits.append(-number))
    return run


@pytest.fixture
def watchdog(run):
    watchdog = run.watched()
    yield watchdog
    watchdog.stop()


def test_a_process_that_still_saves_is_not_ended(run, watchdog):
    run.saving_for_s, run.signals = 0.1, [signal.SIGTERM]
    time.sleep(1.0)
    assert run.exits == []
    run.saving_for_s = float("inf")
    time.sleep(0.3)
    assert run.exits[0] == 143


def test_a_save_that_is_stuck_does_not_keep_the_process(run, watchdog, monkeypatch):
    monkeypatch.setattr(module, "_STALLED_S", 0.05)
    run.saving_for_s, run.signals = 0.1, [signal.SIGTERM]
    time.sleep(1.0)
    assert run.exits[0] == 143


def test_a_peer_is_looked_at_again_before_anything_is_done(run, watchdog):
    run.failed = (1, "it failed")
    time.sleep(0.5)
    run.failed = None
    time.sleep(0.8)
    assert run.alarms == []
    run.failed = (1, "it failed")
    time.sleep(1.2)
    assert run.alarms[0].peer == (1, "it failed")


def test_a_process_in_which_another_run_saves_is_not_ended(run, watchdog):
    run.saving_for_s, run.others_saving_for_s = float("inf"), [0.1]
    run.signals = [signal.SIGTERM]
    time.sleep(0.8)
    assert run.exits == []
    run.others_saving_for_s = [float("inf")]
    time.sleep(0.3)
    assert run.exits[0] == 143


def test_a_signal_that_somebody_caught_is_forgotten(run, watchdog):
    run.signals = [signal.SIGTERM]
    time.sleep(0.15)
    run.caught_s = awake_s()
    time.sleep(0.6)
    assert (run.alarms, run.exits) == ([], [])


def test_where_nothing_unwinds_evidence_is_saved_at_once_and_the_signal_ends_the_process(
    run, watchdog
):
    run.unwinds, run.signals = False, [signal.SIGTERM]
    time.sleep(0.2)
    assert run.alarms[0].signal == "SIGTERM"
    assert run.exits == []
    run.saving_for_s = float("inf")
    time.sleep(0.2)
    assert run.exits[0] == -signal.SIGTERM


def test_a_signal_that_ends_the_process_takes_the_place_of_ctrl_c(run, watchdog):
    run.saving_for_s, run.signals = float("inf"), [signal.SIGINT]
    time.sleep(0.8)
    assert run.exits == []
    run.signals = [signal.SIGTERM]
    time.sleep(0.8)
    assert run.exits[0] == 143
