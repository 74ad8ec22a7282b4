"""Each step saves its evidence, or says why there is none; the order is cheap before fragile."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from esper_lightning.callbacks.history import History
from esper_lightning.recorder.death import Death
from esper_lightning.recorder.evidence_steps import STEPS, DyingRun, steps_of_holders


@pytest.fixture
def make(files):
    """Make a dying run without a profiler, before training began."""

    def make(death=None, callbacks=(), **fields):
        trainer = SimpleNamespace(
            loggers=[],
            global_rank=0,
            strategy=SimpleNamespace(optimizers=[]),
            lightning_module=None,
        )
        guard = SimpleNamespace(
            has_window=False,
            action=None,
            why_no_session="no PyTorchProfiler was attached",
            abandon=lambda: None,
            text=str,
        )
        defaults = {
            "trainer": trainer,
            "files": files,
            "guard": guard,
            "callbacks": lambda: callbacks,
            "death": death or Death(cause="exception", error=RuntimeError("injected")),
            "started_s": 1000.0,
            "bounded": True,
            "print_profile": False,
            "write_report": lambda: None,
        }
        return DyingRun(**{**defaults, **fields})

    return make


def step_of(name):
    """The last step of a name: the first one of the trace only announces it."""
    return [step for step in STEPS if step.name == name][-1]


def save(name, run):
    return step_of(name).save(run)


def test_a_report_is_written_before_any_step_that_may_take_long_or_touches_the_profiler():
    names = [step.name for step in STEPS]
    early = STEPS[: names.index("report")]
    assert [step.name for step in early] == ["history", "loggers", "trace"]
    assert all((step.seconds or 0) <= 5 for step in early)
    assert names.index("checkpoint") < names.index("profile")


class TestHistory:
    def test_is_counted_in_rows(self, make, files):
        files.history.write_text("{}\n{}\n")
        assert save("history", make()) == ("saved", files.history, "2 rows")

    def test_of_an_earlier_run_is_said_to_be_so(self, make, files):
        files.history.write_text("{}\n")
        os.utime(files.history, (999, 999))
        assert save("history", make()).detail == "1 rows, all of an earlier run"

    def test_that_never_began_is_absent(self, make):
        assert save("history", make()).state == "absent"

    def test_that_the_disk_has_not_taken_is_a_failure(self, make, files, monkeypatch):
        files.history.write_text("{}\n")
        monkeypatch.setattr(History, "waiting", 3)
        with pytest.raises(OSError, match="last 3 rows"):
            save("history", make(callbacks=[History()]))


@pytest.mark.parametrize(
    ("death", "bounded", "expected"),
    [
        (Death(cause="exception", error=RuntimeError()), True, set()),
        (Death(cause="exception", error=torch.OutOfMemoryError()), True, {"memory"}),
        (Death(cause="signal", signal="SIGTERM"), True, {"stacks"}),
        (Death(cause="signal", signal="SIGTERM"), False, set()),
        (Death(cause="hang"), True, {"stacks"}),
        (Death(cause="native", signal="SIGSEGV"), False, {"stacks"}),
    ],
)
def test_memory_and_stacks_are_saved_for_the_deaths_that_they_explain(
    make, monkeypatch, death, bounded, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = make(death, bounded=bounded)
    assert {name for name in ("memory", "stacks") if step_of(name).when(run)} == expected


def test_stacks_of_all_threads_are_written_with_the_reason(make, files):
    save("stacks", make(Death(cause="signal", signal=signal.SIGTERM.name)))
    text = files.stacks.read_text()
    assert "signal: SIGTERM" in text
    assert "test_stacks_of_all_threads_are_written_with_the_reason" in text


def test_stacks_that_a_fault_has_written_are_not_written_over(make, files):
    files.stacks.write_text("of the fault")
    assert save("stacks", make(Death(cause="native"))).path == files.stacks
    assert files.stacks.read_text() == "of the fault"


def test_the_crash_checkpoint_of_an_earlier_run_is_renamed(make, files):
    files.crash_checkpoint.write_text("earlier")
    os.utime(files.crash_checkpoint, (999, 999))
    assert save("checkpoint", make()) == ("absent", None, "training had not begun")
    assert not files.crash_checkpoint.exists()
    (renamed,) = files.directory.glob(f"{files.crash_checkpoint.name}*")
    assert renamed.read_text() == "earlier"


def test_the_minibatch_of_the_error_is_saved_unless_it_is_there_already(make, files):
    assert save("minibatch", make()).state == "absent"
    for number in (1.0, 2.0):
        error = RuntimeError()
        error.minibatch = {"obs": torch.tensor(number)}
        assert save("minibatch", make(Death(cause="exception", error=error))).state == "saved"
    assert torch.load(files.bad_minibatch, weights_only=True) == {"obs": 1.0}


class TestProfiler:
    @pytest.mark.parametrize(
        ("action", "why"),
        [
            (None, "no PyTorchProfiler was attached"),
            ("NONE", "the profiler was waiting"),
            ("WARMUP", "the profiler was warming up"),
        ],
    )
    def test_without_a_window_the_trace_says_why(self, make, action, why):
        run, abandoned = make(), []
        run.guard.action, run.guard.abandon = action, lambda: abandoned.append(True)
        assert save("trace", run).detail == f"{why}; closed windows stay"
        assert abandoned
        assert not step_of("profile").when(run)

    def test_the_open_window_and_its_table_are_saved(self, make, files, capsys):
        run = make(print_profile=True)
        pieces = [files.trace / "1.json", files.trace / "2.json"]
        run.guard.has_window, run.guard.finish = True, lambda: (pieces, "a table")
        outcome = save("trace", run)
        assert outcome.path == pieces[-1]
        assert "in 2 pieces" in outcome.detail
        assert save("profile", run).path == files.profile
        assert files.profile.read_text() == "a table"
        assert capsys.readouterr().out == "a table\n"

    def test_a_table_that_would_take_too_long_is_absent(self, make, files):
        run = make()
        run.guard.has_window, run.guard.finish = True, lambda: ([files.trace / "1.json"], "")
        save("trace", run)
        assert save("profile", run).state == "absent"
        assert not files.profile.exists()

    def test_an_error_of_the_table_is_that_of_the_table_and_not_of_the_trace(self, make):
        run = make()
        run.guard.text = lambda: 1 / 0
        assert save("trace", run).state == "absent"
        with pytest.raises(ZeroDivisionError):
            save("profile", run)


class TestHolders:
    def test_an_object_without_evidence_or_with_every_attribute_has_no_step(self, make):
        class Odd:
            def __getattr__(self, name):
                raise RuntimeError(name)

        assert steps_of_holders(make(callbacks=[object(), Odd()])) == []

    def test_a_folder_without_files_is_removed_and_one_with_files_stays(self, make, files):
        class Holds:
            def __init__(self, writes):
                self.writes = writes

            def save_evidence(self, directory, death):
                if self.writes:
                    (directory / "one.txt").touch()

        run = make(callbacks=[Holds(False), Holds(True)])
        outcomes = [step.save(run) for step in steps_of_holders(run)]
        assert outcomes[0] == ("absent", None, "it had nothing to save")
        assert outcomes[1] == ("saved", files.evidence / "Holds-2", None)
        assert [path.name for path in files.evidence.iterdir()] == ["Holds-2"]
