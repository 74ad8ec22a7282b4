"""PPO as a LightningModule: one ``training_step`` is one iteration.

Axes: ``T`` rollout step, ``B`` environment. Read ``training_step`` first; everything else prepares
it or reports on it.
"""
# Lightning sets many attributes of its Trainer where no type checker sees them.
# pyright: reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from esper_lightning.callbacks.loggers import guard_loggers
from esper_lightning.compiling.loops import CompileMode
from esper_lightning.core.ranks import Ranks
from esper_lightning.core.running_stats import ObsNormalizer, RunningStats, normalized_space
from esper_lightning.core.seeding import require_torch_defaults, stream, stream_seed
from esper_lightning.core.types import Observation
from esper_lightning.envs.base import EnvSpec
from esper_lightning.policies import MLP
from esper_lightning.policies.base import PolicySpec
from esper_lightning.ppo.agent import Agent, prepare_obs
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.extension import Extensions, ExtensionSpec
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import (
    adapt_learning_rate,
    build_optimizer,
    schedule_learning_rate,
)
from esper_lightning.training import trainer_rules
from esper_lightning.training.checkpoint.hooks import CheckpointHooks
from esper_lightning.training.checkpoint.resumption import Resumption
from esper_lightning.training.evaluation import Evaluation
from esper_lightning.training.iterations import Iterations
from esper_lightning.training.progress import Progress
from esper_lightning.training.publish import publish
from esper_lightning.training.settings import PPOSettings

__all__ = ["PPO"]

_log = logging.getLogger(__name__)


class PPO(CheckpointHooks):
    """Proximal policy optimisation over batched environments (Schulman et al. 2017).

    Train it with ``Trainer.fit(model)``; no data module is needed. ``global_step`` counts
    iterations, an epoch is ``iterations_per_epoch`` of them: what Lightning does per epoch -
    evaluate, save, check for an early stop - happens that often. Whatever is logged in a run has
    ``env_steps`` as its x axis, except what is written past ``Logger.log_metrics``. Callbacks can
    monitor every metric of a history row; those of episodes are NaN until one has ended, which
    ``EarlyStopping`` takes for a reason to stop unless ``check_finite=False``.

    Attributes:
        settings: The arguments.
        progress: Counters of the run.
        evaluation: Environments and episodes of the latest evaluation.
    """

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
        extensions: tuple[ExtensionSpec, ...] = (),
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
            extensions: What to add to PPO: rewards, terms of the loss, metrics (``RND()``, for
                example).

        Raises:
            ValueError: If a setting is out of range or does not fit the environment.
        """
        super().__init__()
        require_torch_defaults("PPO")
        self.settings = settings = PPOSettings(
            env=env,
            policy=policy,
            ppo=ppo,
            seed=seed,
            total_env_steps=total_env_steps,
            iterations_per_epoch=iterations_per_epoch,
            eval_episodes=eval_episodes,
            compile=compile,
            warm_start=warm_start,
            extensions=extensions,
        )
        self.save_hyperparameters(settings.to_data())
        self.env, self.ppo, self.seed = settings.env, settings.ppo, settings.seed
        self.automatic_optimization = False
        self.progress = Progress(settings)

        weights = stream(self.seed, rank=0, purpose="weights", device=torch.device("cpu"))
        spaces = self.env.spaces()
        normalizes, clip = self.ppo.normalize_obs, self.ppo.obs_clip
        seen = normalized_space(spaces.obs, clip=clip) if normalizes else spaces.obs
        self.policy = settings.policy.build(replace(spaces, obs=seen), weights)
        built = (extension.build(spaces, weights) for extension in settings.extensions)
        self.extensions = Extensions(built)
        whole_sequences = self.policy.memory_size > 0
        self.ppo.check_against(num_envs=self.env.num_envs, whole_sequences=whole_sequences)
        self.obs_normalizer = ObsNormalizer(spaces.obs, clip=clip) if normalizes else None
        self.return_stats = RunningStats(()) if self.ppo.normalize_reward else None
        self.evaluation = Evaluation(settings)

    @property
    def iteration(self) -> int:
        """Iterations finished."""
        return self.progress.iteration

    @property
    def env_steps(self) -> int:
        """Environment steps taken, over all environments of all ranks."""
        return self.progress.env_steps

    @property
    def gradient_steps(self) -> int:
        """Optimizer steps applied."""
        return self.progress.gradient_steps

    @property
    def planned_env_steps(self) -> int | None:
        """Environment steps after which this run will end, known once training has started."""
        return self.progress.planned_env_steps

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
        steps = self.progress.next_rollout_steps(self._ranks.size)
        done = self.progress.done_share()
        learning_rate = schedule_learning_rate(self._optimizer, self.ppo, progress=done)
        with (
            trainer_rules.autocast_without_cache(self.device),
            trainer_rules.few_cpu_threads(steps * self.env.num_envs // self.ppo.minibatches),
        ):
            with profile("rollout"):
                rollout = learner.rollout(steps)
            with profile("advantages"):
                targets = learner.compute_targets(rollout)
            with profile("update"):
                update = learner.update(targets, learning_rate=learning_rate)
        with profile("logging"):
            metrics = learner.to_host(rollout, targets, update, iteration=self.iteration + 1)
            if self.obs_normalizer is not None:
                # Only now: acting and learning are to see the same statistics.
                self.obs_normalizer.update(rollout.obs, self._ranks)
            row = self.progress.finish_iteration(
                metrics,
                env_steps=rollout.reward.numel() * self._ranks.size,
                duration_s=time.perf_counter() - started,
            )
            trainer_rules.count_step(self.trainer)
            row["optim/learning_rate"] = learning_rate
            adapt_learning_rate(self._optimizer, self.ppo, kl=metrics["policy/approx_kl"])
            publish(self.trainer, row)
        self._within_iteration = False
        if self.progress.next_rollout_steps(self._ranks.size) == 0:
            self.trainer.should_stop = True
        return {"row": row}

    @override
    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        """Stop everywhere if a callback stops one rank: the others would wait for it for ever."""
        if self._ranks.size > 1:
            strategy, stops = self.trainer.strategy, self.trainer.should_stop
            self.trainer.should_stop = strategy.reduce_boolean_decision(stops, all=False)

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Play one deterministic episode in each of ``eval_episodes`` environments."""
        rank = self.global_rank
        self.evaluation.play(self.policy, self._normalize, device=self.device, rank=rank)

    @override
    def on_validation_epoch_end(self) -> None:
        """Report the evaluation."""
        metrics = self.evaluation.finish()
        if not self.trainer.barebones:
            # Every rank has the same metrics; Lightning wants them reduced all the same.
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
        fits = self.trainer.state.fn == TrainerFn.FITTING
        trainer_rules.refuse_trainer(self.trainer, self.settings, fits=fits)
        trainer_rules.keep_lightning_from_requeueing(self.trainer)
        self._guard_loggers()
        return []

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over the policy and the extensions."""
        return build_optimizer(self.policy, self.ppo, self.extensions)

    @override
    def train_dataloader(self) -> Iterable[int]:
        """The "batches" of an epoch: nothing but the number of an iteration in it."""
        return Iterations(self.settings.iterations_per_epoch)

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
            Agent(self.policy, self.obs_normalizer, self.extensions),
            self.ppo,
            self.return_stats,
            exploration=stream(self.seed, rank=rank, purpose=name("acting"), device=device),
            sample_order=stream(self.seed, rank=rank, purpose=name("order"), device=device),
            mode=self.settings.compile,
            device=device,
            ranks=self._ranks,
        )

    @override
    def on_train_start(self) -> None:
        """Take up the environments where the checkpoint left them, or reset them."""
        self._guard_loggers()
        self._optimizer = cast(torch.optim.Adam, self.optimizers(use_pl_optimizer=False))
        self._optimizer.param_groups[0]["eps"] = self.ppo.adam_eps  # not that of a checkpoint
        budget, ranks = self.settings.total_env_steps, self._ranks.size
        self.progress.planned_env_steps = trainer_rules.planned_env_steps(
            self.trainer,
            done=self.env_steps,
            per_iteration=self.ppo.rollout_steps * self.env.num_envs * ranks,
            budget=budget,
        )
        resumption = self._resumption or Resumption(rank_state=None, digest=0)
        resumed = resumption.start(self._learner, self._optimizer)
        self.progress.new_episodes = self.is_resuming and not resumed
        self._resumption = None
        if self.progress.new_episodes:
            _log.warning(
                "The checkpoint holds no environments of rank %d: new episodes begin there.",
                self.global_rank,
            )
        if self.progress.next_rollout_steps(ranks) == 0:
            used = "PPO.total_env_steps=%s is used up: %d env steps were taken. Nothing to train."
            _log.warning(used, budget, self.env_steps)
            self.trainer.should_stop = True

    def _guard_loggers(self) -> None:
        """Give loggers, those that have come since too, ``env_steps`` as their x axis.

        Until the run is over, however it ends; none of them ends it.
        """
        if not self.trainer.fast_dev_run:  # else they are dummies
            guard_loggers(self.trainer.loggers, lambda: self.env_steps)

    def _normalize(self, obs: Observation) -> Observation:
        return prepare_obs(obs, self.obs_normalizer)
