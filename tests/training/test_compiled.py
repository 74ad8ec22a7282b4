"""Compiled training is eager training: the same rows, weights and episodes."""

import dataclasses
import logging
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.envs import Acrobot, BatchedEnv, CartPole, Pendulum

pytestmark = pytest.mark.usefixtures("native_code")
SMALL = PPOConfig(rollout_steps=8, minibatches=2, epochs=2, learning_rate=3e-3)
EVERYTHING = dataclasses.replace(
    SMALL,
    normalize_obs=True,
    normalize_reward=True,
    value_clip=0.2,
    entropy_coef=0.01,
    target_kl=0.02,
    learning_rate_schedule="linear",
)
CASES = {
    "discrete": (CartPole(num_envs=16, time_limit=5), MLP(), SMALL),
    "continuous": (
        Pendulum(num_envs=16, time_limit=5),
        MLP(action_bounds="tanh", trunk="shared", activation="elu"),
        EVERYTHING,
    ),
    "memory": (CartPole(num_envs=16, time_limit=5), Recurrent(), EVERYTHING),
}
ITERATIONS = 3


def warnings_of(caplog):
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [r.getMessage() for r in records if r.name.startswith("esper_lightning")]


def train(make_trainer, mode, case="discrete", *, iterations=ITERATIONS, **trainer):
    env, policy, ppo = CASES[case]
    steps = env.num_envs * ppo.rollout_steps
    # The last iteration is shorter than the others.
    budget = steps * (iterations - 1) + steps // 2
    model = PPO(env, policy, ppo, total_env_steps=budget, compile=mode)
    make_trainer(limit_val_batches=0, **trainer).fit(model)
    return model


def assert_same(model, other):
    assert (model.iteration, model.env_steps) == (other.iteration, other.env_steps)
    assert model.gradient_steps == other.gradient_steps
    expected = other.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-5, msg=name)
    state, theirs = (m._learner._env.state_dict() for m in (model, other))
    for name, value in state.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case != "continuous")) for case in CASES],
)
def test_compiled_training_gives_the_results_of_eager_training(make_trainer, caplog, case):
    eager = train(make_trainer, "off", case)
    compiled = train(make_trainer, "auto", case)
    assert_same(compiled, eager)
    assert warnings_of(caplog) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """CartPole behind an adapter: its step is not known to be a pure function."""

    num_envs: int = 16

    def spaces(self):
        return CartPole().spaces()

    def build(self, device, seed):
        env = CartPole(num_envs=self.num_envs, time_limit=5).build(device, seed)

        class Adapter:
            reset, step = env.reset, env.step
            state_dict, load_state_dict = env.state_dict, env.load_state_dict

        return Adapter()


@pytest.mark.trap(23)
def test_an_environment_behind_an_adapter_is_stepped_and_the_rest_compiled(make_trainer, caplog):
    models = []
    for env, mode in ((Foreign(), "auto"), (CartPole(num_envs=16, time_limit=5), "off")):
        model = PPO(env, ppo=SMALL, total_env_steps=16 * 8 * 2, compile=mode)
        make_trainer(limit_val_batches=0).fit(model)
        models.append(model)
    assert_same(*models)
    assert warnings_of(caplog) == []


def test_a_compiled_run_resumes_bit_for_bit(make_trainer, tmp_path, monkeypatch):
    """With empty caches and with filled ones, and where a short rollout is the first of all."""

    def run(name, budget, **fit):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{name == 'resumed'}"))
        env = CartPole(num_envs=4, time_limit=5)
        model = PPO(env, MLP(hidden_sizes=(8,)), SMALL, total_env_steps=budget)
        trainer = make_trainer(limit_val_batches=0)
        trainer.fit(model, **fit)
        trainer.save_checkpoint(tmp_path / name)
        return model

    whole = run("whole", 4 * 8 * 2 + 4 * 5)
    run("half", 4 * 8 * 2)
    resumed = run("resumed", 4 * 8 * 2 + 4 * 5, ckpt_path=tmp_path / "half", weights_only=True)
    assert resumed.iteration == whole.iteration == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_an_overridden_step_is_called(make_trainer):
    from esper_lightning.envs.autoreset import AutoresetEnv  # noqa: PLC0415
    from esper_lightning.envs.base import is_functional  # noqa: PLC0415

    class Noisy(AutoresetEnv):
        def step(self, action):
            return super().step(action)

    class Whole(Noisy):
        def transition(self, episodes, action, initial):
            return super().transition(episodes, action, initial)

    class Forwards(BatchedEnv):
        """An environment that forwards all other attributes to another object."""

        def __init__(self, env):
            self._env = env

        def __getattr__(self, name):
            return getattr(self._env, name)

        def step(self, action):
            return self._env.step(action)

    assert not is_functional(Forwards(CartPole(num_envs=2).build(torch.device("cpu"), 0)))

    def build(kind):
        return kind(Acrobot(num_envs=2), device=torch.device("cpu"), seed=0)

    assert [is_functional(build(kind)) for kind in (AutoresetEnv, Noisy, Whole)] == [
        True,
        False,
        True,
    ]


def test_a_nan_is_found_in_compiled_training_too(make_trainer, monkeypatch):
    model = PPO(CartPole(num_envs=16), ppo=SMALL, total_env_steps=16 * 8 * 4)
    rate = "esper_lightning.training.module.schedule_learning_rate"
    monkeypatch.setattr(rate, lambda *_, **__: float("nan"))
    with pytest.raises(ValueError, match=r"must be finite.* in iteration 1, gradient step"):
        make_trainer(limit_val_batches=0).fit(model)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"PPO\.compile must be one of off, auto, default, max"):
        PPO(CartPole(), compile="fast")


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("mode", ["off", pytest.param("auto", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_iterations(make_trainer, mode):
    """The slope over the second half of a run counts, when all is allocated and compiled."""
    sizes = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.iteration % 12 == 0:
                sizes.append(resident_bytes())

    env = CartPole(num_envs=16, time_limit=5)
    ppo = dataclasses.replace(SMALL, epochs=1, minibatches=1)
    model = PPO(env, ppo=ppo, total_env_steps=16 * 8 * 240, compile=mode)
    make_trainer(limit_val_batches=0, callbacks=[Watch()]).fit(model)
    second = torch.tensor(sizes[len(sizes) // 2 :], dtype=torch.float64)
    growth_per_iteration = (second[-5:].mean() - second[:5].mean()) / (20 * (len(second) - 5))
    assert growth_per_iteration < 1024  # bytes: 10 MB in 10,000 iterations
