"""Signals are noticed by a thread, and by the descriptor that was there before."""

import os
import queue
import signal

import pytest

from esper_lightning.recorder.wakeup import Wakeup


@pytest.fixture
def arrived():
    return queue.SimpleQueue()


@pytest.fixture
def wakeup(arrived):
    before = signal.set_wakeup_fd(-1)
    handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    made = Wakeup(arrived.put)
    yield made
    if made.thread.is_alive():  # else the test has closed it
        made.close()
    made.thread.join(5)
    assert not made.thread.is_alive()
    signal.signal(signal.SIGUSR1, handler)
    signal.set_wakeup_fd(before)


@pytest.fixture
def pipe():
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    yield reads, writes
    for descriptor in (reads, writes):
        os.close(descriptor)


def test_a_signal_arrives_in_the_thread_and_at_the_descriptor_before(wakeup, arrived, pipe):
    reads, writes = pipe
    signal.set_wakeup_fd(writes)
    wakeup.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert arrived.get(timeout=5) == signal.SIGUSR1
    assert os.read(reads, 9) == bytes([signal.SIGUSR1])
    wakeup.close()
    wakeup.thread.join(5)
    assert signal.set_wakeup_fd(-1) == writes


def test_a_descriptor_that_somebody_set_later_stays(wakeup, pipe):
    wakeup.install()
    signal.set_wakeup_fd(pipe[1])
    wakeup.install()
    wakeup.close()
    wakeup.thread.join(5)
    assert signal.set_wakeup_fd(-1) == pipe[1]


def test_where_somebody_removed_it_ours_is_set_again(wakeup, arrived):
    wakeup.install()
    signal.set_wakeup_fd(-1)
    wakeup.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert arrived.get(timeout=5) == signal.SIGUSR1
