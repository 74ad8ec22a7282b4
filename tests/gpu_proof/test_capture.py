"""Training whose stages are replayed graphs is plain training, bit for bit.

Graphs are simulated on a CPU (``simulated``): addresses are frozen, and the memory of results holds
garbage between replays. Compiled steps are the traced operations themselves, so bits must agree.
"""

import dataclasses

import pytest
import torch
from lightning.pytorch import Callback

from esper_lightning import MLP, PPO, PPOConfig, Recurrent
from esper_lightning.envs import Acrobot, CartPole, Morphogenesis, Pendulum
from tests.gpu_proof.simulated import SimulatedCuda

FULL = PPOConfig(
    rollout_steps=8,
    epochs=2,
    minibatches=2,
    target_kl=0.02,
    normalize_obs=True,
    normalize_reward=True,
    value_clip=0.2,
)
CARTPOLE = CartPole(num_envs=16, time_limit=12)
PENDULUM = Pendulum(num_envs=16, time_limit=12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticGrowth(Morphogenesis):
    """Morphogenesis whose step never reads the host, on a CPU as well."""

    def build(self, device, seed, **how):
        return super().build(device, seed, static=True, **how)


GROWTH = StaticGrowth(
    dataset="synthetic", num_envs=3, channels=(8, 8), kernels=(3, 1), pools=(4, 1),
    train_batches=2, batch_size=16, validation_size=32, epochs=4,
)  # fmt: skip
CASES = {
    "full": (CARTPOLE, MLP(), FULL),
    "memory": (CARTPOLE, Recurrent(), FULL),
    "growth": (GROWTH, MLP(), dataclasses.replace(FULL, rollout_steps=4)),
    "plain": (CARTPOLE, MLP(), PPOConfig(rollout_steps=8)),
    "tanh": (PENDULUM, MLP(action_bounds="tanh"), FULL),
    "adaptive": (
        Acrobot(num_envs=16, time_limit=12),
        MLP(trunk="shared"),
        dataclasses.replace(FULL, learning_rate_schedule="adaptive"),
    ),
    "LSTM": (PENDULUM, Recurrent(cell="lstm"), FULL),
}


class Rows(Callback):
    """Collects history rows, without times."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        row = outputs["row"].items()
        self.rows.append({n: v for n, v in row if "time" not in n and "per_s" not in n})


class Meddles(Callback):
    """Moves some weights to other addresses, and changes others in place."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        for number, parameter in enumerate(pl_module.policy.parameters()):
            if number % 2:
                parameter.data = parameter.data * 0.99
            else:
                with torch.no_grad():
                    parameter.mul_(1.01)


def train(make_trainer, case, mode, *, iterations=3, callbacks=(), **how):
    """State and rows of a run, whose last rollout is shorter than the others."""
    env, policy, ppo = case
    budget = env.num_envs * (ppo.rollout_steps * iterations + 2)
    model = PPO(
        env, policy, ppo, total_env_steps=budget, iterations_per_epoch=2, eval_episodes=4,
        compile=mode,
    )  # fmt: skip
    rows = Rows()
    trainer = make_trainer(callbacks=[*callbacks, rows], limit_val_batches=1)
    trainer.fit(model, **how)
    return model, rows.rows, trainer


def assert_equal(first, other):
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name]), name
    assert len(first[1]) > 1
    for row, its_row in zip(first[1], other[1], strict=True):
        assert str(row) == str(its_row)  # NaN included


FAST = ("full", "memory", "growth")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_training_with_graphs_is_plain_training(name, make_trainer, monkeypatch, caplog):
    plain = train(make_trainer, CASES[name], "off")
    cuda = SimulatedCuda()
    cuda.install(monkeypatch)
    replayed = train(make_trainer, CASES[name], "max")
    assert "slower way" not in caplog.text
    # Rollout or acting, values, advantages, update; steps of environments that train or evaluate.
    assert len(cuda.graphs) == (6 if name == "growth" else 4)
    assert_equal(plain, replayed)


@pytest.mark.slow
def test_a_callback_may_change_and_move_weights_between_replays(make_trainer, monkeypatch):
    plain = train(make_trainer, CASES["full"], "off", callbacks=[Meddles()])
    SimulatedCuda().install(monkeypatch)
    assert_equal(plain, train(make_trainer, CASES["full"], "max", callbacks=[Meddles()]))


@pytest.mark.slow
def test_a_resumed_run_captures_again_and_is_the_same(make_trainer, monkeypatch, tmp_path):
    def resumed(mode):
        path = tmp_path / f"{mode}.ckpt"
        train(make_trainer, CASES["full"], mode)[2].save_checkpoint(path)
        return train(make_trainer, CASES["full"], mode, iterations=6, ckpt_path=path)

    plain = resumed("off")
    SimulatedCuda().install(monkeypatch)
    assert_equal(plain, resumed("max"))
