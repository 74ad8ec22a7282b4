"""Runs and the rest of their process share signals, handlers, threads, and time."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.recorder.signals import ENDING, FAULTS, signal_name
from tests import forked
from tests.crash.harness import FAILING_OPERATOR, read_trace
from tests.reports import read_report

pytestmark = pytest.mark.crash
_PROGRAM = Path(__file__).with_name("scenarios.py")
_LIMIT_S = 60
_ROOT = Path(__file__).parents[2]


class Outcome:
    """The files that a scenario left."""

    def __init__(self, directory: Path, status: int | None) -> None:
        self.directory, self.status = directory, status

    def report(self, run="run"):
        return read_report(RunLayout(self.directory / run).rank(0).crash)

    def state(self, run="run"):
        return read_report(RunLayout(self.directory / run).rank(0).process)["state"]

    def rows(self, run="run"):
        return len(read_json_lines(RunLayout(self.directory / run).rank(0).history))

    def stacks(self, run="run"):
        path = RunLayout(self.directory / run).rank(0).stacks
        return path.read_text() if path.exists() else ""

    def has(self, name):
        return (self.directory / name).exists()

    @property
    def output(self):
        return (self.directory / "output").read_text()[-3000:]


@pytest.fixture
def run(tmp_path):
    def run(name, *arguments):
        with (tmp_path / "output").open("wb") as output:
            words = [_PROGRAM, name, json.dumps(arguments)]
            process = forked.start(words, output=output, cwd=tmp_path, new_session=True)
        try:
            status = process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = None
        return Outcome(tmp_path, status)

    return run


def _statuses(number: int) -> tuple[int, ...]:
    return (1,) if number == signal.SIGINT else (128 + number, -number)


def _check_evidence(outcome: Outcome, number: int) -> None:
    report = outcome.report()
    assert report is not None, (outcome.status, outcome.output)
    assert outcome.status in _statuses(number), outcome.output
    assert report["signal"] == signal_name(number)
    assert report["cause"] == ("native" if number in FAULTS else "signal")
    assert report["complete"]
    assert report["evidence"]["stacks"]["state"] == "saved"
    assert "most recent call first" in outcome.stacks()
    if number not in FAULTS:
        assert "training_step" in "".join(report["error"]["traceback"])
    files = RunLayout(outcome.directory / "run").rank(0)
    (trace,) = files.trace.glob("*.pt.trace.json*")
    assert FAILING_OPERATOR in read_trace(trace)
    assert (outcome.state(), outcome.rows()) == ("failed", 3)


# Python ignores these two, and so does a run; every other one ends a process that does not listen.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
_LISTENED = (signal.SIGALRM, signal.SIGPWR, signal.SIGRTMIN + 3)
_REST = [n for n in ENDING if n not in (*_LISTENED, *_IGNORED_BY_PYTHON)]


_ENDS = """
import os, signal, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    pid = os.fork()
    if pid == 0:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(0)
    status = os.waitpid(pid, os.WUNTRACED)[1]
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    elif os.WIFSIGNALED(status):
        print(int(number))
"""


def test_every_signal_that_ends_a_process_is_known():
    command = [sys.executable, "-S", "-E", "-c", _ENDS]
    ended = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert set(map(int, ended.split())) == {*ENDING, *FAULTS}


class TestASignalThatNobodyHandles:
    @pytest.mark.parametrize("number", _LISTENED, ids=signal_name)
    def test_leaves_stacks_and_trace_and_its_name(self, run, number):
        _check_evidence(run("sent", number), number)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", _REST, ids=signal_name)
    def test_leaves_them_whichever_it_is(self, run, number):
        _check_evidence(run("sent", number), number)

    @pytest.mark.parametrize("number", [signal.SIGTRAP, signal.SIGSYS], ids=signal_name)
    def test_leaves_them_when_c_raises_it(self, run, number):
        _check_evidence(run("raised_by_c", number), number)

    @pytest.mark.slow
    @pytest.mark.parametrize("number", FAULTS, ids=signal_name)
    def test_leaves_them_whichever_c_raises(self, run, number):
        _check_evidence(run("raised_by_c", number), number)


class TestASignalOfTheUsers:
    @pytest.mark.parametrize("number", _IGNORED_BY_PYTHON, ids=signal_name)
    def test_that_python_ignores_is_ignored(self, run, number):
        outcome = run("sent_and_on", number)
        assert (outcome.status, outcome.state()) == (0, "finished"), outcome.output

    @pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTRAP], ids=signal_name)
    def test_that_is_handled_stays_theirs(self, run, number):
        outcome = run("handled_by_the_user", number)
        assert (outcome.status, outcome.state()) == (0, "finished"), outcome.output
        assert outcome.has("handled")

    @pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTRAP], ids=signal_name)
    def test_that_is_ignored_stays_ignored(self, run, number):
        outcome = run("ignored_by_the_user", number)
        assert (outcome.status, outcome.state()) == (0, "finished"), outcome.output

    def test_that_a_c_library_handles_stays_its(self, run):
        outcome = run("dumped_by_faulthandler", signal.SIGUSR1)
        assert (outcome.status, outcome.state()) == (0, "finished"), outcome.output
        assert "training_step" in (outcome.directory / "dumped").read_text()


class TestASecondSignal:
    @pytest.mark.parametrize(
        "number", [signal.SIGUSR1, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
    )
    def test_does_not_interrupt_the_unwinding_of_the_first(self, run, number):
        outcome = run("again_while_unwinding", number, 3.0)
        assert outcome.status in _statuses(number), outcome.output
        assert outcome.has("cleaned up")
        assert outcome.report()["signal"] == signal_name(number)
        assert outcome.report()["complete"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=signal_name)
    def test_does_not_interrupt_lightnings_shutdown(self, run, number):
        outcome = run("again_while_lightning_shuts_down", number)
        assert outcome.status in _statuses(number)[:1], outcome.output
        assert outcome.has("shut down")
        assert outcome.has("as before")

    def test_takes_effect_where_the_first_was_caught(self, run):
        outcome = run("caught_and_again", signal.SIGUSR1)
        assert outcome.status == 128 + signal.SIGUSR1, outcome.output
        assert outcome.has("caught")
        assert outcome.rows() == 3


class TestSeveralRuns:
    @pytest.mark.parametrize(
        ("first", "last"),
        [
            ("thread", "thread"),
            ("main", "thread"),
            pytest.param("thread", "main", marks=pytest.mark.slow),
        ],
    )
    @pytest.mark.parametrize("fault", ["segfault", int(signal.SIGHUP)])
    def test_one_is_protected_when_the_earlier_one_has_ended(self, run, first, last, fault):
        outcome = run("overlapping", first, last, fault)
        report = outcome.report("b")
        assert report is not None, (outcome.status, outcome.output)
        name = "SIGSEGV" if fault == "segfault" else "SIGHUP"
        assert (report["signal"], report["complete"]) == (name, True)
        assert "act_of_b" in outcome.stacks("b") + str(report["error"])
        assert (outcome.state("a"), outcome.report("a")) == ("finished", None)
        if fault == "segfault":
            assert outcome.status == -signal.SIGSEGV
        else:
            assert outcome.status in _statuses(fault)

    @pytest.mark.parametrize("where", ["main", "thread"])
    @pytest.mark.parametrize(
        "fault",
        [
            "segfault",
            int(signal.SIGTERM),
            pytest.param(int(signal.SIGUSR1), marks=pytest.mark.slow),
        ],
    )
    def test_all_that_live_are_saved(self, run, where, fault):
        outcome = run("together", where, fault)
        name = "SIGSEGV" if fault == "segfault" else signal_name(fault)
        for each in ("a", "b"):
            report = outcome.report(each)
            assert report is not None, (each, outcome.status, outcome.output)
            assert (report["signal"], report["complete"]) == (name, True)
            assert "in fit" in outcome.stacks(each)
        if where == "main" and fault != "segfault":
            assert outcome.status == 128 + fault
        else:
            assert outcome.status == -signal.Signals[name]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=signal_name)
    def test_one_within_another_dies_with_it(self, run, number):
        outcome = run("within", number)
        assert outcome.status in _statuses(number)[:1], outcome.output
        for each in ("inner", "outer"):
            report = outcome.report(each)
            assert (report["cause"], report["signal"]) == ("signal", signal_name(number))

    @pytest.mark.parametrize("fault", ["segfault", int(signal.SIGHUP)])
    def test_a_trainer_that_is_not_recorded_takes_no_protection_with_it(self, run, fault):
        outcome = run("beside_an_unrecorded_trainer", fault)
        report = outcome.report()
        assert report is not None, (outcome.status, outcome.output)
        assert report["signal"] == ("SIGSEGV" if fault == "segfault" else "SIGHUP")

    def test_in_a_child_of_theirs_signals_do_what_they_do_without(self, run):
        outcome = run("forks", signal.SIGUSR1)
        assert outcome.status == 0, outcome.output
        assert (outcome.directory / "child").read_text() == str(-signal.SIGUSR1)
        assert outcome.state() == "finished"


class TestInAnotherThread:
    def test_of_an_asyncio_loop_the_loop_keeps_its_signals(self, run):
        outcome = run("in_an_executor", signal.SIGTERM)
        assert outcome.has("handled"), outcome.output
        assert outcome.has("handled afterwards")
        assert outcome.state("a") == "finished"
        assert outcome.report("b")["signal"] == "SIGTERM"
        assert outcome.status == -signal.SIGTERM

    def test_ctrl_c_is_for_the_main_thread(self, run):
        outcome = run("interrupted_beside", "run")
        assert (outcome.status, outcome.state(), outcome.rows()) == (0, "finished", 8)
        assert outcome.report() is None

    def test_it_dies_with_the_interpreter(self, run):
        outcome = run("exits_beside_a_daemon", "run")
        assert outcome.status == 0
        assert (outcome.report()["cause"], outcome.report()["complete"]) == ("exit", True)

    def test_an_exception_there_is_no_death(self, run):
        outcome = run("raises_in_another_thread", "run")
        assert (outcome.status, outcome.state()) == (0, "finished"), outcome.output
        assert outcome.report() is None


class TestAProcessThatWasSuspended:
    def test_has_not_hung(self, run):
        outcome = run("suspended", 2.5)
        assert (outcome.status, outcome.state(), outcome.rows()) == (0, "finished", 8)
        assert outcome.report() is None
        assert outcome.stacks() == ""

    @pytest.mark.slow
    def test_has_its_grace_period_yet(self, run):
        outcome = run("suspended_after_a_signal", 5)
        assert outcome.status == 143, outcome.output
        assert outcome.has("cleaned up")
        assert outcome.report()["error"]["type"] == "SIGTERMException"
