"""PPO as a LightningModule: one ``training_step`` is one iteration. Axes: ``T`` rollout step, ``B`` environment.

Read ``training_step`` first; everything else prepares it or reports on it.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import CatMetric
from typing_extensions import override

from esper_lightning.core.buffer import allocate_rollout, first_steps
from esper_lightning.core.diagnostics import explained_variance
from esper_lightning.core.gae import discounted_returns
from esper_lightning.core.running_stats import ObsNormalizer, RunningStats
from esper_lightning.core.schedules import adaptive_learning_rate, linear_learning_rate
from esper_lightning.core.seeding import stream, stream_seed
from esper_lightning.core.types import Observation, Rollout
from esper_lightning.core.validate import require
from esper_lightning.envs.base import EnvSpec
from esper_lightning.policies import MLP
from esper_lightning.policies.base import PolicySpec
from esper_lightning.training import trainer_support
from esper_lightning.training.collect import ActingState, collect, first_non_finite, is_finite
from esper_lightning.training.config import PPOConfig
from esper_lightning.training.evaluation import evaluate_policy
from esper_lightning.training.iterations import Iterations
from esper_lightning.training.metrics import (
    DEVICE_METRICS,
    EVAL_RETURN,
    ROLLOUT_RETURN,
    RecentEpisodes,
)
from esper_lightning.training.specs import describe, instantiate, plain, with_num_envs
from esper_lightning.training.update import UpdateMetrics, build_optimizer, prepare_samples, update

__all__ = ["PPO"]

_CHECKPOINT_KEY = "esper_lightning"


class PPO(LightningModule):
    """Proximal policy optimisation over batched environments (Schulman et al. 2017).

    Train it with ``Trainer.fit(model)``; no data module is needed. ``global_step`` counts iterations, an epoch is
    ``iterations_per_epoch`` of them: what Lightning does per epoch - evaluate, save, check for an early stop -
    happens that often. Loggers get ``env_steps`` as their x axis.

    Attributes:
        iteration: Iterations finished.
        env_steps: Environment steps taken, over all environments.
        gradient_steps: Optimizer steps applied.
    """

    def __init__(
        self,
        env: EnvSpec,
        policy: PolicySpec = MLP(),  # noqa: B008 - frozen
        ppo: PPOConfig = PPOConfig(),  # noqa: B008 - frozen
        seed: int = 0,
        total_env_steps: int | None = None,
        iterations_per_epoch: int = 50,
        eval_episodes: int = 100,
    ) -> None:
        """Check the settings and build the networks; environments follow in ``setup``, on the device.

        Args:
            env: Which environments to train in.
            policy: Which networks to train.
            ppo: How to train them.
            seed: Of everything random: weights, environments, exploration, sample order, evaluation.
            total_env_steps: The run ends when so many steps have been taken, over all environments: the last rollout
                is shortened to fit, and less than one step of all environments is left unused. ``None`` leaves the
                end to the Trainer's own limits.
            iterations_per_epoch: Length of Lightning's epoch.
            eval_episodes: Episodes of one evaluation, each in an environment of its own.

        Raises:
            ValueError: If a setting is out of range or does not fit the environment.
        """
        super().__init__()
        hint = "CartPole(num_envs=64), for example."
        require(isinstance(env, EnvSpec), "PPO.env", "be an environment spec", env, hint)
        require(
            isinstance(policy, PolicySpec),
            "PPO.policy",
            "be a policy spec",
            policy,
            "MLP(), for example.",
        )
        for name, value in (
            ("iterations_per_epoch", iterations_per_epoch),
            ("eval_episodes", eval_episodes),
        ):
            require(value >= 1, f"PPO.{name}", "be at least 1", value)
        ppo.check_against(num_envs=env.num_envs)
        enough = total_env_steps is None or total_env_steps >= env.num_envs
        rule = f"be at least env.num_envs = {env.num_envs}"
        require(enough, "PPO.total_env_steps", rule, total_env_steps)
        self._eval_env = with_num_envs(env, eval_episodes)

        self.automatic_optimization = False
        self.save_hyperparameters(
            {
                "env": describe(env),
                "policy": describe(policy),
                "ppo": plain(ppo),
                "seed": seed,
                "total_env_steps": total_env_steps,
                "iterations_per_epoch": iterations_per_epoch,
                "eval_episodes": eval_episodes,
            }
        )
        self.env, self.ppo, self.seed = env, ppo, seed
        self.total_env_steps, self.iterations_per_epoch = total_env_steps, iterations_per_epoch
        self.iteration = self.env_steps = self.gradient_steps = 0
        self.train_time_s = 0.0

        spaces = env.spaces()
        weights = stream(seed, rank=0, purpose="weights", device=torch.device("cpu"))
        self.policy = policy.build(spaces, weights)
        self.obs_normalizer = (
            ObsNormalizer(spaces.obs, clip=ppo.obs_clip) if ppo.normalize_obs else None
        )
        self.return_stats = RunningStats(()) if ppo.normalize_reward else None
        self.recent_episodes = RecentEpisodes()
        self.eval_return = CatMetric(nan_strategy="error")
        self.eval_length = CatMetric(nan_strategy="error")
        self._acting: ActingState | None = None
        self._resumed: dict[str, Any] | None = None

    # --- the main path ---

    @override
    def training_step(self, batch: int, batch_idx: int) -> dict[str, Any]:
        """One iteration: roll out, estimate advantages, update, report.

        Returns:
            The iteration's history row under ``"row"``.

        Raises:
            ValueError: If the environment returned a value that is not finite; the weights are then as before.
        """
        started = time.perf_counter()
        profile = self.trainer.profiler.profile
        rollout = first_steps(self._rollout, self._next_rollout_steps())
        learning_rate = self._set_learning_rate()
        with trainer_support.autocast_without_cache(self.device):
            with profile("rollout"):
                assert self._acting is not None
                self._acting = collect(
                    self._env,
                    self.policy,
                    self._normalize,
                    self._acting,
                    rollout,
                    generator=self._exploration,
                )
                healthy = is_finite(rollout)
            with profile("advantages"):
                reward = self._scale_reward(rollout, healthy)
                samples = prepare_samples(self.policy, self._normalize, rollout, reward, self.ppo)
            with profile("update"):
                metrics = update(
                    self.policy,
                    self._optimizer,
                    samples,
                    self.ppo,
                    healthy=healthy,
                    generator=self._sample_order,
                    backward=self.manual_backward,
                )
        with profile("logging"):
            self.recent_episodes.update(rollout.episode_return, rollout.episode_length)
            variance = explained_variance(samples.value, samples.value_target)
            figures, gradient_steps, was_healthy = self._to_host(
                rollout, metrics, variance, healthy
            )
            if not was_healthy:
                owner = f"{type(self.env).__name__}.step"
                hint = "The weights are those of the previous iteration."
                require(False, owner, "return finite values", first_non_finite(rollout), hint)
            if (
                self.obs_normalizer is not None
            ):  # frozen until here: acting and learning saw the same
                self.obs_normalizer.update(rollout.obs)
            env_steps = rollout.reward.numel() * self.trainer.world_size
            self.iteration += 1
            self.env_steps += env_steps
            self.gradient_steps += gradient_steps
            duration_s = time.perf_counter() - started
            self.train_time_s += duration_s
            row = {
                "iteration": self.iteration,
                "env_steps": self.env_steps,
                "gradient_steps": self.gradient_steps,
                "time_s": self.train_time_s,
                "env_steps_per_s": env_steps / duration_s,
                **figures,
                "optim/learning_rate": learning_rate,
            }
            self._report(row)
        trainer_support.count_step(self.trainer)
        if self._next_rollout_steps() == 0:
            self.trainer.should_stop = True
        return {"row": row}

    @override
    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Evaluate deterministically: one episode in each of ``eval_episodes`` environments of its own."""
        # Lightning's inference mode would forbid environments to write into their own state later.
        with torch.inference_mode(False), torch.no_grad():
            seed = stream_seed(self.seed, rank=self.global_rank, purpose="evaluation")
            env = self._eval_env.build(self.device, seed)
            episodes = evaluate_policy(self.policy, self._normalize, env)
        self.eval_return.update(episodes.episode_return)
        self.eval_length.update(episodes.episode_length)

    @override
    def on_validation_epoch_end(self) -> None:
        """Report the evaluation."""
        returns, lengths = (
            cast(Tensor, self.eval_return.compute()),
            cast(Tensor, self.eval_length.compute()),
        )
        metrics = {
            EVAL_RETURN: returns.mean().item(),
            "eval/episode_return_std": returns.std(correction=0).item(),
            "eval/episode_length_mean": lengths.mean().item(),
            "eval/episodes": float(returns.numel()),
        }
        self.eval_return.reset()
        self.eval_length.reset()
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        if not self.trainer.barebones:
            # Lightning would log them over iterations; what ``Trainer.validate`` returns are those it logs.
            self.log_dict(metrics, logger=False if fitting else None)
        if fitting and not self.trainer.sanity_checking:
            self._log_to_loggers(metrics)

    # --- life cycle ---

    @override
    def configure_callbacks(self) -> list[Any]:
        """Add none; the first hook of a run, and so the earliest place to refuse what cannot work."""
        trainer_support.refuse_unsupported(self.trainer)
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
        if stage != "fit":
            return
        trainer_support.silence_checkpoint_advice()
        device = self.trainer.strategy.root_device
        rank = self.trainer.global_rank

        def generator(purpose: str) -> torch.Generator:
            return stream(self.seed, rank=rank, purpose=purpose, device=device)

        self._exploration, self._sample_order = generator("exploration"), generator("sample order")
        self._env = self.env.build(
            device, stream_seed(self.seed, rank=rank, purpose="environments")
        )
        spaces = self.env.spaces()
        self._rollout = allocate_rollout(
            spaces, self.ppo.rollout_steps, self.env.num_envs, device=device
        )
        self._acting = None

    @override
    def on_train_start(self) -> None:
        """Take up the environments where the checkpoint left them, or reset them."""
        self._optimizer = cast(torch.optim.Adam, self.optimizers(use_pl_optimizer=False))
        self._planned_env_steps = trainer_support.planned_env_steps(
            self.trainer,
            done=self.env_steps,
            per_iteration=self.ppo.rollout_steps * self.env.num_envs * self.trainer.world_size,
            budget=self.total_env_steps,
        )
        endless = self._planned_env_steps is None and self.ppo.learning_rate_schedule == "linear"
        rule = "be known for PPOConfig.learning_rate_schedule='linear'"
        require(not endless, "PPO.total_env_steps", rule, self.total_env_steps)
        if self._resumed is not None:
            self._restore_acting(self._resumed)
        else:
            obs, mask = self._env.reset()
            zeros = torch.zeros(self.env.num_envs, device=self.device)
            self._acting = ActingState(obs, mask, zeros)
        if self._next_rollout_steps() == 0:
            self.trainer.should_stop = True

    @property
    def planned_env_steps(self) -> int | None:
        """Where this run will end, in environment steps; ``None`` if no limit is known. Valid while it trains."""
        return self._planned_env_steps

    # --- checkpoints ---

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and, while training, the state of environments and random streams."""
        state: dict[str, Any] = {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            "train_time_s": self.train_time_s,
        }
        if self._acting is not None:
            state["acting"] = self._acting._asdict()
            state["env"] = self._env.state_dict()
            state["generators"] = [g.get_state() for g in (self._exploration, self._sample_order)]
        checkpoint[_CHECKPOINT_KEY] = state

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take counters; refuse a checkpoint of something else.

        Raises:
            ValueError: If it was not written by PPO, or for another environment or policy.
        """
        self.refuse_not_ours(checkpoint, "this one")
        fitting = False
        if self._trainer is not None:  # else it is being built from this checkpoint
            fitting = self.trainer.state.fn == TrainerFn.FITTING
            self.refuse_foreign(checkpoint, resuming=fitting)
        state = checkpoint[_CHECKPOINT_KEY]
        self.iteration, self.env_steps = state["iteration"], state["env_steps"]
        self.gradient_steps, self.train_time_s = state["gradient_steps"], state["train_time_s"]
        self._resumed = state if fitting and "env" in state else None

    @staticmethod
    def refuse_not_ours(checkpoint: dict[str, Any], path: str) -> None:
        """Refuse a checkpoint that another module wrote.

        Raises:
            ValueError: Naming ``path``.
        """
        require(_CHECKPOINT_KEY in checkpoint, "ckpt_path", "name a checkpoint of PPO", path)

    def refuse_foreign(self, checkpoint: dict[str, Any], *, resuming: bool) -> None:
        """Refuse a checkpoint of another environment or policy; another ``num_envs`` only when ``resuming``.

        Raises:
            ValueError: Naming the setting that differs.
        """
        for name in ("env", "policy"):
            mine, theirs = (
                _flat_settings(hparams[name])
                for hparams in (self.hparams, checkpoint["hyper_parameters"])
            )
            differing = sorted(
                key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)
            )
            if not resuming:
                differing = [key for key in differing if key != "num_envs"]
            hint = "Use the config of the run that wrote the checkpoint."
            for key in differing[:1]:
                field = f"PPO.{name}" if key == "class_path" else f"PPO.{name}.{key}"
                require(
                    False, field, f"be the checkpoint's, {theirs.get(key)!r}", mine.get(key), hint
                )

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **kwargs: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Weights, normalisers and settings of a checkpoint.

        Args:
            checkpoint_path: A file that the Trainer wrote.
            **kwargs: Settings that replace those of the checkpoint, and Lightning's ``map_location``.

        Raises:
            ValueError: If the file is no checkpoint of PPO, or its environment cannot be imported.
        """
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        cls.refuse_not_ours(checkpoint, str(checkpoint_path))
        saved = checkpoint["hyper_parameters"]
        settings = {
            "env": instantiate(saved["env"], owner="env"),
            "policy": instantiate(saved["policy"], owner="policy"),
            "ppo": PPOConfig(**saved["ppo"]),
        }
        return super().load_from_checkpoint(
            checkpoint_path, weights_only=True, **{**settings, **kwargs}
        )

    def _restore_acting(self, state: dict[str, Any]) -> None:
        self._env.load_state_dict(state["env"])
        acting = {key: _to_device(value, self.device) for key, value in state["acting"].items()}
        self._acting = ActingState(**acting)
        for generator, saved in zip(
            (self._exploration, self._sample_order), state["generators"], strict=True
        ):
            generator.set_state(saved.cpu())
        self._resumed = None

    # --- parts of an iteration ---

    def _normalize(self, obs: Observation) -> Observation:
        return obs if self.obs_normalizer is None else self.obs_normalizer(obs)

    def _scale_reward(self, rollout: Rollout, healthy: Tensor) -> Tensor:
        """[T, B] rewards as the learner sees them; one scale for the whole rollout."""
        if self.return_stats is None:
            return rollout.reward
        assert self._acting is not None
        ended = rollout.terminated | rollout.truncated
        returns, carried = discounted_returns(
            rollout.reward, ended, self._acting.discounted_return, discount=self.ppo.discount
        )
        self._acting = self._acting._replace(discounted_return=carried)
        self.return_stats.update(returns, where=healthy)
        return self.return_stats.scale(rollout.reward, clip=self.ppo.reward_clip)

    def _next_rollout_steps(self) -> int:
        """``T`` of the next iteration: shorter where the budget leaves less, 0 where it is used up."""
        steps = self.ppo.rollout_steps
        if self.total_env_steps is None:
            return steps
        left = (self.total_env_steps - self.env_steps) // (
            self.env.num_envs * self.trainer.world_size
        )
        return max(0, min(steps, left))

    def _set_learning_rate(self) -> float:
        group = self._optimizer.param_groups[0]
        if self.ppo.learning_rate_schedule == "linear":
            assert self._planned_env_steps is not None
            progress = min(1.0, self.env_steps / self._planned_env_steps)
            group["lr"] = linear_learning_rate(self.ppo.learning_rate, progress=progress)
        return float(group["lr"])

    def _to_host(
        self, rollout: Rollout, metrics: UpdateMetrics, variance: Tensor, healthy: Tensor
    ) -> tuple[dict[str, float | int | None], int, bool]:
        """The one device-to-host copy of an iteration."""
        recent = self.recent_episodes.compute()
        episodes = (rollout.episode_length > 0).sum()
        scalars = [*recent, episodes, *metrics[:-1], variance, metrics.gradient_steps, healthy]
        *values, gradient_steps, was_healthy = torch.stack(
            [scalar.double() for scalar in scalars]
        ).tolist()
        figures: dict[str, float | int | None] = dict(zip(DEVICE_METRICS, values, strict=True))
        figures["rollout/episodes"] = int(values[2])
        for name in DEVICE_METRICS[:2]:
            if figures[name] != figures[name]:  # NaN: no episode has ended yet
                figures[name] = None
        return figures, int(gradient_steps), bool(was_healthy)

    def _report(self, row: dict[str, Any]) -> None:
        """To callbacks, progress bars and loggers; not by ``self.log``, which costs 0.3 ms for each metric."""
        if self.ppo.learning_rate_schedule == "adaptive":
            group = self._optimizer.param_groups[0]
            kl = row["policy/approx_kl"]
            group["lr"] = adaptive_learning_rate(group["lr"], kl=kl, desired_kl=self.ppo.desired_kl)
        numbers = {
            name: float("nan") if value is None else float(value) for name, value in row.items()
        }
        self.trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in numbers.items()}
        )
        shown = {"return": numbers[ROLLOUT_RETURN], "env_steps/s": numbers["env_steps_per_s"]}
        self.trainer.progress_bar_metrics.update(shown)
        interval = self.trainer.log_every_n_steps  # 0 for a barebones Trainer
        if interval and self.iteration % interval == 0:
            self._log_to_loggers({name: value for name, value in numbers.items() if value == value})

    def _log_to_loggers(self, metrics: dict[str, float]) -> None:
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.env_steps)


def _flat_settings(description: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": description["class_path"], **description["init_args"]}


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: tensor.to(device) for key, tensor in cast(dict[str, Tensor], value).items()}
    return None if value is None else value.to(device)
