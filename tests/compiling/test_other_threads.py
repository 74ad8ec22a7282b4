"""What other threads of the user change while a function is traced stays as they left it.

Where a profiler records stacks, functions are traced in a thread of the package's own.
"""

import contextlib
import queue
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec.asyn
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from esper_lightning.compiling.holders import ImpureError
from esper_lightning.compiling.loops import compile_function
from esper_lightning.compiling.other_threads import (
    call_unrecorded,
    other_threads_run,
    records_calls,
)
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


STACKS: dict[str, Any] = {
    "activities": [torch.profiler.ProfilerActivity.CPU],
    "with_stack": True,
}
NO_LOCK = contextlib.nullcontext()


def state_of_thread() -> tuple[Any, ...]:
    """What belongs to a thread and decides how an operation computes."""
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    cached = torch.is_autocast_cache_enabled()
    return autocast, cached, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def test_a_profiler_that_records_stacks_records_no_translation(tmp_path: Path) -> None:
    user = SimpleNamespace(gain=3.0)

    def scaled(x: Tensor) -> Tensor:
        return (x * user.gain).tanh()

    def around(x: Tensor) -> Tensor:
        return native(x)

    native = compile_function("function", scaled, mode="auto", device=torch.device("cpu"))
    x = torch.randn(8)
    with torch.profiler.profile(**STACKS) as profile:
        got = around(x)
    torch.testing.assert_close(got, scaled(x))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = (tmp_path / "trace.json").read_text()
    assert re.search(r"\(\d+\): around", trace)
    assert not re.search(r"purity\.py|tracing\.py|proxy_tensor\.py|translation\.py", trace)
    user.gain = 5.0
    torch.testing.assert_close(native(x), scaled(x))


def test_a_thread_for_translations_computes_as_the_one_that_waits() -> None:
    def seen() -> tuple[Any, ...]:
        return records_calls(), threading.get_ident(), other_threads_run(), state_of_thread()

    contexts = [
        contextlib.nullcontext(),
        torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
        torch.no_grad(),
        torch.inference_mode(),
    ]
    with torch.profiler.profile(**STACKS):
        for context in contexts:
            with context:
                recorded, thread, others, state = call_unrecorded(NO_LOCK, seen)
                assert state == state_of_thread()
            assert (recorded, others) == (False, False)
            assert thread != threading.get_ident()
        with torch.device("meta"):  # a mode of this thread
            assert call_unrecorded(NO_LOCK, seen)[1] == threading.get_ident()
    assert call_unrecorded(NO_LOCK, seen)[1] == threading.get_ident()


def test_an_error_of_a_thread_for_translations_is_raised_by_the_one_that_waits() -> None:
    def fail() -> None:
        raise SystemExit("as a user's function may")

    with torch.profiler.profile(**STACKS), pytest.raises(SystemExit, match="user's function"):
        call_unrecorded(NO_LOCK, fail)


def test_a_signal_interrupts_a_translation_in_a_thread_of_its_own() -> None:
    left = list[bool]()

    def hang() -> None:
        try:
            time.sleep(0.3)
            signal.raise_signal(signal.SIGINT)  # its handler runs in the main thread
            while True:
                pass
        finally:
            left.append(True)

    with torch.profiler.profile(**STACKS), pytest.raises(KeyboardInterrupt):
        call_unrecorded(NO_LOCK, hang)
    assert left == [True]
    assert not [each for each in threading.enumerate() if each.name == "esper-translation"]
