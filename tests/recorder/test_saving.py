"""The evidence of a run is saved once, by whoever sees the death first."""

from types import SimpleNamespace

import pytest

from esper_lightning.forensics.report import CrashReport
from esper_lightning.recorder.awake import awake_s
from esper_lightning.recorder.death import Death
from esper_lightning.recorder.saving import Saving


class Rescue:
    """Notes what it is asked, and leaves an empty report."""

    def __init__(self, files, log):
        self._files, self._log = files, log
        self.report, self.written = CrashReport(), None
        self.begun_s = self.progress_s = awake_s()
        self.is_done = False

    def run(self, death):
        self._log.append(death.cause)
        self.report = CrashReport(cause=death.cause)
        self._files.crash.write_text(death.cause)
        self.written = self._files.crash

    def amend(self, error):
        self._log.append(error)


@pytest.fixture
def log():
    return []


@pytest.fixture
def saving(files, log):
    peers = SimpleNamespace(report=lambda state, saved=False: log.append((state, saved)))
    return Saving(files, peers, lambda bounded: Rescue(files, log))


def test_a_second_death_adds_its_error_and_no_more(saving, log):
    saving.save(Death(cause="signal"))
    error = ValueError()
    saving.save(Death(cause="exception", error=error))
    saving.save(Death(cause="exit"))
    assert log == [("failed", False), "signal", ("failed", True), error]


def test_a_hang_is_saved_once_and_the_death_after_it_again(saving, log, files):
    for cause in ("hang", "hang", "exception"):
        saving.save(Death(cause=cause))
    assert [each for each in log if isinstance(each, str)] == ["hang", "exception"]
    assert files.crash.with_name("crash.json.1").read_text() == "hang"


@pytest.mark.parametrize("cause", ["signal", "peer", "exception"])
def test_the_report_of_what_did_not_end_the_run_is_renamed_at_its_end(saving, files, cause):
    saving.save(Death(cause=cause))
    saving.finish()
    assert files.crash.exists() == (cause == "exception")
    saving.save(Death(cause="exit"))
    assert files.crash.exists() == (cause == "exception")


def test_a_signal_that_somebody_caught_is_forgotten_once_the_run_continues(saving, files):
    saving.save(Death(cause="signal"))
    saving.forget_caught_signal(saving.rescue.begun_s - 1)
    assert files.crash.exists()
    saving.forget_caught_signal(awake_s())
    assert not files.crash.exists()
    assert saving.going_for_s(is_known=False) is None


def test_the_time_is_infinite_once_all_is_saved_and_nobody_has_noticed(saving):
    saving.save(Death(cause="signal"))
    assert saving.going_for_s(is_known=False) == float("inf")
    assert saving.going_for_s(is_known=True) < 60
