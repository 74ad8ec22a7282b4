"""The private attributes of Lightning's profilers are what the package takes them for."""

from lightning.pytorch.profilers import PyTorchProfiler

from esper_lightning.callbacks import profiler_internals as internals


def test_a_profiler_gives_its_settings():
    profiler = PyTorchProfiler(record_shapes=True)
    assert internals.profiler_settings(profiler)["record_shapes"] is True
    assert not internals.records_nvtx(profiler)
    assert internals.take_open_spans(profiler) == []
    assert internals.take_parent_profiler(profiler) is None
    assert internals.record_no_module_names(profiler)
    assert not internals.record_no_module_names(profiler)
