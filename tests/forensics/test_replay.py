"""The verdict on a replay, from files alone."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.forensics.fingerprint import Fingerprint
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.rank_record import ProcessRecord
from esper_lightning.forensics.remains import examine
from esper_lightning.forensics.replay import (
    BY_PROGRAM,
    ReplayRecord,
    compared,
    judge,
    needs_program,
    row_differences,
)
from esper_lightning.forensics.report import (
    CrashReport,
    ErrorReport,
    NonFiniteReport,
    PeerReport,
)

ERROR = ErrorReport(
    type="ValueError",
    message="at 0x7f00aa11",
    traceback=('  File "/here/train.py", line 3, in step', '  File "/here/env.py", line 9, in act'),
)
DEATH = CrashReport(cause="exception", iteration=3, error=ERROR, rank=0, started_s=1e9)


def leave(
    directory, *, losses=(0.1, 0.2), report=DEATH, state="failed", rank=0, ranks=1, threads=1
):
    """The files of one rank."""
    files = RunLayout(directory).rank(rank)
    files.directory.mkdir(parents=True)
    rows = [{"iteration": i + 1, "loss": loss, "time_s": id(loss)} for i, loss in enumerate(losses)]
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    files.history.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print_ = Fingerprint(threads={"torch threads": threads})
    record = ProcessRecord(
        state=state, rank=rank, started_s=1e9, world_size=ranks, fingerprint=print_
    )
    record.write(files.process)
    if report is not None:
        report.write(files.crash)
    return directory


@pytest.fixture
def judged(tmp_path):
    """The verdict on a replay that left other files than the run that died."""

    def judged(*, died=DEATH, deep=False, record=None, **again):
        dead = leave(tmp_path / "run", report=died)
        new = leave(tmp_path / "again", **again)
        about = {"iteration": 3, "begins": 0, "deep": deep, **(record or {})}
        ReplayRecord(run_dir=str(dead), started_s=1e9, rank=0, **about).write(new)
        return judge(new, examine(dead))

    return judged


def test_the_same_error_is_reproduced_wherever_its_file_is(judged):
    lines = tuple(line.replace("/here/", "/there/") for line in ERROR.traceback)
    error = replace(ERROR, message="at 0x7f00bb22", traceback=lines)
    verdict = judged(report=replace(DEATH, error=error))
    assert (verdict.outcome, verdict.iteration, verdict.rows) == ("reproduced", 3, 2)
    assert verdict.lines[0].endswith("ValueError: at 0x7f00bb22 at env.py:9")
    assert verdict.lines[1] == "2 rows of the history are the same, bit for bit."


@pytest.mark.parametrize(
    ("message", "again"),
    [
        ("worker 793 failed after 3.5 s", "worker 32191 failed after 12.25 s"),
        ("no file {root}/run/6.png", "no file {root}/again/7.png"),
        ("no file '/moved/run/a'", "no file 'somewhere/again/a'"),
    ],
)
def test_an_error_may_name_its_run_a_process_or_a_time(judged, tmp_path, message, again):
    died, replayed = (
        replace(DEATH, error=replace(ERROR, message=text.format(root=tmp_path)))
        for text in (message, again)
    )
    assert judged(died=died, report=replayed).outcome == "reproduced"


def test_another_text_at_the_same_line_is_reproduced_and_shown(judged):
    error = replace(ERROR, message="no scene in /tmp/tmpa1_b/scene.xml")
    verdict = judged(report=replace(DEATH, error=error))
    assert verdict.outcome == "reproduced"
    assert verdict.lines[0].endswith(
        "ValueError: no scene in /tmp/tmpa1_b/scene.xml at env.py:9"
        "; in the run that died: ValueError: at 0x7f00aa11"
    )


def test_rows_are_compared_wherever_the_folder_of_their_rank_is(tmp_path):
    here, there, again = (tmp_path / name for name in ("here", "there", "again"))
    leave(here, ranks=2)
    leave(there, rank=1, ranks=2, losses=(0.1, 0.3))
    for rank in range(2):
        leave(again, rank=rank, ranks=2)
    places = {"run_dir": str(here), "more_dirs": (str(there),)}
    ReplayRecord(**places, started_s=1e9, rank=0, iteration=3, begins=0).write(again)
    verdict = judge(again, examine(*ReplayRecord.read(again).directories))
    assert (verdict.outcome, verdict.rows) == ("different", 3)
    assert "loss 0.3 -> 0.2" in verdict.lines[0]


@pytest.mark.parametrize(("peer", "outcome"), [(1, "reproduced"), (2, "different")])
def test_a_first_failure_on_a_host_that_is_not_here_may_be_that_of_the_replay(
    judged, tmp_path, peer, outcome
):
    """Rank 0 of the run has lost rank 1, or another, whose folder is missing."""
    lost = replace(DEATH, cause="peer", peer=PeerReport(rank=peer, reason="it failed"))
    leave(tmp_path / "again", rank=1, ranks=2, report=replace(DEATH, rank=1))
    verdict = judged(died=lost, report=lost, ranks=2)
    assert verdict.outcome == outcome
    if outcome == "reproduced":
        assert "rank 1: ValueError" in verdict.lines[0]
        assert "left no report here to compare" in verdict.lines[0]


@pytest.mark.parametrize(
    ("changed", "iteration"),
    [
        ({"error": replace(ERROR, type="TypeError")}, 3),
        ({"error": replace(ERROR, traceback=ERROR.traceback[:1])}, 3),
        ({"cause": "native", "error": None, "signal": "SIGSEGV"}, 3),
        ({"iteration": 2}, 2),
    ],
)
def test_another_death_is_different(judged, changed, iteration):
    verdict = judged(report=replace(DEATH, **changed), threads=2)
    assert (verdict.outcome, verdict.iteration) == ("different", iteration)
    assert verdict.lines[-1] == "What differs between the runs: torch threads 1 -> 2."


def test_another_row_is_different_even_in_its_last_bit(judged):
    verdict = judged(losses=(0.1, 0.20000000000000004))
    assert (verdict.outcome, verdict.iteration) == ("different", 2)
    assert "loss 0.2 -> 0.20000000000000004" in verdict.lines[0]
    assert "it died in the same way all the same" in verdict.lines[0]


@pytest.mark.parametrize("iteration", [None, 4])
def test_an_iteration_that_goes_well_has_a_cause_outside(judged, iteration):
    report = None if iteration is None else replace(DEATH, iteration=iteration)
    state = "finished" if iteration is None else "failed"
    verdict = judged(losses=(0.1, 0.2, 0.3), report=report, state=state)
    assert verdict.outcome == "did not happen again"
    assert "outside of the program's state" in verdict.lines[-1]


def test_a_process_that_vanishes_again_is_reproduced_whatever_memory_it_had(judged):
    def vanished(text, phases):
        error = ErrorReport(message=text)
        return CrashReport(cause="vanished", iteration=3, error=error, started_s=1e9, phases=phases)

    verdict = judged(died=vanished("it had 1 GB", ("a",)), report=vanished("2 GB", ("a",)))
    assert verdict.outcome == "reproduced"


STOPPED = {
    "SIGINT": replace(DEATH, cause="signal", signal="SIGINT"),
    "SIGTERM": replace(DEATH, cause="signal", signal="SIGTERM", error=None),
    "SIGKILL by somebody": replace(
        DEATH, cause="vanished", error=ErrorReport(message="SIGKILL by somebody (it had 1 GB)")
    ),
}


@pytest.mark.parametrize("what", STOPPED)
@pytest.mark.parametrize("iteration", [2, 3])
def test_a_replay_that_is_stopped_decides_nothing(judged, what, iteration):
    verdict = judged(losses=(0.1,), report=replace(STOPPED[what], iteration=iteration))
    assert verdict.outcome == "undecided"
    ended = f"ended in iteration {iteration} ({what}), before iteration 3 was over."
    assert verdict.lines[0].endswith(ended)
    assert verdict.from_start is None


@pytest.mark.parametrize("what", STOPPED)
def test_a_run_that_ends_itself_by_a_signal_is_reproduced(judged, what):
    assert judged(died=STOPPED[what], report=STOPPED[what]).outcome == "reproduced"


@pytest.mark.parametrize("what", STOPPED)
def test_the_signal_of_who_stops_the_replay_is_not_that_of_the_run(judged, what):
    verdict = judged(died=STOPPED[what], report=STOPPED[what], record={"stopped_by": "SIGINT"})
    assert verdict.outcome == "undecided"
    assert "(SIGINT)" in verdict.lines[0]


def test_a_signal_from_outside_interrupts_another_line(judged):
    """The line that a signal has interrupted counts, and not the handler of the recorder."""
    handler = '  File "/x/esper_lightning/recorder/{}.py", line 9, in handle'
    handlers = [handler.format(name) for name in ("registry", "arrivals")]
    line = '  File "/x/lib/python3.12/site-packages/torch/a.py", line {}, in backward'
    died, again = (
        replace(
            STOPPED["SIGINT"],
            error=ErrorReport(type="KeyboardInterrupt", traceback=(line.format(number), *handlers)),
        )
        for number in (7, 8)
    )
    assert judged(died=died, report=again).outcome == "undecided"


def test_a_signal_does_not_hide_a_row_that_differs(judged):
    report = replace(STOPPED["SIGINT"], iteration=2)
    verdict = judged(losses=(0.2,), report=report, record={"stopped_by": "SIGINT"})
    assert (verdict.outcome, verdict.iteration) == ("different", 1)


def test_a_process_that_vanishes_in_another_phase_decides_nothing(judged):
    died = CrashReport(cause="vanished", iteration=3, started_s=1e9, phases=("a",))
    assert judged(died=died, report=replace(died, phases=("b",))).outcome == "undecided"


OWN, LATER, LOST = DEATH, replace(DEATH, time_s=2e9), replace(DEATH, cause="peer", time_s=2e9)
EARLY = replace(DEATH, time_s=1e9)
OF_RANK_1 = replace(DEATH, error=replace(ERROR, type="KeyError"))


@pytest.mark.parametrize(
    ("run", "again", "outcome"),
    [
        ((EARLY, LATER), (LATER, EARLY), "reproduced"),
        ((EARLY, LATER), (LOST, EARLY), "reproduced"),
        ((EARLY, LOST), (LATER, EARLY), "reproduced"),
        ((EARLY, LOST), (LOST, EARLY), "different"),
        ((EARLY, None), (LOST, EARLY), "reproduced"),  # the folder of rank 1 is missing
        # Each rank has its own error, and which is first is chance.
        (
            (EARLY, replace(OF_RANK_1, time_s=2e9)),
            (LATER, replace(OF_RANK_1, time_s=1e9)),
            "reproduced",
        ),
        ((EARLY, LATER), (LATER, replace(OF_RANK_1, time_s=1e9)), "different"),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_which_of_the_ranks_that_die_is_first_decides_nothing(tmp_path, run, again, outcome, deep):
    places = tmp_path / "run", tmp_path / "again"
    for place, reports in zip(places, (run, again), strict=True):
        for rank, report in enumerate(reports):
            if report is not None:
                leave(place, rank=rank, ranks=2, report=replace(report, rank=rank))
    about = {"iteration": 3, "begins": 0, "deep": deep}
    ReplayRecord(run_dir=str(places[0]), started_s=1e9, rank=0, **about).write(places[1])
    verdict = judge(places[1], examine(places[0]))
    assert verdict.outcome == outcome
    if outcome == "reproduced" and again[0] is not LOST:
        assert verdict.lines[0].startswith("Reproduced: iteration 3, rank 0: ValueError")


def test_an_iteration_that_was_never_finished_is_no_verdict(judged):
    verdict = judged(losses=(0.1, 0.2), report=None, state="finished")
    assert verdict.outcome == "undecided"
    assert "ended after iteration 2, before iteration 3 was over" in verdict.lines[0]


def test_what_differs_comes_before_other_processes_and_hardware(judged):
    well = {"losses": (0.1, 0.2, 0.3), "report": None, "state": "finished"}
    lines = judged(**well, threads=2).lines
    assert lines[-2] == "What differs between the runs: torch threads 1 -> 2."
    assert lines[-1].startswith("If that is not the cause, it is outside of the program's state")


def test_a_checkpoint_may_lack_state_and_the_line_to_type_is_given(judged, tmp_path):
    well = {"losses": (0.1, 0.2, 0.3), "report": None, "state": "finished"}
    lines = judged(**well, record={"begins": 1, "start": "last.ckpt"}).lines
    assert lines[1] == "1 row of the history is the same, bit for bit."
    assert lines[2].endswith("an environment variable, a race, or state that no checkpoint holds.")
    how = f"replay(trainer, model, {str(tmp_path / 'run')!r}, from_start=True)"
    assert lines[-1].strip() == how


@pytest.mark.parametrize("loss", [0.2, 0.5])
def test_a_start_that_restores_less_than_the_run_had_decides_nothing(judged, loss):
    verdict = judged(
        losses=(0.1, loss, 0.3),
        report=None,
        state="finished",
        record={"start": "last.ckpt", "lacks": "the order of the data"},
    )
    assert verdict.outcome == "undecided"
    assert "does not restore the order of the data" in verdict.lines[0]
    assert ("different from iteration 2 on" in verdict.lines[0]) == (loss == 0.5)


def test_a_death_is_reproduced_whatever_the_start_restores(judged):
    assert judged(record={"lacks": "the order of the data"}).outcome == "reproduced"


def test_rows_without_values_are_no_evidence(judged):
    verdict = judged(losses=(None, None), record={"whole_rows": False})
    assert verdict.rows == 0
    assert verdict.lines[1] == "There was no value in the rows of the history to compare."


def test_values_of_earlier_steps_are_compared_only_where_a_row_is_whole():
    recorded, again = {"loss": 1.0, "val_loss": 2.0}, {"loss": 1.0}
    assert row_differences(recorded, again, whole=False) == []
    assert row_differences(recorded, again) == ["val_loss 2.0 -> absent"]
    assert row_differences(again, recorded, whole=False) == ["val_loss absent -> 2.0"]


def test_a_deep_replay_finds_a_value_that_is_not_finite_by_another_error(judged):
    found = NonFiniteReport(phase="update")
    died = replace(DEATH, error=replace(ERROR, type="NonFiniteError", non_finite=found))
    text = "Function 'LogBackward0' returned nan values in its 0th output."
    error = replace(ERROR, type="RuntimeError", message=text)
    again = replace(DEATH, error=error)
    assert judged(deep=True, died=died, report=again).outcome == "reproduced"


@pytest.mark.parametrize("kind", ["ValueError", "OSError"])
def test_a_deep_replay_finds_the_same_error_at_another_line(judged, kind):
    error = replace(ERROR, type=kind, traceback=ERROR.traceback[:1])
    verdict = judged(deep=True, report=replace(DEATH, error=error))
    assert verdict.outcome == ("reproduced" if kind == ERROR.type else "different")


def test_there_is_no_verdict_where_the_dead_run_is_gone(tmp_path):
    dead, again = leave(tmp_path / "run"), leave(tmp_path / "again")
    with pytest.raises(ValueError, match="RUN_DIR must be that of a replay"):
        judge(again, examine(dead))
    ReplayRecord(run_dir=str(dead), started_s=2e9, rank=0, iteration=3).write(again)
    with pytest.raises(ValueError, match="another run is there now"):
        judge(again, examine(dead))


@pytest.mark.parametrize(
    "name",
    ["time_s", "env_steps_per_s", "perf/step_ms", "train_time", "fps", "samples_per_second"],
)
def test_times_and_rates_are_not_compared(name):
    assert row_differences({name: 1.0}, {name: 2.0}) == []


@pytest.mark.parametrize("name", ["loss/policy", "env_steps", "loss", "eval/times", "timeouts"])
def test_everything_else_is_compared(name):
    assert row_differences({name: 1.0}, {name: 2.0}) == [f"{name} 1.0 -> 2.0"]


def test_a_config_with_classes_of_its_program_is_not_whole(tmp_path):
    config = tmp_path / "config.yaml"
    for text, lacks in {
        "model: {}\n": None,
        f"{BY_PROGRAM}objects of its own: plugins\nmodel: {{}}\n": "plugins",
        "model:\n  env:\n    class_path: __main__.Maze\n": "__main__.Maze",
    }.items():
        config.write_text(text)
        assert needs_program(config) == lacks


@given(st.dictionaries(st.text(), st.none() | st.booleans() | st.floats() | st.integers()))
def test_a_row_is_the_same_as_itself_after_json(row):
    assert row_differences(row, json.loads(json.dumps(row))) == []
    assert compared(row).keys() <= row.keys()
