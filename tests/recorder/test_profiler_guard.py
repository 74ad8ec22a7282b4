"""The profiler is the user's own: its spans are noted, and its errors end no run."""

import contextlib
import gzip
import json
import logging

import pytest
import torch
from lightning.pytorch.profilers import PassThroughProfiler, PyTorchProfiler, SimpleProfiler

from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.recorder.profiler_guard import ProfilerGuard, unrecorded

STEP = "[Strategy]SingleDeviceStrategy.training_step"


class Protection:
    """Holds nothing back."""

    held = staticmethod(contextlib.nullcontext)


@pytest.fixture
def ring(files):
    ring = PhaseRing(files.phases)
    yield ring
    ring.close()


@pytest.fixture
def guard(files, ring):
    """Guard a profiler; all guards are released at the end."""
    guards = []

    def guard(profiler, on_batch=list, on_described=list):
        made = ProfilerGuard(
            profiler, ring, Protection, on_batch=on_batch, on_described=on_described, files=files
        )
        guards.append(made)
        return made

    yield guard
    for made in guards:
        made.abandon()
        made.release()


def names_in(path):
    """Names of the events of a trace."""
    with gzip.open(path) as file:
        return {event.get("name") for event in json.load(file)["traceEvents"]}


@pytest.mark.parametrize("kind", [SimpleProfiler, PassThroughProfiler])
def test_spans_of_the_profiler_are_those_of_the_phase_ring(guard, ring, kind):
    profiler, batches, ends = kind(), [], []
    guard(profiler, lambda: batches.append(list(ring.open_names)), lambda: ends.append(True))
    with profiler.profile("outer"), profiler.profile("run_training_batch"):
        assert ring.open_names == ["outer", "run_training_batch"]
    assert ring.open_names == []
    assert batches == [["outer", "run_training_batch"]]
    profiler.describe()
    assert ends == [True]
    if kind is SimpleProfiler:
        assert set(profiler.recorded_durations) == {"outer", "run_training_batch"}


def test_phases_that_an_error_leaves_stay_open_for_the_report(guard, ring):
    profiler = SimpleProfiler()
    guard(profiler)
    with contextlib.suppress(KeyError), profiler.profile("outer"), profiler.profile("inner"):
        raise KeyError
    assert ring.open_names == ["outer", "inner"]


def test_a_released_profiler_is_as_it_was(guard, ring):
    profiler = SimpleProfiler()
    before = dict(vars(profiler))
    guard(profiler).release()
    assert vars(profiler) == before
    with profiler.profile("later"):
        assert ring.open_names == []


def test_an_error_of_the_profiler_turns_it_off_and_ends_no_run(guard, ring, files, caplog):
    class Fails(SimpleProfiler):
        def start(self, action_name):
            if action_name == "bad":
                raise OSError("the disk is full")
            super().start(action_name)

    profiler = Fails()
    guard(profiler)
    with caplog.at_level(logging.WARNING):
        for name in ("good", "bad", "good", "bad"):
            with profiler.profile(name):
                assert ring.open_names == [name]
    assert caplog.text.count("The profiler failed and is off") == 1
    assert "the disk is full" in caplog.text
    assert len(profiler.recorded_durations["good"]) == 1
    assert "good" in files.profile.read_text()  # what it had until then


def test_the_summary_has_the_spans_that_are_still_open(guard):
    profiler = SimpleProfiler()
    made = guard(profiler)
    profiler.start("never ends")
    assert "never ends" in made.text()
    assert guard(PassThroughProfiler()).text() == ""


def test_without_a_window_nothing_is_finished(guard):
    made = guard(PyTorchProfiler())
    assert not made.has_window
    assert (made.action, made.why_no_session) == (None, "the profiler was waiting")
    with pytest.raises(ValueError, match="no window was open"):
        made.finish()
    assert made.why_no_session == "the profiler was off by then"


def test_the_window_in_which_a_run_dies_is_exported_without_the_rescues_own_work(
    guard, files, tmp_path
):
    (tmp_path / "theirs").touch()  # in the place of the user's folder
    plan = torch.profiler.schedule(wait=0, warmup=1, active=1)
    profiler = PyTorchProfiler(dirpath=tmp_path / "theirs", schedule=plan)
    made = guard(profiler)
    with profiler.profile(STEP):
        torch.ones(3).tan()
    with contextlib.suppress(KeyError), profiler.profile(STEP):
        torch.ones(3).sin()
        with unrecorded():
            torch.ones(3).cos()
        raise KeyError
    assert made.has_window
    assert made.action == "RECORD_AND_SAVE"
    (path,), table = made.finish()
    assert path.parent == files.trace
    assert path.name.startswith("crash-rank0-")
    assert names_in(path) & {"aten::tan", "aten::sin", "aten::cos"} == {"aten::sin"}
    assert "aten::sin" in table
    assert not made.has_window
