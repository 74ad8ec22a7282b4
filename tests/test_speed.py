"""Measurements of speed: what a table says is what the runs took."""

import dataclasses
import json
import re
import time
from pathlib import Path

import pytest
import torch

from esper_lightning import MLP, Composed, PPOConfig
from esper_lightning.cli.main import main
from esper_lightning.envs import CartPole
from esper_lightning.envs.base import EnvSpec
from esper_lightning.speed import Speed, measure_speed, other_sizes, speed_as_data, speed_table
from esper_lightning.training.settings import PPOSettings

STEP_S = 0.02
SMALL = PPOConfig(rollout_steps=4, minibatches=1, epochs=1)


@dataclasses.dataclass(frozen=True)
class Slow(EnvSpec):
    """CartPole behind an adapter whose steps take a known time."""

    num_envs: int = 2

    def spaces(self):
        return CartPole().spaces()

    def build(self, device, seed):
        env = CartPole(num_envs=self.num_envs).build(device, seed)

        class Adapter:
            reset = staticmethod(env.reset)
            state_dict, load_state_dict = env.state_dict, env.load_state_dict

            @staticmethod
            def step(action):
                time.sleep(STEP_S)
                return env.step(action)

        return Adapter()


def test_the_time_of_steps_is_that_of_the_environment() -> None:
    settings = PPOSettings(env=Slow(), policy=MLP(hidden_sizes=(4,)), ppo=SMALL)
    off, own, other = measure_speed(settings, accelerator="cpu", num_envs=[4], seconds=0.05)
    assert [speed.compile for speed in (off, own, other)] == ["off", "auto", "auto"]
    assert [speed.num_envs for speed in (off, own, other)] == [2, 2, 4]
    for speed in (off, own, other):
        slept_ms = 4 * STEP_S * 1e3
        environment, rollout = speed.stages_ms["environment"], speed.stages_ms["rollout"]
        assert slept_ms <= environment <= rollout <= speed.iteration_ms
        assert 0.0 < speed.policy_ms < slept_ms
        assert speed.env_steps_per_s == speed.env_steps / speed.iteration_ms * 1e3
    text = speed_table([off, own, other], settings)
    assert "The environments take" in text
    data = json.loads(json.dumps(speed_as_data([off, own, other], settings)))["speeds"]
    assert (data[2]["num_envs"], data[2]["policy_ms"]) == (4, other.policy_ms)


class Sleeper(torch.nn.Module):
    """An encoder whose calls take a known time where they run eagerly."""

    def __init__(self, space):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, obs):
        time.sleep(STEP_S)
        return self.linear(obs)


def test_the_time_of_the_policy_is_that_of_its_calls() -> None:
    policy = Composed(encoder="tests.test_speed:Sleeper")
    settings = PPOSettings(env=CartPole(num_envs=2), policy=policy, ppo=SMALL, compile="off")
    for speed in measure_speed(settings, accelerator="cpu", num_envs=[2], seconds=0.01):
        slept_ms = 4 * STEP_S * 1e3
        assert slept_ms <= speed.policy_ms
        assert "environment" not in speed.stages_ms


def speed(mode: str, num_envs: int, iteration_ms: float, stage_ms: float) -> Speed:
    stages = dict.fromkeys(("rollout", "advantages", "update", "logging"), stage_ms)
    return Speed(mode, num_envs, num_envs * 32, 1.0, iteration_ms, stages, 0.5)  # pyright: ignore[reportArgumentType]


def test_suggestions_follow_the_figures() -> None:
    settings = PPOSettings(env=CartPole(num_envs=64))
    off, own = speed("off", 64, 40.0, 10.0), speed("auto", 64, 10.0, 1.0)
    text = speed_table([off, own, speed("auto", 256, 12.0, 2.5)], settings)
    assert "compile='auto' is 4.0 times as fast as off." in text
    assert re.search(r"^  policy alone +0\.5 +0\.5$", text, re.MULTILINE)
    assert "\npolicy alone: it acts for the steps of a rollout without environments" in text
    assert "Trainer and callbacks take 60% of an iteration" in text
    assert "num_envs=256 gives 3.3 times the env-steps/s, with 8,192 instead of 2,048" in text
    text = speed_table([off, own, speed("auto", 16, 9.0, 2.0)], settings)
    assert "Other numbers of environments are not much faster." in text


def sizes(found: list[PPOSettings]) -> list[int]:
    return [each.env.num_envs for each in found]


def test_numbers_that_were_not_asked_for_are_within_the_step_budget() -> None:
    settings = PPOSettings(env=CartPole(num_envs=64))
    assert sizes(other_sizes(settings)) == [4, 16, 256, 1024]
    assert sizes(other_sizes(dataclasses.replace(settings, total_env_steps=300))) == [4, 16, 256]
    with pytest.raises(ValueError, match=r"at least env\.num_envs = 512, got 300"):
        other_sizes(dataclasses.replace(settings, total_env_steps=300), 512)


def test_numbers_that_do_not_fit_are_skipped_or_refused() -> None:
    settings = PPOSettings(env=CartPole(num_envs=2), ppo=dataclasses.replace(SMALL, minibatches=8))
    assert sizes(other_sizes(settings, [1, 2, 4])) == [4]  # 4 steps are no 8 minibatches
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        measure_speed(settings, num_envs=[0])
    with pytest.raises(ValueError, match="seconds must be"):
        measure_speed(settings, seconds=0.0)


def test_the_command_prints_a_table_and_writes_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", "--model.env", "CartPole", "--model.env.num_envs", "4"]
    words += ["--model.ppo.rollout_steps", "4", "--model.ppo.minibatches", "1"]
    main([*words, "--seconds", "0.01", "--num_envs", "8", "--output", "speed.json"])
    printed = capsys.readouterr().out
    assert "CartPole: 4 environments x 4 steps" in printed
    assert "Trainer and callbacks" in printed
    data = json.loads((tmp_path / "speed.json").read_text())
    assert [one["num_envs"] for one in data["speeds"]] == [4, 4, 8]
    assert data["machine"]["torch"] == torch.__version__
    assert list(tmp_path.iterdir()) == [tmp_path / "speed.json"]
