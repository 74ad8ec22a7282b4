"""What the handler of a fault in C does, in order; ``crash/test_process.py`` lets processes die."""

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from esper_lightning.recorder import last_words
from esper_lightning.recorder.last_words import LastWords


@pytest.fixture
def done(monkeypatch):
    """What was done, in order; nothing reaches the process."""
    done = []
    monkeypatch.setattr(last_words, "set_c_handler", lambda *given: done.append(("set", *given)))
    monkeypatch.setattr(last_words, "raise_in_this_thread", lambda n: done.append(("raise", n)))
    monkeypatch.setattr(last_words, "alarm", lambda seconds: done.append(("alarm", seconds)))
    monkeypatch.setattr(last_words, "dump_stacks", lambda path, _: done.append(("stacks", path)))
    return done


@pytest.fixture
def handlers(done):
    return SimpleNamespace(restore_fault=lambda number: done.append(("restore", number)))


def member(done, name, *, here=False, ended=False, problem=None):
    def last_gasp(signal_name):
        done.append((name, signal_name))
        if problem is not None:
            raise problem

    of = SimpleNamespace(stacks=Path(name), last_gasp=last_gasp)
    thread = threading.get_ident() if here else 0
    return SimpleNamespace(of=of, thread=thread, ended=ended)


def test_stacks_of_all_runs_come_first_and_the_thread_that_failed_before_the_others(done, handlers):
    members = [
        member(done, "other"),
        member(done, "dead", ended=True),
        member(done, "own", here=True),
    ]
    LastWords(members, handlers).fault(signal.SIGSEGV)
    assert done == [
        ("set", signal.SIGSEGV, 0),  # a second fault ends the process
        ("alarm", 10),
        ("stacks", Path("own")),
        ("stacks", Path("other")),
        ("alarm", 10),
        ("own", "SIGSEGV"),
        ("alarm", 10),
        ("other", "SIGSEGV"),
        ("alarm", 0),
        ("restore", signal.SIGSEGV),
        ("raise", signal.SIGSEGV),
    ]


def test_the_process_dies_of_the_fault_whatever_saving_raises(done, handlers):
    words = LastWords([member(done, "own", here=True, problem=RuntimeError())], handlers)
    with pytest.raises(RuntimeError):  # ctypes prints it
        words.fault(signal.SIGBUS)
    assert done[-2:] == [("restore", signal.SIGBUS), ("raise", signal.SIGBUS)]


def test_a_fault_whose_former_handler_has_returned_saves_nothing_again(done, handlers):
    words = LastWords([member(done, "own")], handlers)
    words.fault(signal.SIGABRT)
    done.clear()
    words.fault(signal.SIGABRT)
    assert done == [("set", signal.SIGABRT, 0), ("raise", signal.SIGABRT)]


def test_a_forked_child_saves_nothing(done, handlers, monkeypatch):
    words = LastWords([member(done, "own")], handlers)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    words.fault(signal.SIGFPE)
    assert [each[0] for each in done] == ["set", "restore", "raise"]
