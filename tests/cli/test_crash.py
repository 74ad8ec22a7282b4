"""``esper crash``: the first failure is named, whatever is missing or damaged."""

import gzip
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule

from esper_lightning import FlightRecorder
from esper_lightning.cli import crash
from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import PhaseRing
from tests.reports import write_report

BLOCKED = """
import sys
for name in ("torch", "lightning", "numpy", "jsonargparse"):
    sys.modules[name] = None
from esper_lightning.cli.main import main
main(["crash", sys.argv[1]])
"""


DIED_S = 1_800_000_000.0
ODD = (None, "text", 5, -1, 1e300, [], {}, ["text"], {"text": 1}, [[]], {"text": {"path": 1}})
FIELDS = ("time_s", "error", "evidence", "phases", "metrics", "peer", "profiler", "schema")
FIELDS += (
    "memory",
    "cgroup",
    "world_size",
    "cause",
    "signal",
    "exit_status",
    "iteration",
    "pid",
    "host",
)


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
    out, err = capsys.readouterr()
    assert err == ""
    if options:
        json.loads(out, parse_constant=pytest.fail)  # NaN is no JSON
    return out


def trace(path, *, before_s, operator="aten::mul"):
    """A window that ended before the death."""
    path.parent.mkdir(parents=True, exist_ok=True)
    event = {"ph": "X", "cat": "cpu_op", "name": operator, "ts": 1.0, "dur": 2.0}
    path.write_text(json.dumps({"traceEvents": [event]}))
    os.utime(path, (DIED_S - before_s, DIED_S - before_s))


def lightnings_name(before_s, step="training_step", number=""):
    at_ns = int((DIED_S - before_s) * 1e9)
    return f"fit-{number}[Strategy]DDPStrategy.{step}.{at_ns}.pt.trace.json"


def test_a_hang_that_passed_is_no_death(tmp_path, capsys):
    rank(tmp_path, 0, time_s=100.0, cause="hang", state="finished")
    text = shown(capsys, tmp_path)
    assert "No death on record: finished." in text
    assert "Rank 0 hung in iteration 10, and continued." in text


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


@pytest.mark.parametrize("folders", [1, 2])
def test_a_rank_that_lost_a_peer_is_not_blamed(tmp_path, capsys, folders):
    error = {"type": "RuntimeError", "message": "Connection closed by peer", "traceback": []}
    for number in range(folders):
        rank(tmp_path, number, time_s=100.0, cause="peer", error=error)
    text = shown(capsys, tmp_path)
    assert "failed first" not in text
    where = "its folder is on another host" if folders == 1 else "no rank reports why"
    assert f"Rank 0 lost a peer; {where}.\nRuntimeError: Connection closed by peer" in text
    assert ("   1  left nothing" in text) == (folders == 1)
    assert json.loads(shown(capsys, tmp_path, "--json"))["first_failure"] is None


def test_memory_and_the_kernels_counters_stand_beside_each_other(tmp_path, capsys):
    memory = {"rss_bytes": 1_500_000_000, "limit_bytes": 2_000_000_000, "odd": 10**400}
    cgroup = {"before": {"oom_kill": 3}, "after": {"oom_kill": 4}}
    rank(tmp_path, 0, time_s=100.0, memory=memory, cgroup=cgroup)
    text = shown(capsys, tmp_path)
    assert "Memory: rss 1.50 GB, limit 2.00 GB, oom_kill 3 -> 4" in text


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


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_window_that_lightning_closed_before_the_death_is_shown(tmp_path, capsys, elsewhere):
    place = tmp_path / "elsewhere" if elsewhere else tmp_path / "run"
    profiler = {"class": "PyTorchProfiler", "action": "NONE", "dirpath": str(place)}
    rank(tmp_path / "run", 0, time_s=DIED_S, profiler=profiler)
    trace(place / lightnings_name(30.0), before_s=29.0, operator="aten::early")
    trace(place / lightnings_name(12.5), before_s=12.0)
    trace(place / lightnings_name(2.0, "validation_step"), before_s=2.0, operator="aten::val")
    trace(place / lightnings_name(1.0, number="1-"), before_s=1.0, operator="aten::of_rank_1")
    text = shown(capsys, tmp_path / "run")
    assert lightnings_name(12.5) in text
    assert "The latest closed window; it ended 12.5 s before the death" in text
    assert text.count("aten::mul") == 2
    assert "Last operators of that window:" in text
    assert "30.0 s before the death" in text
    assert "aten::of_rank_1" not in text
    (remains,) = json.loads(shown(capsys, tmp_path / "run", "--json"))["ranks"]
    assert len(remains["windows"]) == 3


def test_the_window_that_was_open_comes_before_closed_ones(tmp_path, capsys):
    evidence = {"trace": {"state": "saved", "path": "trace/crash-rank0.pt.trace.json"}}
    files = rank(tmp_path, 0, time_s=DIED_S, evidence=evidence)
    trace(files.trace / "crash-rank0.pt.trace.json", before_s=-3.0)
    trace(files.trace / "window-rank0-1.pt.trace.json", before_s=-4.0, operator="aten::closed")
    text = shown(capsys, tmp_path)
    assert "The window that was open at the death" in text
    assert "aten::mul" in text
    assert "aten::closed" not in text


def test_traces_and_ranks_of_an_earlier_run_are_not_of_this_death(tmp_path, capsys):
    for number in range(3):
        files = rank(tmp_path, number, time_s=DIED_S)
        started_s = DIED_S - (1000 if number == 2 else 60)
        process = {"started_s": started_s, "world_size": 3 if number == 2 else 2}
        write_report(files.process, {"state": "failed", **process})
        trace(files.trace / "window-rank0.pt.trace.json", before_s=70.0)
    text = shown(capsys, tmp_path)
    assert "No trace." in text
    assert "Of an earlier run, and not shown: rank2" in text
    assert [r["rank"] for r in json.loads(shown(capsys, tmp_path, "--json"))["ranks"]] == [0, 1]
    trace(RunLayout(tmp_path).rank(0).trace / "window-rank0-2.pt.trace.json", before_s=50.0)
    assert "it ended 50.0 s before the death" in shown(capsys, tmp_path)


def test_a_rank_that_never_began_did_not_die_of_what_it_died_of_before(tmp_path, capsys):
    for number, ago_s in enumerate((0.0, 3600.0)):
        files = rank(tmp_path, number, time_s=DIED_S - ago_s)
        process = {"started_s": DIED_S - ago_s - 5, "world_size": 2}
        write_report(files.process, {"state": "failed", **process})
    text = shown(capsys, tmp_path)
    assert "Rank 0 failed first" in text
    assert "Of an earlier run, and not shown: rank1" in text


@pytest.mark.parametrize("same", [True, False])
def test_ranks_that_have_met_know_that_they_are_one_run(tmp_path, capsys, same):
    """A launcher may start the next attempt a moment after the death of one."""
    for number in range(2):
        files = rank(tmp_path, number, time_s=DIED_S - number)
        process = {"started_s": DIED_S - number, "world_size": 2, "state": "failed"}
        write_report(files.process, {**process, "run": "a" if same else str(number)})
    text = shown(capsys, tmp_path)
    assert f"Rank {int(same)} failed first" in text
    assert ("Of an earlier run, and not shown: rank1" in text) != same


def test_columns_are_what_the_rows_hold(tmp_path, capsys):
    files = rank(tmp_path, 0, time_s=DIED_S)
    row = {"iteration": 7, "note": "text", "train_loss": 0.25, "val/acc": 0.5, "train/acc": "NaN"}
    files.history.write_bytes(encode_rows([row, row]))
    text = shown(capsys, tmp_path)
    assert ["iteration", "train_loss", "val/acc", "train/acc"] in map(str.split, text.splitlines())
    assert ["7", "0.25", "0.5", "NaN"] in map(str.split, text.splitlines())
    many = {f"metrics/a_name_that_is_rather_long_{i}": 0.5 for i in range(40)}
    files.history.write_bytes(encode_rows([{**many, "loss/policy": 0.125, "iteration": 7}]))
    lines = shown(capsys, tmp_path).splitlines()
    assert max(map(len, lines)) <= 100
    assert next(line for line in lines if "0.125" in line).split()[:2] == ["7", "0.125"]
    assert any(line.startswith("Not shown: metrics/a_name") for line in lines)


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_another_type_are_left_out(tmp_path, capsys, field):
    files = rank(tmp_path, 0, time_s=DIED_S)
    whole = json.loads(files.crash.read_bytes())
    for value in ODD:
        files.crash.write_text(json.dumps(whole | {field: value}))
        files.process.write_text(json.dumps({"state": "failed", field: value}))
        assert "Rank 0 failed first" in shown(capsys, tmp_path)
        assert json.loads(shown(capsys, tmp_path, "--json"))["first_failure"] == 0


def test_numbers_that_are_not_finite_are_strict_json(tmp_path, capsys):
    files = rank(tmp_path, 0, time_s=DIED_S)
    text = files.crash.read_text().replace('"iteration": 10', '"iteration": 10, "a": -Infinity')
    files.crash.write_text(text)
    files.history.write_text('{"iteration": 1, "loss": NaN}\n{"iteration": 2, "loss": "NaN"}\n')
    (remains,) = json.loads(shown(capsys, tmp_path, "--json"))["ranks"]
    assert [row["loss"] for row in remains["last_rows"]] == ["NaN", "NaN"]
    assert remains["report"]["a"] == "-Infinity"


@pytest.mark.parametrize("damage", ["history", "pid", "nested", "trace", "ring"])
def test_no_damage_is_an_error(tmp_path, capsys, damage):
    files = rank(tmp_path, 0, time_s=DIED_S)
    if damage == "history":
        files.history.unlink()
        files.history.mkdir()
    elif damage == "pid":
        process = {"state": "running", "host": socket.gethostname(), "pid": 10**12}
        write_report(files.process, process)
    elif damage == "nested":
        files.crash.write_text("[" * 100_000)
        files.history.write_text("[" * 100_000)
    elif damage == "trace":
        files.trace.mkdir()
        (files.trace / "a.pt.trace.json").write_text('{"traceEvents": null}')
    else:
        files.phases.write_bytes(b"ESPERPH1" + b"\xff" * 300_000)
    assert shown(capsys, tmp_path).startswith("Run directory: ")
    shown(capsys, tmp_path, "--json")


def test_the_stock_profilers_window_is_found_after_a_death(make_trainer, tmp_path, capsys):
    """The profiler is used as its documentation shows: its only window closed before the death."""

    class Dying(LightningModule):
        layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            if batch_idx == 15:
                raise RuntimeError("injected")
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.layer.parameters(), 1e-3)

    trainer = make_trainer(max_epochs=1, profiler="pytorch", callbacks=[FlightRecorder()])
    with pytest.raises(RuntimeError, match="injected"):
        trainer.fit(Dying(), torch.utils.data.DataLoader(torch.ones(20, 2)))
    capsys.readouterr()
    text = shown(capsys, tmp_path)
    assert "The latest closed window; it ended " in text
    assert "aten::addmm" in text or "aten::linear" in text


def test_of_a_nan_it_shows_where_it_is(tmp_path, capsys):
    found = {"phase": "rollout", "tensors": ["reward"], "environments": [3, 5]}
    error = {"type": "NonFiniteError", "message": "NaN", "traceback": [], "non_finite": found}
    rank(tmp_path, 0, time_s=1.0, error=error)
    text = shown(capsys, tmp_path)
    assert "Not finite, in rollout: reward, environments [3, 5]" in text


@pytest.mark.parametrize("place", ["cut", "directory", "pipe", "deep", "nothing"])
def test_a_damaged_report_is_there_and_unreadable(tmp_path, capsys, place):
    files = rank(tmp_path, 0, time_s=DIED_S)
    files.crash.unlink()
    if place == "directory":
        files.crash.mkdir()
    elif place == "pipe":
        os.mkfifo(files.crash)
    else:
        files.crash.write_text(
            {"cut": '{"rank": 0, "cau', "deep": "[" * 10**5, "nothing": ""}[place]
        )
    text = shown(capsys, tmp_path)
    assert "Rank 0: crash.json is there and cannot be read: " in text
    assert "Rank 0 failed first: how is not known" in text
    assert "Last of 9 rows" in text
    content = json.loads(shown(capsys, tmp_path, "--json"))
    assert content["first_failure"] == 0
    assert list(content["ranks"][0]["unreadable"]) == ["crash.json"]


def test_a_report_of_a_run_that_finished_is_damaged(tmp_path, capsys):
    files = rank(tmp_path, 0, state="finished")
    files.crash.write_text("{")
    text = shown(capsys, tmp_path)
    assert "Rank 0: crash.json is there and cannot be read: " in text
    assert "No death on record: finished." in text


def test_what_a_run_says_does_not_steer_the_terminal(tmp_path, capsys):
    error = {
        "type": "\x1b[2J",
        "message": "a\nRank 1 failed\ud800\r",
        "traceback": ["\x1b]0;t\x07"],
    }
    files = rank(tmp_path, 0, time_s=DIED_S, error=error, phases=["\x9b31m"])
    files.history.write_bytes(encode_rows([{"iteration": 1, "\x1b[5m": 0.5}]))
    text = shown(capsys, tmp_path)
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"\x1b[2J: a\nRank 1 failed\ud800\r" in text
    assert shown(capsys, tmp_path, "--json").isascii()


def test_rows_that_are_doubled_are_said_and_not_summed(tmp_path, capsys):
    files = rank(tmp_path, 0, time_s=DIED_S)
    files.history.write_bytes(files.history.read_bytes() * 2)
    text = shown(capsys, tmp_path)
    said = "history.jsonl has not one row for each iteration in order: of 18 rows, 9 repeated."
    assert said in text
    assert json.loads(shown(capsys, tmp_path, "--json"))["ranks"][0]["remarks"] == [said]


def test_folders_that_are_no_ranks_are_none(tmp_path, capsys):
    rank(tmp_path, 0, time_s=DIED_S)
    for name in ("rank007", "rank-1", "rank99999999999999999999", "rank\u0663", "rank1.5"):
        (tmp_path / name).mkdir()
    content = json.loads(shown(capsys, tmp_path, "--json"))
    assert [found["rank"] for found in content["ranks"]] == [0]


def test_a_packed_trace_without_end_is_read_at_both_ends(tmp_path, capsys):
    files = rank(tmp_path, 0, time_s=DIED_S)
    files.trace.mkdir()
    event = b'{"ph": "X", "cat": "cpu_op", "name": "%s", "ts": 1, "dur": 2},'
    with gzip.open(files.trace / "a.pt.trace.json.gz", "wb", compresslevel=1) as file:
        file.write(b'{"traceEvents": [' + event % b"aten::first")
        for _ in range(150):
            file.write(b" " * (1 << 20))
        file.write(event % b"aten::last")
    text = shown(capsys, tmp_path)
    assert "aten::first" in text
    assert "aten::last" in text
    assert re.search(r"without \d\d MB in the middle, which were not read", text)


@pytest.mark.parametrize("odd", [[], {}, ["cpu_op"], {"a": [1]}, None, True, 5])
def test_events_of_a_trace_may_hold_anything(tmp_path, odd):
    path = tmp_path / "a.pt.trace.json"
    whole = {"ph": "X", "cat": "cpu_op", "name": "op", "ts": 1.0, "dur": 2.0, "pid": 1, "tid": 2}
    events = [whole, *(whole | {name: odd} for name in whole)]
    path.write_text(json.dumps({"traceEvents": events}))
    assert crash.summarize(path).events == len(events)
