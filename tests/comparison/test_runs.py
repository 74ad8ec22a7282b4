"""A run is read whatever is missing, torn or not a number; damaged files are named."""

import json
import math
from pathlib import Path

import pytest

from esper_lightning.comparison.runs import find_runs, identity, read_metrics, read_run
from tests.comparison.conftest import KILLED


def test_settings_returns_and_end_of_a_run_are_read(make_run):
    run = read_run(make_run("a", seed=3, evaluations=[1, 2, 3, 4, 5]))
    assert (run.seed, run.env_steps, run.budget, run.ended) == (3, 10_000, 10_000, "finished")
    assert run.settings["env.class_path"] == "esper_lightning.CartPole"
    assert run.settings["env.num_envs"] == 10
    assert run.settings["ppo.learning_rate"] == 1e-3
    assert not [name for name in run.settings if "seed" in name or "logger" in name]
    assert run.at(10_000, "evaluation") == 5
    assert run.at(7_000, "evaluation") == 3  # the latest, of 6,000
    assert run.at(1_000, "evaluation") is None
    assert run.at(7_000, "rollout") == 7


def test_beyond_its_last_row_a_run_has_no_score(make_run):
    run = read_run(make_run("a", returns=[1, 2, 3, 4], state="running", crash=KILLED))
    assert (run.ended, run.how) == ("died", "died: the process is gone: SIGKILL")
    assert run.at(4_000, "rollout") == 4
    assert run.at(4_001, "rollout") is None


def test_a_long_cause_of_a_death_is_cut_visibly(make_run):
    crash = {"cause": "vanished", "error": {"message": "no room " * 20}}
    how = read_run(make_run("a", state="running", crash=crash)).how
    assert how.startswith("died: no room no room")
    assert how.endswith(" no room...")


def test_a_torn_last_line_is_skipped(make_run):
    directory = make_run("a", state="running", crash=KILLED)
    history = directory / "rank0" / "history.jsonl"
    history.write_bytes(history.read_bytes()[:-9])
    assert read_run(directory).env_steps == 9_000


def test_a_damaged_history_is_named(make_run):
    directory = make_run("a")
    (directory / "rank0" / "history.jsonl").write_text('{"iteration": 1}\n{"iter\n{}\n')
    with pytest.raises(ValueError, match=r"a/rank0/history\.jsonl:2 must be a JSON object"):
        read_run(directory)


def test_rows_without_a_return_are_skipped(make_run):
    directory = make_run("a", returns=[1, 2])
    more = '{"iteration": 3}\n{"env_steps": null, "rollout/episode_return_mean": 9}\n{}\n'
    more += '{"env_steps": "3000", "rollout/episode_return_mean": 9}\n'
    with (directory / "rank0" / "history.jsonl").open("a") as history:
        history.write(more)
    assert read_run(directory).measured("rollout") == 2_000


def test_a_return_that_is_not_finite_is_no_score(make_run):
    diverged = read_run(make_run("a", returns=[None, 2, math.nan, 4, math.inf, math.nan]))
    assert diverged.measured("rollout") == 4_000
    assert diverged.at(3_000, "rollout") is None
    assert diverged.at(4_000, "rollout") == 4
    assert diverged.at(6_000, "rollout") is None
    assert read_run(make_run("b", returns=[None, None])).measured("rollout") == 0


@pytest.mark.parametrize(
    ("reached", "state", "budget", "ended"),
    [
        (10, "finished", 10_000, "finished"),
        (10, "finished", 10_999, "finished"),  # less than an iteration is left
        (9, "finished", 11_000, "stopped"),
        (9, "finished", 10_000, "stopped"),  # a whole iteration is left
        (9, "finished", None, "finished"),  # the Trainer's limits
        (9, "running", 10_000, "running"),
        (9, "unknown", 11_000, "unknown"),
        (10, "unknown", 10_000, "finished"),
    ],
)
def test_budget_and_state_of_the_process_say_how_a_run_ended(
    make_run, reached, state, budget, ended
):
    run = read_run(make_run("a", returns=[1] * reached, state=state, budget=budget))
    assert run.ended == ended


def test_a_run_that_left_only_its_config_died(make_run):
    directory = make_run("a")
    for path in (directory / "rank0").iterdir():
        path.unlink()
    (directory / "rank0").rmdir()
    run = read_run(directory)
    assert (run.ended, run.env_steps, run.measured("rollout")) == ("died", 0, 0)


MANY = "model: {seed: 0, total_env_steps: many}"


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "a: [", "model: 3", "model: {seed: x}", "model: {seed: true}", "\0", MANY],
)
def test_a_config_that_cannot_be_read_is_named(make_run, content):
    directory = make_run("a")
    config = directory / "config.yaml"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(ValueError, match=r"a/config\.yaml"):
        read_run(directory)


def test_runs_are_found_once_and_in_order(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(f"runs/a/seed{k}", seed=k) for k in (10, 9)]
    (tmp_path / "runs" / "empty").mkdir()
    assert find_runs([tmp_path / "runs", runs[0]]) == runs[::-1]
    assert find_runs([Path("runs"), *runs]) == [run.relative_to(tmp_path) for run in runs[::-1]]
    with pytest.raises(ValueError, match="RUN must be a run directory"):
        find_runs([tmp_path / "runs" / "empty"])
    with pytest.raises(ValueError, match="nowhere"):
        find_runs([tmp_path / "nowhere"])


def test_rows_that_are_repeated_or_out_of_order_are_named(make_run):
    directory = make_run("a", evaluations=[1, 2, 3])
    history = directory / "rank0" / "history.jsonl"
    rows = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(b"".join([*rows[5:], *rows]))
    run = read_run(directory)
    assert [point.env_steps for point in run.points["rollout"]] == list(range(1000, 11_000, 1000))
    assert run.env_steps == 10_000
    (remark,) = run.remarks
    assert "of 15 rows, 5 repeated, 5 out of order, 1 going back in env_steps." in remark
    assert read_run(make_run("b")).remarks == []


def test_of_rows_at_the_same_env_steps_the_last_counts(make_run):
    directory = make_run("a", returns=[1, 2])
    more = '{"iteration": 2, "env_steps": 2000, "rollout/episode_return_mean": 7}\n'
    with (directory / "rank0" / "history.jsonl").open("a") as history:
        history.write(more)
    assert read_run(directory).points["rollout"] == [(1000, 1), (2000, 7)]
    metrics = read_metrics(directory / "rank0" / "history.jsonl")
    assert metrics["rollout/episode_return_mean"] == [(1000, 1), (2000, 7)]


ODD = ("5", True, None, [], {}, -5, 1e300, "NaN", 10**30, [[1]])


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize(
    "name", ["iteration", "env_steps", "time_s", "rollout/episode_return_mean"]
)
def test_values_of_another_type_are_not_read_as_numbers(make_run, name, odd):
    directory = make_run("a", returns=[1, 2, 3])
    history = directory / "rank0" / "history.jsonl"
    rows = [json.loads(line) for line in history.read_bytes().splitlines()]
    history.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows[:2], rows[2] | {name: odd}])
    )
    run = read_run(directory)
    assert run.env_steps == (2000 if name == "env_steps" else 3000)
    assert math.isfinite(run.time_s)
    assert len(run.points["rollout"]) == 2 + (
        name in ("iteration", "time_s")
        or (name != "env_steps" and odd in (-5, 1e300, "NaN", 10**30))
    )


@pytest.mark.parametrize(
    "content",
    [
        "[" * 10_000,
        "&a [*a]",
        "model: &a {seed: 0, x: *a}",
        "model: {a0: &a0 [x, x]"
        + "".join(f", a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 40))
        + "}",
        "a0: &a0 {k: 1}\n"
        + "".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}\n" for k in range(1, 40)),
        "model: {seed: " + "9" * 5000 + "}",
        "model: {seed: 0, x: !!timestamp x}",
        "model: {seed: 0, x: !!int ''}",
        "model: {seed: 0, x: !!bool x}",
        "model: {seed: 0, x: 2001-99-99}",
        "model: {seed: 0, x: !!python/object/apply:os.system [true]}",
        "model: " + "x" * 10**6,
    ],
    ids=lambda content: content[:30],
)
def test_a_config_with_entries_without_end_is_named(make_run, content):
    directory = make_run("a")
    (directory / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"a/config\.yaml") as caught:
        read_run(directory)
    assert "\n" not in str(caught.value)


def test_keys_of_a_config_may_have_any_type(make_run):
    directory = make_run("a")
    with (directory / "config.yaml").open("a") as config:
        config.write("other: {1: a, x: b, null: [[{1: a, x: b}]], 2001-01-01: .nan}\n")
    run = read_run(directory)
    assert run.settings["other.1"] == "a"
    assert json.loads(identity(dict(run.settings)))


def test_folders_that_contain_themselves_are_searched_once(make_run, tmp_path):
    runs = [make_run("runs/a"), make_run("runs/b")]
    for k in range(3):
        (tmp_path / "runs" / f"loop{k}").symlink_to(tmp_path / "runs")
    assert find_runs([tmp_path / "runs"]) == runs
