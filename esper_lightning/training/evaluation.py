"""Evaluations during a run: deterministic episodes in environments that training never sees."""

from typing import Any

import torch
from torch import nn
from torchmetrics import CatMetric

from esper_lightning.compiling.loops import few_cpu_threads
from esper_lightning.core.seeding import stream_seed
from esper_lightning.envs.base import BatchedEnv, close_env, reseed_env
from esper_lightning.envs.inspector import FIRST_STEPS, FirstSteps
from esper_lightning.policies.base import Policy
from esper_lightning.ppo.collect import Normalize
from esper_lightning.ppo.evaluation import evaluate_policy
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
        self._env: BatchedEnv | None = None
        self.episode_return = CatMetric(nan_strategy="error")
        self.episode_length = CatMetric(nan_strategy="error")
        self._seed, self._has_played = settings.seed, False

    def play(
        self, policy: Policy, normalize: Normalize, *, device: torch.device, rank: int
    ) -> None:
        """Play deterministic episodes, the same number in each environment.

        Args:
            policy: Policy to evaluate.
            normalize: Function from the environment's observations to those that the policy sees.
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
                policy, normalize, env, first_steps=first, episodes_each=self._episodes_each
            )
        self._has_played = True
        self.episode_return.update(episodes.episode_return)
        self.episode_length.update(episodes.episode_length)

    def close(self) -> None:
        """Release the processes, windows and other resources of the environments."""
        close_env(self.spec, self._env)
        self._env = None

    def __getstate__(self) -> dict[str, Any]:
        """The state to pickle, which is everything but the environments."""
        return {**super().__getstate__(), "_env": None}

    def finish(self) -> dict[str, float]:
        """Metrics of the episodes of all ranks; afterwards the episodes are forgotten."""
        metrics = evaluation_metrics(self.episode_return.compute(), self.episode_length.compute())
        self.episode_return.reset()
        self.episode_length.reset()
        return metrics
