"""PPO on a CUDA device: no host synchronisation in the hot path, and the same learning."""

import pytest
import torch

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.envs import CartPole, Morphogenesis, Pendulum
from esper_lightning.ppo.learner import Learner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
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
    env, policy = (CASES | {"growth": (Morphogenesis.synthetic(num_envs=64), MLP())})[case]
    budget = env.num_envs * EVERYTHING.rollout_steps * iterations
    model = PPO(env, policy, EVERYTHING, total_env_steps=budget, compile=mode)
    make_trainer(accelerator="gpu", devices=1, limit_val_batches=0).fit(model)
    assert model.iteration == iterations
    return model


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
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(Learner, name, guarded)

    for name in ("rollout", "advantages", "update"):
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
    trainer = make_trainer(accelerator="gpu", devices=1)
    trainer.fit(model)
    assert trainer.callback_metrics["rollout/episode_return_mean"] > 100
