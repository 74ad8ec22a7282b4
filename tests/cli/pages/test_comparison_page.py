"""The page of a comparison shows what its text says, the settings that differ, and all metrics."""

import pytest

from esper_lightning.cli.main import main
from tests.cli.pages.browser import Elements
from tests.comparison.conftest import KILLED, make_run  # noqa: F401 - a fixture


@pytest.fixture
def runs(make_run, tmp_path):  # noqa: F811
    for seed in range(2):
        make_run(f"runs/base/seed{seed}", seed=seed)
        killed = {"returns": range(4), "state": "running", "crash": KILLED} if seed else {}
        make_run(f"runs/fast/seed{seed}", seed=seed, settings={"learning_rate": 3e-3}, **killed)
    return tmp_path / "runs"


def test_variants_scores_and_settings(runs, tmp_path, capsys):
    main(["report", str(runs), "--html", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"Page: {tmp_path / 'page.html'}\n"
    found = Elements((tmp_path / "page.html").read_text())
    texts = found.texts
    assert "CartPole: 2 variants, 4 runs" in texts
    assert {"ppo.learning_rate=0.001", "ppo.learning_rate=0.003", "Settings that differ"} <= {
        *texts
    }
    assert texts[texts.index("ppo.learning_rate") + 1 :][:4] == ["0.001", "0.001", "0.003", "0.003"]
    labels = [a["aria-label"] for a in found.all("svg")]
    assert labels[1:] == ["rollout/episode_return_mean"]
    crosses = [a for a in found.all("path") if "cross" in (a["class"] or "")]
    assert len(crosses) == 1


def test_several_runs_need_a_file(runs, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(runs), "--html"])
    assert "must name a file" in capsys.readouterr().err


def test_several_runs_need_a_page(runs, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(runs / "base"), str(runs / "fast")])
    assert "esper compare compares runs" in capsys.readouterr().err
