"""Spaces of Gymnasium and those of this package: actions reach every bound, and no further."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from esper_lightning import MLP, PPO, PPOConfig, check_env
from esper_lightning.core.spaces import Box as OurBox
from esper_lightning.envs import Gymnasium
from esper_lightning.envs.adapters.custom import adapt
from esper_lightning.envs.adapters.spaces import action_encoder, read_action_space
from esper_lightning.envs.adapters.tensors import to_range
from tests.envs.adapters.simulators import TorchFive

CPU = torch.device("cpu")


def box(low, high, dtype=np.float32):
    return Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


SCALED_HERE = {
    "a constant column": box([-3, 5], [1, 5]),
    "a constant": box([5], [5]),
    "a matrix": box([[-1, -2], [0, 3]], [[1, 2], [4, 5]]),
}


@pytest.mark.parametrize("name", SCALED_HERE)
def test_bounds_that_a_box_of_ours_cannot_represent_are_scaled_to_by_the_adapter(name):
    space = SCALED_HERE[name]
    ours = read_action_space(space)
    assert ours == OurBox(space.shape, -1.0, 1.0)
    on_host, on_device = action_encoder(space), to_range(space, CPU)
    for unit in (-1.0, 0.0, 0.3, 1.0, 7.0):
        wanted = space.low + (min(unit, 1.0) + 1) / 2 * (space.high - space.low)
        given = on_host(np.full((3, ours.size), unit, np.float32).reshape(3, *space.shape))
        assert all(space.contains(each) for each in given)
        np.testing.assert_allclose(given, np.stack([wanted] * 3), rtol=1e-6)
        tensor = on_device(torch.full((3, *space.shape), unit))
        np.testing.assert_allclose(tensor.numpy(), given, rtol=1e-6)


@pytest.mark.parametrize(("space", "ours"), [
    (box([-2, -2], [2, 2]), OurBox((2,), -2.0, 2.0)),
    (box([-1, -2], [1, 2]), OurBox((2,), (-1.0, -2.0), (1.0, 2.0))),
    (box([[-1, -1]], [[1, 1]]), OurBox((1, 2), -1.0, 1.0)),
    (box([[-np.inf] * 2], [[np.inf] * 2]), OurBox((1, 2))),
    (box([0], [10], np.uint8), OurBox((1,), 0.0, 10.0)),
])  # fmt: skip
def test_policies_scale_to_bounds_that_a_box_of_ours_represents(space, ours):
    assert read_action_space(space) == ours
    action = np.full((2, *space.shape), 0.5, np.float32)
    np.testing.assert_array_equal(action_encoder(space)(action), action.astype(space.dtype))
    wanted = action.round() if np.issubdtype(space.dtype, np.integer) else action
    np.testing.assert_array_equal(to_range(space, CPU)(torch.tensor(action)).numpy(), wanted)


@pytest.mark.parametrize(("space", "action", "wanted"), [
    (box([-1, 0], [1, 4], np.int8), [[-0.6, 0.4], [0.4, 3.6]], [[-1, 0], [0, 4]]),
    (box([-1, 0], [1, 4], np.int8), [[7.0, -2.0]], [[1, 0]]),
    (box([5, 0], [5, 4], np.int64), [[0.0, 0.4], [1.0, 1.0]], [[5, 3], [5, 4]]),  # scaled here
])  # fmt: skip
def test_actions_of_whole_numbers_are_rounded_to_the_nearest_within_the_bounds(
    space, action, wanted
):
    given = action_encoder(space)(np.array(action, np.float32))
    assert given.dtype == space.dtype
    assert given.tolist() == wanted
    assert to_range(space, CPU)(torch.tensor(action)).tolist() == wanted


INF = np.inf
MIXED = {
    "a constant beside no bounds": (box([5, -INF], [5, INF]), [-3.0, -3.0], [5, -3]),
    "bounds beside none": (box([-2, -INF], [4, INF]), [0.5, 7.0], [2.5, 7]),
    "bounds are kept": (box([-2, -INF], [4, INF]), [9.0, -9.0], [4, -9]),
    "one bound": (box([0, -INF], [INF, 1]), [-1.0, 3.0], [0, 1]),
    "within one bound": (box([0, -INF], [INF, 1]), [2.0, -3.0], [2, -3]),
    "a matrix": (box([[5, -INF], [0, 0]], [[5, INF], [2, INF]]), [[2.0] * 2] * 2, [[5, 2], [2, 2]]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MIXED)
def test_components_have_the_bounds_that_they_have_beside_others_without(name):
    space, action, wanted = MIXED[name]
    assert read_action_space(space) == OurBox(space.shape)
    assert action_encoder(space)(np.array([action], np.float32)).tolist() == [wanted]
    assert to_range(space, CPU)(torch.tensor([action])).tolist() == [wanted]


def test_a_policy_acts_within_bounds_of_some_components(make_trainer):
    taken = []

    class Arm(gymnasium.Env):
        action_space = box([5, -INF, -2], [5, INF, 2])
        observation_space = box([-1], [1])

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            taken.append(action)
            return np.zeros(1, np.float32), 0.0, False, len(taken) % 4 == 0, {}

    gymnasium.register("EsperArm-v0", Arm)
    model = PPO(
        env=Gymnasium(id="EsperArm-v0", num_envs=2),
        policy=MLP(hidden_sizes=(4,), initial_std=9.0),
        ppo=PPOConfig(rollout_steps=16, minibatches=2, epochs=1),
    )
    make_trainer(max_steps=1).fit(model)
    acted = np.stack(taken)
    assert len(acted) == 32
    assert (acted[:, 0] == 5).all()
    assert np.abs(acted[:, 1]).max() > 5
    assert np.abs(acted[:, 2]).max() == 2


@pytest.mark.parametrize(("low", "high", "last"), [([-1, 3], [2, 3], [2, 3]), ([-9], [5], [5])])
def test_tensors_of_actions_are_within_the_bounds(low, high, last):
    made, taken = TorchFive(3), []
    made.single_action_space, step = box(low, high), made.step
    made.step = lambda action: (taken.append(action), step(action[:, :1]))[1]
    env = adapt(made, CPU, 0, name="arm", lost="previous")
    space = env.spaces.action
    assert space.bounded
    env.reset()
    env.step(torch.tensor([space.highs] * 3))
    assert taken[0].tolist() == [last] * 3


def test_tensors_of_one_number_are_vectors():
    made = TorchFive(3)
    step, made.reset = made.step, lambda seed=None: (torch.arange(3.0), {})
    made.step = lambda action: (torch.arange(3.0), *step(action)[1:])
    env = adapt(made, CPU, 0, name="arm", lost="previous")
    assert env.spaces.obs == OurBox((1,))
    assert env.reset()[0].tolist() == [[0.0], [1.0], [2.0]]
    result = env.step(torch.zeros(3, 1))
    assert result.obs.shape == result.reached_obs.shape == (3, 1)


def test_an_action_space_of_tensors_may_say_its_shape_alone():
    made = TorchFive(3)
    made.single_action_space = SimpleNamespace(shape=(1,))
    env = adapt(made, CPU, 0, name="arm", lost="previous")
    assert env.spaces.action == OurBox((1,))
    check_env(env, steps=5)
