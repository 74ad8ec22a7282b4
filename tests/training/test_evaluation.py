"""Evaluations during a run: episodes, environments and seeds."""

import torch
from lightning.pytorch import Callback

from esper_lightning.envs import Custom, Gymnasium
from tests.envs.adapters.simulators import RslRl, TorchFive
from tests.training.short_runs import fit

COUNTER = Gymnasium(id="EsperCounter-v0", num_envs=4, kwargs={"length": 3})


class TestEvaluation:
    def test_each_environment_plays_several_episodes(self):
        _, trainer = fit(COUNTER, eval_episodes=10)
        assert trainer.callback_metrics["eval/episodes"] == 12
        assert trainer.callback_metrics["eval/episode_length_mean"] == 3

    def test_environments_are_made_once_for_all_evaluations(self, monkeypatch):
        seeds = []
        build = Gymnasium.build

        def counted(self, device, seed):
            seeds.append(seed)
            return build(self, device, seed)

        monkeypatch.setattr(Gymnasium, "build", counted)
        fit(COUNTER, iterations=6, eval_episodes=4)
        assert len(seeds) == 2  # of training, and of evaluations

    def test_environments_that_take_no_seed_are_made_for_each_evaluation_and_closed(self):
        made = []

        class Look(Callback):
            def on_validation_epoch_end(self, trainer, pl_module):
                made.append((pl_module.evaluation._env.simulator._env, first[-1]))

        first, reset = [], RslRl.reset

        class Known(RslRl):
            def reset(self):
                first.append(reset(self)[0].clone())
                return first[-1], None

        spec = Custom(
            make="tests.envs.adapters.simulators:make_rsl_rl",
            num_envs=4,
            kwargs={"kind": Known},
            lost="previous",
            shared=False,
        )
        fit(spec, Look(), iterations=6, eval_episodes=4)
        assert len({id(each) for each, _ in made}) == len(made) >= 3
        assert all(each.closed == 1 for each, _ in made)
        assert all(torch.equal(start, made[0][1]) for _, start in made)

    def test_what_a_shared_simulator_logs_in_an_evaluation_is_no_metric_of_training(self):
        class Logs(TorchFive):
            is_evaluated = 0.0

            def step(self, action):
                result = super().step(action)
                self.extras["log"] = {"is_evaluated": Logs.is_evaluated}
                return result

        class Look(Callback):
            logged, evaluations = (), 0

            def on_validation_start(self, trainer, pl_module):
                Logs.is_evaluated, self.evaluations = 1.0, self.evaluations + 1

            def on_validation_end(self, trainer, pl_module):
                Logs.is_evaluated = 0.0

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                self.logged += (float(trainer.callback_metrics["env/is_evaluated"]),)

        look = Look()
        fit(Custom.of(Logs(4)), look, iterations=6, eval_episodes=4)
        assert look.evaluations >= 3
        assert look.logged == (0.0,) * 6

    def test_every_evaluation_starts_alike(self):
        class Starts(Callback):
            def __init__(self):
                self.starts = []

            def on_validation_epoch_end(self, trainer, pl_module):
                env = pl_module.evaluation._env._env
                self.starts.append([each.unwrapped.first_start for each in env.envs])

        starts = Starts()
        fit(COUNTER, starts, iterations=6, eval_episodes=4)
        assert len(starts.starts) >= 3
        assert all(start == starts.starts[0] for start in starts.starts)
