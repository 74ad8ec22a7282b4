"""An attempt returns the outcome of an action, whatever the action does."""

import threading
import time

import pytest

from esper_lightning.recorder.attempt import LateError, attempt


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize("seconds", [None, 20])
def test_a_result_or_an_error_comes_back(seconds, caplog):
    assert attempt(lambda: 3, seconds=seconds) == (3, None)
    error = ValueError("no")
    assert attempt(raising(error), "testing", seconds=seconds) == (None, error)
    assert caplog.messages == ["While testing: ValueError: no"]
    attempt(raising(error), what=None, seconds=seconds)
    assert len(caplog.messages) == 1


def test_what_is_not_to_be_caught_is_raised_in_the_calling_thread():
    with pytest.raises(SystemExit):
        attempt(raising(SystemExit(3)))
    error = SystemExit(3)
    assert attempt(raising(error), errors=BaseException).error is error
    assert attempt(raising(error), seconds=20).error is error


def test_what_takes_too_long_is_left_behind(caplog):
    ended = threading.Event()
    started = time.monotonic()
    try:
        outcome = attempt(lambda: ended.wait(60), "testing", seconds=0.2)
        assert time.monotonic() - started < 20
    finally:
        ended.set()
    assert outcome.result is None
    assert isinstance(outcome.error, LateError)
    assert str(outcome.error) == "not done within 0.2 s"
    assert "LateError" in caplog.text
