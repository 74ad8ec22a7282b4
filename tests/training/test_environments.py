"""The environments of a run: seeds at its start, evaluations within, and their end."""

import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from esper_lightning import MLP, PPO, PPOConfig, check_env
from esper_lightning.cli.main import main
from esper_lightning.core.ranks import SINGLE_RANK
from esper_lightning.envs import CartPole, Custom, FrameStack, Gymnasium
from esper_lightning.envs.frame_stack import FrameStackEnv
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.learner import Learner
from esper_lightning.training import evaluation
from esper_lightning.training.environments import build_learner
from tests.envs.adapters.simulators import TorchFive
from tests.training.short_runs import SMALL, fit

COUNTER = Gymnasium(id="EsperCounter-v0", num_envs=4, kwargs={"length": 3})


def first_rollout(iteration, rank):
    ppo = PPOConfig(rollout_steps=4, minibatches=1)
    module = PPO(CartPole(num_envs=3), MLP(hidden_sizes=(4,)), ppo)
    place = {"iteration": iteration, "rank": rank, "device": torch.device("cpu")}
    agent = Agent(module.policy, None)
    learner = build_learner(module.settings, agent, None, **place, ranks=SINGLE_RANK)
    learner.start(module.configure_optimizers(), None)
    return learner.rollout(4)


def test_ranks_and_later_runs_have_states_and_noise_of_their_own():
    again, first, *others = (first_rollout(*at) for at in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert torch.equal(again.obs, first.obs)
    assert torch.equal(again.action, first.action)
    for other in others:
        assert not torch.equal(other.obs[0], first.obs[0])
        assert not torch.equal(other.action, first.action)


class Stops(TorchFive):
    """A simulator with the fault ``next(...)`` of an empty iterator, in the step ``at``."""

    def __init__(self, num_envs, at):
        super().__init__(num_envs)
        self.at, self.taken = at, 0

    def step(self, action):
        self.taken += 1
        if self.taken == self.at:
            next(iter(()))
        return super().step(action)


class TestCodeThatRaisesStopIteration:
    """Lightning takes it for the end of the data, and would begin the next epoch for ever."""

    def test_in_a_rollout_it_is_an_error(self):
        with pytest.raises(RuntimeError, match="step raised StopIteration") as caught:
            fit(Custom.of(Stops(4, at=3)), evaluates=False)
        assert isinstance(caught.value.__cause__, StopIteration)

    def test_in_an_evaluation_it_is_an_error(self):
        with pytest.raises(RuntimeError, match="step raised StopIteration"):
            fit(Custom.of(Stops(4, at=19)), eval_episodes=4)  # two rollouts take 16 steps


def test_a_module_may_have_hooks_of_its_own():
    members = dict.fromkeys(("on_fit_start", "on_train_epoch_start"), lambda self: None)
    model = type("Mine", (PPO,), members)(CartPole(num_envs=4), MLP(hidden_sizes=(4,)), SMALL)
    Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    ).fit(model)
    assert model.iteration == 2


def test_training_goes_on_where_only_the_first_steps_of_episodes_have_masks():
    spec = Gymnasium(id="EsperRarely-v0", num_envs=4, mask="allowed", kwargs={"length": 3})
    assert fit(spec, evaluates=False)[0].iteration == 4


class TestASharedSimulator:
    @pytest.mark.trap(1)
    def test_training_acts_on_what_the_simulator_shows_after_an_evaluation(self):
        made = TorchFive(4)
        seen = []

        class Look(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                acting = pl_module._learner._acting.obs["policy"]
                seen.append(torch.equal(acting, made.state))

        fit(Custom.of(made), Look(), eval_episodes=4)
        assert seen == [True] * 4

    def test_episodes_after_evaluations_differ(self):
        made, starts = TorchFive(4), []

        class Look(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                starts.append(pl_module._learner._acting.obs["policy"].clone())

        fit(Custom.of(made), Look(), iterations=6, eval_episodes=4)
        assert not torch.equal(starts[1], starts[2])

    def test_one_that_existed_before_the_run_outlives_it(self):
        made = TorchFive(4)
        fit(Custom.of(made), eval_episodes=4)
        assert made.closed == 0

    @pytest.mark.parametrize("stacked", [False, True])
    def test_one_that_the_run_made_serves_evaluations_and_is_closed_once_at_its_end(self, stacked):
        made = []

        class Look(Callback):
            def on_train_batch_end(self, trainer, pl_module, *_):
                assert pl_module._learner._env is not None
                assert [each.closed for each in made] == [0]

        class Known(TorchFive):
            def __init__(self, num_envs, **kwargs):
                super().__init__(num_envs, **kwargs)
                made.append(self)

        path = "tests.envs.adapters.simulators:make_torch_five"
        spec = Custom(make=path, num_envs=4, kwargs={"kind": Known})
        spec = FrameStack(env=spec, frames=2) if stacked else spec
        model, trainer = fit(spec, Look(), eval_episodes=4)
        assert [each.closed for each in made] == [1]
        model.close_environments()
        trainer.validate(model, verbose=False)  # which makes another one
        assert [each.closed for each in made] == [1, 1]

    def test_an_evaluation_after_the_run_leaves_the_closed_one_of_training_alone(self):
        class Strict(TorchFive):
            def reset(self, **kwargs):
                assert self.closed == 0
                return super().reset(**kwargs)

        path = "tests.envs.adapters.simulators:make_torch_five"
        spec = Custom(make=path, num_envs=4, kwargs={"kind": Strict})
        model, trainer = fit(spec, eval_episodes=4)
        assert trainer.validate(model, verbose=False)[0]["eval/episodes"] == 4

    def test_a_module_that_never_trained_is_evaluated_in_it(self, make_trainer):
        model = PPO(Custom.of(TorchFive(4)), MLP(hidden_sizes=(4,)), eval_episodes=4)
        trainer = make_trainer(limit_val_batches=1)
        assert trainer.validate(model, verbose=False)[0]["eval/episodes"] == 4

    def test_one_that_nobody_released_is_closed_at_the_end_of_its_process(self):
        program = (
            "from esper_lightning.envs import Custom\n"
            "from tests.envs.adapters import simulators\n"
            "simulators.TorchFive.close = lambda self: print('closed')\n"
            "make = 'tests.envs.adapters.simulators:make_torch_five'\n"
            "Custom(make=make, num_envs=2).spaces()\n"
            "import os\n"
            "if os.fork():\n"
            "    os.wait()\n"
            "    print('forked')\n"
        )
        done = subprocess.run(
            [sys.executable, "-u", "-c", program], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["forked", "closed"]


@dataclass(frozen=True, kw_only=True)
class Counted(CartPole):
    """CartPole that notes what was built and what was closed."""

    built: ClassVar[list[object]] = []
    closed: ClassVar[list[object]] = []

    def build(self, device, seed):
        env = super().build(device, seed)
        self.built.append(env)
        env.close = lambda: self.closed.append(env)
        return env


class TestWhateverBuildsEnvironmentsClosesThem:
    @pytest.fixture(autouse=True)
    def every_one_once(self):
        Counted.built.clear()
        Counted.closed.clear()
        yield
        assert len(Counted.built) > 0
        assert sorted(map(id, Counted.built)) == sorted(map(id, Counted.closed))

    @pytest.fixture
    def model(self):
        ppo = PPOConfig(rollout_steps=8, minibatches=1, epochs=1)
        return PPO(Counted(num_envs=2), MLP(hidden_sizes=(4,)), ppo, eval_episodes=2)

    def test_in_a_check(self):
        check_env(Counted(num_envs=2), steps=5)

    def test_in_a_run_with_evaluations(self):
        fit(Counted(num_envs=2), eval_episodes=2)

    def test_in_a_run_that_dies_before_its_first_step(self, model, make_trainer, monkeypatch):
        def fail(self, *args, **kwargs):
            raise MemoryError

        monkeypatch.setattr(Learner, "__init__", fail)
        with pytest.raises(MemoryError):
            make_trainer(max_steps=1).fit(model)

    def test_in_a_stack_that_cannot_be_built(self, monkeypatch):
        def fail(self, *args, **kwargs):
            raise MemoryError

        monkeypatch.setattr(FrameStackEnv, "__init__", fail)
        with pytest.raises(MemoryError):
            FrameStack(env=Counted(num_envs=2)).build(torch.device("cpu"), 0)

    def test_in_an_evaluation_and_in_an_export(self, model, make_trainer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_trainer(limit_val_batches=1).validate(model, verbose=False)
        trainer = make_trainer(max_steps=1)
        trainer.fit(model)
        trainer.save_checkpoint("run.ckpt")
        assert len(Counted.built) == 2
        main(["export", "--ckpt_path", "run.ckpt", "--output", "policy.pt2"])
        assert len(Counted.built) == 3
        main(["evaluate", "--ckpt_path", "run.ckpt", "--trainer.accelerator", "cpu"])
        assert len(Counted.built) == 4

    def test_in_an_evaluation_that_dies(self, model, make_trainer, monkeypatch):
        def fail(*args, **kwargs):
            raise MemoryError

        monkeypatch.setattr(evaluation, "evaluate_policy", fail)
        with pytest.raises(MemoryError):
            make_trainer(limit_val_batches=1).validate(model, verbose=False)


class TestTheEndOfARun:
    def test_environments_are_closed(self):
        model, _ = fit(COUNTER, eval_episodes=4)
        assert model._learner._env._env.closed
        assert model.evaluation._env is None

    def test_workers_end_with_a_run_that_dies(self):
        class Fault(Callback):
            def on_train_batch_end(self, *args):
                self.processes = list(args[1]._learner._env._env._processes)
                raise RuntimeError("boom")

        fault, env = Fault(), Gymnasium(id="EsperCounter-v0", num_envs=4, workers=2)
        with pytest.raises(RuntimeError, match="boom"):
            fit(env, fault)
        assert len(fault.processes) == 2
        assert not any(process.is_alive() for process in fault.processes)
