"""``esper compare`` as a user meets it."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from esper_lightning.cli.main import main
from tests.comparison.conftest import KILLED, make_run  # noqa: F401 - a fixture

BLOCKED = """
import sys
class NotThere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "lightning", "jsonargparse", "jaxtyping"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotThere())
sys.modules[sys.argv[1]] = None
from esper_lightning.cli.main import main
main(["compare", *sys.argv[2:]])
"""


@pytest.fixture
def runs(make_run):  # noqa: F811 - the fixture
    fast = {"learning_rate": 3e-3}
    for k in range(5):
        make_run(f"runs/base/seed{k}", seed=k, returns=[k + i for i in range(10)])
        died = {"returns": range(4), "state": "running", "crash": KILLED} if k == 2 else {}
        make_run(f"runs/fast/seed{k}", **({"seed": k, "settings": fast} | died))


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def compare(capsys, *arguments) -> str:
    main(["compare", *arguments])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_the_terminal_gets_tables(runs, capsys):
    said = compare(capsys, "runs").splitlines()
    assert said[0] == "CartPole: return by rollout/episode_return_mean (rollout, actions drawn)"
    assert "At 10,000 env steps (the end), seeds 0 1 3 4" in said
    assert "At 4,000 env steps (the last place that every run reached), seeds 0 1 2 3 4" in said
    assert sum("runs/" in line for line in said) == 10


def test_an_earlier_comparison_is_replaced_where_a_link_leads(runs, capsys, tmp_path):
    compare(capsys, "runs", "--output", "out")
    (tmp_path / "out" / "comparison.md").rename(tmp_path / "shared.md")
    (tmp_path / "out" / "comparison.md").symlink_to(tmp_path / "shared.md")
    compare(capsys, "runs", "--output", "out")
    assert (tmp_path / "out" / "comparison.md").is_symlink()
    assert "(comparison.png)" in (tmp_path / "shared.md").read_text()


@pytest.mark.parametrize("name", ["comparison.md", "comparison.png"])
def test_files_that_no_comparison_wrote_are_not_replaced(runs, capsys, tmp_path, name):
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / name
    if name == "comparison.md":
        theirs.write_text("# CartPole: return by rollout/episode_return_mean\n\nMy own words.")
    else:
        Figure(figsize=(1, 1)).savefig(theirs)
    before = theirs.read_bytes()
    said = fails(capsys, "runs", "--output", "out")
    assert f"--output must name a new file or an earlier comparison, got 'out/{name}'." in said
    assert theirs.read_bytes() == before
    assert [path.name for path in theirs.parent.iterdir()] == [name]


def test_a_folder_without_a_name_is_refused(runs, capsys):
    assert "--output must name a directory, got ''." in fails(capsys, "runs", "--output", "")


def test_files_are_written(runs, capsys, tmp_path):
    compare(capsys, "runs", "--output", "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| ppo.learning_rate=0.003 | 2 | 4,000 † |" in text
    assert "(comparison.png)" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    picture = (tmp_path / "out" / "comparison.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) > (1000, 400)
    assert not list((tmp_path / "out").glob(".*"))


def test_programs_get_strict_json(runs, capsys):
    content = json.loads(compare(capsys, "runs", "--json"), parse_constant=pytest.fail)
    assert [place["seeds"] for place in content["places"]] == [[0, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert content["places"][0]["rows"][1]["interquartile_mean"]["value"] == 10
    killed = content["variants"][1]["runs"]["2"]
    assert (killed["env_steps"], killed["ended"]) == (4_000, "died")


def test_one_run_is_a_comparison_without_intervals(runs, capsys):
    said = compare(capsys, "runs/base/seed0")
    assert "One seed: there is no interval." in said
    assert "baseline" not in said


def test_an_unreadable_run_is_left_out_by_name(runs, capsys, tmp_path):
    (tmp_path / "runs" / "base" / "seed1" / "config.yaml").write_text("{")
    said = compare(capsys, "runs")
    assert "Left out, unreadable: runs/base/seed1/config.yaml must be a readable" in said
    assert "Left out, seed 1: missing in ppo.learning_rate=0.001." in said
    assert "seed1/config.yaml" in fails(capsys, "runs/base/seed1")


def test_mistakes_are_one_line(runs, capsys, make_run):  # noqa: F811 - the fixture
    assert "got 'nowhere'" in fails(capsys, "nowhere")
    assert "--baseline must be one of" in fails(capsys, "runs", "--baseline", "none")
    make_run("runs/other/seed0", env={"num_envs": 3})
    assert "model.env.num_envs must be the same in all runs" in fails(capsys, "runs")


def started(*arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, *arguments],
        env={**os.environ, "MPLCONFIGDIR": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_works_without_torch(runs):
    done = started("tensorboard", "runs", "--output", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "seeds 0 1 3 4" in done.stdout


@pytest.mark.parametrize("absent", ["scipy", "matplotlib"])
def test_what_is_not_installed_is_named(runs, absent):
    done = started(absent, "runs", "--output", "out")
    assert done.returncode == 2
    how = "pip install 'esper_lightning[compare]'"
    assert done.stderr == f"esper: error: esper compare needs {absent}: {how}\n"
