"""``esper crash``: the first failure is named, whatever is missing or damaged."""

import json
import os
import socket
import subprocess
import sys

import pytest

from esper_lightning.cli import crash
from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import PhaseRing
from esper_lightning.forensics.report import write_report

BLOCKED = """
import sys
for name in ("torch", "lightning", "numpy", "jsonargparse"):
    sys.modules[name] = None
from esper_lightning.cli.main import main
main(["crash", sys.argv[1]])
"""


def rank(directory, number, *, time_s=None, cause="exception", state="failed", **more):
    files = RunLayout(directory).rank(number)
    files.directory.mkdir(parents=True)
    rows = [{"iteration": i, "loss": 0.5 / i} for i in range(1, 10)]
    files.history.write_bytes(encode_rows(rows))
    process = {"rank": number, "pid": os.getpid(), "host": socket.gethostname(), "state": state}
    write_report(files.process, process)
    if time_s is not None:
        error = {"type": "ValueError", "message": f"of rank {number}", "traceback": ["here"]}
        report = {
            "rank": number,
            "world_size": 2,
            "time_s": time_s,
            "cause": cause,
            "error": error if cause == "exception" else None,
            "iteration": 10,
            "phases": ["training_step", "update"],
            "evidence": {"trace": {"state": "absent", "path": None, "detail": "it was waiting"}},
            "complete": True,
        }
        write_report(files.crash, report | more)
    return files


def shown(capsys, directory, *options):
    crash.run([str(directory), *options])
    return capsys.readouterr().out


def test_a_hang_that_passed_is_no_death(tmp_path, capsys):
    rank(tmp_path, 0, time_s=100.0, cause="hang", state="finished")
    text = shown(capsys, tmp_path)
    assert "No death on record: finished." in text
    assert "Rank 0 hung in iteration 10, and went on." in text


def test_names_error_phase_and_evidence(tmp_path, capsys):
    rank(tmp_path, 0, time_s=100.0)
    text = shown(capsys, tmp_path)
    assert "Rank 0 failed first: ValueError: of rank 0" in text
    assert "Iteration 10, in:\n    training_step\n    update" in text
    assert "Last of 9 rows" in text
    assert "it was waiting" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_first_cause_is_not_the_first_to_notice(tmp_path, capsys):
    peer = {"rank": 1, "reason": "it failed"}
    rank(tmp_path, 0, time_s=99.0, cause="peer", peer=peer)
    rank(tmp_path, 1, time_s=100.0)
    assert "Rank 1 failed first: ValueError: of rank 1" in shown(capsys, tmp_path)
    assert json.loads(shown(capsys, tmp_path, "--json"))["first_failure"] == 1


def test_a_rank_that_vanished_fails_before_those_that_notice(tmp_path, capsys):
    rank(tmp_path, 0, time_s=100.0)
    error = {"type": None, "message": "The process vanished.", "traceback": []}
    rank(tmp_path, 1, time_s=100.1, cause="vanished", error=error)
    assert "Rank 1 failed first: The process vanished." in shown(capsys, tmp_path)


def test_ranks_of_an_earlier_run_with_more_of_them_are_left_out(tmp_path):
    for number, started_s in ((0, 200.0), (1, 100.0)):
        rank(tmp_path, number, time_s=started_s + 1)
        process = {"state": "failed", "world_size": 2 - (number == 0), "started_s": started_s}
        write_report(RunLayout(tmp_path).rank(number).process, process)
    assert [remains.rank for remains in crash.examine(tmp_path)] == [0]


def test_a_missing_rank_is_named(tmp_path, capsys):
    rank(tmp_path, 1, time_s=100.0)
    rank(tmp_path, 3, time_s=101.0, world_size=4)
    text = shown(capsys, tmp_path)
    assert "   0  left nothing" in text
    assert "   2  left nothing" in text


def test_a_process_that_vanished_without_a_report(tmp_path, capsys):
    files = rank(tmp_path, 0, state="running")
    assert "No death on record: running." in shown(capsys, tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    process = {"rank": 0, "pid": int(ended), "host": socket.gethostname(), "state": "running"}
    write_report(files.process, process)
    ring = PhaseRing(files.phases)
    ring.iteration = 4
    ring.enter("rollout")
    ring.close()
    text = shown(capsys, tmp_path)
    assert "Rank 0 failed first: its process vanished without a report." in text
    assert "Iteration 4, in: rollout" in text


def test_damaged_files_are_read_as_far_as_they_go(tmp_path, capsys):
    files = rank(tmp_path, 0, time_s=100.0)
    files.history.write_bytes(b'{"iteration": 1}\n{"itera\x00\n{"iteration": 3}\n{"iter')
    files.phases.write_bytes(b"torn")
    files.process.write_bytes(b"{")
    text = shown(capsys, tmp_path)
    assert "Last of 2 rows" in text
    assert "2 lines are damaged" in text


@pytest.mark.parametrize("schema", [0, 99])
def test_another_schema_is_named(tmp_path, capsys, schema):
    files = rank(tmp_path, 0)
    files.crash.write_text(json.dumps({"schema": schema, "cause": "exception"}))
    assert f"Written with schema {schema}" in shown(capsys, tmp_path)


def test_what_is_no_run(tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit) as caught:
            crash.run([str(directory)])
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("esper: error: RUN_DIR must hold rank folders")


def test_needs_no_torch(tmp_path):
    rank(tmp_path, 0, time_s=100.0)
    command = [sys.executable, "-c", BLOCKED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Rank 0 failed first" in result.stdout
