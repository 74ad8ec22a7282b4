"""Simulators in JAX. Their packages do not fit beside ours: ``make worlds`` runs these tests."""

from pathlib import Path

import pytest
import torch

from esper_lightning import check_env
from esper_lightning.cli.main import main
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.envs import Brax, Gymnax
from esper_lightning.envs.adapters.jax import JaxSimulator
from esper_lightning.envs.adapters.simulated import SimulatedEnv
from esper_lightning.forensics.files import read_json_lines

jax = pytest.importorskip("jax")
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("default")


def gymnax(name, **kwargs):
    pytest.importorskip("gymnax")
    return Gymnax(id=name, num_envs=4, **kwargs)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar"])
def test_gymnax_keeps_the_contract(name):
    check_env(gymnax(name), steps=30)


def test_brax_keeps_the_contract():
    pytest.importorskip("brax")
    check_env(Brax(id="fast", num_envs=4, time_limit=9), steps=30)


@pytest.mark.parametrize("config", ["breakout", "space_invaders"])
def test_configs_train_one_iteration(config, tmp_path, monkeypatch):
    pytest.importorskip("gymnax")
    monkeypatch.chdir(tmp_path)
    settings = ["--model.env.num_envs", "4", "--model.total_env_steps", "512"]
    main(["fit", "--config", config, *settings, "--model.eval_episodes", "2"])
    (history,) = Path().glob("runs/*/version_0/rank0/history.jsonl")
    assert [row["env_steps"] for row in read_json_lines(history)] == [512]


def test_gymnax_truncates_at_its_time_limit():
    env = gymnax("Pendulum-v1").build(CPU, 0)
    env.reset()
    results = [env.step(torch.zeros(4, 1)) for _ in range(200)]
    assert [t for t, r in enumerate(results) if r.truncated.any()] == [199]
    assert results[-1].episode_length.tolist() == [200] * 4
    assert not any(r.terminated.any() for r in results)


def test_a_seed_decides_the_next_reset_and_all_that_follows():
    env = gymnax("CartPole-v1").build(CPU, 3)

    def played(seed):
        if seed is not None:
            assert env.reseed(seed)
        first = [env.reset()[0]]
        return torch.stack(first + [env.step(torch.ones(4).long()).obs for _ in range(20)])

    built, again, same, other, later = map(played, (None, 3, 3, 4, None))
    assert torch.equal(built, same)
    assert torch.equal(again, same)
    assert not torch.equal(other, same)
    assert not torch.equal(later, other)


def test_an_evaluation_has_at_most_as_many_environments_as_training():
    assert gymnax("CartPole-v1").evaluation_spec(100).num_envs == 4
    assert gymnax("CartPole-v1").evaluation_spec(3).num_envs == 3


def test_resets_are_computed_where_an_episode_ended():
    began = []

    def reset(key):
        jax.debug.callback(lambda _: began.append(1), key)  # once for each environment
        return jax.numpy.zeros(()), jax.numpy.zeros(1)

    def step(key, state, action):
        state = state + action
        ended = jax.numpy.zeros((), bool)
        return state, state[None].astype("float32"), state.astype("float32"), ended, ended

    spaces = EnvSpaces(obs=Box((1,)), action=Discrete(3))
    simulator = JaxSimulator(
        spaces, reset, step, num_envs=2, seed=0, device=CPU, name="sum", time_limit=3
    )
    env = SimulatedEnv(simulator, None)
    env.reset()
    counts = []
    for _ in range(6):
        env.step(torch.tensor([1, 2]))  # int64
        jax.effects_barrier()
        counts.append(len(began))
    assert counts == [2, 2, 4, 4, 4, 6]
