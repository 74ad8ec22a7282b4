"""Training with native code gives the results of eager training, for whatever is shipped."""

import contextlib
import dataclasses
import sys
from contextvars import ContextVar

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.profilers import PyTorchProfiler

from esper_lightning import CNN, MLP, PPO, PPOConfig, Recurrent
from esper_lightning.envs import Acrobot, CartPole, MountainCar, Pendulum
from tests.growth.test_play import SPEC as GROWTH
from tests.training.test_compiled import EVERYTHING, SMALL, warnings_of
from tests.training.test_module import NotADataclass
from tests.training.test_policies import IMAGE, STACKED, BrightSide

pytestmark = pytest.mark.usefixtures("native_code")
CASES = {
    "Acrobot": (Acrobot(num_envs=16), MLP(), SMALL),
    "MountainCar, relu": (MountainCar(num_envs=16), MLP(activation="relu"), EVERYTHING),
    "Pendulum, silu": (
        Pendulum(num_envs=16, time_limit=5),
        MLP(activation="silu", hidden_sizes=(40, 24)),
        dataclasses.replace(SMALL, normalize_reward=True),
    ),
    "CartPole, gelu": (CartPole(num_envs=16), MLP(activation="gelu"), EVERYTHING),
    "CartPole, wide": (CartPole(num_envs=16), MLP(hidden_sizes=(256, 256)), SMALL),
    "CartPole, odd sizes": (CartPole(num_envs=7), MLP(hidden_sizes=(17, 3)), SMALL),
    "groups and masks": (NotADataclass(), MLP(), EVERYTHING),
    "growth": (GROWTH, MLP(), SMALL),
    "images": (BrightSide(num_envs=8), CNN(**IMAGE), SMALL),
    "images, residual": (
        BrightSide(num_envs=16),
        CNN(kind="impala", channels=(4, 8), hidden_sizes=(8,), trunk="separate"),
        SMALL,
    ),
    "images, channels last, and a vector": (STACKED, CNN(**IMAGE, activation="silu"), EVERYTHING),
    "memory": (CartPole(num_envs=16, time_limit=5), Recurrent(), EVERYTHING),
    "long memory": (CartPole(num_envs=16, time_limit=5), Recurrent(cell="lstm"), EVERYTHING),
}
IMPURE = "its step is no pure function"


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case != "images")) for case in CASES],
)
def test_native_training_gives_the_results_of_eager_training(make_trainer, caplog, case):
    env, policy, ppo = CASES[case]

    def train(mode: str) -> PPO:
        steps = env.num_envs * ppo.rollout_steps
        model = PPO(env, policy, ppo, total_env_steps=2 * steps, compile=mode)
        make_trainer(limit_val_batches=0).fit(model)
        return model

    eager, native = train("off"), train("auto")
    assert native.gradient_steps == eager.gradient_steps
    expected = eager.state_dict()
    for name, value in native.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-5, msg=name)
    assert [m for m in warnings_of(caplog) if IMPURE not in m] == []


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_a_stock_profiler_records_the_program_that_trains(make_trainer, tmp_path, caplog, mode):
    profiler = PyTorchProfiler(
        tmp_path, schedule=torch.profiler.schedule(wait=0, warmup=1, active=1), with_stack=False
    )
    model = PPO(CartPole(num_envs=8), ppo=SMALL, total_env_steps=512, compile=mode)
    make_trainer(profiler=profiler, limit_val_batches=0).fit(model)
    assert warnings_of(caplog) == []
    traces = [path.read_text() for path in tmp_path.rglob("*.pt.trace.json")]
    assert traces
    assert any("nn.Module" in trace or "policy" in trace for trace in traces) == (mode == "off")


@pytest.mark.slow  # the types of tests are checked, and every check is a stack
def test_stacks_for_a_profiler_change_no_bit_from_the_first_iteration_on(make_trainer, caplog):
    def train() -> dict[str, torch.Tensor]:
        model = PPO(CartPole(num_envs=8), ppo=SMALL, total_env_steps=256)
        make_trainer().fit(model)
        return model.state_dict()

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_stack=True):
        profiled = train()
    expected = train()
    assert warnings_of(caplog) == []
    assert all(torch.equal(one, expected[name]) for name, one in profiled.items())


def test_any_number_of_threads_gives_the_same_bits(make_trainer):
    """Once training begins: torch's own initialisation of weights depends on threads."""

    class Threads(Callback):
        def __init__(self, number: int) -> None:
            self.number = number

        def on_train_start(self, trainer, pl_module) -> None:
            torch.set_num_threads(self.number)

    def weights(threads: int) -> list[bytes]:
        torch.set_num_threads(1)
        ppo = PPOConfig(rollout_steps=8, minibatches=2, epochs=1)
        model = PPO(CartPole(num_envs=128), ppo=ppo, total_env_steps=2048, compile="auto")
        make_trainer(limit_val_batches=0, callbacks=[Threads(threads)]).fit(model)
        torch.set_num_threads(1)
        return [value.numpy().tobytes() for value in model.state_dict().values()]

    first, others = weights(1), [weights(2), weights(3)]
    assert all(bits == first for bits in others)


BONUS = ContextVar("bonus", default=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RareBonus(CartPole):
    """A task with a bonus that no step of this test gets, in a place that no watch looks at."""

    def advance(self, state, action):
        transition = super().advance(state, action)
        is_far = state[:, 0].abs() > 1e6
        reward = torch.where(is_far, BONUS.get(), transition.reward)
        return transition._replace(reward=reward)


@pytest.fixture
def no_bonus():
    """The variable as it is in a new process, in this test and after it."""
    token = BONUS.set(1.0)
    yield
    BONUS.reset(token)


class RaisesBonus(Callback):
    def on_train_batch_start(self, trainer, *_):
        BONUS.set(1.0 if trainer.global_step < 6 else 2.0)


class Dies(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            raise ArithmeticError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndsTheProcess(RareBonus):
    """A task whose step ends the process from some time on."""

    def advance(self, state, action):
        if BONUS.get() == 2.0:
            sys.exit("for a reason of its own")
        return super().advance(state, action)


@pytest.mark.usefixtures("no_bonus")
def test_a_run_ends_by_its_own_error_whatever_a_last_look_meets(make_trainer):
    env = EndsTheProcess(num_envs=16)
    model = PPO(env, ppo=SMALL, total_env_steps=16 * SMALL.rollout_steps * 7, compile="auto")
    with pytest.raises(ArithmeticError):
        make_trainer(limit_val_batches=0, callbacks=[RaisesBonus(), Dies()]).fit(model)


@pytest.mark.usefixtures("no_bonus")
@pytest.mark.parametrize("end", [[], [Dies()]], ids=["end", "error"])
def test_a_number_that_no_result_shows_is_told_at_the_end_of_a_run(make_trainer, caplog, end):
    env = RareBonus(num_envs=16)
    for callbacks in ([], [RaisesBonus()]):
        assert warnings_of(caplog) == []
        model = PPO(env, ppo=SMALL, total_env_steps=16 * SMALL.rollout_steps * 7, compile="auto")
        with pytest.raises(ArithmeticError) if end else contextlib.nullcontext():
            make_trainer(limit_val_batches=0, callbacks=[*callbacks, *end]).fit(model)
    (line,) = warnings_of(caplog)
    assert "other operations than at first: aten.scalar_tensor.default(2.0" in line
    assert line.endswith("(in 2 calls at most)")  # 5 was compared, 6 was right
