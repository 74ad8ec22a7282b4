"""What specs of environments with a name say where a package is missing, or does not know it."""

import sys
from types import MappingProxyType, ModuleType, SimpleNamespace

import numpy as np
import pytest

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.envs import Brax, EnvPool, Gymnax


@pytest.mark.parametrize(("spec", "package", "install"), [
    (EnvPool(id="CartPole-v1"), "envpool", "'esper_lightning[envpool]'"),
    (Gymnax(id="CartPole-v1"), "gymnax", "'esper_lightning[jax]'"),
    (Brax(id="ant"), "brax", "'esper_lightning[jax]'"),
    (Brax(id="CartpoleBalance", suite="playground"), "mujoco_playground",
     "'esper_lightning[playground]'"),
])  # fmt: skip
def test_a_missing_package_is_named_with_the_way_to_install_it(spec, package, install, monkeypatch):
    for name in (package, f"{package}.envs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"\.id='") as caught:
        spec.spaces()
    start = f"{type(spec).__name__}.id={spec.id!r} needs {package}: pip install {install}. ("
    assert str(caught.value).startswith(start)


def test_a_module_that_a_package_lacks_is_named_and_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "gymnax.py").write_text("import no_such_module.within")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gymnax", raising=False)
    with pytest.raises(ValueError, match=r"^Gymnax.id='CartPole-v1' needs no_such_module: pip"):
        Gymnax(id="CartPole-v1").spaces()


def test_a_discrete_observation_of_gymnax_has_a_column_for_each_value(monkeypatch):
    discrete = SimpleNamespace(n=16, shape=())
    env = SimpleNamespace(observation_space=lambda _: discrete, action_space=lambda _: discrete)
    package = ModuleType("gymnax")
    package.make = lambda name: (env, None)
    monkeypatch.setitem(sys.modules, "gymnax", package)
    assert Gymnax(id="Lake").spaces() == EnvSpaces(obs=Box((16,), -0.5, 1.5), action=Discrete(16))


@pytest.fixture
def playground(monkeypatch):
    """MuJoCo Playground with one environment, as far as its spaces go."""

    def load(env_name, config=None, config_overrides=None):
        if env_name != "Walk":
            raise ValueError(f"Env '{env_name}' not found. Available envs: {('Walk',) * 200}")
        size = (config_overrides or {}).get("size", 7)
        return SimpleNamespace(observation_size=size, action_size=2)

    package = ModuleType("mujoco_playground")
    package.registry = SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "mujoco_playground", package)


@pytest.mark.parametrize(("size", "obs"), [
    (7, Box((7,))),
    (np.int64(7), Box((7,))),
    ((8, 8, 3), Box((8, 8, 3))),
    ({"state": (5,), "privileged": (9,)}, {"state": Box((5,)), "privileged": Box((9,))}),
    (MappingProxyType({"state": (5,)}), {"state": Box((5,))}),
])  # fmt: skip
def test_spaces_of_playground_are_numbers_shapes_or_groups(playground, size, obs):
    kwargs = {"config_overrides": {"size": size}}
    spaces = Brax(id="Walk", suite="playground", kwargs=kwargs).spaces()
    assert spaces == EnvSpaces(obs=obs, action=Box((2,), -1.0, 1.0))


@pytest.mark.parametrize(("given", "why"), [
    ({"id": "Nowhere"}, "Env 'Nowhere' not found. Available envs: .* ...$"),
    ({"id": "Walk", "kwargs": {"wings": 2}}, ".* unexpected keyword argument 'wings'$"),
])  # fmt: skip
def test_what_playground_cannot_make_is_refused_by_the_name_of_the_setting(playground, given, why):
    line = f"^Brax.id='{given['id']}' cannot be made: {why}"
    with pytest.raises(ValueError, match=line) as caught:
        Brax(**given, suite="playground").spaces()
    assert len(str(caught.value)) < 500  # which ends within the names of two hundred environments
