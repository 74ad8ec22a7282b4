"""What other threads of the user change while a function is traced stays as they left it."""

import queue
import threading
from types import SimpleNamespace
from typing import Any

import fsspec.asyn
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.other_threads import other_threads_run
from esper_lightning.compiling.purity import results_of_pure
from esper_lightning.compiling.tracing import Traced


@pytest.fixture(name="other_thread")
def _other_thread() -> Any:
    """A thread of a user that lives, and does what it is told."""
    tasks, done = queue.Queue[Any](), queue.Queue[None]()

    def work() -> None:
        for task in iter(tasks.get, None):
            done.put(task())

    thread = threading.Thread(target=work)
    thread.start()
    yield lambda task: (tasks.put(task), done.get(timeout=10.0))
    tasks.put(None)
    thread.join()


def test_what_another_thread_adds_meanwhile_is_never_lost(other_thread: Any) -> None:
    user = SimpleNamespace()

    def produce() -> None:
        user.log.append("event")
        user.table["event"], user.last = 1, "event"
        user.names.add("event")
        user.array[0, 0] += 1.0

    def step(x: Tensor) -> Tensor:
        user.log.append(x * 2.0)
        user.table["x"] = x * 2.0
        other_thread(produce)
        return x * 2.0

    for call in (results_of_pure, lambda f, x: Traced(f, (x,), functional=True)):
        user.__init__(log=[], table={}, names={"a"}, array=np.zeros((2, 2)), last=None)
        with pytest.raises(ImpureError, match="an attribute that changes"):
            call(step, torch.ones(2))
        assert user.log[-1] == user.last == "event"
        assert user.array[0, 0] == user.table["event"] == 1.0
        assert "event" in user.names
        held = (*user.log, *user.table.values())
        assert not any(isinstance(one, FakeTensor) for one in held)


def test_threads_of_test_runners_and_of_this_package_are_no_users(other_thread: Any) -> None:
    assert other_threads_run()
    other_thread(lambda: None)


def test_without_other_threads_there_is_none() -> None:
    assert not other_threads_run()


def test_the_thread_that_reads_remote_addresses_is_no_users() -> None:
    fsspec.asyn.get_loop()
    assert not other_threads_run()
