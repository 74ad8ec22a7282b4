"""Pictures of simulators: every environment is drawn, in the order of the environments.

mjlab, Brax and JAX do not fit beside ours. What their adapters call is here, as their sources have
it.
"""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from esper_lightning.envs import Brax
from esper_lightning.envs.adapters import jax as adapter
from esper_lightning.envs.adapters.custom import adapt
from esper_lightning.envs.adapters.jax import JaxSimulator
from esper_lightning.envs.adapters.mjlab import make
from esper_lightning.envs.adapters.simulated import Simulator
from tests.envs.adapters.simulators import TorchFive

CPU = torch.device("cpu")


class OffscreenRenderer:
    """mjlab's renderer: it follows the environment that its settings name."""

    def __init__(self, model, cfg, scene):
        self.cfg, self.is_open = cfg, False
        assert (model, scene) == ("model", "scene")

    def initialize(self):
        self.is_open = True

    def update(self, data):
        assert self.is_open
        self.state = data[self.cfg.env_idx]

    def render(self):
        return np.full((self.cfg.height, self.cfg.width, 3), self.state, np.uint8)

    def close(self):
        self.is_open = False


class ManagerBasedRlEnv(TorchFive):
    """mjlab's environment, as far as its pictures go."""

    def __init__(self, cfg, device):
        super().__init__(cfg.scene.num_envs)
        self.cfg, self.scene = cfg, "scene"
        self.sim = SimpleNamespace(mj_model="model", data=[10 * k for k in range(self.num_envs)])
        self.metadata = {"render_fps": 50.0}
        self.is_closed = False

    def close(self):
        self.is_closed = True


@pytest.fixture
def mjlab(monkeypatch):
    viewer = SimpleNamespace(height=480, width=640, env_idx=0, max_extra_envs=2)
    scene = SimpleNamespace(num_envs=1)
    contents = {
        "mjlab.envs": {"ManagerBasedRlEnv": ManagerBasedRlEnv},
        "mjlab.tasks.registry": {
            "load_env_cfg": lambda task: SimpleNamespace(scene=scene, viewer=viewer, seed=0)
        },
        "mjlab.viewer.offscreen_renderer": {"OffscreenRenderer": OffscreenRenderer},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return viewer


def test_mjlab_draws_every_environment(mjlab):
    made = make(num_envs=3, device="cpu", seed=1, task="Balance")
    env = adapt(made, CPU, 0, name="Balance", lost="previous")
    pictures = env.render()
    assert pictures.shape == (3, 240, 320, 3)
    assert pictures.dtype == torch.uint8
    assert pictures[:, 0, 0, 0].tolist() == [0, 10, 20]
    assert env.frames_per_s == 50.0
    assert (mjlab.env_idx, mjlab.height) == (0, 480)  # the settings of the task are as they were
    renderers = made._renderers
    env.render()
    assert made._renderers is renderers
    env.close()
    assert made.is_closed
    assert not any(renderer.is_open for renderer in renderers)


def test_a_simulator_that_draws_one_picture_of_many_environments_is_refused():
    class One(TorchFive):
        def render(self):
            return np.zeros((4, 5, 3), np.uint8)

    assert adapt(One(1), CPU, 0, name="one", lost="previous").render().shape == (1, 4, 5, 3)
    with pytest.raises(ValueError, match=r"many.render\(\) must return pictures of all") as caught:
        adapt(One(3), CPU, 0, name="many", lost="previous").render()
    assert "got [4, 5, 3]." in str(caught.value)
    with pytest.raises(ValueError, match=r"got none\. It may have to be made with render_mode"):
        adapt(TorchFive(2), CPU, 0, name="dark", lost="previous").render()


@pytest.fixture
def simulator():
    """A simulator of JAX with a state, without JAX."""
    made = JaxSimulator.__new__(JaxSimulator)
    made._jax = SimpleNamespace(tree=SimpleNamespace(map=pytree.tree_map))
    made.name, made.num_envs, made._draw = "ant", 2, None
    state = {"position": torch.tensor([[1.0], [2.0]]), "model": torch.tensor([7.0, 7.0, 7.0])}
    made._running = state, torch.zeros(2)
    return made


def test_a_state_of_jax_is_drawn_for_each_environment(simulator):
    seen = []

    def draw(state):
        seen.append({name: array.tolist() for name, array in state.items()})
        return np.full((2, 3, 3), state["position"].item())

    simulator._draw = draw
    pictures = simulator.render()
    assert pictures.dtype == torch.uint8
    assert pictures[:, 1, 2, 0].tolist() == [1, 2]
    whole = [7.0, 7.0, 7.0]  # of all environments together
    assert seen == [{"position": [1.0], "model": whole}, {"position": [2.0], "model": whole}]


def test_an_environment_of_jax_without_pictures_says_so(simulator):
    with pytest.raises(ValueError, match="ant must draw pictures to be shown"):
        simulator.render()


@pytest.mark.parametrize("suite", ["brax", "playground"])
def test_brax_and_playground_draw_with_their_own_renderers(suite, monkeypatch):
    """Brax draws states of its physics, and Playground states of the environment."""
    given = {}

    class Simulated(Simulator):
        num_envs, spaces, device, name, reseeds = 2, None, CPU, "ant", True
        reset = step = None

        def __init__(self, *args, **kwargs):
            given.update(kwargs)

    class Env:
        observation_size, action_size, dt = 3, 2, 0.05

        def render(self, trajectory):
            return [f"picture of {one}" for one in trajectory]

    monkeypatch.setattr(adapter, "JaxSimulator", Simulated)
    monkeypatch.setattr(Brax, "_env", lambda self: Env())
    monkeypatch.setitem(sys.modules, "jax.numpy", ModuleType("jax.numpy"))
    monkeypatch.setitem(sys.modules, "jax", ModuleType("jax"))
    Brax(id="ant", num_envs=2, suite=suite).build(CPU, 0)
    state = SimpleNamespace(pipeline_state="physics")
    expected = "physics" if suite == "brax" else state
    assert given["draw"](state) == f"picture of {expected}"
    assert given["frames_per_s"] == pytest.approx(20.0)
