"""What specs of environments with a name say where a package is missing, or does not know it."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from esper_lightning.envs import Brax, EnvPool, Gymnax


@pytest.mark.parametrize(("spec", "package", "install"), [
    (EnvPool(id="CartPole-v1"), "envpool", "'esper_lightning[envpool]'"),
    (Gymnax(id="CartPole-v1"), "gymnax", "'esper_lightning[jax]'"),
    (Brax(id="ant"), "brax", "'esper_lightning[jax]'"),
    (Brax(id="CartpoleBalance", suite="playground"), "mujoco_playground", "playground"),
])  # fmt: skip
def test_a_missing_package_is_named_with_the_way_to_install_it(spec, package, install, monkeypatch):
    for name in (package, f"{package}.envs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"\.id='") as caught:
        spec.spaces()
    start = f"{type(spec).__name__}.id={spec.id!r} needs {package}: pip install {install}. ("
    assert str(caught.value).startswith(start)


def test_an_unknown_environment_of_playground_is_refused_by_the_name_of_the_setting(monkeypatch):
    def load(name):
        raise ValueError(f"Env '{name}' not found.")

    package = ModuleType("mujoco_playground")
    package.registry = SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "mujoco_playground", package)
    line = "^Brax.id='Nowhere' cannot be made: Env 'Nowhere' not found.$"
    with pytest.raises(ValueError, match=line):
        Brax(id="Nowhere", suite="playground").spaces()
