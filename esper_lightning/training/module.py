"""PPO as a LightningModule: one ``training_step`` is one iteration.

Axes: ``T`` rollout step, ``B`` environment. Read ``training_step`` first: everything else in this
file prepares an iteration or publishes its results.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from typing_extensions import override

from esper_lightning.callbacks.lightning_internals import no_hook_ends_data
from esper_lightning.callbacks.loggers import guard_loggers
from esper_lightning.callbacks.run_directory import begin_run_directory
from esper_lightning.callbacks.tracking import begin_tracking, continue_tracking
from esper_lightning.compiling.loops import CompileMode, autocast_without_cache, few_cpu_threads
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.running_stats import ObsNormalizer, RunningStats, normalized_space
from esper_lightning.core.seeding import require_torch_defaults, stream, stream_seed
from esper_lightning.envs.base import EnvSpec
from esper_lightning.policies.base import PolicySpec, build_policy
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.extension import Extensions, ExtensionSpec
from esper_lightning.ppo.optimizer import (
    adapt_learning_rate,
    build_optimizer,
    schedule_learning_rate,
)
from esper_lightning.recorder.awake import awake_s
from esper_lightning.training import trainer_rules
from esper_lightning.training.checkpoint.hooks import CheckpointHooks
from esper_lightning.training.checkpoint.meeting import tells_other_ranks
from esper_lightning.training.checkpoint.start import resume_later_state
from esper_lightning.training.environments import RunEnvironments, build_learner
from esper_lightning.training.evaluation import Evaluation
from esper_lightning.training.iterations import Iterations
from esper_lightning.training.monitors import ReportsAbsentMetrics
from esper_lightning.training.progress import LEARNING_RATE, Progress
from esper_lightning.training.publish import publish
from esper_lightning.training.settings import PPOSettings

__all__ = ["PPO"]

_log = logging.getLogger(__name__)


@no_hook_ends_data
class PPO(CheckpointHooks):
    """Proximal policy optimisation over batched environments (Schulman et al. 2017).

    ``Trainer.fit(model)`` trains the module; no data module is needed. Lightning's ``global_step``
    counts iterations, and an epoch is ``iterations_per_epoch`` iterations. Whatever Lightning does
    once per epoch happens that often: evaluating, saving, and checking for an early stop.

    Everything that is logged in a run has ``env_steps`` as its x axis, except for what is written
    without ``Logger.log_metrics``. Callbacks can monitor every metric of a history row. Metrics of
    episodes are NaN until an episode has ended; ``EarlyStopping`` stops at a NaN, unless it has
    ``check_finite=False``.

    Attributes:
        settings: Settings of the module, which are the arguments of ``PPO``.
        progress: Counters of the run.
        obs_normalizer: Statistics of observations; ``None`` without ``PPOConfig.normalize_obs``.
        return_stats: Statistics of discounted returns; ``None`` without
            ``PPOConfig.normalize_reward``.
        evaluation: Environments and episodes of the latest evaluation.
    """

    def __init__(
        self,
        env: EnvSpec,
        policy: PolicySpec = PPOSettings.policy,
        ppo: PPOConfig = PPOSettings.ppo,
        seed: int = PPOSettings.seed,
        total_env_steps: int | None = PPOSettings.total_env_steps,
        iterations_per_epoch: int = PPOSettings.iterations_per_epoch,
        eval_episodes: int | None = PPOSettings.eval_episodes,
        compile: CompileMode = PPOSettings.compile,  # noqa: A002 - the usual name of the setting
        warm_start: str | None = PPOSettings.warm_start,
        extensions: tuple[ExtensionSpec, ...] = PPOSettings.extensions,
        redeal: bool = PPOSettings.redeal,
    ) -> None:
        """Check the settings and build the networks; environments are built when a run starts.

        Args:
            env: Environments to train in, such as ``CartPole(num_envs=2048)``. With several ranks
                (processes), each rank has that many environments of its own.
            policy: Networks to train, such as ``MLP()`` for vectors, ``CNN()`` for images or
                ``Recurrent()`` for tasks that need memory.
            ppo: Settings of the algorithm.
            seed: Seed of everything random: initial weights, environments, exploration, order of
                samples, and evaluations.
            total_env_steps: Number of environment steps after which the run ends, over all
                environments of all ranks. The last rollout is shortened to fit; a remainder of less
                than one step of all environments is not used. ``None`` means that only the
                Trainer's own limits end the run.
            iterations_per_epoch: Number of iterations in an epoch. Lightning evaluates and saves
                once per epoch.
            eval_episodes: Number of episodes that each rank plays in one evaluation, as a rule each
                in an environment of its own. ``None`` means 100, or as many as ``env.num_envs``
                where the spec cannot be copied with another number of environments.
            compile: Compile mode of rollouts, updates and evaluations. ``auto`` turns them into
                native code on a CPU, in seconds, and compiles nothing elsewhere; it needs a C++
                compiler. ``off`` compiles nothing. On CUDA, ``default`` compiles single steps of
                rollouts and updates, and ``max`` captures both as graphs (evaluations are eager);
                on a CPU both mean ``auto``. All give the same results to rounding (under
                ``bf16-mixed``, the rounding of bfloat16). What cannot be compiled runs a slower
                way, with a warning. Where the environment variable ``TORCH_COMPILE_DISABLE`` is 1,
                nothing is compiled on a CPU.
            warm_start: Checkpoint from which a new run takes weights and normalisation statistics,
                and nothing else. It has no effect where a run is resumed.
            extensions: Additions to PPO: rewards, terms of the loss and metrics, such as ``RND()``.
            redeal: Whether a run that is resumed by another number of ranks deals the environments
                of the checkpoint anew, ``num_envs`` to each rank. Running episodes continue, and
                random streams are new.

        Raises:
            ValueError: If a setting is out of range or does not fit the environments.
        """
        arguments = dict(locals())  # by name, so that a new argument needs no line of its own
        del arguments["self"], arguments["__class__"]
        super().__init__()
        require_torch_defaults("PPO")
        self.settings = settings = PPOSettings(**arguments)
        self.save_hyperparameters(settings.to_data())
        self.env, self.ppo, self.seed = settings.env, settings.ppo, settings.seed
        self.automatic_optimization = False
        self.progress = Progress(settings)

        weights = stream(self.seed, rank=0, purpose="weights", device=torch.device("cpu"))
        spaces = self.env_spaces = self.env.spaces()
        normalizes, clip = self.ppo.normalize_obs, self.ppo.obs_clip
        seen = normalized_space(spaces.obs, clip=clip) if normalizes else spaces.obs
        self.policy = build_policy(settings.policy, replace(spaces, obs=seen), weights)
        self.extensions = Extensions.build(settings.extensions, spaces, weights)
        whole_sequences = self.policy.memory_size > 0
        self.ppo.check_against(num_envs=self.env.num_envs, whole_sequences=whole_sequences)
        self.obs_normalizer = ObsNormalizer(spaces.obs, clip=clip) if normalizes else None
        self.return_stats = RunningStats(()) if self.ppo.normalize_reward else None
        self.evaluation = Evaluation(settings)

    counts_iterations = True  # ``iteration`` numbers the rows of the history

    @property
    def iteration(self) -> int:
        """Number of finished iterations."""
        return self.progress.iteration

    @property
    def env_steps(self) -> int:
        """Number of environment steps taken, over all environments of all ranks."""
        return self.progress.env_steps

    @property
    def gradient_steps(self) -> int:
        """Number of gradient steps applied."""
        return self.progress.gradient_steps

    @property
    def planned_env_steps(self) -> int | None:
        """Number of environment steps after which this run will end.

        ``None`` until training has started, and for a run without a limit.
        """
        return self.progress.planned_env_steps

    # The iteration.

    @override
    def training_step(self, batch: int, batch_idx: int) -> dict[str, Any]:
        """One iteration: roll out, estimate advantages, update, publish metrics.

        Returns:
            A dictionary that holds the history row of the iteration under ``"row"``.

        Raises:
            NonFiniteError: If a number of the rollout or of the update is not finite. After a
                rollout that is not finite, the weights are those of the previous iteration.
        """
        started = awake_s.measured()
        self._within_iteration = True
        profile, learner = self.trainer.profiler.profile, self._learner
        steps = self.progress.next_rollout_steps(self._ranks.size)
        with (
            autocast_without_cache(self.device),
            few_cpu_threads(steps * self.env.num_envs // self.ppo.minibatches),
        ):
            with profile("rollout"):
                learner.begin_iteration(self.progress.of_run())
                rollout = learner.rollout(steps)
            with profile("advantages"):
                targets = learner.compute_targets(rollout)
            with profile("update"):
                done = self.progress.done_share()
                learning_rate = schedule_learning_rate(self._optimizer, self.ppo, progress=done)
                update = learner.update(targets, learning_rate=learning_rate)
        with profile("logging"):
            metrics = learner.to_host(rollout, targets, update, iteration=self.iteration + 1)
            if self.obs_normalizer is not None:
                # Only after the update, so that acting and learning see the same statistics.
                self.obs_normalizer.update(rollout.obs, self._ranks)
            row = self.progress.finish_iteration(
                metrics,
                env_steps=rollout.reward.numel() * self._ranks.size,
                duration_s=awake_s.measured() - started,
            )
            trainer_rules.count_step(self.trainer)
            row[LEARNING_RATE] = learning_rate
            adapt_learning_rate(self._optimizer, self.ppo, kl=metrics["policy/approx_kl"])
            self._guard_loggers()
            publish(self.trainer, row)
        self._within_iteration = False
        if self.progress.next_rollout_steps(self._ranks.size) == 0:
            self.trainer.should_stop = True
        return {"row": row}

    @override
    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        """Stop all ranks if a callback stops one: the others would wait for that rank for ever."""
        if self._ranks.size > 1:
            strategy, stops = self.trainer.strategy, self.trainer.should_stop
            self.trainer.should_stop = strategy.reduce_boolean_decision(stops, all=False)

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Play the deterministic episodes of one evaluation.

        Within a fit, training then continues with new episodes if it shares the simulator.
        """
        rank = self.global_rank
        self.evaluation.play(self.policy, self.obs_normalizer, device=self.device, rank=rank)
        state = self.trainer.state
        trains = state.fn == TrainerFn.FITTING and state.stage == RunningStage.VALIDATING
        if trains and getattr(self.env, "shared", False):
            purpose = f"environments after evaluation in iteration {self.iteration}"
            self._learner.begin_episodes(stream_seed(self.seed, rank=rank, purpose=purpose))

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the evaluation."""
        metrics = self.evaluation.finish()
        if not self.trainer.barebones:
            # Every rank has the same metrics, but Lightning warns unless they are reduced.
            self.log_dict(metrics, sync_dist=True)

    @override
    def log(self, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Log a metric as any module does; all iterations have the same weight in an epoch."""
        super().log(*args, batch_size=batch_size or 1, **kwargs)

    # Life cycle.

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Refuse a Trainer that cannot work, and add callbacks of every run.

        This is the first hook of a run: nothing is written before all ranks agree here. From here
        on, an error of a logger cannot end the run.

        Raises:
            ValueError: If a setting of the Trainer does not work with PPO, ranks disagree, or the
                run directory is refused.
        """
        fits = self.trainer.state.fn == TrainerFn.FITTING
        more = type(self) is not PPO
        with tells_other_ranks(self.trainer):
            trainer_rules.refuse_trainer(self.trainer, self.settings, fits=fits, logs_more=more)
        trainer_rules.keep_lightning_from_requeueing(self.trainer)
        trainer_rules.keep_profilers_from_slowing(self.trainer, self.settings.compile)
        if fits:
            self.refuse_other_ranks()
            begin_run_directory(self.trainer)
            resume_later_state(self.trainer)
            continue_tracking(self.trainer)
        self._guard_loggers()
        return [RunEnvironments(), ReportsAbsentMetrics(logs_more=more)]

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the trained weights of the policy and of the extensions."""
        return build_optimizer(self.policy, self.ppo, self.extensions)

    @override
    def train_dataloader(self) -> Iterable[int]:
        """The "batches" of an epoch: each is the number of an iteration within the epoch."""
        return Iterations(self.settings.iterations_per_epoch)

    @override
    def val_dataloader(self) -> Iterable[int]:
        """A single "batch", which stands for one evaluation."""
        return Iterations(1)

    @override
    def setup(self, stage: str) -> None:
        """Prepare Lightning and the trackers of a run, before a checkpoint is restored."""
        self._guard_loggers()
        trainer_rules.silence_lightning()
        if stage == "fit":
            begin_tracking(self.trainer)
            self._ranks = Ranks(self.trainer.world_size)

    def open_environments(self) -> None:
        """Build environments and rollout storage on the device, for the iteration that is next.

        A checkpoint has been restored by now, so that new episodes of a resumed run are no
        repetition of its first ones.
        """
        self._learner = build_learner(
            self.settings,
            Agent(self.policy, self.obs_normalizer, self.extensions),
            self.return_stats,
            iteration=self.iteration,
            device=self.trainer.strategy.root_device,
            rank=self.trainer.global_rank,
            ranks=self._ranks,
        )

    def look_at_stages(self) -> None:
        """Take a slower way where native code is no longer what its function does, and say so."""
        learner = getattr(self, "_learner", None)
        stages = {} if learner is None else learner.stages
        for stage in [*stages.values(), *self.evaluation.stages().values()]:
            stage.look()

    def close_environments(self) -> None:
        """Release the processes, windows and other resources of all environments."""
        self.evaluation.close()
        if (learner := getattr(self, "_learner", None)) is not None:
            learner.close()

    @override
    def on_train_start(self) -> None:
        """Resume the environments where the checkpoint left them, or start new episodes."""
        self._guard_loggers()
        self._optimizer = cast(torch.optim.Adam, self.optimizers(use_pl_optimizer=False))
        self._optimizer.param_groups[0]["eps"] = self.ppo.adam_eps  # not that of a checkpoint
        self.progress.planned_env_steps = trainer_rules.planned_env_steps(
            self.trainer, self.progress, ranks=self._ranks.size
        )
        self._learner.begin_iteration(self.progress.of_run())  # resets may depend on it
        self.start_learner(self._learner, self._optimizer)
        if self.progress.next_rollout_steps(self._ranks.size) == 0:
            used = "PPO.total_env_steps=%s is used up: %d env steps were taken. Nothing to train."
            _log.warning(used, self.settings.total_env_steps, self.env_steps)
            self.trainer.should_stop = True

    def _guard_loggers(self) -> None:
        """Give all loggers of the Trainer ``env_steps`` as their x axis, until the run is over.

        Loggers that were added since the last call are included. Their errors cannot end the run.
        """
        if not self.trainer.fast_dev_run:  # fast_dev_run has dummies in place of loggers
            guard_loggers(self.trainer.loggers, lambda: self.env_steps)
