"""Settings of PPO: frozen, checked at construction, with defaults that train."""

from dataclasses import dataclass
from typing import Literal

from esper_lightning.core.errors import at_least, check_fields, positive, require

__all__ = ["PPOConfig"]

_FLOAT32 = 3.4e38  # about the greatest number that float32 weights can hold
_LARGEST_FACTOR = 1000  # largest prime factor that is tried when divisors are suggested


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation (Schulman et al. 2017).

    Attributes:
        rollout_steps: Number of steps ``T`` that every environment takes in one iteration.
        epochs: Number of passes over each rollout in the update.
        minibatches: Number of minibatches, and so of gradient steps, in each pass. It must divide
            ``rollout_steps * num_envs``. For a policy with memory, which learns from whole
            sequences, it must divide ``num_envs``.
        discount: Discount ``gamma`` of future rewards, per step; in [0, 1].
        gae_lambda: Parameter ``lambda`` of generalised advantage estimation, in [0, 1]: 0 gives the
            one-step temporal difference, 1 the discounted return.
        clip: Greatest change of the probability ratio of an action that still lowers the policy
            loss; in (0, 1).
        value_clip: Greatest change of a value that still lowers the value loss. ``None`` means no
            limit.
        value_coef: Weight of the squared value error in the loss.
        entropy_coef: Weight of the entropy bonus in the loss.
        normalize_advantage: Whether advantages are shifted and scaled to mean 0 and standard
            deviation 1 over each rollout.
        max_grad_norm: Greatest 2-norm of a gradient; larger gradients are scaled down to that norm.
            ``None`` means no limit.
        learning_rate: Step size of Adam at the start of the run.
        learning_rate_schedule: Schedule of the learning rate: ``constant`` never changes it;
            ``linear`` lowers it in a straight line to zero at the end of the run; ``adaptive``
            changes it after each iteration so that the next one moves the policy by about
            ``desired_kl``.
        desired_kl: KL divergence (nats) of one iteration that the adaptive learning rate aims at.
        target_kl: Greatest mean KL divergence (nats) of a pass. After a pass that exceeds it, the
            remaining gradient steps of the iteration are skipped. ``None`` means no limit.
        adam_eps: Small number that Adam adds to its denominator.
        normalize_obs: Whether observations are shifted and scaled by their running mean and
            standard deviation.
        obs_clip: Greatest magnitude of a normalised observation, in standard deviations.
        normalize_reward: Whether rewards are divided by the running standard deviation of the
            discounted return.
        reward_clip: Greatest magnitude of a normalised reward.
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
            at_least(f"PPOConfig.{name}", getattr(self, name), 1)
        for name in ("discount", "gae_lambda"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"PPOConfig.{name}", "lie in [0, 1]", value)
        hint = "Usual values are 0.1 to 0.3."
        require(0.0 < self.clip < 1.0, "PPOConfig.clip", "lie in (0, 1)", self.clip, hint)
        for name in ("value_coef", "entropy_coef"):
            at_least(f"PPOConfig.{name}", getattr(self, name), 0)
        for name in ("learning_rate", "desired_kl", "adam_eps", "obs_clip", "reward_clip"):
            positive(f"PPOConfig.{name}", getattr(self, name))
        rule = "be held by float32, below 3.4e38"
        require(self.learning_rate < _FLOAT32, "PPOConfig.learning_rate", rule, self.learning_rate)
        for name in ("value_clip", "max_grad_norm", "target_kl"):
            positive(f"PPOConfig.{name}", getattr(self, name), "None switches it off.")

    def check_against(self, *, num_envs: int, whole_sequences: bool = False) -> None:
        """Check the settings that depend on the environments and on the policy.

        Args:
            num_envs: Number of environments of each rank.
            whole_sequences: Whether minibatches are made of whole sequences, as for a policy with
                memory.

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
    """Divisors of ``number`` up to ``most``, in ascending order.

    Divisors with two prime factors above 1,000 may be missing: looking for those would take long.
    """
    found, rest = {1}, number
    for factor in range(2, _LARGEST_FACTOR + 1):
        while rest % factor == 0:
            rest //= factor
            found |= {n * factor for n in found if n * factor <= most}
    return sorted(found | {n * rest for n in found if n * rest <= most})
