"""Scores are averaged over exactly the seeds, budgets and places that are named."""

import math

import pytest

from esper_lightning.comparison.runs import read_run
from esper_lightning.comparison.scores import compare
from esper_lightning.comparison.text import describe
from esper_lightning.comparison.variants import group
from tests.comparison.conftest import KILLED

FAST = {"learning_rate": 3e-3}
BASE_NAME, FAST_NAME = "ppo.learning_rate=0.001", "ppo.learning_rate=0.003"


def comparison(*directories, **options):
    return compare(group([read_run(directory) for directory in directories]), **options)


def pairs(make_run, seeds=range(3), **fast):
    """Runs of two variants, whose returns at the end are 10 + seed, and twice that."""
    base = [make_run(f"base/{k}", seed=k, returns=[k + i for i in range(1, 11)]) for k in seeds]
    other = [
        make_run(
            f"fast/{k}", seed=k, settings=FAST, returns=[2 * (k + i) for i in range(1, 11)], **fast
        )
        for k in seeds
    ]
    return [*base, *other]


def test_finished_runs_are_compared_at_the_end_alone(make_run):
    result = comparison(*pairs(make_run))
    (place,) = result.places
    assert (place.env_steps, place.is_end, place.seeds) == (10_000, True, [0, 1, 2])
    assert place.left_out == []
    base, fast = place.rows
    assert (base.name, base.score, base.improvement) == (BASE_NAME, [10, 11, 12], None)
    assert (fast.name, fast.score) == (FAST_NAME, [20, 22, 24])
    assert base.interquartile_mean.value == 11  # of three seeds none is trimmed
    assert fast.improvement == (1.0, 1.0, 1.0)
    curve = result.curves[FAST_NAME]
    assert curve.env_steps == [k * 1000 for k in range(1, 11)]
    assert curve.value == [2 * (1 + i) for i in range(1, 11)]


def test_the_baseline_may_be_any_variant(make_run):
    result = comparison(*pairs(make_run), baseline=FAST_NAME)
    base, fast = result.places[0].rows
    assert base.improvement == (0.0, 0.0, 0.0)
    assert fast.improvement is None
    with pytest.raises(ValueError, match=r"--baseline must be one of .*0\.003, got 'fast'"):
        comparison(*pairs(make_run, seeds=(7,)), baseline="fast")


def test_a_killed_run_has_no_score_at_the_end(make_run):
    killed = make_run(
        "fast/3", seed=3, settings=FAST, returns=[1, 2, 3, 99], state="running", crash=KILLED
    )
    result = comparison(*pairs(make_run), make_run("base/3", seed=3), killed)
    end, everywhere = result.places
    assert (end.env_steps, end.seeds) == (10_000, [0, 1, 2])
    assert end.left_out == [f"seed 3: known up to 4,000 in {FAST_NAME}"]
    assert [row.score for row in end.rows] == [[10, 11, 12], [20, 22, 24]]
    assert (everywhere.env_steps, everywhere.is_end) == (4_000, False)
    assert everywhere.seeds == [0, 1, 2, 3]
    assert [row.score for row in everywhere.rows] == [[4, 5, 6, 4], [8, 10, 12, 99]]
    assert result.curves[FAST_NAME].seeds == [0, 1, 2]
    text = describe(result)
    (line,) = [line for line in text.splitlines() if "fast/3" in line]
    assert "4,000 †" in line
    assert "died: the process is gone: SIGKILL" in line
    assert "they may have been the worse ones" in text


def test_a_variant_whose_runs_all_died_does_not_cost_the_others_their_scores(make_run):
    dead = [
        make_run(f"dead/{k}", seed=k, settings={"learning_rate": 9}, returns=[1, 2], crash=KILLED)
        for k in range(3)
    ]
    result = comparison(*pairs(make_run), *dead)
    end, everywhere = result.places
    assert [row.name for row in end.rows] == [BASE_NAME, FAST_NAME]
    assert end.left_out == ["ppo.learning_rate=9: none of its runs has a return there"]
    assert [len(row.score) for row in everywhere.rows] == [3, 3, 3]
    assert everywhere.env_steps == 2_000
    assert result.curves["ppo.learning_rate=9"].env_steps == [1_000, 2_000]


def test_without_a_run_of_the_baseline_at_the_end_there_is_no_improvement(make_run):
    dead = make_run("base/0", returns=[1, 2], crash=KILLED)
    result = comparison(dead, make_run("fast/0", settings=FAST))
    end, everywhere = result.places
    assert [row.improvement for row in end.rows] == [None]
    assert everywhere.rows[1].improvement == (0.5, None, None)
    assert describe(result)


def test_a_long_cause_of_death_stays_in_its_cell(make_run):
    crash = {"error": {"type": "OutOfMemoryError", "message": "a | b\n" * 99}}
    text = describe(comparison(make_run("a", returns=[1], crash=crash)), markdown=True)
    (line,) = [line for line in text.splitlines() if "OutOfMemoryError" in line]
    assert line.count("|") - line.count("\\|") == 8
    assert len(line) < 300


def test_where_all_runs_died_there_is_no_end(make_run):
    runs = [make_run("a", returns=[1, 2, 3], crash=KILLED)]
    runs += [make_run("b", returns=[1, 2], settings=FAST, crash=KILLED)]
    (place,) = comparison(*runs).places
    assert (place.env_steps, place.is_end) == (2_000, False)


def test_a_run_without_any_return_is_named(make_run):
    empty = make_run("fast/3", seed=3, settings=FAST, returns=[], state="running", crash=KILLED)
    (place,) = comparison(*pairs(make_run), make_run("base/3", seed=3), empty).places
    assert place.seeds == [0, 1, 2]
    assert place.left_out == [f"seed 3: known up to 0 in {FAST_NAME}"]
    with pytest.raises(ValueError, match="Runs must have a return of rollouts"):
        comparison(make_run("x", returns=[None]), score="rollout")


def test_missing_seeds_are_named_and_omitted_from_every_variant(make_run):
    more = make_run("base/7", seed=7, returns=[1000] * 10)
    (place,) = comparison(*pairs(make_run), more).places
    assert place.seeds == [0, 1, 2]
    assert place.left_out == [f"seed 7: missing in {FAST_NAME}"]
    assert place.rows[0].score == [10, 11, 12]


def test_other_budgets_are_named_and_compared_where_every_run_arrived(make_run):
    long = [
        make_run(f"long/{k}", seed=k, budget=20_000, returns=[k + i for i in range(1, 21)])
        for k in range(3)
    ]
    result = comparison(*pairs(make_run)[:3], *long)
    (place,) = result.places
    assert place.env_steps == 10_000
    assert [row.score for row in place.rows] == [[10, 11, 12]] * 2
    assert [row.name for row in place.rows] == ["total_env_steps=10000", "total_env_steps=20000"]
    note = result.notes[0]
    assert note.startswith("Budgets differ")
    assert "total_env_steps=20000: 20000 env steps" in note


def test_a_longer_run_that_died_after_the_common_end_is_compared(make_run):
    long = make_run("long/0", budget=20_000, returns=range(1, 13), state="running", crash=KILLED)
    (place,) = comparison(make_run("base/0"), long).places
    assert (place.env_steps, [row.score for row in place.rows]) == (10_000, [[10], [10]])


def test_runs_that_stopped_early_are_compared_where_every_run_arrived(make_run):
    runs = [make_run("a", returns=[1] * 5), make_run("b", returns=[2] * 7, settings=FAST)]
    (place,) = comparison(*runs).places
    assert place.env_steps == 5_000


def test_evaluations_score_all_runs_or_none(make_run):
    evaluated = [
        make_run("a", evaluations=[100, 200, 300, 400, 500]),
        make_run("b", settings=FAST, evaluations=[1, 2, 3, 4, 5]),
    ]
    result = comparison(*evaluated)
    assert (result.score, result.notes) == ("evaluation", [])
    assert [row.score for row in result.places[0].rows] == [[500], [5]]
    without = make_run("c", settings={"learning_rate": 1})
    result = comparison(*evaluated, without)
    assert result.score == "rollout"
    assert str(without) in result.notes[0]
    assert [row.score for row in result.places[0].rows] == [[10]] * 3
    assert "no run has evaluations" in comparison(without).notes[0].lower()
    forced = comparison(*evaluated, without, score="evaluation").places[0]
    assert [row.score for row in forced.rows] == [[500], [5]]


def test_a_run_that_diverged_has_no_score_at_the_end(make_run):
    bad = make_run("fast/3", seed=3, settings=FAST, returns=[1, 2, 3] + [math.nan] * 7)
    end, everywhere = comparison(*pairs(make_run), make_run("base/3", seed=3), bad).places
    assert end.seeds == [0, 1, 2]
    assert everywhere.env_steps == 3_000


def test_a_curve_begins_where_every_run_has_a_return(make_run):
    runs = [make_run(f"a/{k}", seed=k, returns=[None] * k + [9 - k] * (10 - k)) for k in range(3)]
    (curve,) = comparison(*runs).curves.values()
    assert curve.env_steps == [k * 1000 for k in range(3, 11)]
    assert curve.value == [8.0] * 8


def test_long_histories_have_curves_of_bounded_length(make_run):
    run = make_run("a", returns=range(1, 1001), budget=1_000_000)
    curve = comparison(run).curves["a"]
    assert len(curve.env_steps) == 200
    assert (curve.env_steps[0], curve.env_steps[-1]) == (1_000, 1_000_000)
    assert curve.value == [steps / 1_000 for steps in curve.env_steps]
    assert curve.low is None


def test_finished_runs_of_one_budget_are_each_compared_at_their_own_end(make_run):
    """The last whole step of all environments may be a little before the budget."""
    whole, before = make_run("a"), make_run("b", settings=FAST)
    history = before / "rank0" / "history.jsonl"
    history.write_text(history.read_text().replace('"env_steps":10000', '"env_steps":9990'))
    result = comparison(whole, before)
    (place,) = result.places
    assert [row.score for row in place.rows] == [[10], [10]]
    assert any("each compared at its own: 9,990, 10,000" in note for note in result.notes)
