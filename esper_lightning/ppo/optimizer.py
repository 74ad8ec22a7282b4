"""Adam over the policy's weights, and the learning rate over a run."""

import torch
from torch import nn

from esper_lightning.core.errors import require
from esper_lightning.ppo.config import PPOConfig

__all__ = [
    "adapt_learning_rate",
    "adaptive_learning_rate",
    "build_optimizer",
    "linear_learning_rate",
    "schedule_learning_rate",
    "trained_parameters",
]

_LEAST, _GREATEST = 1e-5, 1e-2  # bounds of an adaptive learning rate, those of rsl_rl


def build_optimizer(
    policy: nn.Module, config: PPOConfig, extensions: nn.Module | None = None
) -> torch.optim.Adam:
    """Adam over the trained weights of a policy and of the extensions of PPO.

    The optimizer holds the moments and the learning rate; ``Updater`` takes the steps.

    Args:
        policy: Policy to train.
        config: PPO settings: ``learning_rate`` and ``adam_eps`` are used.
        extensions: Extensions of PPO; ``None`` for none.
    """
    trained = trained_parameters(policy, extensions)
    return torch.optim.Adam(trained, lr=config.learning_rate, eps=config.adam_eps)


def trained_parameters(policy: nn.Module, extensions: nn.Module | None) -> list[nn.Parameter]:
    """The parameters that PPO trains, in the order of the optimizer; a shared one counts once.

    Args:
        policy: Policy to train.
        extensions: Extensions of PPO; ``None`` for none.
    """
    both = nn.ModuleList([policy] if extensions is None else [policy, extensions])
    return [parameter for parameter in both.parameters() if parameter.requires_grad]


def schedule_learning_rate(
    optimizer: torch.optim.Adam, config: PPOConfig, *, progress: float
) -> float:
    """Set and return the learning rate of the next iteration; an adaptive rate stays as it is.

    Args:
        optimizer: Adam from ``build_optimizer``.
        config: PPO settings, which override the learning rate that a checkpoint restored.
        progress: Share of the run that is done, in [0, 1].
    """
    group = optimizer.param_groups[0]
    if config.learning_rate_schedule == "linear":
        group["lr"] = linear_learning_rate(config.learning_rate, progress=progress)
    elif config.learning_rate_schedule == "constant":
        group["lr"] = config.learning_rate
    return float(group["lr"])


def adapt_learning_rate(optimizer: torch.optim.Adam, config: PPOConfig, *, kl: float) -> None:
    """Adapt the learning rate after an iteration, if ``learning_rate_schedule`` is ``adaptive``.

    Args:
        optimizer: Adam from ``build_optimizer``.
        config: PPO settings.
        kl: KL divergence (nats) by which the iteration moved the policy.
    """
    if config.learning_rate_schedule == "adaptive":
        group = optimizer.param_groups[0]
        group["lr"] = adaptive_learning_rate(group["lr"], kl=kl, desired_kl=config.desired_kl)


def linear_learning_rate(initial: float, *, progress: float) -> float:
    """A learning rate that falls in a straight line to zero at the end of the run.

    Args:
        initial: Learning rate at the start.
        progress: Share of the run that is done, in [0, 1].

    Raises:
        ValueError: If ``progress`` lies outside [0, 1].
    """
    require(0.0 <= progress <= 1.0, "linear_learning_rate.progress", "lie in [0, 1]", progress)
    return initial * (1.0 - progress)


def adaptive_learning_rate(current: float, *, kl: float, desired_kl: float) -> float:
    """A learning rate that follows how far the policy moved.

    The rate is divided by 1.5 where the policy moved by more than twice ``desired_kl``, and
    multiplied by 1.5 where it moved by less than half of ``desired_kl``. This is the rule of
    Schulman et al. 2017 (section 4) with the factor and the bounds that rsl_rl uses.

    Args:
        current: Learning rate of the iteration that just ended.
        kl: KL divergence (nats) of that iteration; if it is not finite, the rate stays the same.
        desired_kl: KL divergence (nats) to aim at.
    """
    if kl > 2.0 * desired_kl and kl < float("inf"):
        return max(_LEAST, current / 1.5)
    if 0.0 <= kl < 0.5 * desired_kl:
        return min(_GREATEST, current * 1.5)
    return current
