"""PPO on a CUDA device: no host synchronisation in the hot path, and the same learning.

Without one, the same tests are rehearsed on the CPU, so that a name that changes is noticed.
"""

import contextlib

import pytest
import torch

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.envs import CartPole, Morphogenesis, Pendulum
from esper_lightning.ppo.learner import Learner

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
MODES = ["off", "default", "max"]
EVERYTHING = PPOConfig(
    rollout_steps=16, target_kl=0.02, normalize_obs=True, normalize_reward=True, value_clip=0.2
)
CASES = {
    "discrete": (CartPole(num_envs=64, time_limit=20), MLP()),
    "continuous": (Pendulum(num_envs=64, time_limit=20), MLP(action_bounds="tanh")),
    "memory": (CartPole(num_envs=64, time_limit=20), Recurrent()),
}


def train(make_trainer, case, mode, iterations=4):
    hosts = Morphogenesis.synthetic(num_envs=64 if ON_GPU else 2)
    env, policy = (CASES | {"growth": (hosts, MLP())})[case]
    budget = env.num_envs * EVERYTHING.rollout_steps * iterations
    model = PPO(env, policy, EVERYTHING, total_env_steps=budget, compile=mode)
    fit(make_trainer, model)
    assert model.iteration == iterations
    return model


def fit(make_trainer, model, checkpoint=None, **settings):
    trainer = make_trainer(accelerator="gpu" if ON_GPU else "cpu", devices=1, **settings)
    trainer.fit(model, ckpt_path=checkpoint, weights_only=None if checkpoint is None else True)
    return trainer


@contextlib.contextmanager
def no_synchronisation():
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [*CASES, "growth"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_synchronises_before_the_one_copy(make_trainer, monkeypatch, case, mode):
    calls = []

    def forbid_synchronising(name):
        function = getattr(Learner, name)

        def guarded(*args, **kwargs):
            calls.append(name)
            if calls.count(name) == 1:  # allocations, compilations and captures may synchronise
                return function(*args, **kwargs)
            with no_synchronisation():
                return function(*args, **kwargs)

        monkeypatch.setattr(Learner, name, guarded)

    for name in ("rollout", "compute_targets", "update"):
        forbid_synchronising(name)
    train(make_trainer, case, mode)
    assert len(calls) == 3 * 4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", MODES[1:])
def test_captured_training_is_eager_training(make_trainer, caplog, case, mode):
    eager, compiled = train(make_trainer, case, "off"), train(make_trainer, case, mode)
    assert eager.gradient_steps == compiled.gradient_steps
    expected = eager.state_dict()
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=5e-3, atol=1e-4, msg=name)
    assert "slower way" not in caplog.text


@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_memory_does_not_grow_with_iterations(make_trainer):
    train(make_trainer, "discrete", "max", iterations=2)
    torch.cuda.reset_peak_memory_stats()
    few = train(make_trainer, "discrete", "max", iterations=4)
    del few
    after_few = torch.cuda.max_memory_allocated()
    train(make_trainer, "discrete", "max", iterations=40)
    assert torch.cuda.max_memory_allocated() <= 1.05 * after_few + 2**20


@pytest.mark.parametrize("mode", MODES)
def test_training_on_a_gpu_learns(make_trainer, mode):
    ppo = PPOConfig(rollout_steps=32, learning_rate=1e-3)
    model = PPO(CartPole(num_envs=32), ppo=ppo, total_env_steps=60_000, compile=mode)
    trainer = fit(make_trainer, model)
    assert trainer.callback_metrics["rollout/episode_return_mean"] > 100


@pytest.mark.parametrize("case", ["discrete", "memory"])
@pytest.mark.parametrize("mode", ["off", "max"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(make_trainer, tmp_path, case, mode):
    whole = train(make_trainer, case, mode)

    def model():
        env, policy = CASES[case]
        budget = env.num_envs * EVERYTHING.rollout_steps * 4
        return PPO(env, policy, EVERYTHING, total_env_steps=budget, compile=mode)

    first = fit(make_trainer, model(), max_steps=2)
    assert first.lightning_module.iteration == 2
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = model()
    fit(make_trainer, resumed, tmp_path / "half.ckpt")
    assert resumed.iteration == whole.iteration == 4
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu_in_new_episodes(make_trainer, tmp_path, caplog):
    env, policy = CASES["discrete"]
    steps = env.num_envs * EVERYTHING.rollout_steps
    settings = {"ppo": EVERYTHING, "compile": "off"}
    first = fit(make_trainer, PPO(env, policy, total_env_steps=2 * steps, **settings))
    first.save_checkpoint(tmp_path / "gpu.ckpt")
    resumed = PPO(env, policy, total_env_steps=4 * steps, **settings)
    trainer = make_trainer(accelerator="cpu")
    trainer.fit(resumed, ckpt_path=tmp_path / "gpu.ckpt", weights_only=True)
    assert resumed.iteration == 4
    assert ("new episodes" in caplog.text) == ON_GPU
