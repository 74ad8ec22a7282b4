"""A sweep searches, ends hopeless runs early, continues when called again, and judges the best."""

import fcntl
import json
import os
import sys
from pathlib import Path

import optuna
import pytest

from esper_lightning.cli import jobs, sweep
from esper_lightning.cli.main import main
from esper_lightning.forensics.files import read_json_lines
from esper_lightning.forensics.processes import identify
from tests import forked

CARTPOLE = str(Path(__file__).parents[2] / "configs" / "cartpole.yaml")
# In place of esper, without torch: the return of a run is best where ``clip`` is 0.3.
STAND_IN = """
import json, sys, time
from pathlib import Path
words = sys.argv[1:]
if words[0] == "compare":
    print("compared", *words[1:], flush=True)
    sys.exit()
given = dict(word[2:].split("=", 1) for word in words if word.startswith("--model.ppo."))
clip = float(given.get("model.ppo.clip", 0.2))
if Path("first_is_best").exists() and "trial0/" in str(words):
    clip = 0.3
if clip > float(Path("fails_above").read_text()):
    sys.exit("esper: error: clip must be less")
seed = int(words[words.index("--model.seed") + 1])
run = Path(words[words.index("--run_dir") + 1])
(run / "rank0").mkdir(parents=True, exist_ok=True)
env = {"class_path": "CartPole", "init_args": {"num_envs": 4}}
model = {"env": env, "seed": seed, "total_env_steps": 1000, "ppo": {"clip": clip}}
(run / "config.yaml").write_text(json.dumps({"model": model}))
with (run / "rank0" / "history.jsonl").open("w") as history:
    for k in range(1, 11):
        row = {"iteration": k, "env_steps": 100 * k}
        row["rollout/episode_return_mean"] = seed + 10 * k * (1 - abs(clip - 0.3))
        print(json.dumps(row), file=history, flush=True)
        if k == 5 and clip > float(Path("hangs_above").read_text()):
            time.sleep(20)
(run / "rank0" / "process.json").write_text(json.dumps({"state": "finished"}))
with open("asked", "a") as asked:
    print(run, file=asked)
"""
SEARCH = ("--search", "model.ppo.clip=0.1..0.9")


@pytest.fixture
def launch(tmp_path, monkeypatch, capfd):
    """Gives a function that sweeps with the stand-in, and returns exit status and output."""
    (tmp_path / "esper.py").write_text(STAND_IN)
    monkeypatch.setattr(jobs, "_ESPER", [sys.executable, "-ISE", str(tmp_path / "esper.py")])
    monkeypatch.setattr(jobs, "_LOOK_S", 0.02)
    monkeypatch.chdir(tmp_path)
    Path("hangs_above").write_text("9")
    Path("fails_above").write_text("9")

    def launch(*words: str, output: str = "out", search=SEARCH) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["sweep", "--config", CARTPOLE, *search, "--output", output, *words])
        return end.value.code, *capfd.readouterr()

    return launch


def trials(output="out") -> list[optuna.trial.FrozenTrial]:
    return sweep._open_study(Path(output)).get_trials()


def asked() -> list[str]:
    return Path("asked").read_text().split()


def test_the_best_of_the_trials_is_judged_by_further_seeds(launch):
    status, out, _ = launch("--trials", "3", "--seeds", "0", "4", "--judges", "7")
    assert status == 0
    found = trials()
    assert asked()[:2] == ["out/trial0/seed0", "out/trial0/seed4"]
    for trial in found:  # the mean of the two seeds at the end
        clip = trial.params["model.ppo.clip"]
        assert trial.value == pytest.approx(2 + 100 * (1 - abs(clip - 0.3)))
    best = max(found, key=lambda trial: trial.value)
    assert f"  trial {best.number}: {best.value:.4g} with --model.ppo.clip=" in out
    assert asked()[6:] == ["out/judged/base/seed7", f"out/judged/trial{best.number}/seed7"]
    assert f"compared out/judged/base out/judged/trial{best.number} --output out\n" in out
    config = json.loads((Path("out/judged") / f"trial{best.number}/seed7/config.yaml").read_text())
    assert config["model"]["ppo"]["clip"] == best.params["model.ppo.clip"]


def test_a_sweep_that_was_interrupted_chooses_as_one_that_was_not(launch, monkeypatch):
    words = ("--trials", "4", "--seeds", "0", "1", "--judges")
    launch(*words, output="whole")
    Path("asked").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(sweep._Sweep, "_execute", interrupted_at("trial1/seed1"))
        assert launch(*words)[0] == 1
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "RUNNING"]
    assert launch(*words)[0] == 0
    assert [(t.params, t.value) for t in trials()] == [(t.params, t.value) for t in trials("whole")]
    assert asked().count("out/trial1/seed0") == 1  # it was finished


def interrupted_at(run):
    execute = sweep._Sweep._execute

    def stops(self, job, prunes=None):
        if str(job.run).endswith(run):
            raise KeyboardInterrupt
        return execute(self, job, prunes)

    return stops


def test_more_trials_are_added_to_those_that_are_done(launch):
    launch("--trials", "1", "--seeds", "0", "--judges")
    launch("--trials", "2", "--seeds", "0", "--judges", "--jobs", "2")
    assert asked() == ["out/trial0/seed0", "out/trial1/seed0"]


def test_a_run_that_is_worse_than_most_before_is_ended_early(launch, monkeypatch):
    monkeypatch.setattr(sweep, "_TRIALS_BEFORE_PRUNING", 1)
    monkeypatch.setattr(jobs, "_LOOK_S", 0.5)  # the first run is over before the second look
    Path("hangs_above").write_text("0.5")  # for so long that all its rows are read
    Path("first_is_best").touch()
    clips = "model.ppo.clip=[0.3, 0.9]"
    words = ("--trials", "4", "--seeds", "0", "1", "--judges")
    status, out, _ = launch(*words, search=("--search", clips))
    assert status == 0
    ended = [trial for trial in trials() if trial.state.name == "PRUNED"]
    assert ended
    for trial in ended:
        assert trial.params == {"model.ppo.clip": "0.9"}
        assert [*trial.intermediate_values] == [10, 20, 30, 40, 50]
        assert not Path(f"out/trial{trial.number}/seed1").exists()
        assert f"trial {trial.number}: - with --model.ppo.clip=0.9 at 50 %: ended early" in out


def test_a_trial_whose_runs_have_no_return_is_no_error(launch, monkeypatch):
    def none(paths):
        raise ValueError("Runs must have a return")

    monkeypatch.setattr(sweep, "compare_runs", none)
    status, out, _ = launch("--trials", "1", "--seeds", "0")
    assert status == 1
    assert "not judged: Runs must have a return" in out


def test_a_trial_that_fails_is_shown_and_stops_no_other(launch):
    Path("fails_above").write_text("0.5")
    status, out, _ = launch("--trials", "4", "--seeds", "0", "--judges")
    assert status == 0
    assert {trial.state.name for trial in trials()} == {"COMPLETE", "FAIL"}
    assert "failed with exit status 1:\n    esper: error: clip must be less" in out


def test_where_no_trial_succeeds_the_sweep_gives_up(launch):
    Path("fails_above").write_text("0")
    status, out, _ = launch("--trials", "9", "--seeds", "0")
    assert status == 1
    assert len(trials()) == 3
    assert "0 of 3 trials finished, 0 ended early, 3 failed." in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--trials", "0"), "--trials must be at least 1, got 0."),
        (("--judges", "1"), "--judges must be other seeds than --seeds, got [1]."),
        (("--seeds", "1", "1"), "--seeds must name each seed once"),
        (("--search", "model.ppo.clip=[1, 2]"), "--search must name each setting once"),
        (("--search", "model.env.num_envs=1..2"), "must name a setting that may differ"),
        (("--config", "cartpol"), "The nearest is 'cartpole'."),
        (("--config", "s3://a/b.yaml"), "--config must name a file on this machine, got 's3://a/"),
        (("--config", "no.yaml"), "--config must name a file of text (No such file or directory)"),
        (("--config", "."), "--config must name a file of text (it is a directory), got '.'."),
        (("--config", "latin"), "--config must name a file of text ('utf-8' codec can't decode"),
    ],
)
def test_mistakes_are_a_line_and_leave_nothing(launch, words, says):
    Path("latin").write_bytes(b"model:  # \xe9")
    status, out, err = launch(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert not Path("out").exists()


def test_a_directory_belongs_to_one_sweep(launch):
    launch("--trials", "1", "--seeds", "0", "--judges")
    assert "sweep.json must be of the same sweep" in launch("--seeds", "1")[2]
    running = Path("out/trial9/seed0/rank0")
    running.mkdir(parents=True)
    process = {**identify(os.getpid()).to_dict(), "state": "running"}
    (running / "process.json").write_text(json.dumps(process))
    assert "out/trial9/seed0 must be a run that has ended" in launch("--seeds", "0")[2]
    with Path("out/sweep.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "--output must be of no sweep that runs" in launch("--seeds", "0")[2]


def test_optuna_is_named_where_it_is_missing(launch, monkeypatch):
    find = sweep.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "optuna" else find(name)
    )
    err = launch()[2]
    assert err == "esper: error: esper sweep needs optuna: pip install 'esper_lightning[sweep]'\n"


@pytest.mark.slow
def test_a_sweep_of_real_runs(tmp_path):
    words = ["--search", "model.ppo.learning_rate=1e-4..1e-2 log", "--output", "out", "--trials=2"]
    words += ["--seeds", "0", "--judges", "1", "--", "--model.total_env_steps", "2_048"]
    words += ["--model.env.num_envs", "8", "--model.compile", "off", "--model.eval_episodes", "4"]
    command = ["-m", "esper_lightning.cli.main", "sweep", "--config", "cartpole", *words]
    done = forked.run(command, cwd=tmp_path, children=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 trials finished, 0 ended early, 0 failed." in done.stdout
    assert "At 2,048 env steps (the end), seeds 1" in done.stdout
    assert (tmp_path / "out" / "comparison.html").exists()
    rows = read_json_lines(tmp_path / "out/trial1/seed0/rank0/history.jsonl")
    assert rows[-1]["env_steps"] == 2048
