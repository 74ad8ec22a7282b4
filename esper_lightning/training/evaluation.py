"""Evaluations during a run: deterministic episodes in environments that training never sees."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torchmetrics import CatMetric

from esper_lightning.compiling.loops import CompileMode, few_cpu_threads
from esper_lightning.compiling.stages import Stage, StageState, restore_stages, stages_within
from esper_lightning.core.running_stats import ObsNormalizer
from esper_lightning.core.seeding import stream_seed
from esper_lightning.envs.base import (
    BatchedEnv,
    FunctionalEnv,
    close_env,
    is_functional,
    reseed_env,
)
from esper_lightning.envs.inspector import FIRST_STEPS, FirstSteps
from esper_lightning.policies.base import Policy
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.ppo.evaluation import Stride, evaluate_policy
from esper_lightning.ppo.metrics import evaluation_metrics
from esper_lightning.training.settings import PPOSettings
from esper_lightning.training.specs import episodes_each, evaluation_spec

__all__ = ["Evaluation"]


class Evaluation(nn.Module):
    """Evaluations of a run: their environments, and the episodes of the latest one over all ranks.

    Args:
        settings: Settings of the module.

    Attributes:
        spec: Spec of the environments in which each rank plays an evaluation.
        episode_return: Returns of the episodes of the latest evaluation.
        episode_length: Lengths of the same episodes, in steps.
    """

    def __init__(self, settings: PPOSettings) -> None:
        super().__init__()
        self.spec = evaluation_spec(settings.env, settings.eval_episodes)
        self._episodes_each = episodes_each(self.spec, settings.eval_episodes)
        self._compile: CompileMode = settings.compile
        self._env: BatchedEnv | None = None
        self._stride: Stride | None = None
        self._stages: dict[str, StageState] = {}  # while there is no stride
        self.episode_return = CatMetric(nan_strategy="error")
        self.episode_length = CatMetric(nan_strategy="error")
        self._seed, self._has_played = settings.seed, False

    def play(
        self,
        policy: Policy,
        normalizer: ObsNormalizer | None,
        *,
        device: torch.device,
        rank: int,
    ) -> None:
        """Play deterministic episodes, the same number in each environment.

        Args:
            policy: Policy to evaluate.
            normalizer: Statistics of observations; ``None`` for no normalisation.
            device: Device of policy and environments.
            rank: Number of this rank, which plays episodes of its own.
        """
        # In Lightning's inference mode, environments could not write into their own state later.
        with torch.inference_mode(False), torch.no_grad(), few_cpu_threads(self.spec.num_envs):
            seed = stream_seed(self._seed, rank=rank, purpose="evaluation")
            env = self._env
            if env is None or not reseed_env(env, seed):
                self.close()
                env = self._env = self.spec.build(device, seed)
            steps = 0 if self._has_played else FIRST_STEPS
            first = FirstSteps(self.spec, self.spec.spaces(), env, device, steps=steps)
            episodes = evaluate_policy(
                policy,
                partial(prepare_obs, normalizer=normalizer),
                env,
                first_steps=first,
                stride=self._stride_of(policy, normalizer, env, device),
                episodes_each=self._episodes_each,
            )
        self._has_played = True
        self.episode_return.update(episodes.episode_return)
        self.episode_length.update(episodes.episode_length)

    def _stride_of(
        self,
        policy: Policy,
        normalizer: ObsNormalizer | None,
        env: BatchedEnv,
        device: torch.device,
    ) -> Stride | None:
        """Many steps at once, compiled at their first use; ``None`` if Python takes each step.

        Environments that are built anew for every evaluation are not worth a compilation each.
        """
        if not (is_functional(env) and hasattr(env, "reseed")):
            return None
        stride, functional = self._stride, cast(FunctionalEnv, env)
        if stride is None or not stride.is_of(policy, normalizer, functional):
            mode = self._compile
            stride = Stride(policy, normalizer, functional, mode=mode, device=device)
            restore_stages(stages_within(stride), self._stages)
            self._stride, self._stages = stride, {}
        return stride

    def stages(self) -> dict[str, Stage]:
        """The stages of evaluations by name; none before the first evaluation."""
        return {} if self._stride is None else stages_within(self._stride)

    def stage_states(self) -> dict[str, StageState]:
        """How the stages of evaluations run, for a checkpoint."""
        if self._stride is None:
            return self._stages
        return {name: stage.state() for name, stage in self.stages().items()}

    def restore_stages(self, states: Mapping[str, StageState]) -> None:
        """Let evaluations run as those of a checkpoint did, or as new ones without a state."""
        if self._stride is None:
            self._stages = dict(states)
        else:
            restore_stages(stages_within(self._stride), states)

    def close(self) -> None:
        """Release the processes, windows and other resources of the environments."""
        self._stages = self.stage_states()
        close_env(self.spec, self._env)
        self._env = self._stride = None

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle, which is everything but the environments."""
        return {**super().__getstate__(), "_env": None, "_stride": None}

    def finish(self) -> dict[str, float]:
        """Metrics of the episodes of all ranks; afterwards the episodes are forgotten."""
        metrics = evaluation_metrics(self.episode_return.compute(), self.episode_length.compute())
        self.episode_return.reset()
        self.episode_length.reset()
        return metrics
