"""Progress of a run: its counters, its budget of environment steps, and its history rows."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from esper_lightning.envs.base import RunProgress
from esper_lightning.ppo.learner import ITERATION_METRICS
from esper_lightning.ppo.metrics import ROLLOUT_METRICS, RecentEpisodes, rollout_metrics
from esper_lightning.training.settings import PPOSettings

__all__ = ["LEARNING_RATE", "ROW_METRICS", "Progress"]

_log = logging.getLogger(__name__)
_ENDS_ALWAYS = (
    "Every episode of iteration %d lasted one step, and earlier ones did not: environments that "
    "ended may not have begun anew. check_env says more."
)
LEARNING_RATE = "optim/learning_rate"
ROW_METRICS = (
    *("iteration", "env_steps", "gradient_steps", "time_s", "env_steps_per_s"),
    *ROLLOUT_METRICS,
    *ITERATION_METRICS,
    LEARNING_RATE,
)
"""Metrics of every history row; extensions and environments add others, with a ``/``."""


class Progress:
    """Counters of a run, which advance once for each finished iteration.

    Args:
        settings: Settings of the module.

    Attributes:
        iteration: Number of finished iterations.
        env_steps: Number of environment steps taken, over all environments of all ranks.
        budget: The setting ``PPO.total_env_steps``.
        gradient_steps: Number of gradient steps applied.
        train_time_s: Seconds spent in iterations, including those before the run was resumed. Time
            in which a recorded process was suspended does not count.
        planned_env_steps: Number of environment steps after which this run will end; ``None``
            without a limit, and before training starts.
        new_episodes: Whether a resumed run had to start new episodes, which the next history row
            reports.
        redealt_to: Number of ranks to which a resumed run has dealt environments anew, which the
            next history row reports; ``None`` without that.
    """

    def __init__(self, settings: PPOSettings) -> None:
        self.iteration = self.env_steps = self.gradient_steps = 0
        self.train_time_s = 0.0
        self.planned_env_steps: int | None = None
        self.new_episodes = self._has_warned = False
        self.redealt_to: int | None = None
        self._recent_episodes = RecentEpisodes()
        self._rollout_steps, self._num_envs = settings.ppo.rollout_steps, settings.env.num_envs
        self.budget = settings.total_env_steps

    def next_rollout_steps(self, ranks: int) -> int:
        """Number of rollout steps ``T`` of the next iteration.

        The budget shortens the last rollout. The number is 0 where the budget is used up.

        Args:
            ranks: Number of ranks that train together.
        """
        if self.budget is None:
            return self._rollout_steps
        left = (self.budget - self.env_steps) // (self._num_envs * ranks)
        return max(0, min(self._rollout_steps, left))

    def env_steps_after(self, iterations: int, *, ranks: int) -> int:
        """Number of environment steps taken after further iterations of full length.

        Args:
            iterations: Number of further iterations.
            ranks: Number of ranks that train together.
        """
        return self.env_steps + iterations * self._rollout_steps * self._num_envs * ranks

    def done_share(self) -> float:
        """Share of the planned environment steps that are taken; 0 for a run without a limit."""
        return min(1.0, self.env_steps / (self.planned_env_steps or math.inf))

    def of_run(self) -> RunProgress:
        """The counters that a curriculum of the environments may depend on."""
        return RunProgress(self.iteration, self.env_steps, self.planned_env_steps)

    def finish_iteration(
        self, metrics: Mapping[str, float], *, env_steps: int, duration_s: float
    ) -> dict[str, float | int | None]:
        """Count an iteration and make its history row.

        Args:
            metrics: Metrics of the iteration, from ``Learner.to_host``.
            env_steps: Environment steps of the iteration, over all ranks.
            duration_s: Seconds that the iteration took.

        Returns:
            The history row of the iteration.
        """
        episodes = metrics["episodes"]
        ends_always = episodes == env_steps and self._recent_episodes.means()[1] > 1.0
        if ends_always and not self._has_warned:
            self._has_warned = True
            _log.warning(_ENDS_ALWAYS, self.iteration + 1)
        self._recent_episodes.update(metrics["return_sum"], metrics["length_sum"], episodes)
        new_episodes, self.new_episodes = self.new_episodes, False
        redealt_to, self.redealt_to = self.redealt_to, None
        self.iteration += 1
        self.env_steps += env_steps
        self.gradient_steps += int(metrics["gradient_steps"])
        self.train_time_s += duration_s
        return {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            "time_s": self.train_time_s,
            "env_steps_per_s": env_steps / duration_s,
            **rollout_metrics(episodes, self._recent_episodes),
            **{name: value for name, value in metrics.items() if "/" in name},
            **({"resumed_with_new_episodes": 1} if new_episodes else {}),
            **({} if redealt_to is None else {"resumed_on_ranks": redealt_to}),
        }

    def state_dict(self) -> dict[str, Any]:
        """The counters, for a checkpoint."""
        return {
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "gradient_steps": self.gradient_steps,
            "train_time_s": self.train_time_s,
            "recent_episodes": self._recent_episodes.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the counters of a checkpoint.

        Raises:
            ValueError: If ``state`` is not what ``state_dict`` returned.
        """
        self.iteration, self.env_steps = state["iteration"], state["env_steps"]
        self.gradient_steps, self.train_time_s = state["gradient_steps"], state["train_time_s"]
        self._recent_episodes.load(state["recent_episodes"])
