"""Simulators in JAX. Their packages do not fit beside ours: ``make worlds`` runs these tests."""

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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
batching = pytest.importorskip("jax.interpreters.batching")
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("default")


def gymnax(name, **kwargs):
    pytest.importorskip("gymnax")
    return Gymnax(id=name, num_envs=4, **kwargs)


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar", "FrozenLake-misc"]
)
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


@pytest.mark.trap(11)
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


@pytest.mark.trap(12)
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


@dataclasses.dataclass
class Data:
    """The state of MuJoCo Warp: ``contacts`` belong to all environments together."""

    place: Any
    contacts: Any


jax.tree_util.register_dataclass(Data, data_fields=["place", "contacts"], meta_fields=[])
batching.register_vmappable(
    Data,
    int,
    int,
    lambda part, _, data, axis: Data(part(data.place, axis), data.contacts),
    lambda join, size, data, axis: Data(join(size, data.place, axis), data.contacts),
    None,
)
FIELDS = ["data", "obs", "reward", "done", "metrics", "info"]
State = dataclasses.make_dataclass("State", FIELDS)
jax.tree_util.register_dataclass(State, data_fields=FIELDS, meta_fields=[])


class Walk:
    """An environment of MuJoCo Playground, with the members of ``MjxEnv`` that are read.

    With ``warp`` the state is that of MuJoCo Warp, which ``jax.vmap`` maps only in part.
    """

    observation_size, action_size = {"state": (2,), "privileged_state": (3,)}, 1

    def __init__(self, *, warp):
        self.warp = warp

    def reset(self, rng):
        rng, key = jax.random.split(rng)
        place, zero = jax.random.uniform(key, ()), jax.numpy.zeros(())
        return self.shown(place, zero, zero, zero, rng)

    def step(self, state, action):
        place = (state.data.place if self.warp else state.data["place"]) + action[0]
        count = state.info["count"] + 1
        over = (place > 1.5).astype(float)
        return self.shown(place, count, place, over, state.info["rng"])

    def shown(self, place, count, reward, done, rng):
        obs = jax.numpy.stack([place, count])
        groups = {"state": obs, "privileged_state": jax.numpy.append(obs, 1.0)}
        contacts = jax.numpy.zeros((7,))
        data = Data(place, contacts) if self.warp else {"place": place}
        info = {"rng": rng, "count": count}
        return State(data, groups, reward, done, {"reward/place": reward}, info)


@pytest.fixture
def playground(monkeypatch):
    package = ModuleType("mujoco_playground")

    def load(env_name, config=None, config_overrides=None):
        assert env_name == "Walk"
        return Walk(**config_overrides)

    package.registry = SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "mujoco_playground", package)


@pytest.mark.parametrize("warp", [False, True])
class TestPlayground:
    def spec(self, warp):
        kwargs = {"config_overrides": {"warp": warp}}
        return Brax(id="Walk", suite="playground", num_envs=3, time_limit=5, kwargs=kwargs)

    def test_the_contract_is_kept(self, playground, warp):
        check_env(self.spec(warp), steps=20)

    def test_episodes_end_by_themselves_or_by_the_time_limit(self, playground, warp):
        env = self.spec(warp).build(CPU, 0)
        first = env.reset()[0]["state"][:, 0].tolist()
        action = torch.tensor([[0.0], [1.0], [0.5]])
        places = [first]
        for t in range(1, 6):
            result = env.step(action)
            falls = [place + float(a) > 1.5 for place, a in zip(places[-1], action, strict=True)]
            assert result.terminated.tolist() == falls
            assert result.truncated[0].item() == (t == 5)
            went = [place + float(a) for place, a in zip(places[-1], action, strict=True)]
            assert result.reached_obs["state"][:, 0].tolist() == pytest.approx(went)
            ended = (result.terminated | result.truncated).tolist()
            assert (result.obs["state"][:, 1] == 0).tolist() == ended
            places.append(result.obs["state"][:, 0].tolist())
