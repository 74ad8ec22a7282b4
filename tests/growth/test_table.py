"""``esper evaluate`` on a policy that grows networks."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from esper_lightning import MLP, PPO, PPOConfig
from esper_lightning.cli.main import main
from esper_lightning.comparison.statistics import interquartile_mean
from esper_lightning.envs import CartPole, Morphogenesis
from esper_lightning.envs.morphogenesis.baselines import BASELINES
from esper_lightning.envs.morphogenesis.population import Population
from esper_lightning.growth.play import fresh_hosts, play, play_trained
from esper_lightning.growth.table import table

CPU = torch.device("cpu")
SPEC = Morphogenesis.synthetic(
    num_envs=4,
    image=(1, 4),
    channels=(4, 4),
    kernels=(3, 1),
    pools=(2, 1),
    classes=3,
    epochs=6,
    train_batches=2,
    batch_size=8,
    validation_size=32,
)
POLICIES = ["PPO", "PPO, actions drawn", *BASELINES]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["esper"])


@pytest.fixture
def saved(make_trainer):
    """A function that saves a checkpoint of an environment, and returns the model."""

    def save(env) -> PPO:
        ppo = PPOConfig(rollout_steps=2, minibatches=1, epochs=1)
        settings = {"total_env_steps": 2 * env.num_envs, "eval_episodes": 5}
        model, trainer = PPO(env, MLP(hidden_sizes=(8,)), ppo, **settings), make_trainer()
        trainer.fit(model)
        trainer.save_checkpoint("x.ckpt")
        return model

    return save


def evaluate(*arguments) -> None:
    main(["evaluate", "--ckpt_path", "x.ckpt", "--trainer.accelerator", "cpu", *arguments])


def rows(said: str) -> dict[str, list[str]]:
    """Cells of the table by policy."""
    cells = [re.split(r" {2,}", line.strip()) for line in said.splitlines()]
    return {row[0]: row[1:] for row in cells if row[0] in POLICIES}


def test_it_prints_everyone_and_draws_three_episodes(saved, capsys):
    model = saved(SPEC)
    evaluate("--figures", "drawn")
    said = capsys.readouterr().out
    assert "Morphogenesis: mean return " in said
    found = rows(said)
    assert list(found) == POLICIES
    with fresh_hosts(SPEC, hosts=5, device=CPU, seed=0) as hosts:
        env = hosts
    assert f"IQM over the same 5 fresh hosts of {env.host_parameters} parameters" in said
    expected = dict(play_trained(model, env))["PPO"]
    iqm = interquartile_mean(expected.episode_return.numpy())
    assert float(found["PPO"][0]) == pytest.approx(float(iqm), rel=1e-3)
    accuracy = 100 * interquartile_mean(expected.test_accuracy.numpy())
    assert float(found["PPO"][2]) == pytest.approx(float(accuracy), rel=1e-3)
    assert found["never grow"][4:] == ["0", "0 to 0", "0", "0 of 5"]
    for which in ("worst", "median", "best"):
        path = Path("drawn") / f"episode_{which}.png"
        assert f"Figure: {path}" in said
        assert imread(path).std() > 0.05


def test_without_scipy_there_are_plain_means(saved, capsys, monkeypatch):
    model = saved(SPEC)
    monkeypatch.setitem(sys.modules, "scipy", None)
    evaluate()
    said = capsys.readouterr().out
    assert "Plain means: pip install 'esper_lightning[compare]'" in said
    assert "interval" not in said.partition("\n  Plain")[0]
    with fresh_hosts(SPEC, hosts=5, device=CPU, seed=0) as hosts:
        env = hosts
    mean = dict(play_trained(model, env))["PPO"].episode_return.mean().item()
    assert float(rows(said)["PPO"][0]) == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    ("env", "missing", "message"),
    [
        (
            CartPole(num_envs=2),
            None,
            "--figures must be for an environment with figures: Morph",
        ),
        (SPEC, "matplotlib", "--figures must find matplotlib, got 'none'. pip install"),
    ],
)
def test_figures_that_cannot_be_drawn_are_refused(
    saved, capsys, monkeypatch, env, missing, message
):
    saved(env)
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as caught:
        evaluate("--figures", "drawn")
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("drawn").exists()


def test_a_picture_of_somebody_else_is_not_replaced_by_a_figure(saved, capsys, monkeypatch):
    saved(SPEC)
    monkeypatch.setattr(PPO, "validation_step", None)  # nothing could be played
    Path("drawn").mkdir()
    theirs = Figure(figsize=(1, 1))
    theirs.savefig("drawn/episode_best.png")
    before = Path("drawn/episode_best.png").read_bytes()
    with pytest.raises(SystemExit):
        evaluate("--figures", "drawn")
    rule = "--figures must name a new file or an earlier figure of esper"
    assert f"{rule}, got 'drawn/episode_best.png'." in capsys.readouterr().err
    assert Path("drawn/episode_best.png").read_bytes() == before


def test_a_folder_for_figures_that_cannot_be_made_is_refused_before_anything_is_played(
    saved, capsys, monkeypatch
):
    saved(SPEC)
    monkeypatch.setattr(PPO, "validation_step", None)  # nothing could be played
    Path("file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(SystemExit) as caught:
            evaluate("--figures", folder)
        assert caught.value.code == 2
        message = (
            rf"^esper: error: --figures must be a folder that can be made \(.*\), got '{folder}'"
        )
        assert re.search(message, capsys.readouterr().err)


def poisoned(baseline="grow at the start"):
    """Episodes in which the second host diverges, of two policies that play alike."""
    env, rule = SPEC.build(CPU, 1), BASELINES[baseline]

    def poison(obs, mask):
        if (env.hosts.vitals.step == 3).all():
            env.hosts.weights.host[1] = float("nan")
        return rule(env)

    return play(env, poison)


def test_hosts_that_differ_have_plain_means(played_kinds):
    assert table({"x": [played_kinds]}, host_parameters=1).title.startswith("mean over the same 8")
    (row,) = table({"x": [played_kinds]}, host_parameters=1).rows
    assert float(row[1]) == pytest.approx(played_kinds.episode_return.mean().item(), rel=1e-3)
    low, high = map(float, row[2].split(" to "))
    assert low < float(row[1]) < high


@pytest.fixture
def played_kinds():
    population = Population(classes=(2, 3), images_per_class=(40,))
    spec = replace(SPEC, num_envs=8, population=population)
    env = spec.build(CPU, 1)
    return play(env, lambda obs, mask: BASELINES["never grow"](env))


def test_a_host_that_diverges_is_counted():
    played = poisoned()
    (row,) = table({"x": [played, played]}, host_parameters=1).rows
    assert row[-1] == "2 of 8"
