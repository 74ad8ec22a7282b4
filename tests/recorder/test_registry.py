"""One registry of a process: errors, ends and children reach the recordings that they concern."""

import os
import signal

import pytest
from lightning.pytorch.trainer import call

from esper_lightning.recorder.member import Member
from esper_lightning.recorder.registry import registry
from esper_lightning.recorder.signals import FAULTS, c_handler


class Run:
    """A recording that notes what the registry asks of it."""

    def __init__(self, trainer, log=None):
        self.trainer, self.log = trainer, [] if log is None else log

    def die(self, error, *, lingers):
        self.log.append((error, lingers))

    def leave(self):
        self.log.append("left")

    def at_exit(self):
        self.log.append(self)


@pytest.fixture
def begin():
    """Register recordings, and take them away at the end."""
    members = []

    def begin(run):
        members.append(Member(run))
        registry.add(members[-1])
        return members[-1]

    yield begin
    for member in members:
        registry.remove(member)
    assert registry.members == []


def handlers():
    return {number: (signal.getsignal(number), c_handler(number)) for number in signal.Signals}


def test_the_recording_of_a_trainer_is_its_latest(begin, make_trainer):
    trainer, other = make_trainer(), make_trainer()
    assert registry.member_of(trainer) is None
    first, second = begin(Run(trainer)), begin(Run(trainer))
    assert registry.member_of(trainer) is second
    registry.remove(second)
    registry.remove(second)  # twice is no mistake
    assert registry.member_of(trainer) is first
    assert registry.member_of(other) is None


def test_a_recording_that_cannot_begin_leaves_the_process_as_it_was(make_trainer, monkeypatch):
    before, interrupt = handlers(), call._interrupt

    def fails():
        raise OSError("no handler")

    with monkeypatch.context() as patched:
        patched.setattr(registry.handlers, "catch_faults", fails)
        with pytest.raises(OSError, match="no handler"):
            registry.add(Member(Run(make_trainer())))
    assert registry.members == []
    assert handlers() == before
    assert call._interrupt is interrupt


def test_an_error_that_ends_a_run_reaches_its_recording_and_no_other(begin, make_trainer):
    run, other = Run(make_trainer()), Run(make_trainer())
    begin(run), begin(other)
    error = RuntimeError("injected")
    call._interrupt(run.trainer, error)
    call._interrupt(make_trainer(), error)  # is not recorded
    assert run.log == [(error, True)]
    assert other.log == []


def test_where_lightning_cannot_shut_down_a_run_its_recording_leaves(begin, make_trainer):
    run = Run(make_trainer())
    begin(run)
    run.trainer.strategy.on_exception = lambda error: 1 / 0
    error = RuntimeError("injected")
    with pytest.raises(ZeroDivisionError):
        call._interrupt(run.trainer, error)
    assert run.log == [(error, True), "left"]


def test_an_error_of_a_run_within_a_run_reaches_no_recording(begin, make_trainer):
    run = Run(make_trainer())
    begin(run)

    def outer():
        with pytest.raises(RuntimeError):
            call._call_and_handle_interrupt(run.trainer, inner)

    def inner():
        raise RuntimeError("a tuner survives it")

    call._call_and_handle_interrupt(run.trainer, outer)
    assert run.log == []


def test_at_the_exit_of_the_interpreter_the_latest_recording_is_first(begin, make_trainer):
    log = []
    runs = [Run(make_trainer(), log) for _ in range(3)]
    for run in runs:
        begin(run)
    registry._at_exit()
    assert log == runs[::-1]


def test_a_forked_child_is_not_the_run(begin, make_trainer):
    before = handlers()
    begin(Run(make_trainer()))
    assert all(handlers()[number] != before[number] for number in FAULTS)
    child = os.fork()
    if child == 0:
        os._exit(0 if registry.members == [] and handlers() == before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(registry.members) == 1
