"""The text of a comparison has rows, remarks and the ends of runs."""

import pytest

from esper_lightning.comparison.text import describe
from tests.comparison.conftest import KILLED
from tests.comparison.test_scores import BASE_NAME, FAST, FAST_NAME, comparison, pairs


def test_a_row_has_mean_interquartile_mean_and_probability_of_improvement(make_run):
    returns = {0: 8, 1: 10, 2: 10, 3: 100}
    runs = [make_run(f"a/{k}", seed=k, returns=[0] * 9 + [r]) for k, r in returns.items()]
    runs += [make_run(f"b/{k}", seed=k, settings=FAST, returns=[0] * 9 + [9]) for k in returns]
    lines = describe(comparison(*runs)).splitlines()
    base, fast = (next(x for x in lines if x.strip().startswith(n)) for n in (BASE_NAME, FAST_NAME))
    assert base.split()[1:4] == ["4", "32", "10"]
    assert base.endswith("baseline              -")
    assert fast.split()[1:4] == ["4", "9", "9"]
    assert "0.25" in fast.split()


@pytest.mark.parametrize(("seeds", "said"), [(1, "One seed: there"), (4, "of 4 seeds"), (5, "")])
def test_a_remark_says_where_there_are_few_seeds(make_run, seeds, said):
    text = describe(comparison(*pairs(make_run, seeds=range(seeds))))
    remarks = [line for line in text.splitlines() if "too narrow" in line or "One seed" in line]
    assert len(remarks) == bool(said)
    assert all(said in remark for remark in remarks)


def test_the_latest_return_of_a_run_and_how_the_run_ended_are_printed(make_run):
    runs = [
        make_run("a", returns=[1, 2, 7]),
        make_run("b", settings=FAST, returns=[3, 5], crash=KILLED),
    ]
    lines = describe(comparison(*runs)).splitlines()
    a, b = (next(line for line in lines if f" {run} " in line) for run in runs)
    assert "7 at 3,000" in a
    assert "5 at 2,000" in b
    assert "2,000 †" in b
