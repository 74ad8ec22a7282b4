"""PPO as a LightningModule: one ``training_step`` is one iteration.

Axes: ``T`` rollout step, ``B`` environment. Read ``training_step`` first; everything else prepares
it or reports on it.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torchmetrics import CatMetric
from typing_extensions import override

from esper_lightning.callbacks.loggers import guard_loggers
from esper_lightning.compiling.loops import CompileMode
from esper_lightning.core.buffer import rollout_bytes
from esper_lightning.core.errors import check_arguments, require
from esper_lightning.core.ranks import SINGLE_RANK, Ranks, RanksDisagreeError
from esper_lightning.core.running_stats import ObsNormalizer, RunningStats, normalized_space
from esper_lightning.core.seeding import (
    global_random_states,
    require_torch_defaults,
    set_global_random_states,
    stream,
    stream_seed,
)
from esper_lightning.core.types import Observation, Rollout
from esper_lightning.envs.base import EnvSpec
from esper_lightning.envs.contract import Report
from esper_lightning.envs.inspector import FIRST_STEPS, FirstSteps, check_told
from esper_lightning.policies import MLP
from esper_lightning.policies.base import PolicySpec
from esper_lightning.ppo.agent import Agent, prepare_obs
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.evaluation import evaluate_policy
from esper_lightning.ppo.learner import Learner, Targets
from esper_lightning.ppo.metrics import (
    RecentEpisodes,
    evaluation_metrics,
    rollout_metrics,
    to_host,
)
from esper_lightning.ppo.non_finite import refuse_gradient, refuse_rollout
from esper_lightning.ppo.optimizer import (
    adapt_learning_rate,
    build_optimizer,
    schedule_learning_rate,
)
from esper_lightning.ppo.update import UpdateMetrics
from esper_lightning.training import trainer_rules
from esper_lightning.training.checkpoint.states import (
    STATE_KEY,
    digest,
    load_checkpoint,
    load_weights,
    refuse_foreign,
    refuse_huge,
    refuse_non_finite,
    refuse_not_ours,
    refuse_not_whole,
    refuse_other_optimizer,
    refuse_other_weights,
    settings_of,
)
from esper_lightning.training.iterations import Iterations
from esper_lightning.training.publish import publish
from esper_lightning.training.specs import (
    evaluation_spec,
    first_difference,
    require_specs,
    spec_to_data,
    to_data,
)

__all__ = ["PPO"]

_log = logging.getLogger(__name__)


class PPO(LightningModule):
    """Proximal policy optimisation over batched environments (Schulman et al. 2017).

    Train it with ``Trainer.fit(model)``; no data module is needed. ``global_step`` counts
    iterations, an epoch is ``iterations_per_epoch`` of them: what Lightning does per epoch -
    evaluate, save, check for an early stop - happens that often. Whatever is logged in a run has
    ``env_steps`` as its x axis, except what is written past ``Logger.log_metrics``. Callbacks can
    monitor every figure of a history row; those of episodes are NaN until one has ended, which
    ``EarlyStopping`` takes for a reason to stop unless ``check_finite=False``.

    Attributes:
        iteration: Iterations finished.
        env_steps: Environment steps taken, over all environments.
        gradient_steps: Optimizer steps applied.
        saves_alone: Whether the next checkpoint is one of this rank alone, because others may not
            be there: it holds the environments of this rank only.
        settings: The arguments as plain data, in the form of a config's ``model``.
    """

    @check_arguments
    def __init__(
        self,
        env: EnvSpec,
        policy: PolicySpec = MLP(),  # noqa: B008 - frozen
        ppo: PPOConfig = PPOConfig(),  # noqa: B008 - frozen
        seed: int = 0,
        total_env_steps: int | None = None,
        iterations_per_epoch: int = 50,
        eval_episodes: int | None = None,
        compile: CompileMode = "off",  # noqa: A002 - as it is called everywhere
        warm_start: str | None = None,
    ) -> None:
        """Check the settings and build the networks; ``setup`` builds environments, on the device.

        Args:
            env: Which environments to train in, on each rank.
            policy: Which networks to train.
            ppo: How to train them.
            seed: Of everything random: weights, environments, exploration, sample order,
                evaluation.
            total_env_steps: The run ends when so many steps have been taken, over all environments:
                the last rollout is shortened to fit, and less than one step of all environments is
                left unused. ``None`` leaves the end to the Trainer's own limits.
            iterations_per_epoch: Length of Lightning's epoch.
            eval_episodes: Episodes of one evaluation on each rank, each in an environment of its
                own. ``None`` for 100, or ``env.num_envs`` where the spec is not a dataclass.
            compile: How rollouts and updates run. ``off`` begins at once; ``default`` compiles
                single steps; ``max`` compiles (or, on CUDA, captures) whole rollouts and updates,
                several times as fast after half a minute of compilation or more. The results are
                the same to rounding (that of bfloat16 under ``bf16-mixed``); what cannot be
                compiled runs a slower way, with a warning.
            warm_start: Checkpoint whose weights and normalisers a new run begins with; nothing else
                of it is used. Of no effect where a run is resumed.

        Raises:
            ValueError: If a setting is out of range or does not fit the environment.
        """
        super().__init__()
        require_torch_defaults("PPO")
        require_specs("PPO", env, policy)
        spaces, report = env.spaces(), Report(type(env).__name__)
        with report.told():
            check_told(env.num_envs, spaces, report)
        at_least_1 = {"iterations_per_epoch": iterations_per_epoch, "eval_episodes": eval_episodes}
        for name, value in at_least_1.items():
            require(value is None or value >= 1, f"PPO.{name}", "be at least 1", value)
        enough = total_env_steps is None or total_env_steps >= env.num_envs
        rule = f"be at least env.num_envs = {env.num_envs}"
        require(enough, "PPO.total_env_steps", rule, total_env_steps)

        self.automatic_optimization = False
        settings: dict[str, Any] = {
            "env": spec_to_data(env),
            "policy": spec_to_data(policy),
            "ppo": to_data(ppo),
            "seed": seed,
            "total_env_steps": total_env_steps,
            "iterations_per_epoch": iterations_per_epoch,
            "eval_episodes": eval_episodes,
            "compile": compile,
            "warm_start": warm_start,
        }
        self.save_hyperparameters(settings)
        self.settings: dict[str, Any] = settings
        self.env, self.ppo, self.seed = env, ppo, seed
        self.compile_mode: CompileMode = compile
        self.total_env_steps, self.iterations_per_epoch = total_env_steps, iterations_per_epoch
        self.iteration = self.env_steps = self.gradient_steps = 0
        self.train_time_s = 0.0
        self.warm_start = warm_start
        self.saves_alone = False

        weights = stream(seed, rank=0, purpose="weights", device=torch.device("cpu"))
        seen = normalized_space(spaces.obs, clip=ppo.obs_clip) if ppo.normalize_obs else spaces.obs
        self.policy = policy.build(replace(spaces, obs=seen), weights)
        ppo.check_against(num_envs=env.num_envs, whole_sequences=self.policy.memory_size > 0)
        normalizes = ppo.normalize_obs
        self.obs_normalizer = ObsNormalizer(spaces.obs, clip=ppo.obs_clip) if normalizes else None
        self.return_stats = RunningStats(()) if ppo.normalize_reward else None
        self.recent_episodes = RecentEpisodes()
        self.eval_return = CatMetric(nan_strategy="error")
        self.eval_length = CatMetric(nan_strategy="error")
        self._eval_env = evaluation_spec(env, eval_episodes)
        self._spaces, self._evaluated = spaces, False
        self._within_iteration = self._resuming = self._new_episodes = False
        self._resumed: dict[str, Any] | None = None
        self._loaded_digest = 0  # of the checkpoint, where several ranks resume
        self._ranks = SINGLE_RANK

    # The main path.

    @override
    def training_step(self, batch: int, batch_idx: int) -> dict[str, Any]:
        """One iteration: roll out, estimate advantages, update, report.

        Returns:
            The iteration's history row under ``"row"``.

        Raises:
            ValueError: If the environment returned a value that is not finite; the weights are then
                those of the previous iteration.
        """
        started = time.perf_counter()
        self._guard_loggers()
        self._within_iteration = True
        profile, learner = self.trainer.profiler.profile, self._learner
        steps = self._next_rollout_steps()
        learning_rate = self._set_learning_rate()
        with (
            trainer_rules.autocast_without_cache(self.device),
            trainer_rules.few_cpu_threads(steps * self.env.num_envs // self.ppo.minibatches),
        ):
            with profile("rollout"):
                rollout = self._collect(steps)
            with profile("advantages"):
                targets = learner.compute_targets(rollout)
            with profile("update"):
                metrics = learner.update(targets, learning_rate=learning_rate)
        with profile("logging"):
            host = self._to_host(rollout, targets, metrics)
            if self.obs_normalizer is not None:
                # Only now: acting and learning are to see the same statistics.
                self.obs_normalizer.update(rollout.obs, self._ranks)
            row = self._count(rollout, host, time.perf_counter() - started)
            row["optim/learning_rate"] = learning_rate
            adapt_learning_rate(self._optimizer, self.ppo, kl=host["policy/approx_kl"])
            self._report(row)
        self._within_iteration = False
        if self._next_rollout_steps() == 0:
            self.trainer.should_stop = True
        return {"row": row}

    @override
    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        """Stop everywhere if a callback stops one rank: the others would wait for it for ever."""
        if self._ranks.size > 1:
            strategy, stops = self.trainer.strategy, self.trainer.should_stop
            self.trainer.should_stop = strategy.reduce_boolean_decision(stops, all=False)

    @override
    def on_train_epoch_end(self) -> None:
        """Stop where the weights of ranks are not the same bits, before they are saved.

        Raises:
            RuntimeError: On every rank, if any differs.
        """
        if self._ranks.size > 1:
            weights = digest({"state_dict": self.state_dict()})
            got = [f"{each:012x}" for each in self._ranks.gather_objects(weights)]
            if len(set(got)) > 1:
                raise RuntimeError(
                    f"The weights of all ranks must be the same, got {got} in iteration "
                    f"{self.iteration}. Hosts with other software or hardware, or code that "
                    "depends on the rank, train different weights."
                )

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Evaluate deterministically.

        One episode in each of ``eval_episodes`` environments of its own.
        """
        # Lightning's inference mode would forbid environments to write into their own state later.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            trainer_rules.few_cpu_threads(self._eval_env.num_envs),
        ):
            seed = stream_seed(self.seed, rank=self.global_rank, purpose="evaluation")
            env = self._eval_env.build(self.device, seed)
            steps = 0 if self._evaluated else FIRST_STEPS
            first = FirstSteps(self._eval_env, self._spaces, env, self.device, steps=steps)
            episodes = evaluate_policy(self.policy, self._normalize, env, first_steps=first)
        self._evaluated = True
        self.eval_return.update(episodes.episode_return)
        self.eval_length.update(episodes.episode_length)

    @override
    def on_validation_epoch_end(self) -> None:
        """Report the evaluation."""
        metrics = evaluation_metrics(self.eval_return.compute(), self.eval_length.compute())
        self.eval_return.reset()
        self.eval_length.reset()
        if not self.trainer.barebones:
            # Every rank has the same figures; Lightning wants them reduced all the same.
            self.log_dict(metrics, sync_dist=True)

    @override
    def log(self, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Log a metric as any module does; an iteration weighs as much as any other in an epoch."""
        super().log(*args, batch_size=batch_size or 1, **kwargs)

    # Life cycle.

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Add none: this is the first hook of a run, the place to refuse what cannot work.

        From here on loggers cannot end the run.
        """
        self.refuse_trainer(self.trainer, fits=self.trainer.state.fn == TrainerFn.FITTING)
        trainer_rules.keep_lightning_from_requeueing(self.trainer)
        self._guard_loggers()
        return []

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the policy."""
        return build_optimizer(self.policy, self.ppo)

    @override
    def train_dataloader(self) -> Iterable[int]:
        """The "batches" of an epoch: nothing but the number of an iteration in it."""
        return Iterations(self.iterations_per_epoch)

    @override
    def val_dataloader(self) -> Iterable[int]:
        """One batch is one evaluation."""
        return Iterations(1)

    @override
    def setup(self, stage: str) -> None:
        """Build environments and rollout storage on the device."""
        self._guard_loggers()
        if stage != "fit":
            return
        trainer_rules.silence_checkpoint_advice()
        device, rank = self.trainer.strategy.root_device, self.trainer.global_rank
        self._ranks = Ranks(self.trainer.world_size)

        def name(purpose: str) -> str:  # a second fit is not to repeat the noise of the first
            return f"{purpose} from iteration {self.iteration}"

        env_seed = stream_seed(self.seed, rank=rank, purpose=name("environments"))
        self._learner = Learner(
            self.env,
            self.env.build(device, env_seed),
            Agent(self.policy, self.obs_normalizer),
            self.ppo,
            self.return_stats,
            exploration=stream(self.seed, rank=rank, purpose=name("acting"), device=device),
            sample_order=stream(self.seed, rank=rank, purpose=name("order"), device=device),
            mode=self.compile_mode,
            device=device,
            ranks=self._ranks,
        )

    @override
    def on_fit_start(self) -> None:
        """Take up the weights of another run, unless this one is resumed.

        Raises:
            RanksDisagreeError: If they would not begin with the same settings and the same state.
        """
        if self.warm_start is not None and self.iteration == 0 and not self._resuming:
            load_weights(self, self.warm_start)
        if self._ranks.size > 1:
            # Not in on_train_start: a rank whose checkpoint is the end of a run never comes there.
            try:
                self._refuse_to_disagree()
            except ValueError as error:
                raise RanksDisagreeError(str(error)) from None

    @override
    def on_train_start(self) -> None:
        """Take up the environments where the checkpoint left them, or reset them."""
        self._guard_loggers()
        self._optimizer = cast(torch.optim.Adam, self.optimizers(use_pl_optimizer=False))
        self._optimizer.param_groups[0]["eps"] = self.ppo.adam_eps  # not that of a checkpoint
        self._planned_env_steps = trainer_rules.planned_env_steps(
            self.trainer,
            done=self.env_steps,
            per_iteration=self.ppo.rollout_steps * self.env.num_envs * self.trainer.world_size,
            budget=self.total_env_steps,
        )
        goes_on = self._learner.start(self._optimizer, self._resumed)
        if self._resumed is not None:
            set_global_random_states(self._resumed["global_random"])
        self._new_episodes = self._resuming and not goes_on
        self._resumed, self._resuming = None, False
        if self._new_episodes:
            _log.warning(
                "The checkpoint holds no environments of rank %d: new episodes begin there.",
                self.global_rank,
            )
        if self._next_rollout_steps() == 0:
            used = "PPO.total_env_steps=%s is used up: %d env steps were taken. Nothing to train."
            _log.warning(used, self.total_env_steps, self.env_steps)
            self.trainer.should_stop = True

    def _guard_loggers(self) -> None:
        """Give loggers, those that have come since too, ``env_steps`` as their x axis.

        Until the run is over, however it ends; none of them ends it.
        """
        if not self.trainer.fast_dev_run:  # else they are dummies
            guard_loggers(self.trainer.loggers, lambda: self.env_steps)

    def _refuse_to_disagree(self) -> None:
        """Refuse ranks with other settings or checkpoints: they would train different weights."""
        own = {name: value for name, value in self.settings.items() if name != "warm_start"}
        name, values = first_difference("PPO", self._ranks.gather_objects(own))
        hint = "Every host must have the same settings."
        require(not values, name, "be the same on all ranks", values, hint)
        numbers = (self.iteration, self._loaded_digest, digest({"state_dict": self.state_dict()}))
        everyones: list[tuple[int, int, int]] = self._ranks.gather_objects(numbers)
        self._loaded_digest = 0
        got: list[int | str] = [iteration for iteration, *_ in everyones]
        if len(set(got)) == 1:  # what the files hold tells them apart
            got = [f"iteration {i} of {loaded ^ weights:012x}" for i, loaded, weights in everyones]
        resumes = any(iteration or loaded for iteration, loaded, _ in everyones)
        field = "ckpt_path" if resumes else "PPO.warm_start"
        hint = "Every host must find the same checkpoint: copy it, or use a shared directory."
        require(len(set(everyones)) == 1, field, "be the same on all ranks", got, hint)

    @property
    def planned_env_steps(self) -> int | None:
        """Where this run will end, in environment steps; ``None`` without a limit.

        Known from the start of training on.
        """
        return self._planned_env_steps

    # Checkpoints.

    @property
    def is_resuming(self) -> bool:
        """Whether a checkpoint is being taken up, and training has not begun."""
        return self._resuming

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: not what belongs to a run."""
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_learner"}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and, between iterations, environments and random streams of every rank.

        A collective, unless ``saves_alone``.
        """
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            "train_time_s": self.train_time_s,
            "recent_episodes": self.recent_episodes.state(),
            "world_size": self._ranks.size,
            "ranks": self._rank_states(),
        }
        checkpoint[STATE_KEY] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take counters; refuse a checkpoint of something else.

        Raises:
            ValueError: If it was not written by PPO, or for another environment or policy, or is
                not finite.
        """
        refuse_not_ours(checkpoint, "another module's")
        if self._trainer is None:  # it is being built from this very checkpoint
            refuse_other_weights(self, checkpoint, "its own")
        else:
            resumes = self.trainer.state.fn == TrainerFn.FITTING
            ranks = self.trainer.world_size if resumes else None
            self.refuse_checkpoint(checkpoint, "another run's", world_size=ranks)
            self._resuming = resumes
        state = checkpoint[STATE_KEY]
        self.iteration, self.env_steps = state["iteration"], state["env_steps"]
        self.gradient_steps, self.train_time_s = state["gradient_steps"], state["train_time_s"]
        self.recent_episodes.load(state["recent_episodes"])
        self._resumed = state["ranks"].get(self.global_rank) if self._resuming else None
        if self._resuming and self.trainer.world_size > 1:
            self._loaded_digest = digest(checkpoint)

    @classmethod
    @override
    def load_from_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, checkpoint_path: str | Path, **kwargs: Any
    ) -> Self:
        """Weights, normalisers and settings of a checkpoint.

        Args:
            checkpoint_path: A file that the Trainer wrote.
            **kwargs: Settings that replace those of the checkpoint, and Lightning's
                ``map_location``.

        Raises:
            ValueError: If the file is no checkpoint of PPO, or a class of it cannot be imported.
        """
        checkpoint = load_checkpoint(checkpoint_path)
        settings = settings_of(checkpoint, kwargs)
        try:
            with refuse_huge(checkpoint):
                return super().load_from_checkpoint(checkpoint_path, weights_only=True, **settings)  # pyright: ignore[reportArgumentType]
        except ValueError:
            raise
        except Exception as error:  # settings and weights that do not fit may fail anywhere
            message = (
                f"ckpt_path must hold PPO's settings and weights, got {str(checkpoint_path)!r}"
            )
            raise ValueError(f"{message}. {' '.join(str(error).split())}") from error

    def refuse_trainer(self, trainer: Trainer, *, fits: bool = True) -> None:
        """Refuse a Trainer in which PPO would be wrong, or could not begin.

        Args:
            trainer: Before it runs.
            fits: Whether it is to train, and not to evaluate alone.

        Raises:
            ValueError: Naming the setting and what to use instead.
        """
        trainer_rules.refuse_unsupported(
            trainer,
            num_envs=self.env.num_envs,
            budget=self.total_env_steps,
            rollout_bytes=rollout_bytes(self._spaces, self.ppo.rollout_steps, self.env.num_envs),
            evaluation_bytes=rollout_bytes(self._spaces, 1, self._eval_env.num_envs),
        )
        if fits:
            trainer_rules.refuse_unfit(
                trainer,
                iterations_per_epoch=self.iterations_per_epoch,
                budget=self.total_env_steps,
                needs_end=self.ppo.learning_rate_schedule == "linear",
            )

    def refuse_checkpoint(
        self, checkpoint: dict[str, Any], path: str, *, world_size: int | None
    ) -> None:
        """Refuse a checkpoint that cannot serve this module: of other settings, or not finite.

        Args:
            checkpoint: Of PPO.
            path: Of the checkpoint, for the error.
            world_size: Number of ranks that resume training; ``None`` for an evaluation.

        Raises:
            ValueError: Naming what does not fit.
        """
        resuming = world_size is not None
        refuse_not_whole(checkpoint, path)
        refuse_foreign(checkpoint, self.settings, world_size=world_size)
        refuse_other_weights(self, checkpoint, path)
        if resuming:
            trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
            refuse_other_optimizer(trained, checkpoint, path)
        refuse_non_finite(checkpoint, path, resuming=resuming)

    def _rank_states(self) -> dict[int, dict[str, Any]]:
        """``Learner.state_dict`` of each rank, on the first; empty within an iteration."""
        learner: Learner | None = getattr(self, "_learner", None)
        mine = None if learner is None or self._within_iteration else learner.state_dict()
        if mine is None:
            return {}
        mine["global_random"] = global_random_states()
        if self.saves_alone:
            return {self.global_rank: mine}
        return dict(enumerate(self._ranks.collect_states(mine)))

    # Parts of an iteration.

    def _collect(self, steps: int) -> Rollout:
        """Act for so many steps."""
        return self._learner.rollout(steps)

    def _to_host(
        self, rollout: Rollout, targets: Targets, metrics: UpdateMetrics
    ) -> dict[str, float]:
        """The one device-to-host copy of an iteration, which also tells whether it was healthy."""
        iteration, learner = self.iteration + 1, self._learner
        host = to_host(learner.metrics(targets, metrics))
        if not host["healthy"]:
            refuse_rollout(rollout, self.env, self._spaces.action, iteration=iteration)
        if not host["gradients_finite"]:
            samples, agent = targets.samples, learner.agent
            ranks = self._ranks.size
            refuse_gradient(
                agent,
                samples,
                self.ppo,
                learner.order,
                env=type(self.env).__name__,
                largest_reward=rollout.reward.abs().max().item(),
                iteration=iteration,
                ranks=ranks,
            )
        self.recent_episodes.update(host["return_sum"], host["length_sum"], host["episodes"])
        return host

    def _count(
        self, rollout: Rollout, host: dict[str, float], duration_s: float
    ) -> dict[str, float | int | None]:
        """Advance every counter; returns the history row."""
        env_steps = rollout.reward.numel() * self._ranks.size
        new_episodes, self._new_episodes = self._new_episodes, False
        self.iteration += 1
        self.env_steps += env_steps
        self.gradient_steps += int(host["gradient_steps"])
        self.train_time_s += duration_s
        trainer_rules.count_step(self.trainer)
        return {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            "time_s": self.train_time_s,
            "env_steps_per_s": env_steps / duration_s,
            **rollout_metrics(host["episodes"], self.recent_episodes),
            **{name: value for name, value in host.items() if "/" in name},
            **({"resumed_with_new_episodes": 1} if new_episodes else {}),
        }

    def _normalize(self, obs: Observation) -> Observation:
        return prepare_obs(obs, self.obs_normalizer)

    def _next_rollout_steps(self) -> int:
        """``T`` of the next iteration: less where the budget leaves less, 0 where it is used up."""
        steps = self.ppo.rollout_steps
        if self.total_env_steps is None:
            return steps
        per_step = self.env.num_envs * self._ranks.size
        return max(0, min(steps, (self.total_env_steps - self.env_steps) // per_step))

    def _set_learning_rate(self) -> float:
        """Of the next iteration."""
        progress = min(1.0, self.env_steps / (self._planned_env_steps or math.inf))
        return schedule_learning_rate(self._optimizer, self.ppo, progress=progress)

    def _report(self, row: dict[str, Any]) -> None:
        """To callbacks, bars and loggers, without ``self.log``: it costs 0.3 ms for each metric."""
        publish(self.trainer, row)
        interval = self.trainer.log_every_n_steps  # 0 for a barebones Trainer
        if interval and self.iteration % interval == 0:
            known = {name: float(value) for name, value in row.items() if value is not None}
            for logger in self.trainer.loggers:
                logger.log_metrics(known, step=self.env_steps)
