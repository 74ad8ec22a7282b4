"""WindowProfiler: a schedule that works as its arguments state, and never costs the run."""

import errno
import gzip
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from esper_lightning.recorder.profiling import trace_export
from esper_lightning.recorder.profiling.window_profiler import WindowProfiler

CONFIGS = Path(__file__).parents[3] / "configs"


class Plain(LightningModule):
    """A module that runs an operator named after its step, in training and validation."""

    def __init__(self, dies_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.dies_at = dies_at

    def training_step(self, batch, batch_idx):
        torch.special.erfcx(torch.ones(1 + self.global_step))
        if self.global_step == self.dies_at:
            raise RuntimeError("injected")
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        torch.special.i1e(torch.ones(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.fixture
def fit(make_trainer, tmp_path):
    def run(profiler, *, steps, module=None, **settings):
        trainer = make_trainer(max_epochs=1, profiler=profiler, **settings)
        data = DataLoader(torch.randn(steps, 4))
        trainer.fit(module or Plain(), data, DataLoader(torch.randn(2, 4)))
        assert not torch._C._autograd._profiler_enabled()
        return sorted((tmp_path / "rank0" / "trace").glob("*"), key=first_step)

    return run


def first_step(path):
    return int(re.search(r"steps(\d+)", path.name).group(1))


def calls(path, name):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ({"wait": 1, "warmup": 1, "active": 3, "repeat": 1}, 12, [(2, 4)]),
        ({"wait": 1, "warmup": 1, "active": 2, "repeat": 0}, 12, [(2, 3), (6, 7), (10, 11)]),
        ({"wait": 2, "warmup": 0, "active": 1, "repeat": 2}, 12, [(2, 2), (5, 5)]),
        ({"wait": 0, "warmup": 0, "active": 2, "repeat": 1}, 4, [(0, 1)]),
        ({"wait": 1, "warmup": 1, "active": 5, "repeat": 1}, 4, [(2, 3)]),  # open at the end
        ({"wait": 9, "warmup": 1, "active": 5, "repeat": 1}, 4, []),
    ],
)
def test_records_what_the_schedule_says(fit, schedule, steps, expected):
    profiler = WindowProfiler(**schedule)
    traces = fit(profiler, steps=steps)
    found = [tuple(map(int, re.search(r"steps(\d+)-(\d+)", path.name).groups())) for path in traces]
    assert found == expected
    for path, (first, last) in zip(traces, expected, strict=True):
        assert calls(path, "aten::special_erfcx") == last - first + 1
    assert profiler.windows == [[path] for path in traces]
    assert (profiler.last_table is None) == (not expected)


def test_a_validation_within_a_window_belongs_to_it(fit):
    profiler = WindowProfiler(wait=1, warmup=1, active=4)
    settings = {"val_check_interval": 4, "limit_val_batches": 2, "num_sanity_val_steps": 2}
    (trace,) = fit(profiler, steps=8, **settings)
    assert calls(trace, "aten::special_erfcx") == 4
    assert calls(trace, "aten::special_i1e") == 2


def test_a_window_is_bounded_by_events(fit):
    profiler = WindowProfiler(wait=1, warmup=1, active=8, repeat=1, max_events=1)
    (trace,) = fit(profiler, steps=12)
    assert calls(trace, "aten::special_erfcx") == 1


def test_a_window_has_all_the_steps_that_its_bound_allows_and_no_more(fit):
    profiler = WindowProfiler(wait=1, warmup=1, active=1)
    fit(profiler, steps=4)
    of_one_step = profiler._events_per_step
    for bound, steps in ((1.5, 1), (2.5, 2), (3.5, 3)):
        settings = {"wait": 1, "warmup": 1, "active": 8, "max_events": int(bound * of_one_step)}
        profiler = WindowProfiler(filename=f"bound{steps}", **settings)
        fit(profiler, steps=12)
        assert [calls(path, "aten::special_erfcx") for (path,) in profiler.windows] == [steps]


def test_keeps_its_latest_windows_only(fit, tmp_path):
    kept = tmp_path / "rank0" / "trace" / "of-another-run-steps0-0.pt.trace.json.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"")
    profiler = WindowProfiler(wait=1, warmup=0, active=1, repeat=0, keep=2)
    traces = fit(profiler, steps=9)
    assert [[path] for path in traces] == [[kept], *profiler.windows]
    assert [first_step(path) for (path,) in profiler.windows] == [5, 7]


def test_a_window_in_many_files_counts_as_one(fit, monkeypatch):
    most = 1000  # bytes a file, as under a limit on the size of files
    true = trace_export._pieces
    monkeypatch.setattr(trace_export, "_BATCH", 8)
    monkeypatch.setattr(trace_export, "_written_by_kineto", lambda *_: False)
    monkeypatch.setattr(trace_export, "_pieces", lambda results, _: true(results, most))
    profiler = WindowProfiler(wait=1, warmup=0, active=1, repeat=0, keep=2)
    traces = fit(profiler, steps=9)
    assert sorted(traces) == sorted(path for window in profiler.windows for path in window)
    assert [{first_step(path) for path in window} for window in profiler.windows] == [{5}, {7}]
    for window in profiler.windows:
        assert len(window) > 2
        assert sum(calls(path, "aten::special_erfcx") for path in window) == 1


def test_the_debug_profile_records_as_long_as_the_run_goes_on():
    config = yaml.safe_load((CONFIGS / "debug_profile.yaml").read_text())
    settings = config["trainer"]["profiler"]["init_args"]
    assert settings["repeat"] == 0
    assert WindowProfiler(**settings).keep >= 1


def test_on_a_gpu_sessions_that_follow_each_other_keep_their_events(monkeypatch):
    """CUPTI's teardown after a session takes the events of the next one (pytorch/kineto#1554)."""
    found = []

    class Session:
        def __init__(self, **settings):
            found.append(os.environ.get("TEARDOWN_CUPTI"))

        def prepare_trace(self):
            pass

        start_trace = prepare_trace

    def begin():
        profiler = WindowProfiler()
        profiler._begin_session()
        profiler.profiler = None

    monkeypatch.setattr(torch.profiler, "profile", Session)
    monkeypatch.setenv("TEARDOWN_CUPTI", "1")
    begin()
    del os.environ["TEARDOWN_CUPTI"]
    begin()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    begin()
    assert found == ["1", None, "0"]


def test_another_profiler_costs_the_window_that_it_meets_only(fit):
    """Another profiler records while the warm-up step would be counted."""

    class Profiled(Plain):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 0:
                self.other = torch.profiler.profile()
                self.other.start()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.other.stop()

    (trace,) = fit(WindowProfiler(wait=1, warmup=1, active=2), steps=6, module=Profiled())
    assert calls(trace, "aten::special_erfcx") == 2


def test_an_exception_does_not_end_a_step(make_trainer, tmp_path):
    profiler = WindowProfiler(wait=1, warmup=1, active=1)
    trainer = make_trainer(max_epochs=1, profiler=profiler)
    data = DataLoader(torch.randn(6, 4))
    with pytest.raises(RuntimeError, match="injected"):
        trainer.fit(Plain(dies_at=2), data, data)
    (path,) = profiler.finish_window()
    assert calls(path, "aten::special_erfcx") == 1
    assert profiler.finish_window() == []
    assert not torch._C._autograd._profiler_enabled()


def test_a_death_in_the_step_that_counts_events_leaves_no_window(make_trainer, tmp_path):
    profiler = WindowProfiler(wait=1, warmup=1, active=1)
    trainer = make_trainer(max_epochs=1, profiler=profiler)
    data = DataLoader(torch.randn(6, 4))
    with pytest.raises(RuntimeError, match="injected"):
        trainer.fit(Plain(dies_at=1), data, data)
    assert profiler.finish_window() == []
    assert not list(tmp_path.rglob("*.gz"))


@pytest.mark.parametrize("problem", ["a file", "full", "name"])
def test_where_a_folder_takes_nothing_the_run_directory_does(
    fit, tmp_path, caplog, monkeypatch, problem
):
    folder, settings = tmp_path / "folder", {"wait": 0, "warmup": 0, "active": 1, "repeat": 3}
    if problem == "a file":
        folder.write_text("")
    elif problem == "full":
        refuse_in(folder, monkeypatch)
    else:
        settings["filename"] = "n" * 250
    profiler = WindowProfiler(folder, **settings)
    traces = fit(profiler, steps=5)
    assert [calls(path, "aten::special_erfcx") for path in traces] == [1, 1, 1]
    assert profiler.windows == [[path] for path in traces]
    assert caplog.text.count(f"{folder} takes no traces") == 1
    assert [path for path in tmp_path.rglob("*.*") if path.name.startswith(".")] == []


def refuse_in(folder, monkeypatch):
    """A full disk, as Kineto and Python meet it."""
    true = torch.profiler.profile.export_chrome_trace

    def export(profile, path, *args, **kwargs):
        if folder in Path(path).parents:
            Path(f"{path}.tmp").write_text("{")
        else:
            true(profile, path, *args, **kwargs)

    def write(path, content):
        if folder in path.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        path.write_bytes(content)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    monkeypatch.setattr(trace_export, "write_atomically", write)


def test_where_nothing_takes_a_window_it_is_lost_with_one_warning(fit, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    (tmp_path / "rank0").write_text("")
    settings = {"wait": 0, "warmup": 0, "active": 1, "repeat": 3}
    profiler = WindowProfiler(tmp_path / "file" / "folder", **settings)
    assert fit(profiler, steps=5) == []
    assert caplog.text.count("A recorded window is lost") == 1
    assert "aten::" in profiler.last_table


def test_a_table_that_cannot_be_written_costs_no_trace(fit, tmp_path, caplog):
    (tmp_path / "rank0" / "profile.txt").mkdir(parents=True)
    (tmp_path / "rank0" / "profile.txt" / "in the way").write_text("")
    assert len(fit(WindowProfiler(wait=0, warmup=0), steps=5)) == 1
    assert caplog.text.count("The table of the latest window cannot be written") == 1


def test_can_be_pickled_and_used_twice(fit, tmp_path):
    profiler = pickle.loads(pickle.dumps(WindowProfiler(wait=1, warmup=0, active=1)))
    assert len(fit(profiler, steps=3)) == 1
    assert len(fit(profiler, steps=3)) == 2
    assert len(profiler.windows) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"wait": -1}, "WindowProfiler.wait must be at least 0, got -1."),
        ({"active": 0}, "WindowProfiler.active must be at least 1, got 0."),
        ({"filename": ""}, "WindowProfiler.filename must name a file, got ''."),
        ({"filename": "a\0b"}, r"WindowProfiler.filename must name a file, got 'a\x00b'."),
        ({"dirpath": ""}, "WindowProfiler.dirpath must name a directory, got ''."),
        ({"dirpath": Path("a\0b")}, "WindowProfiler.dirpath must name a directory, got "),
    ],
)
def test_settings_that_cannot_work(setting, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        WindowProfiler(**setting)
