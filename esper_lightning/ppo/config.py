"""Settings of PPO: frozen, checked at construction, with defaults that train."""

import math
from dataclasses import dataclass
from typing import Literal

from esper_lightning.core.errors import check_fields, require

__all__ = ["PPOConfig"]

_FLOAT32 = 3.4e38  # about the greatest number of a weight
_LARGEST_FACTOR = 1000  # that is looked for in the number of samples, to name its divisors


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation (Schulman et al. 2017).

    Attributes:
        rollout_steps: Steps of every environment in one iteration, ``T``.
        epochs: Passes over a rollout.
        minibatches: Parts of each pass; must divide ``rollout_steps * num_envs``, or for a policy
            with memory, which learns from whole sequences, ``num_envs``.
        discount: ``gamma``, per step.
        gae_lambda: ``lambda`` of generalised advantage estimation: 0 is one-step TD, 1 the
            discounted return.
        clip: Greatest change of the probability ratio that still lowers the loss.
        value_clip: Greatest change of the value that still lowers the loss; ``None`` for no limit.
        value_coef: Weight of the squared value error.
        entropy_coef: Weight of the entropy bonus.
        normalize_advantage: Whether advantages get mean 0 and deviation 1 over the rollout.
        max_grad_norm: Gradients are scaled down to this 2-norm; ``None`` for no limit.
        learning_rate: Step size of Adam at the start.
        learning_rate_schedule: ``constant``; ``linear`` to zero at the end of the run;
            ``adaptive``, from iteration to iteration, so that the policy moves about
            ``desired_kl``.
        desired_kl: KL divergence (nats) of one iteration that the adaptive schedule aims at.
        target_kl: After a pass whose mean KL divergence (nats) exceeds this, the rest of the
            iteration's updates are left out; ``None`` for never.
        adam_eps: Term that Adam adds to the denominator.
        normalize_obs: Whether observations are shifted and scaled by running statistics.
        obs_clip: Normalised observations are held within this many deviations.
        normalize_reward: Whether rewards are divided by the running deviation of the discounted
            return.
        reward_clip: Scaled rewards are held within this range around zero.
    """

    rollout_steps: int = 128
    epochs: int = 4
    minibatches: int = 4
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float | None = None
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    normalize_advantage: bool = True
    max_grad_norm: float | None = 0.5
    learning_rate: float = 3e-4
    learning_rate_schedule: Literal["constant", "linear", "adaptive"] = "constant"
    desired_kl: float = 0.01
    target_kl: float | None = None
    adam_eps: float = 1e-5
    normalize_obs: bool = False
    obs_clip: float = 10.0
    normalize_reward: bool = False
    reward_clip: float = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("rollout_steps", "epochs", "minibatches"):
            value = getattr(self, name)
            require(value >= 1, f"PPOConfig.{name}", "be at least 1", value)
        for name in ("discount", "gae_lambda"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"PPOConfig.{name}", "lie in [0, 1]", value)
        hint = "Usual values are 0.1 to 0.3."
        require(0.0 < self.clip < 1.0, "PPOConfig.clip", "lie in (0, 1)", self.clip, hint)
        for name in ("value_coef", "entropy_coef"):
            value = getattr(self, name)
            require(
                0.0 <= value < math.inf,
                f"PPOConfig.{name}",
                "be finite and not negative",
                value,
            )
        for name in ("learning_rate", "desired_kl", "adam_eps", "obs_clip", "reward_clip"):
            value = getattr(self, name)
            require(0.0 < value < math.inf, f"PPOConfig.{name}", "be finite and positive", value)
        rule = "be held by float32, below 3.4e38"
        require(self.learning_rate < _FLOAT32, "PPOConfig.learning_rate", rule, self.learning_rate)
        for name in ("value_clip", "max_grad_norm", "target_kl"):
            value = getattr(self, name)
            ok = value is None or 0.0 < value < math.inf
            hint = "None switches it off."
            require(ok, f"PPOConfig.{name}", "be finite and positive", value, hint)

    def check_against(self, *, num_envs: int, whole_sequences: bool = False) -> None:
        """Check what depends on the environments, and on whether the policy has memory.

        Raises:
            ValueError: If a rollout cannot be cut into minibatches of equal size.
        """
        total = self.rollout_steps * num_envs
        rule = f"divide rollout_steps * num_envs = {self.rollout_steps} * {num_envs} = {total}"
        if whole_sequences:
            total = num_envs
            rule = f"divide num_envs = {num_envs} for a policy with memory"
        if total % self.minibatches:
            near = _divisors(total, most=4 * self.minibatches)[-3:]
            hint = f"Near values that do: {', '.join(map(str, near))}."
            require(False, "PPOConfig.minibatches", rule, self.minibatches, hint)


def _divisors(number: int, *, most: int) -> list[int]:
    """Divisors of ``number`` up to ``most``, in order, in a moment.

    Divisors with two prime factors above 1,000 may be missing.
    """
    found, rest = {1}, number
    for factor in range(2, _LARGEST_FACTOR + 1):
        while rest % factor == 0:
            rest //= factor
            found |= {n * factor for n in found if n * factor <= most}
    return sorted(found | {n * rest for n in found if n * rest <= most})
