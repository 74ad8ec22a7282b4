"""The second process: reports that it completes or does not touch, and the OOM killer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_lightning.forensics import phases as phases_module
from esper_lightning.forensics import sidecar as sidecar_module
from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.memory import Memory
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.processes import identify
from esper_lightning.forensics.rank_record import ProcessRecord, same_recording
from esper_lightning.forensics.report import CrashReport
from esper_lightning.forensics.sidecar import complete_report, locked, start
from tests.reports import read_report, write_report


@pytest.fixture
def files(tmp_path):
    layout = RankLayout(tmp_path / "rank0")
    layout.directory.mkdir()
    layout.history.write_bytes(encode_rows([{"iteration": 1}, {"iteration": 2}]))
    process = {"rank": 0, "world_size": 1, "pid": 1, "host": "h", "state": "running"}
    write_report(layout.process, process)
    return layout


def test_a_process_that_vanished_gets_a_report_from_its_ring(files):
    ring = PhaseRing(files.phases)
    ring.iteration = 3
    ring.enter("update")
    files.trace.mkdir()
    for name in (".crash.ckpt.1.1.tmp", "trace/.1-3.json", "trace/.1-3.tmp.json.gz"):
        (files.directory / name).write_text("half")
    assert complete_report(files)
    report = read_report(files.crash)
    assert (report["cause"], report["iteration"], report["phases"]) == ("vanished", 3, ["update"])
    assert report["evidence"]["history"]["detail"] == "2 rows"
    assert report["written_by"] == "sidecar"
    assert read_report(files.process)["state"] == "failed"
    assert not list(files.directory.rglob(".*"))
    ring.close()


def test_a_state_from_which_the_run_can_go_on_is_named(files):
    files.states[1].write_bytes(b"a state")
    assert complete_report(files)
    detail = read_report(files.crash)["evidence"]["checkpoint"]["detail"]
    assert detail.endswith("; ckpt_path='last' resumes from state.1.ckpt")


def test_hidden_files_of_others_stay_where_they_are(files):
    files.trace.mkdir()
    names = (
        ".notes.json",
        ".notes.tmp",
        ".last.ckpt.2.1.tmp",
        "trace/.view.json",
        "trace/.2-1.json",
    )
    for name in names:
        (files.directory / name).write_text("of somebody else")
    assert complete_report(files)
    assert all((files.directory / name).exists() for name in names)


@pytest.mark.parametrize(
    ("after", "guilty"),
    [({"oom_kill": 4, "oom": 8}, True), ({"oom_kill": 3, "oom": 8}, False)],
)
def test_the_oom_killer_is_named_only_where_its_counter_moved(files, after, guilty):
    before = {"oom_kill": 3, "oom": 7}
    complete_report(files, before=before, after=after)
    report = read_report(files.crash)
    assert ("OOM killer" in report["error"]["message"]) == guilty
    assert report["cgroup"] == {"before": before, "after": after}


def test_a_fault_in_c_is_read_from_the_stacks(files):
    files.stacks.write_text("Fatal Python error: Segmentation fault (SIGSEGV)\n\nThread\n")
    complete_report(files)
    report = read_report(files.crash)
    assert report["cause"] == "native"
    assert "SIGSEGV" in report["error"]["message"]


def test_a_report_that_was_not_finished_says_what_is_missing(files):
    evidence = {"history": {"state": "saved"}, "trace": {"state": "pending"}}
    write_report(files.crash, {"cause": "exception", "evidence": evidence, "complete": False})
    assert complete_report(files)
    report = read_report(files.crash)
    assert report["cause"] == "exception"
    assert report["evidence"]["history"]["state"] == "saved"
    assert report["evidence"]["trace"]["state"] == "failed"
    assert "died while this was being saved" in report["evidence"]["trace"]["detail"]
    assert report["complete"]


def test_what_is_complete_is_left_alone(files):
    write_report(files.crash, {"cause": "exception", "evidence": {}, "complete": True})
    before = files.crash.read_bytes()
    assert not complete_report(files)
    assert files.crash.read_bytes() == before


def test_a_run_that_finished_gets_no_report(files):
    write_report(files.process, {"rank": 0, "state": "finished"})
    assert not complete_report(files)
    assert not files.crash.exists()


def test_it_waits_for_the_process_and_then_leaves(files):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    sidecar = start(files.directory, process.pid)
    time.sleep(0.5)
    assert not files.crash.exists()
    process.kill()
    process.wait()
    assert sidecar._process.wait(timeout=10) == 0
    assert read_report(files.crash)["cause"] == "vanished"
    sidecar.stop()


@pytest.mark.parametrize("complete", [True, False])
def test_a_process_that_vanishes_after_a_hang_has_a_report_of_its_own(files, complete):
    hang = {"cause": "hang", "evidence": {"trace": {"state": "pending"}}, "complete": complete}
    write_report(files.crash, hang)
    assert complete_report(files)
    assert read_report(files.crash)["cause"] == "vanished"
    assert read_report(files.crash.with_suffix(".json.1"))["cause"] == "hang"


def test_what_an_earlier_run_left_is_no_evidence(files):
    os.utime(files.history, (0, 0))
    files.crash_checkpoint.write_text("weights of the earlier run")
    os.utime(files.crash_checkpoint, (0, 0))
    write_report(files.crash, {"cause": "exception", "started_s": 100.0, "complete": True})
    write_report(files.process, {"rank": 0, "state": "running", "started_s": 200.0})
    assert complete_report(files)
    report = read_report(files.crash)
    assert (report["cause"], report["started_s"]) == ("vanished", 200.0)
    assert report["evidence"]["checkpoint"]["state"] == "absent"
    assert report["evidence"]["history"]["state"] == "absent"


def test_signals_to_all_processes_of_a_job_are_not_for_it(files):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    sidecar = start(files.directory, process.pid)
    time.sleep(0.5)
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        sidecar._process.send_signal(getattr(signal, name))
    process.kill()
    process.wait()
    assert sidecar._process.wait(timeout=10) == 0
    assert read_report(files.crash)["cause"] == "vanished"
    sidecar.stop()


def test_it_ends_when_told_to_and_writes_nothing(files):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    sidecar = start(files.directory, process.pid)
    started = time.monotonic()
    sidecar.stop()
    assert time.monotonic() - started < 1.5
    assert sidecar._process.returncode == 0
    process.kill()
    process.wait()
    assert not files.crash.exists()


def another(identity, **changes):
    """The record of a run that began later in the same directory."""
    return {"rank": 0, "world_size": 1, **identity, "started_s": 9.0, "state": "running"} | changes


def test_one_that_is_late_leaves_the_next_run_alone(files):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write_report(files.process, another(identify(process.pid).to_dict(), started_s=1.0))
    sidecar = start(files.directory, process.pid)
    sidecar._process.send_signal(signal.SIGSTOP)
    process.kill()
    process.wait()
    write_report(files.process, another(identify(os.getpid()).to_dict()))
    half = files.directory / ".last.ckpt.2.tmp"
    half.write_text("the next run is writing this")
    left = {path: path.read_bytes() for path in files.directory.iterdir()}
    sidecar._process.send_signal(signal.SIGCONT)
    assert sidecar._process.wait(timeout=10) == 0
    assert {path: path.read_bytes() for path in files.directory.iterdir()} == left
    sidecar.stop()


WATCHED = {"pid": 7, "host": "h", "start_ticks": 1, "boot": "b", "pid_namespace": 4}


@pytest.mark.parametrize(
    "change",
    [{"pid": 8}, {"start_ticks": 2}, {"boot": "c"}, {"pid_namespace": 5}, {"started_s": 2.0}],
)
def test_a_process_that_differs_in_anything_is_not_the_one_that_was_watched(files, change):
    watched = another(WATCHED, started_s=1.0)
    write_report(files.process, watched | change)
    before = files.process.read_bytes()
    assert not complete_report(files, watched=ProcessRecord.from_dict(watched))
    assert not files.crash.exists()
    assert files.process.read_bytes() == before
    write_report(files.process, watched)
    assert complete_report(files, watched=ProcessRecord.from_dict(watched))


def test_a_run_that_begins_while_the_report_is_made_is_left_alone(files, monkeypatch):
    watched, of_the_dead = another(WATCHED), sidecar_module._post_mortem

    def slow(*args):
        write_report(files.process, another(identify(os.getpid()).to_dict()))
        return of_the_dead(*args)

    monkeypatch.setattr(sidecar_module, "_post_mortem", slow)
    write_report(files.process, watched)
    assert not complete_report(files, watched=ProcessRecord.from_dict(watched))
    assert not files.crash.exists()
    assert read_report(files.process)["pid"] == os.getpid()


def test_a_run_that_begins_waits_for_the_report_of_the_one_before(files):
    """The lock of the directory ends with its holder, in whatever way the holder dies."""
    holds = "import sys; sys.path.insert(0, sys.argv[2]);"
    holds += "from esper_lightning.forensics.sidecar import locked; from pathlib import Path;"
    holds += "print(end='', file=open(Path(sys.argv[1]) / 'asked', 'w'));"
    holds += "locked(Path(sys.argv[1])).__enter__();"
    holds += "print(end='', file=open(Path(sys.argv[1]) / 'got', 'w'))"
    root = str(Path(sidecar_module.__file__).parents[2])
    with locked(files.directory):
        command = [sys.executable, "-S", "-c", holds, str(files.directory), root]
        other = subprocess.Popen(command)
        while not (files.directory / "asked").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        assert not (files.directory / "got").exists()
    assert other.wait(10) == 0
    assert (files.directory / "got").exists()
    started = time.monotonic()
    with locked(files.directory):
        assert time.monotonic() - started < 1.0


def test_the_next_run_completes_what_a_second_process_could_not(files):
    """The second process died with its container. Living or completed runs are not touched."""
    write_report(files.process, another(identify(os.getpid()).to_dict()))
    assert not complete_report(files)
    gone = another(identify(os.getpid()).to_dict(), start_ticks=1, changed_s=5.0)
    write_report(files.process, gone)
    os.utime(files.history, (50.0, 50.0))
    assert complete_report(files)
    report, process = read_report(files.crash), read_report(files.process)
    assert (report["cause"], report["time_s"]) == ("vanished", 50.0)  # when it was seen last
    assert same_recording(CrashReport.from_dict(report), ProcessRecord.from_dict(gone))
    assert (process["state"], process["evidence_saved"]) == ("failed", True)
    assert not complete_report(files)


def test_one_that_was_killed_before_its_first_report_has_one(files):
    write_report(files.process, another(WATCHED, state="failed", saved=False))
    assert complete_report(files)
    assert read_report(files.crash)["cause"] == "vanished"
    files.crash.unlink()  # its own report went elsewhere
    write_report(files.process, another(WATCHED, state="failed", saved=True))
    assert not complete_report(files)


@pytest.mark.parametrize(
    ("left", "suspect"), [(0.0, True), (0.05, True), (0.5, False), (None, False)], ids=str
)
def test_the_oom_killer_is_the_first_suspect_where_memory_was_short(
    files, monkeypatch, left, suspect
):
    memory = None
    if left is not None:
        memory = Memory(1_500_000_000, 2_000_000_000, 4_000_000_000, int(left * 4e9))
    monkeypatch.setattr(phases_module, "measure_memory", lambda: memory)
    PhaseRing(files.phases).close()
    assert complete_report(files, before={"oom_kill": 1}, after={"oom_kill": 1})
    report = read_report(files.crash)
    assert ("first suspect: the kernel's OOM killer" in report["error"]["message"]) == suspect
    assert ("SIGKILL by somebody" in report["error"]["message"]) != suspect
    assert report["memory"] == (None if memory is None else memory._asdict())
    assert ("1.50 GB, at most 2.00 GB" in report["error"]["message"]) == (memory is not None)
    assert report["cgroup"]["after"] == {"oom_kill": 1}


def test_without_a_place_for_its_record_it_still_knows_whom_it_watched(files):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    files.process.unlink()
    watched = ProcessRecord.from_dict(another(identify(process.pid).to_dict()))
    sidecar = start(files.directory, process.pid, watched)
    process.kill()
    process.wait()
    assert sidecar._process.wait(timeout=10) == 0
    report = read_report(files.crash)
    assert (report["cause"], report["pid"]) == ("vanished", process.pid)
    sidecar.stop()
