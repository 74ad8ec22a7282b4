"""Signals end a recorded run, and the handlers of others stay in place."""

import contextlib
import os
import signal
import socket

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests.recorder import test_flight_recorder
from tests.recorder.test_flight_recorder import Plain
from tests.reports import read_report

fit, files = test_flight_recorder.fit, test_flight_recorder.files


def kill_at(step, *signals):
    def act(module: LightningModule, batch_idx: int) -> None:
        if batch_idx == step:
            for number in signals:
                os.kill(os.getpid(), number)

    return act


@pytest.fixture(autouse=True)
def _handlers():
    """Begin with default handlers, whatever is inherited (``nohup``), and restore the former."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_would_have_killed_unwinds_with_the_status_of_that_death(fit, files, number):
    error = fit(Plain(kill_at(2, number)))
    assert isinstance(error, SystemExit)
    assert error.code == 128 + number
    report = read_report(files.crash)
    assert (report["cause"], report["signal"]) == ("signal", number.name)
    assert report["exit_status"] == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_sigterm_is_lightnings_own_exception_with_a_status(fit, files):
    error = fit(Plain(kill_at(2, signal.SIGTERM)))
    assert isinstance(error, SIGTERMException)
    assert error.code == 143
    assert read_report(files.crash)["signal"] == "SIGTERM"


def test_a_handler_for_sigterm_that_was_there_before_is_called_first(fit, files):
    seen = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    handler = signal.getsignal(signal.SIGTERM)
    error = fit(Plain(kill_at(2, signal.SIGTERM)))
    assert isinstance(error, SIGTERMException)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_signal_that_the_user_handles_or_ignores_ends_no_run(fit, files):
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert fit(Plain(kill_at(2, signal.SIGUSR1, signal.SIGHUP))) is None
    assert seen == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert read_report(files.process)["state"] == "finished"


def test_the_wakeup_descriptor_of_others_is_theirs_again(fit):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            assert fit(Plain()) is None
            assert signal.set_wakeup_fd(-1) == theirs.fileno()
        finally:
            signal.set_wakeup_fd(before)


class Interrupted(Profiler):
    """A profiler that gets signals while it writes."""

    def __init__(self, *signals: int) -> None:
        super().__init__()
        self.signals, self.written = list(signals), []

    def start(self, action_name: str) -> None:
        if action_name == "run_training_batch" and self.signals:
            signals, self.signals = self.signals, []
            for number in signals:
                os.kill(os.getpid(), number)
            self.written.append(action_name)

    def stop(self, action_name: str) -> None:
        pass

    def summary(self) -> str:
        return ""


def test_what_is_being_written_is_written_before_a_signal_takes_effect(fit, files):
    """Of several signals the first one takes effect."""
    profiler = Interrupted(signal.SIGUSR2, signal.SIGHUP)
    error = fit(Plain(), profiler=profiler)
    assert profiler.written == ["run_training_batch"]
    assert isinstance(error, SystemExit)
    assert read_report(files.crash)["signal"] == "SIGUSR2"
    assert error.code == 128 + signal.SIGUSR2


def test_an_interrupt_that_somebody_caught_ends_nothing(fit, files):
    def act(module, batch_idx):
        with contextlib.suppress(KeyboardInterrupt):
            kill_at(2, signal.SIGINT)(module, batch_idx)
            signal.sigtimedwait([], 0.2)

    assert fit(Plain(act)) is None
    assert read_report(files.process)["state"] == "finished"
