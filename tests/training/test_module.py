"""PPO inside the Trainer.

Counting, budgets, determinism, evaluation, checkpoints, and what it refuses.
"""

import contextlib
import copy
import csv
import dataclasses
import datetime
import math
import pickle
import re
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ThroughputMonitor,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esper_lightning import MLP, PPO, FlightRecorder, PPOConfig, Recurrent, check_env
from esper_lightning.core.errors import NonFiniteError
from esper_lightning.core.seeding import stream_seed
from esper_lightning.core.spaces import Box, EnvSpaces, MultiDiscrete
from esper_lightning.envs import CartPole, EnvSpec, MountainCar, Pendulum
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.ppo.evaluation import evaluate_policy
from esper_lightning.ppo.learner import Learner
from esper_lightning.training import evaluation

SMALL = PPOConfig(rollout_steps=8, minibatches=2, epochs=2)
TIMES = ("time_s", "env_steps_per_s")


class Rows(Callback):
    """Stores the history row of every iteration."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows.append({k: v for k, v in outputs["row"].items() if k not in TIMES})


class DiesIn(Callback):
    """Raises an error when an iteration begins."""

    def __init__(self, iteration):
        self.iteration = iteration

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.iteration + 1 == self.iteration:
            raise RuntimeError(f"in iteration {self.iteration}")


def cartpole(**settings) -> PPO:
    defaults = {
        "env": CartPole(num_envs=4),
        "ppo": SMALL,
        "total_env_steps": 4 * 8 * 3,
        "eval_episodes": 3,
    }
    return PPO(**{**defaults, **settings})


class LogsItself(Callback):
    """Logs in all the ways that callbacks have."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("of a callback", 1.0)
        trainer.logger.log_metrics({"plain": 1.0}, step=trainer.global_step)
        trainer.logger.log_metrics({"without step": 1.0})

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.logger.log_metrics({"of the epoch": 1.0}, trainer.current_epoch)


class LogsMore(PPO):
    """A module whose user logs metrics of their own."""

    flops_per_batch = 1

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        self.log("mine", 1.0)
        self.log("mine_epoch", 1.0, on_step=False, on_epoch=True)
        return output


class Boring(BoringModel):
    """A module that is not PPO."""

    def training_step(self, batch, batch_idx):
        self.log("boring", 1.0)
        return super().training_step(batch, batch_idx)


def x_axes(folder, kind):
    """The x coordinates of the points of each logged series."""
    if kind is TensorBoardLogger:
        events = EventAccumulator(str(folder)).Reload()
        return {k: [e.step for e in events.Scalars(k)] for k in events.Tags()["scalars"]}
    lines = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    names = set(lines[0]) - {"step"}
    return {n: [int(line["step"]) for line in lines if line[n]] for n in names}


def fit(model, trainer, **kwargs):
    rows = Rows()
    trainer.callbacks.append(rows)
    trainer.fit(model, **kwargs)
    return rows.rows


class TestBudget:
    @pytest.mark.parametrize(
        ("budget", "expected"),
        [(96, [32, 64, 96]), (80, [32, 64, 80]), (81, [32, 64, 80]), (4, [4]), (32, [32])],
    )
    def test_a_run_ends_exactly_at_its_budget(self, make_trainer, budget, expected):
        model, trainer = cartpole(total_env_steps=budget), make_trainer()
        rows = fit(model, trainer)
        assert [row["env_steps"] for row in rows] == expected
        assert trainer.state.finished
        assert trainer.global_step == model.iteration == len(expected)

    def test_a_last_rollout_may_have_fewer_samples_than_minibatches(self, make_trainer):
        model = cartpole(
            env=CartPole(num_envs=2),
            ppo=dataclasses.replace(SMALL, minibatches=4),
            total_env_steps=18,
        )
        rows = fit(model, make_trainer())
        assert [row["env_steps"] for row in rows] == [16, 18]
        assert [row["gradient_steps"] for row in rows] == [8, 12]
        assert math.isfinite(rows[1]["loss/value"])

    def test_the_budget_may_span_several_epochs(self, make_trainer):
        trainer = make_trainer()
        rows = fit(cartpole(total_env_steps=32 * 5, iterations_per_epoch=2), trainer)
        assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
        assert trainer.current_epoch == 3

    def test_second_fit_has_nothing_to_do_and_says_so(self, make_trainer, caplog):
        model = cartpole()
        assert len(fit(model, make_trainer())) == 3
        assert "used up" not in caplog.text
        assert fit(model, make_trainer()) == []
        assert "PPO.total_env_steps=96 is used up" in caplog.text

    def test_a_second_fit_continues_with_other_noise(self, make_trainer):
        model = cartpole(total_env_steps=None, iterations_per_epoch=1)
        noise = []
        for _ in range(2):
            fit(model, make_trainer(max_epochs=1))
            noise.append(model._learner._exploration.initial_seed())
        assert model.iteration == 2
        assert noise[0] != noise[1]

    @pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_steps": 2, "max_epochs": None}])
    def test_a_smaller_limit_of_the_trainer_wins_with_a_warning(self, make_trainer, caplog, limit):
        model = cartpole(iterations_per_epoch=2)
        assert len(fit(model, make_trainer(**limit))) == 2
        assert "before PPO.total_env_steps=96" in caplog.text
        assert model.planned_env_steps == 64

    def test_a_module_that_has_trained_can_be_pickled_without_its_environments(self, make_trainer):
        model = cartpole(env=TestCheckpoints.Simulator(num_envs=4))
        fit(model, make_trainer())
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(model._learner._env)
        again = pickle.loads(pickle.dumps(model))
        assert (again.iteration, again.env) == (3, model.env)

    def test_gradient_steps_are_counted_apart(self, make_trainer):
        rows = fit(cartpole(), make_trainer())
        assert [row["gradient_steps"] for row in rows] == [4, 8, 12]

    def test_fast_dev_run_leaves_nothing_behind(self, make_trainer, tmp_path):
        fit(cartpole(), make_trainer(fast_dev_run=True))
        assert list(tmp_path.iterdir()) == []

    def test_a_barebones_trainer_trains(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model = cartpole()
        Trainer(barebones=True, accelerator="cpu", max_epochs=-1).fit(model)
        assert model.env_steps == 96


class TestDeterminism:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {
                "ppo": dataclasses.replace(
                    SMALL, normalize_obs=True, normalize_reward=True, target_kl=1e-3
                )
            },
            {"env": Pendulum(num_envs=4, time_limit=10), "policy": MLP(action_bounds="tanh")},
        ],
    )
    def test_the_same_seed_gives_the_same_bits_for_20_iterations(self, make_trainer, settings):
        first, second = (
            fit(cartpole(total_env_steps=32 * 20, **settings), make_trainer()) for _ in range(2)
        )
        assert len(first) == 20
        assert repr(first) == repr(second)

    def test_another_seed_gives_another_history(self, make_trainer):
        first, second = (fit(cartpole(seed=seed), make_trainer()) for seed in (0, 1))
        assert first != second

    def test_global_rng_plays_no_part(self, make_trainer):
        torch.manual_seed(1)
        first = fit(cartpole(), make_trainer())
        torch.manual_seed(2)
        assert repr(fit(cartpole(), make_trainer())) == repr(first)


class TestLearning:
    def test_cartpole_improves_much(self, make_trainer):
        ppo = PPOConfig(rollout_steps=32, learning_rate=1e-3)
        rows = fit(PPO(CartPole(num_envs=32), ppo=ppo, total_env_steps=28_672), make_trainer())
        assert rows[-1]["rollout/episode_return_mean"] > 100  # a random policy: 22

    def test_bf16_mixed_learns_and_computes_in_bf16(self, make_trainer):
        seen = set()
        ppo = PPOConfig(rollout_steps=32, learning_rate=1e-3)
        model = PPO(CartPole(num_envs=32), ppo=ppo, total_env_steps=14_336)
        model.policy.actor[0].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
        rows = fit(model, make_trainer(precision="bf16-mixed"))
        assert seen == {torch.bfloat16}
        assert rows[-1]["rollout/episode_return_mean"] > 40  # a random policy: 22

    def test_linear_schedule_reaches_zero_at_the_end_of_the_run(self, make_trainer):
        ppo = dataclasses.replace(SMALL, learning_rate=1.0e-3, learning_rate_schedule="linear")
        rows = fit(cartpole(ppo=ppo, total_env_steps=32 * 4), make_trainer())
        assert [row["optim/learning_rate"] for row in rows] == pytest.approx(
            [1e-3, 7.5e-4, 5e-4, 2.5e-4]
        )

    def test_adaptive_schedule_slows_down_where_the_policy_runs_away(self, make_trainer):
        ppo = dataclasses.replace(
            SMALL, learning_rate=1e-2, learning_rate_schedule="adaptive", desired_kl=1e-8
        )
        rows = fit(cartpole(ppo=ppo), make_trainer())
        assert [row["optim/learning_rate"] for row in rows] == pytest.approx(
            [1e-2, 1e-2 / 1.5, 1e-2 / 2.25]
        )

    def test_normalised_observations_stay_within_obs_clip(self, make_trainer):
        model = cartpole(ppo=dataclasses.replace(SMALL, normalize_obs=True, obs_clip=0.5))
        fit(model, make_trainer())
        obs = prepare_obs(torch.tensor([[-1e6, 1e6, -1e6, 1e6]]), model.obs_normalizer)
        assert obs.tolist() == [[-0.5, 0.5, -0.5, 0.5]]

    def test_normalizers_are_frozen_within_an_iteration(self, make_trainer):
        model = cartpole(ppo=dataclasses.replace(SMALL, normalize_obs=True))
        rows = fit(model, make_trainer(max_epochs=1))
        stats = model.obs_normalizer._of("obs")
        assert stats.count == 96
        # Acting and learning saw the same numbers: the first minibatch of a one-minibatch epoch has
        # ratio 1.
        one = dataclasses.replace(SMALL, normalize_obs=True, epochs=1, minibatches=1)
        rows = fit(cartpole(ppo=one), make_trainer())
        assert [row["policy/approx_kl"] for row in rows] == pytest.approx([0.0] * 3, abs=1e-6)


class TestRow:
    NAMES = (
        *(
            "iteration",
            "env_steps",
            "gradient_steps",
            "time_s",
            "env_steps_per_s",
            "rollout/episode_return_mean",
        ),
        *(
            "rollout/episode_length_mean",
            "rollout/episodes",
            "loss/policy",
            "loss/value",
            "loss/entropy",
        ),
        *(
            "policy/approx_kl",
            "policy/clip_fraction",
            "policy/explained_variance",
            "optim/learning_rate",
        ),
        "optim/grad_norm",
    )

    def test_every_row_has_the_promised_names(self, make_trainer):
        for row in fit(cartpole(), make_trainer()):
            assert set(self.NAMES) - set(TIMES) == set(row)

    def test_rollout_metrics_are_null_while_no_episode_has_ended(self, make_trainer):
        model = cartpole(env=Pendulum(num_envs=4, time_limit=20), total_env_steps=4 * 8 * 4)
        known = []

        class Looks(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                metric = trainer.callback_metrics["rollout/episode_return_mean"]
                known.append((not metric.isnan(), "return" in trainer.progress_bar_metrics))

        rows = fit(model, make_trainer(callbacks=[Looks()]))
        assert known == [(False, False)] * 2 + [(True, True)] * 2
        returns = [row["rollout/episode_return_mean"] for row in rows]
        assert returns[:2] == [None, None]
        assert returns[2] is not None
        assert returns[3] == returns[2]  # no episode ended in it: the last known
        assert [row["rollout/episode_length_mean"] for row in rows] == [None, None, 20.0, 20.0]
        assert [row["rollout/episodes"] for row in rows] == [0, 0, 4, 0]


class TestLoggersAndCallbacks:
    def test_tensorboard_x_axis_is_env_steps(self, make_trainer, tmp_path):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        model = cartpole(iterations_per_epoch=2)
        fit(model, make_trainer(logger=logger, limit_val_batches=1.0, num_sanity_val_steps=1))
        events = EventAccumulator(str(tmp_path)).Reload()
        assert [event.step for event in events.Scalars("loss/value")] == [32, 64, 96]
        assert [event.step for event in events.Scalars("eval/episode_return_mean")] == [64, 96]

    def test_the_csv_logger_writes_the_env_steps_of_each_row(self, make_trainer, tmp_path):
        fit(cartpole(), make_trainer(logger=CSVLogger(tmp_path, name="", version="")))
        lines = (tmp_path / "metrics.csv").read_text().splitlines()
        step = lines[0].split(",").index("env_steps")
        assert [float(line.split(",")[step]) for line in lines[1:]] == [32, 64, 96]

    @pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
    def test_whatever_is_logged_has_env_steps_as_its_x_axis(self, make_trainer, tmp_path, kind):
        logger = kind(tmp_path, name="", version="")
        callbacks = [
            LearningRateMonitor("step"),
            LearningRateMonitor("epoch"),
            ThroughputMonitor(batch_size_fn=lambda batch: 1, window_size=2),
            LogsItself(),
        ]
        defaults = {"env": CartPole(num_envs=4), "ppo": SMALL, "eval_episodes": 3}
        model = LogsMore(**defaults, total_env_steps=96, iterations_per_epoch=2)
        trainer = make_trainer(logger=logger, callbacks=callbacks, limit_val_batches=1.0)
        fit(model, trainer)
        found = x_axes(tmp_path, kind)
        assert {"loss/value", "lr-Adam", "mine", "mine_epoch", "eval/episode_return_mean"} <= set(
            found
        )
        assert {"plain", "without step", "of the epoch", "train/batches"} <= set(found)
        for name, steps in found.items():
            assert set(steps) <= {0, 32, 64, 96}, (name, steps)
        assert found["loss/value"] == found["mine"] == found["plain"] == [32, 64, 96]
        assert found["eval/episode_return_mean"] == [64, 96]
        # What is logged outside the run is not ours to place.
        logger.log_metrics({"after": 1.0}, step=7)
        logger.save()
        assert x_axes(tmp_path, kind)["after"] == [7]

    def test_what_hooks_log_at_the_edges_of_a_run_is_on_the_axis(self, make_trainer, tmp_path):
        logger = CSVLogger(tmp_path / "first", name="", version="")
        late = CSVLogger(tmp_path / "late", name="", version="")

        class AtTheEdges(Callback):
            def setup(self, trainer, pl_module, stage):
                trainer.logger.log_metrics({"at setup": 1.0}, 5)

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                if late not in trainer.loggers:
                    trainer.loggers.append(late)

            def on_exception(self, trainer, pl_module, exception):
                for each in trainer.loggers:
                    each.log_metrics({"at the end": 1.0}, step=trainer.global_step)

        trainer = make_trainer(logger=logger, callbacks=[AtTheEdges(), DiesIn(3)])
        with pytest.raises(RuntimeError, match="in iteration 3"):
            fit(cartpole(), trainer)
        found = x_axes(tmp_path / "first", CSVLogger)
        assert (found["at setup"], found["at the end"]) == ([0], [64])
        found = x_axes(tmp_path / "late", CSVLogger)
        assert (found["loss/value"], found["at the end"]) == ([64], [64])

    @pytest.mark.parametrize("callbacks", [[], [DiesIn(2)]], ids=["well", "dies"])
    def test_a_logger_can_be_pickled_when_a_run_is_over(self, make_trainer, tmp_path, callbacks):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        with contextlib.suppress(RuntimeError):
            fit(cartpole(), make_trainer(logger=logger, callbacks=callbacks))
        assert pickle.loads(pickle.dumps(logger)).log_dir == logger.log_dir

    def test_a_resumed_run_and_an_evaluation_keep_to_the_axis(self, make_trainer, tmp_path):
        trainer = make_trainer()
        fit(cartpole(), trainer)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        logger = CSVLogger(tmp_path / "resumed", name="", version="")
        more = cartpole(total_env_steps=32 * 5)
        again = make_trainer(logger=logger, callbacks=[LearningRateMonitor("step"), LogsItself()])
        fit(more, again, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
        found = x_axes(tmp_path / "resumed", CSVLogger)
        assert (found["lr-Adam"], found["plain"]) == ([96, 128], [128, 160])
        alone = CSVLogger(tmp_path / "alone", name="", version="")
        make_trainer(logger=alone, limit_val_batches=1.0).validate(more, verbose=False)
        assert x_axes(tmp_path / "alone", CSVLogger)["eval/episode_return_mean"] == [160]

    def test_a_logger_goes_back_to_what_it_was_in_a_run_of_something_else(
        self, make_trainer, tmp_path
    ):
        logger = CSVLogger(tmp_path, name="", version="")
        with pytest.raises(RuntimeError, match="in iteration 2"):
            fit(cartpole(), make_trainer(logger=logger, callbacks=[DiesIn(2)]))
        make_trainer(logger=logger, max_epochs=1, limit_train_batches=2).fit(Boring())
        assert x_axes(tmp_path, CSVLogger)["boring"] == [0, 1]

    def test_loggers_get_rows_at_the_interval_of_the_trainer(self, make_trainer, tmp_path):
        logger = TensorBoardLogger(tmp_path, name="", version="")
        fit(cartpole(), make_trainer(logger=logger, log_every_n_steps=2))
        assert [e.step for e in EventAccumulator(str(tmp_path)).Reload().Scalars("loss/value")] == [
            64
        ]

    def test_model_checkpoint_monitors_rollout_and_evaluation(self, make_trainer, tmp_path):
        checkpoints = [
            ModelCheckpoint(tmp_path, "rollout", monitor="rollout/episode_length_mean", mode="max"),
            ModelCheckpoint(tmp_path, "eval", monitor="eval/episode_return_mean", mode="max"),
            ModelCheckpoint(tmp_path, "every-{step}", every_n_train_steps=2, save_top_k=-1),
        ]
        model = cartpole(iterations_per_epoch=2, total_env_steps=32 * 5)
        trainer = make_trainer(
            callbacks=checkpoints, enable_checkpointing=True, limit_val_batches=1.0
        )
        fit(model, trainer)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"rollout.ckpt", "eval.ckpt", "every-step=2.ckpt", "every-step=4.ckpt"}

    def test_early_stopping_ends_a_run(self, make_trainer):
        stop = EarlyStopping("loss/entropy", mode="max", patience=1, min_delta=1e9)
        model = cartpole(iterations_per_epoch=2, total_env_steps=32 * 100)
        fit(model, make_trainer(callbacks=[stop]))
        assert model.iteration == 4

    def test_the_learning_rate_monitor_logs_the_learning_rate(self, make_trainer, tmp_path):
        monitor = LearningRateMonitor()
        fit(cartpole(), make_trainer(callbacks=[monitor], logger=CSVLogger(tmp_path)))
        assert set(monitor.lrs) == {"lr-Adam"}
        assert set(monitor.lrs["lr-Adam"]) == {3e-4}


class TestEvaluation:
    def test_validate_is_deterministic_and_leaves_training_alone(self, make_trainer):
        model = cartpole()
        first = make_trainer(limit_val_batches=1.0).validate(model, verbose=False)
        assert make_trainer(limit_val_batches=1.0).validate(model, verbose=False) == first
        assert first[0]["eval/episodes"] == 3
        assert (
            1 <= first[0]["eval/episode_return_mean"] == first[0]["eval/episode_length_mean"] <= 500
        )

    def test_evaluating_changes_no_bit_of_training(self, make_trainer):
        without = fit(cartpole(iterations_per_epoch=1), make_trainer())
        rows = fit(
            cartpole(iterations_per_epoch=1),
            make_trainer(limit_val_batches=1.0, num_sanity_val_steps=1),
        )
        assert repr(rows) == repr(without)

    def test_every_evaluation_is_of_its_own_episodes(self, make_trainer, monkeypatch):
        found, true = [], evaluation.evaluation_metrics
        monkeypatch.setattr(
            evaluation, "evaluation_metrics", lambda *each: found.append(each) or true(*each)
        )
        model = cartpole(iterations_per_epoch=1)
        fit(model, make_trainer(limit_val_batches=1.0))
        assert [[len(each) for each in both] for both in found] == [[3, 3]] * 3

    @pytest.mark.parametrize("rank", [0, 1])
    def test_each_rank_plays_episodes_of_its_own(self, make_trainer, monkeypatch, rank):
        model, seeds = cartpole(), []

        class Spy(CartPole):
            def build(self, device, seed):
                seeds.append(seed)
                return super().build(device, seed)

        model.evaluation.spec = Spy(num_envs=3)
        monkeypatch.setattr(PPO, "global_rank", rank)
        make_trainer(limit_val_batches=1.0).validate(model, verbose=False)
        assert seeds == [stream_seed(0, rank=rank, purpose="evaluation")]

    def test_an_evaluation_counts_the_first_episode_of_each_environment(self, make_trainer):
        model = cartpole(env=MountainCar(num_envs=4, time_limit=37), eval_episodes=5)
        result = make_trainer(limit_val_batches=1.0).validate(model, verbose=False)[0]
        assert (result["eval/episode_length_mean"], result["eval/episodes"]) == (37.0, 5.0)

    def test_episodes_without_end_are_an_error(self):
        model = cartpole()
        env = MountainCar(num_envs=2, time_limit=1000).build(torch.device("cpu"), 0)
        policy = PPO(MountainCar(num_envs=4), ppo=SMALL).policy
        message = r"must end every episode within 64 steps to be evaluated, got '2 running'\."
        with pytest.raises(ValueError, match=message):
            evaluate_policy(
                policy, partial(prepare_obs, normalizer=model.obs_normalizer), env, max_steps=64
            )


class TestCheckpoints:
    PPO = dataclasses.replace(
        SMALL, normalize_obs=True, normalize_reward=True, learning_rate_schedule="linear"
    )

    @pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
    @pytest.mark.parametrize(
        ("env", "policy"),
        [
            (CartPole(num_envs=4), MLP()),
            (Pendulum(num_envs=4, time_limit=20), MLP()),
            (CartPole(num_envs=4), Recurrent(cell="lstm")),
        ],
        ids=lambda spec: type(spec).__name__,
    )
    def test_resumed_run_continues_bit_for_bit(self, make_trainer, tmp_path, env, policy):
        def model():
            settings = {"env": env, "policy": policy, "ppo": self.PPO}
            return cartpole(**settings, total_env_steps=32 * 6, iterations_per_epoch=2)

        whole, reference = model(), make_trainer()
        expected = fit(whole, reference)

        def saving(*others):
            save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
            return make_trainer(callbacks=[save, *others], enable_checkpointing=True)

        with pytest.raises(RuntimeError, match="in iteration 4"):
            fit(model(), saving(DiesIn(iteration=4)))
        resumed = model()
        trainer = saving()
        rows = fit(resumed, trainer, ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
        assert (trainer.global_step, trainer.current_epoch) == (
            reference.global_step,
            reference.current_epoch,
        )
        assert repr(rows) == repr(expected[3:])
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def saved(self, make_trainer, tmp_path, **settings):
        model, trainer = cartpole(**settings), make_trainer()
        trainer.fit(model)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        return model, tmp_path / "x.ckpt"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Simulator(CartPole):
        """CartPole as a simulator whose state cannot be saved."""

        def build(self, device, seed):
            env = super().build(device, seed)
            env.state_dict = lambda: None
            return env

    def test_environments_that_cannot_be_saved_begin_new_episodes_and_say_so(
        self, make_trainer, tmp_path, caplog
    ):
        env = self.Simulator(num_envs=4)
        check_env(env, steps=20)
        _, path = self.saved(make_trainer, tmp_path, env=env)
        more = cartpole(env=env, total_env_steps=32 * 5)
        rows = fit(more, make_trainer(), ckpt_path=path, weights_only=True)
        assert "holds no environments of rank 0: new episodes begin" in caplog.text
        assert [row.get("resumed_with_new_episodes") for row in rows] == [1, None]
        assert [row["env_steps"] for row in rows] == [128, 160]

    def test_a_checkpoint_of_a_gpu_begins_new_episodes_on_a_cpu_and_says_so(
        self, make_trainer, tmp_path, caplog
    ):
        _, path = self.saved(make_trainer, tmp_path)
        checkpoint = torch.load(path, weights_only=True)
        state = checkpoint["esper_lightning"]["ranks"][0]
        of_gpu = torch.zeros(16, dtype=torch.uint8)
        state["generators"] = [of_gpu, of_gpu]
        state["env"]["generator"] = of_gpu
        torch.save(checkpoint, path)
        more = cartpole(total_env_steps=32 * 5)
        rows = fit(more, make_trainer(), ckpt_path=path, weights_only=True)
        said = "holds no environments of rank 0 for this kind of device: new episodes begin"
        assert said in caplog.text
        assert [row.get("resumed_with_new_episodes") for row in rows] == [1, None]
        assert [row["env_steps"] for row in rows] == [128, 160]

    def test_a_warm_start_plays_no_part_where_a_run_is_resumed(self, make_trainer, tmp_path):
        _, path = self.saved(make_trainer, tmp_path)
        plain, warm = (
            cartpole(total_env_steps=32 * 4, warm_start=start) for start in (None, "nowhere.ckpt")
        )
        rows = [fit(m, make_trainer(), ckpt_path=path, weights_only=True) for m in (plain, warm)]
        assert rows[0] == rows[1]
        with pytest.raises(ValueError, match=r"name an existing checkpoint, got 'nowhere.ckpt'"):
            make_trainer().fit(cartpole(warm_start="nowhere.ckpt"))

    def test_a_warm_start_is_for_the_first_fit_alone(self, make_trainer, tmp_path):
        donor, path = self.saved(make_trainer, tmp_path)
        begun = []

        class Looks(Callback):
            def on_train_start(self, trainer, pl_module):
                begun.append(copy.deepcopy(pl_module.state_dict()))

        model = cartpole(warm_start=str(path), total_env_steps=None, iterations_per_epoch=2)
        ends = []
        for _ in range(2):
            fit(model, make_trainer(max_epochs=1, callbacks=[Looks()]))
            ends.append(copy.deepcopy(model.state_dict()))
        for name, value in donor.state_dict().items():
            assert torch.equal(begun[0][name], value), name
            assert torch.equal(begun[1][name], ends[0][name]), name
        assert any(not torch.equal(ends[0][name], begun[0][name]) for name in begun[0])

    def test_a_second_fit_of_a_resumed_module_does_not_go_back(
        self, make_trainer, tmp_path, monkeypatch
    ):
        _, path = self.saved(make_trainer, tmp_path)
        states, start = [], Learner.start

        def spy(learner, optimizer, state):
            states.append(state)
            return start(learner, optimizer, state)

        monkeypatch.setattr(Learner, "start", spy)
        model = cartpole(total_env_steps=None, iterations_per_epoch=2)
        fit(model, make_trainer(max_steps=4), ckpt_path=path, weights_only=True)
        fit(model, make_trainer(max_steps=1))
        assert [state is None for state in states] == [False, True]
        assert model.iteration == 5

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Careless(CartPole):
        """CartPole that samples from the global random generators."""

        def build(self, device, seed):
            env = super().build(device, seed)
            step = env.step

            def noisy(action):
                result = step(action)
                # Not from Python's own: checks of types, which only tests have, draw from that.
                noise = torch.rand(4) + float(np.random.rand())  # noqa: NPY002
                return result._replace(reward=result.reward + noise)

            env.step = noisy
            return env

    def test_the_global_random_generators_are_resumed_as_well(self, make_trainer, tmp_path):
        def model(iterations):
            env = self.Careless(num_envs=4)
            return cartpole(env=env, total_env_steps=32 * iterations)

        def seed(number):
            np.random.seed(number)  # noqa: NPY002
            torch.manual_seed(number)

        seed(1)
        expected = fit(model(4), make_trainer())
        seed(1)
        trainer = make_trainer()
        fit(model(2), trainer)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        seed(2)
        rows = fit(model(4), make_trainer(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
        assert repr(rows) == repr(expected[2:])

    def test_the_clock_of_a_resumed_run_continues(self, make_trainer, tmp_path):
        model, trainer = cartpole(), make_trainer()
        trainer.fit(model)
        model.progress.train_time_s = 1000.0
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        more = cartpole(total_env_steps=32 * 4)
        fit(more, make_trainer(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
        assert 1000.0 < more.progress.train_time_s < 1100.0

    def test_a_budget_that_the_checkpoint_is_beyond_is_used_up(
        self, make_trainer, tmp_path, caplog
    ):
        _, path = self.saved(make_trainer, tmp_path)
        less = cartpole(total_env_steps=32)
        assert fit(less, make_trainer(), ckpt_path=path, weights_only=True) == []
        assert "PPO.total_env_steps=32 is used up: 96 env steps were taken" in caplog.text

    def test_a_rank_that_saves_alone_waits_for_nobody(self, make_trainer, monkeypatch):
        model = cartpole()
        fit(model, make_trainer())
        monkeypatch.setattr(model._ranks, "collect_states", lambda state: 1 / 0)
        saved = {}
        with pytest.raises(ZeroDivisionError):
            model.on_save_checkpoint(saved)
        model.saves_alone = True
        model.on_save_checkpoint(saved)
        assert list(saved["esper_lightning"]["ranks"]) == [0]

    def test_load_from_checkpoint_needs_nothing_but_the_file(self, make_trainer, tmp_path):
        model, path = self.saved(
            make_trainer, tmp_path, ppo=self.PPO, policy=MLP(hidden_sizes=(16,), trunk="shared")
        )
        loaded = PPO.load_from_checkpoint(path)
        assert (loaded.env, loaded.ppo, loaded.iteration) == (model.env, model.ppo, 3)
        for name, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name]), name
        assert PPO.load_from_checkpoint(path, seed=7).seed == 7

    def test_settings_of_the_resumed_run_win(self, make_trainer, tmp_path):
        _, path = self.saved(make_trainer, tmp_path)
        slower = dataclasses.replace(SMALL, learning_rate=1e-6, adam_eps=1e-3)
        model = cartpole(ppo=slower, total_env_steps=32 * 4)
        trainer = make_trainer()
        (row,) = fit(model, trainer, ckpt_path=path, weights_only=True)
        assert row["optim/learning_rate"] == 1e-6
        assert trainer.optimizers[0].param_groups[0]["eps"] == 1e-3

    class Nested:
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Spec(EnvSpec):
            num_envs: int = 4
            extra: object = None

            def spaces(self):
                return CartPole().spaces()

            def build(self, device, seed):
                return CartPole(num_envs=self.num_envs).build(device, seed)

    def test_specs_within_settings_are_rebuilt_unless_they_hold_other_objects(
        self, make_trainer, tmp_path
    ):
        _, path = self.saved(make_trainer, tmp_path, env=self.Nested.Spec())
        assert PPO.load_from_checkpoint(path).env == self.Nested.Spec()
        odd = self.Nested.Spec(extra=torch.float32)
        _, path = self.saved(make_trainer, tmp_path, env=odd)
        with pytest.raises(ValueError, match=r"torch.float32 is not plain data. Pass env yourself"):
            PPO.load_from_checkpoint(path)
        assert PPO.load_from_checkpoint(path, env=odd).iteration == 3

    def test_evaluation_may_use_other_numbers_of_environments(self, make_trainer, tmp_path):
        _, path = self.saved(make_trainer, tmp_path)
        model = cartpole(env=CartPole(num_envs=8), eval_episodes=2)
        make_trainer(limit_val_batches=1.0).validate(
            model, ckpt_path=path, verbose=False, weights_only=True
        )
        assert model.iteration == 3

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"env": CartPole(num_envs=8)}, "PPO.env.num_envs must be the checkpoint's, 4, got 8."),
            (
                {"env": MountainCar(num_envs=4)},
                "PPO.env must be the checkpoint's, 'esper_lightning.envs.cartpole.",
            ),
            (
                {"ppo": dataclasses.replace(SMALL, normalize_obs=True)},
                "PPOConfig.normalize_obs must be the checkpoint's, False, got True.",
            ),
            (
                {"ppo": dataclasses.replace(SMALL, normalize_reward=True)},
                "PPOConfig.normalize_reward must be the checkpoint's, False, got True.",
            ),
            (
                {"policy": MLP(hidden_sizes=(8,))},
                "PPO.policy.hidden_sizes must be the checkpoint's, [64, 64], got [8].",
            ),
        ],
    )
    def test_the_checkpoint_of_another_run_is_refused(self, make_trainer, tmp_path, other, message):
        _, path = self.saved(make_trainer, tmp_path)
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            make_trainer().fit(cartpole(**other), ckpt_path=path, weights_only=True)

    def test_a_checkpoint_of_another_module_is_refused(self, tmp_path):
        torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
        message = "ckpt_path must name a checkpoint of PPO, got '.*x[.]ckpt'"
        with pytest.raises(ValueError, match=message):
            PPO.load_from_checkpoint(tmp_path / "x.ckpt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """CartPole that returns NaN in one environment at its 11th step."""

    num_envs: int = 4
    field: str = "obs"

    def spaces(self) -> EnvSpaces:
        return CartPole(num_envs=self.num_envs).spaces()

    def build(self, device, seed):
        env = CartPole(num_envs=self.num_envs).build(device, seed)
        step, field, count = env.step, self.field, iter(range(10**6))

        def broken_step(action):
            result = step(action)
            if next(count) == 10:
                bad = getattr(result, field).clone()
                bad[(2, 1) if bad.dim() == 2 else 2] = math.nan
                result = result._replace(**{field: bad})
            return result

        env.step = broken_step
        return env


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rich(CartPole):
    """CartPole with another reward."""

    num_envs: int = 4
    reward: float = 1.0

    def advance(self, state, action):
        after = super().advance(state, action)
        return after._replace(reward=torch.full_like(after.reward, self.reward))


class TestErrors:
    @pytest.mark.parametrize(
        ("field", "where"),
        [
            # Seen by the policy at the next step of the rollout.
            ("obs", "nan in obs of environment 2, column 1 at rollout step 3"),
            ("reached_obs", "nan in reached_obs of environment 2, column 1 at rollout step 2"),
            ("reward", "nan in reward of environment 2 at rollout step 2"),
        ],
    )
    @pytest.mark.parametrize("normalize", [False, True])
    def test_nan_from_an_environment_names_it_and_spares_the_weights(
        self, make_trainer, field, where, normalize
    ):
        ppo = dataclasses.replace(SMALL, normalize_obs=normalize, normalize_reward=normalize)
        model = cartpole(env=Broken(field=field), ppo=ppo)
        good = cartpole(env=Broken(field=field), ppo=ppo, total_env_steps=32)
        fit(good, make_trainer())
        message = f"Broken.step must return finite values, got {where}. The weights are those of"
        with pytest.raises(NonFiniteError, match="^" + re.escape(message)) as caught:
            fit(model, make_trainer())
        assert (caught.value.tensors, caught.value.environments) == ([field], [2])
        bad = ~caught.value.minibatch[field].isfinite()  # of the step in which it appeared
        assert bad.view(4, -1).any(1).tolist() == [False, False, True, False]
        assert model.iteration == 1
        for name, value in good.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        saved = {"hyper_parameters": {}}
        model.on_save_checkpoint(saved)
        assert saved["esper_lightning"]["ranks"] == {}  # it stands within an iteration

    @pytest.mark.parametrize("env", [CartPole(num_envs=4), Pendulum(num_envs=4)])
    def test_a_learner_that_diverges_is_not_blamed_on_the_environment(self, make_trainer, env):
        ppo = dataclasses.replace(SMALL, learning_rate=1e18, max_grad_norm=None)
        model = cartpole(env=env, ppo=ppo, total_env_steps=32 * 10)
        with pytest.raises(ValueError, match=r"^PPO('s gradient|\.policy) must .* finite"):
            fit(model, make_trainer())
        assert all(value.isfinite().all() for value in model.policy.state_dict().values())

    @pytest.mark.parametrize("mode", ["off", pytest.param("auto", marks=pytest.mark.slow)])
    @pytest.mark.usefixtures("native_code")
    def test_rewards_whose_gradients_have_infinite_squares_are_trained_on(self, make_trainer, mode):
        ppo = dataclasses.replace(SMALL, value_coef=1e3)
        rows = fit(cartpole(env=Rich(reward=1e17), ppo=ppo, compile=mode), make_trainer())
        assert len(rows) == 3
        assert all(2e19 < row["optim/grad_norm"] < math.inf for row in rows)
        assert all(row["gradient_steps"] > 0 for row in rows)

    @pytest.mark.parametrize(
        ("reward", "limit", "tensors"),
        [(1e30, 0.5, ["loss/value"]), (1e17, None, ["gradient of "]), (1e38, 0.5, ["loss/"])],
    )
    def test_rewards_that_are_too_large_are_named_and_can_be_seen_again(
        self, make_trainer, tmp_path, reward, limit, tensors
    ):
        limits = {"max_grad_norm": limit, "value_coef": 1e3}
        ppo = dataclasses.replace(SMALL, normalize_obs=True, **limits)
        model = cartpole(env=Rich(reward=reward), ppo=ppo)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(NonFiniteError, match=r"^PPO's gradient must be finite") as error:
            fit(model, make_trainer(callbacks=[FlightRecorder(watch=False)]))
        assert re.search(r"in iteration 1, gradient step \d: ", str(error.value))
        assert f"Rewards of Rich reach {reward:.1e}: set PPOConfig.norm" in str(error.value)
        assert error.value.tensors[0].startswith(tensors[0])
        saved = torch.load(tmp_path / "rank0" / "nan.pt", weights_only=True)
        assert saved["value_target"].abs().max() >= reward / 2
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_large_rewards_that_are_scaled_are_no_fault(self, make_trainer):
        ppo = dataclasses.replace(SMALL, normalize_reward=True)
        rows = fit(cartpole(env=Rich(reward=1e30), ppo=ppo), make_trainer())
        assert all(row["optim/grad_norm"] < 1e3 for row in rows)

    @pytest.mark.parametrize(
        ("start", "end", "message"),
        [
            (
                lambda: torch.set_default_dtype(torch.float64),
                lambda: torch.set_default_dtype(torch.float32),
                "torch.get_default_dtype() for PPO must be torch.float32, got torch.float64.",
            ),
            (
                lambda: torch.set_default_dtype(torch.bfloat16),
                lambda: torch.set_default_dtype(torch.float32),
                "torch.get_default_dtype() for PPO must be torch.float32, got torch.bfloat16.",
            ),
            (
                lambda: torch.set_default_device("meta"),
                lambda: torch.set_default_device(None),
                "torch.get_default_device() for PPO must be cpu, got meta.",
            ),
        ],
    )
    def test_defaults_of_torch_that_would_make_other_tensors_are_refused(
        self, make_trainer, start, end, message
    ):
        model = cartpole()
        start()
        try:
            for run in (cartpole, lambda: make_trainer().fit(model)):
                with pytest.raises(ValueError, match="^" + re.escape(message)):
                    run()
            with pytest.raises(ValueError, match=r"^torch.get_default_.* for check_env must be"):
                check_env(CartPole(num_envs=2))
        finally:
            end()
        torch.set_default_device("cpu")
        try:
            fit(model, make_trainer())
        finally:
            torch.set_default_device(None)

    @pytest.mark.parametrize("least", [{"min_epochs": 2}, {"min_steps": 5}])
    def test_a_least_length_beside_a_budget_is_refused(self, make_trainer, least):
        message = f"Trainer.{next(iter(least))} must be None with PPO.total_env_steps=96, got"
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            make_trainer(**least).fit(cartpole())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"policy": CartPole()}, "PPO.policy must be a policy spec, got CartPole("),
            ({"ppo": {}}, "PPO.ppo must be a PPOConfig, got {}."),
            ({"env": "CartPole"}, "PPO.env must be an environment spec, got 'CartPole'."),
            ({"policy": 3}, "PPO.policy must be a policy spec, got 3."),
            (
                {"total_env_steps": 3},
                "PPO.total_env_steps must be at least env.num_envs = 4, got 3.",
            ),
            ({"iterations_per_epoch": 0}, "PPO.iterations_per_epoch must be at least 1, got 0."),
            (
                {"ppo": PPOConfig(rollout_steps=8, minibatches=5)},
                "PPOConfig.minibatches must divide rollout_steps * num_envs = 8 * 4 = 32, got 5. "
                "Near values that do: 4, 8, 16.",
            ),
            (
                {"ppo": PPOConfig(rollout_steps=8, minibatches=8), "policy": Recurrent()},
                "PPOConfig.minibatches must divide num_envs = 4 for a policy with memory, got 8. "
                "Near values that do: 1, 2, 4.",
            ),
            (
                {"env": Pendulum(num_envs=4), "policy": MLP(actor_obs=("camera",))},
                "MLP.actor_obs must name groups of the observation (it has none), got 'camera'.",
            ),
        ],
    )
    def test_settings_that_cannot_work_are_refused(self, settings, message):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            cartpole(**settings)

    @pytest.mark.parametrize(
        ("space", "policy", "message"),
        [
            (
                Box((1,), 0.0, math.inf),
                MLP(),
                "MLP's action space must be bounded everywhere or nowhere",
            ),
            (
                Box((1,)),
                MLP(action_bounds="tanh"),
                "MLP.action_bounds must be 'clip' where the action space has no",
            ),
        ],
    )
    def test_an_action_space_that_fits_no_policy_is_refused(self, space, policy, message):
        class Odd:
            num_envs = 4

            def spaces(self):
                return EnvSpaces(obs=Box((2,)), action=space)

            def build(self, device, seed):
                raise AssertionError

        with pytest.raises(ValueError, match="^" + re.escape(message)):
            PPO(Odd(), policy, SMALL, eval_episodes=4)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"gradient_clip_val": 1.0},
                "Trainer.gradient_clip_val must be None, got 1.0. PPO clips gradients itself",
            ),
            ({"accumulate_grad_batches": 2}, "Trainer.accumulate_grad_batches must be 1, got 2."),
            (
                {
                    "callbacks": [ModelCheckpoint(train_time_interval=datetime.timedelta(1))],
                    "enable_checkpointing": True,
                },
                "ModelCheckpoint.train_time_interval must be None",
            ),
            (
                {"precision": "bf16-true"},
                "Trainer.precision must be one of 32-true, bf16-mixed, got 'bf16-true'.",
            ),
            (
                {"check_val_every_n_epoch": 0},
                "Trainer.check_val_every_n_epoch must be at least 1, or None, got 0.",
            ),
            (
                {"val_check_interval": 60, "limit_val_batches": 1.0},
                "Trainer.val_check_interval must be at most 50, the iterations of an epoch, got 60",
            ),
        ],
    )
    def test_trainer_settings_that_cannot_work_are_refused(self, make_trainer, settings, message):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            make_trainer(**settings).fit(cartpole())

    def test_a_linear_schedule_is_refused_for_an_endless_run(self, make_trainer):
        ppo = dataclasses.replace(SMALL, learning_rate_schedule="linear")
        message = "PPO.total_env_steps must be known for PPOConfig.learning_rate_schedule='linear'"
        with pytest.raises(ValueError, match=re.escape(message)):
            make_trainer().fit(cartpole(ppo=ppo, total_env_steps=None))

    def test_an_evaluation_needs_no_end_of_a_run(self, make_trainer):
        ppo = dataclasses.replace(SMALL, learning_rate_schedule="linear")
        trainer = make_trainer(limit_val_batches=1.0)
        (metrics,) = trainer.validate(cartpole(ppo=ppo, total_env_steps=None), verbose=False)
        assert metrics["eval/episodes"] == 3

    def test_an_evaluation_that_does_not_fit_into_the_memory_is_refused(self, make_trainer):
        message = "PPO.eval_episodes must give an evaluation that fits into the memory"
        with pytest.raises(ValueError, match=message):
            make_trainer(limit_val_batches=1.0).validate(cartpole(eval_episodes=10**12))


class NotADataclass:
    """A spec that shares nothing with ours; observations in double precision, in two groups."""

    def __init__(self, num_envs=4):
        self.num_envs = num_envs

    def spaces(self) -> EnvSpaces:
        return EnvSpaces(
            obs={"position": Box((2,)), "speed": Box((2,))},
            action=MultiDiscrete((2, 3)),
            masked=True,
        )

    def build(self, device, seed):
        return TwoGroups(CartPole(num_envs=self.num_envs).build(device, seed), self.spaces())


class TwoGroups:
    """CartPole with a second action that does nothing; the cart's place decides what it may be."""

    def __init__(self, env, spaces):
        self._env, self.spaces, self.num_envs = env, spaces, env.num_envs
        self.state_dict, self.load_state_dict = env.state_dict, env.load_state_dict
        self._mask = None

    def _masked(self, obs):
        right = obs[:, 0] > 0
        always = torch.ones_like(right)
        self._mask = torch.stack([always, always, always, right, ~right], 1)
        return self._mask

    def _groups(self, obs):
        position, speed = obs.double()[:, ::2], obs.double()[:, 1::2]
        return {"speed": speed, "position": position}

    def reset(self):
        obs = self._env.reset()[0]
        return self._groups(obs), self._masked(obs)

    def step(self, action):
        assert self._mask.gather(1, 2 + action[:, 1:]).all(), "a forbidden action"
        result = self._env.step(action[:, 0])
        return result._replace(
            obs=self._groups(result.obs),
            reached_obs=self._groups(result.reached_obs),
            action_mask=self._masked(result.obs),
        )


class TestEnvironmentsOfOthers:
    def test_a_plain_class_with_groups_and_masks_is_trained_on(self, make_trainer, tmp_path):
        def model():
            policy = MLP(hidden_sizes=(16,), actor_obs=("position",))
            ppo = dataclasses.replace(SMALL, normalize_obs=True)
            return PPO(NotADataclass(), policy, ppo, total_env_steps=96, iterations_per_epoch=2)

        check_env(NotADataclass().build(torch.device("cpu"), 0), steps=100)
        trainer = make_trainer(limit_val_batches=1.0)
        trainer.fit(model())
        assert trainer.callback_metrics["eval/episodes"] == 4
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        make_trainer().fit(model(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
        assert PPO.load_from_checkpoint(tmp_path / "x.ckpt", env=NotADataclass()).iteration == 3

    def test_masks_line_up_with_observations_from_acting_to_learning(self, make_trainer):
        ppo = dataclasses.replace(SMALL, rollout_steps=64, epochs=1, minibatches=1)
        rows = fit(PPO(NotADataclass(), ppo=ppo, total_env_steps=256 * 3), make_trainer())
        assert [row["policy/approx_kl"] for row in rows] == pytest.approx([0.0] * 3, abs=1e-6)
        assert [row["loss/policy"] for row in rows] == pytest.approx([0.0] * 3, abs=1e-6)

    def test_evaluation_normalises_and_masks_as_training_did(self, make_trainer, monkeypatch):
        ppo = dataclasses.replace(SMALL, normalize_obs=True)
        model = PPO(NotADataclass(), ppo=ppo, total_env_steps=96)
        fit(model, make_trainer())
        with torch.no_grad():  # without a mask, one choice would always be taken
            model.policy.action_head.logits.bias[3] = 100.0
        seen = []
        act = model.policy.act_deterministically

        def spy(obs, mask):
            seen.append(obs)
            return act(obs, mask)

        monkeypatch.setattr(model.policy, "act_deterministically", spy)
        make_trainer(limit_val_batches=1.0).validate(model, verbose=False)
        env = model.evaluation.spec.build(
            torch.device("cpu"), stream_seed(0, rank=0, purpose="evaluation")
        )
        first = prepare_obs(env.reset()[0], model.obs_normalizer)
        assert torch.equal(seen[0]["speed"], first["speed"])
        assert not torch.equal(first["speed"], first["speed"].clamp(-0.06, 0.06))

    def test_another_number_of_episodes_is_refused_where_the_spec_cannot_be_copied(self):
        message = "PPO.eval_episodes must equal env.num_envs = 4, got 7. Make the spec a dataclass"
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            PPO(NotADataclass(), ppo=SMALL, eval_episodes=7)
