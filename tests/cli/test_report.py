"""``esper report`` shows one run up to its last iteration, however it ended."""

import json
import math

import pytest

from esper_lightning.cli.main import main
from tests.comparison.conftest import KILLED, make_run  # noqa: F401 - a fixture


def said(capsys, *arguments) -> str:
    main(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_killed_run_is_reported_as_far_as_it_came(make_run, capsys):  # noqa: F811
    run = make_run("a", seed=3, returns=[None, 7, math.nan, 5], evaluations=[9, 8], crash=KILLED)
    lines = said(capsys, run).splitlines()
    assert lines[1] == "CartPole, seed 3: died: the process is gone: SIGKILL"
    assert lines[2].startswith("Trained for 4,000 of 10,000 env steps in ")
    assert "Best of 2: 9 at 2,000 env steps" in lines
    assert "Best of 3: 7 at 2,000 env steps" in lines
    assert "       3,000  nan" in lines


def test_long_curves_are_shown_at_ten_places(make_run, capsys):  # noqa: F811
    lines = said(capsys, make_run("a", returns=range(1, 101), budget=100_000)).splitlines()
    assert "No return of evaluations is known." in lines
    table = lines[lines.index("   env steps  mean return (rollout)") + 1 : -1]
    assert len(table) == 10
    assert (table[0].split(), table[-1].split()) == (["1,000", "1"], ["100,000", "100"])


def test_programs_get_strict_json(make_run, capsys):  # noqa: F811
    run = make_run("a", returns=[1, math.nan])
    content = json.loads(said(capsys, run, "--json"), parse_constant=pytest.fail)
    values = [point["value"] for point in content["points"]["rollout"]]
    assert values == [1, "NaN"]
    assert content["settings"]["ppo.clip"] == 0.2


def test_no_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["report", str(tmp_path)])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("esper: error: ")
