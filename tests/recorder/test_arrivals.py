"""Signals that arrive: whom they concern, when they wait, and what they raise."""

import os
import signal
from collections import deque
from types import SimpleNamespace

import pytest

from esper_lightning.recorder.arrivals import Arrivals
from esper_lightning.recorder.signals import SignalExit


class Handlers:
    """Handlers of a process in which every signal is the recorder's, and would end the process."""

    def __init__(self):
        self.replaced = dict.fromkeys(
            (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM), signal.SIG_DFL
        )

    def is_ours_in_c(self, _number):
        return False

    def ends_process(self, _number):
        return True

    def original(self, number):
        return self.replaced[number]


def member(*, in_main_thread=True, ended=False, ended_by_signal=False):
    unwinds = in_main_thread and (ended_by_signal or not ended)
    return SimpleNamespace(
        in_main_thread=in_main_thread,
        ended=ended,
        ended_by_signal=ended_by_signal,
        unwinds=unwinds,
        arrived=deque(),
        of=SimpleNamespace(trainer=None),
    )


@pytest.fixture
def sent(monkeypatch):
    """Signals that were sent to this process, and did not arrive."""
    numbers = []
    monkeypatch.setattr(os, "kill", lambda _pid, number: numbers.append(number))
    return numbers


def test_the_first_of_the_signals_that_were_held_back_takes_effect_after_the_outermost_block(sent):
    arrivals = Arrivals([member()], Handlers())
    with arrivals.held():
        with arrivals.held():
            arrivals.handle(signal.SIGUSR1, None)
            arrivals.handle(signal.SIGINT, None)
        assert sent == []
    assert sent == [signal.SIGUSR1]
    with arrivals.held():
        pass
    assert sent == [signal.SIGUSR1]


def test_signals_that_are_forgotten_or_of_a_child_take_no_effect(sent, monkeypatch):
    arrivals = Arrivals([member()], Handlers())
    with arrivals.held():
        arrivals.handle(signal.SIGUSR1, None)
        arrivals.forget_pending()
    with arrivals.held():
        arrivals.handle(signal.SIGUSR1, None)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        arrivals.leave_in_child()
    assert sent == []


def test_ctrl_c_reaches_the_watchdog_of_the_main_thread_alone_and_other_signals_all():
    main, other = member(), member(in_main_thread=False)
    arrivals = Arrivals([main, other], Handlers())
    arrivals.arrive(signal.SIGINT)
    assert (len(main.arrived), len(other.arrived)) == (1, 0)
    arrivals.arrive(signal.SIGUSR1)
    assert (len(main.arrived), len(other.arrived)) == (2, 1)


def test_a_signal_raises_once_until_its_exception_has_unwound():
    living = member()
    arrivals = Arrivals([living], Handlers())
    with pytest.raises(SignalExit):
        arrivals.handle(signal.SIGUSR1, None)
    try:
        raise arrivals.raised
    except SignalExit:
        arrivals.handle(signal.SIGUSR1, None)  # it is still unwinding
    assert len(living.arrived) == 1
    arrivals.run_continues()
    with pytest.raises(KeyboardInterrupt):
        arrivals.handle(signal.SIGINT, None)


def test_the_wakeup_thread_does_not_repeat_what_our_handler_has_passed_on():
    living = member()
    arrivals = Arrivals([living], Handlers())
    with pytest.raises(SignalExit):
        arrivals.handle(signal.SIGUSR1, None)
    arrivals.arrive_early(signal.SIGUSR1)
    assert [each.number for each in living.arrived] == [signal.SIGUSR1]
    arrivals.arrive_early(signal.SIGTERM)
    assert [each.number for each in living.arrived] == [signal.SIGUSR1, signal.SIGTERM]


def test_a_run_of_another_thread_is_saved_by_its_watchdog_and_nothing_is_raised():
    other = member(in_main_thread=False)
    Arrivals([other], Handlers()).handle(signal.SIGUSR1, None)
    assert [each.number for each in other.arrived] == [signal.SIGUSR1]


def test_while_a_run_dies_of_a_signal_another_one_is_dropped():
    dying = member(ended=True, ended_by_signal=True)
    Arrivals([dying], Handlers()).handle(signal.SIGTERM, None)
    assert not dying.arrived


def test_without_a_living_run_the_handler_before_ours_is_called():
    called, handlers = [], Handlers()
    handlers.replaced[signal.SIGUSR1] = lambda *given: called.append(given)
    Arrivals([], handlers).handle(signal.SIGUSR1, None)
    assert called == [(signal.SIGUSR1, None)]
