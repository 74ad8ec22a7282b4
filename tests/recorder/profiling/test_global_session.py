"""Any thread can stop the sessions of a profiler, where torch allows it."""

import threading

import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler

from esper_lightning.callbacks.profiler_internals import profiler_settings
from esper_lightning.recorder.profiling.global_session import global_session, make_global


@pytest.mark.skipif(global_session() is None, reason="torch has no global sessions")
def test_another_thread_stops_a_session_and_has_its_events(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path)
    assert make_global(profiler)
    config = profiler_settings(profiler)["experimental_config"]
    profile = torch.profiler.profile(experimental_config=config)
    profile.start()
    torch.ones(3).add(1)
    thread = threading.Thread(target=profile.stop)
    thread.start()
    thread.join()
    assert "aten::add" in {event.key for event in profile.key_averages()}


def test_a_configuration_of_the_user_stays(tmp_path):
    own = torch._C._profiler._ExperimentalConfig()
    profiler = PyTorchProfiler(dirpath=tmp_path, experimental_config=own)
    assert not make_global(profiler)
    assert profiler_settings(profiler)["experimental_config"] is own


def test_an_older_torch_has_none(monkeypatch, tmp_path):
    def refuses(**_):
        raise TypeError

    monkeypatch.setattr(torch._C._profiler, "_ExperimentalConfig", refuses)
    assert global_session() is None
    assert not make_global(PyTorchProfiler(dirpath=tmp_path))
