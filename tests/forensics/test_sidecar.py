"""The second process: what it completes, what it leaves alone, and what it knows of the kernel."""

import os
import signal
import subprocess
import sys
import time

import pytest

from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.report import read_report, write_report
from esper_lightning.forensics.sidecar import complete_report, oom_kills, start


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
    (files.directory / ".crash.ckpt.1.tmp").write_text("half")
    assert complete_report(files)
    report = read_report(files.crash)
    assert (report["cause"], report["iteration"], report["phases"]) == ("vanished", 3, ["update"])
    assert report["evidence"]["history"]["detail"] == "2 rows"
    assert report["written_by"] == "sidecar"
    assert read_report(files.process)["state"] == "failed"
    assert not list(files.directory.glob(".*"))
    ring.close()


@pytest.mark.parametrize(("after", "guilty"), [({"oom_kill": 4}, True), ({"oom_kill": 3}, False)])
def test_the_oom_killer_is_named_only_where_its_counter_moved(files, after, guilty):
    complete_report(files, before={"oom_kill": 3}, after=after)
    report = read_report(files.crash)
    assert ("OOM killer" in report["error"]["message"]) == guilty
    assert report["cgroup"] == {"before": {"oom_kill": 3}, "after": after}


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


def test_counters_of_both_cgroup_versions(tmp_path):
    (tmp_path / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert oom_kills(os.getpid(), tmp_path).items() >= {"oom": 2, "oom_kill": 1}.items()
    (tmp_path / "memory.events").write_text("torn\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\noom_kill 5\n")
    assert oom_kills(os.getpid(), tmp_path)["oom_kill"] == 5
