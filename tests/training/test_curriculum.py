"""Curricula: environments take the progress of a run, also where it is resumed or compiled."""

import dataclasses
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from esper_lightning import check_env
from esper_lightning.envs import CartPole, Custom, Gymnasium, Pendulum, RunProgress
from esper_lightning.envs.autoreset import AutoresetEnv
from tests import forked
from tests.envs.adapters.simulators import Points, RslRl, TorchFive, VmasLike
from tests.training import short_runs

fit = partial(short_runs.fit, iterations=3, evaluates=False)
ROOT = Path(__file__).parents[2]


class RisingEnv(AutoresetEnv):
    """A pendulum that begins higher each iteration; its observation and reward do not say so."""

    def __init__(self, task, *, device, seed):
        self.level = 0.0
        super().__init__(task, device=device, seed=seed)
        self.seen: list[RunProgress] = []

    def begin_iteration(self, progress):
        self.seen.append(progress)
        self.level = progress.iteration / 4

    def draw(self, steps):
        return super().draw(steps) * (1 - self.level)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rising(Pendulum):
    time_limit: int = 3

    def build(self, device, seed):
        return RisingEnv(self, device=device, seed=seed)


class Starts(Callback):
    """The greatest angle at the beginning of an episode, in each iteration."""

    def __init__(self):
        self.widest: list[float] = []

    def on_train_start(self, trainer, pl_module):
        collect = pl_module._learner.rollout

        def look(steps):
            rollout = collect(steps)
            began = rollout.obs[1:][rollout.truncated[:-1]]
            self.widest.append(began[:, 0].min().item())
            return rollout

        pl_module._learner.rollout = look


def test_it_is_called_before_the_first_reset_and_before_every_iteration():
    model, _ = fit(Rising(num_envs=4))
    seen = model._learner._env.seen
    assert seen == [RunProgress(n, n * 32, 96) for n in (0, 0, 1, 2)]


@pytest.mark.parametrize("mode", [
    "off",
    pytest.param("auto", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.usefixtures("native_code")
def test_compiled_rollouts_take_it(mode):
    starts = Starts()
    fit(Rising(num_envs=16), starts, iterations=5, compile=mode)
    assert starts.widest[0] < 0.0  # cosine of the angle
    assert sorted(starts.widest) == starts.widest
    assert starts.widest[-1] == 1.0  # at the end every episode begins upright


def test_the_contract_holds_with_a_curriculum():
    check_env(Rising(num_envs=4), steps=20)


def test_an_environment_without_one_is_not_asked():
    model, _ = fit(CartPole(num_envs=4), iterations=1)
    assert model._learner._curriculum is None


KILLED = """
import os, signal, sys
from lightning.pytorch import Callback
from tests.training.test_curriculum import Rising, fit

class Dies(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.save_checkpoint(sys.argv[1])
        if pl_module.iteration == 2:
            os.kill(os.getpid(), signal.SIGKILL)

fit(Rising(num_envs=4), Dies(), iterations=4)
"""


def test_a_killed_run_continues_it_where_it_was(tmp_path):
    saved, program = tmp_path / "run.ckpt", tmp_path / "program.py"
    program.write_text(KILLED)
    died = forked.run([program, str(saved)], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL, died.stderr
    resumed, _ = fit(Rising(num_envs=4), iterations=4, ckpt_path=str(saved))
    seen = resumed._learner._env.seen
    assert [(p.iteration, p.env_steps) for p in seen] == [(2, 64), (2, 64), (3, 96)]
    whole, _ = fit(Rising(num_envs=4), iterations=4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class TestSimulators:
    """Objects with a method ``begin_iteration``, whose interface is that of another project."""

    EXPECTED = ((0, 0), (0, 0), (1, 32), (2, 64))

    @staticmethod
    def rising(kind: type[Points], **kwargs: Any) -> Any:
        class Rises(kind):
            def begin_iteration(self, progress: RunProgress) -> None:
                self.seen = [*getattr(self, "seen", []), progress[:2]]

        return Rises(4, **kwargs)

    @pytest.mark.parametrize("kind", [TorchFive, RslRl])
    def test_a_simulator_takes_it(self, kind):
        made = self.rising(kind)
        fit(Custom.of(made, lost="previous"))
        assert made.seen == [*self.EXPECTED]

    def test_worlds_of_agents_take_it(self):
        made = self.rising(VmasLike, agents=1)
        fit(Custom.of(made))
        assert made.seen == [*self.EXPECTED]

    def test_the_scenario_of_worlds_takes_it(self):
        made = VmasLike(4, agents=1)
        made.scenario = self.rising(Points)
        fit(Custom.of(made))
        assert made.scenario.seen == [*self.EXPECTED]

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("wrappers", [(), ("gymnasium.wrappers.RecordEpisodeStatistics",)])
    def test_every_single_environment_takes_it(self, workers, wrappers):
        spec = Gymnasium(
            id="EsperRising-v0",
            num_envs=4,
            workers=workers,
            wrappers=wrappers,
            kwargs={"length": 1},
        )
        starts = []

        class Look(Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                starts.append(pl_module._learner._acting.obs[:, 0].tolist())

        fit(spec, Look())
        assert starts == [[100.0] * 4, [101.0] * 4, [102.0] * 4]
