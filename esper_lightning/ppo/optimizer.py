"""Adam over the policy, and its learning rate over a run."""

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


def build_optimizer(
    policy: nn.Module, config: PPOConfig, extensions: nn.Module | None = None
) -> torch.optim.Adam:
    """Adam over policy and extensions, which holds its state and learning rate.

    ``Updater`` takes its steps.
    """
    trained = trained_parameters(policy, extensions)
    return torch.optim.Adam(trained, lr=config.learning_rate, eps=config.adam_eps)


def trained_parameters(policy: nn.Module, extensions: nn.Module | None) -> list[nn.Parameter]:
    """The parameters that the optimizer is over, in its order; a shared parameter counts once."""
    both = nn.ModuleList([policy] if extensions is None else [policy, extensions])
    return [parameter for parameter in both.parameters() if parameter.requires_grad]


def schedule_learning_rate(
    optimizer: torch.optim.Adam, config: PPOConfig, *, progress: float
) -> float:
    """Set and return the rate of the next iteration; an adaptive one stays as it is.

    Args:
        optimizer: From ``build_optimizer``.
        config: Whose settings win over what a checkpoint brought.
        progress: Share of the run that is done, in [0, 1].
    """
    group = optimizer.param_groups[0]
    if config.learning_rate_schedule == "linear":
        group["lr"] = linear_learning_rate(config.learning_rate, progress=progress)
    elif config.learning_rate_schedule == "constant":
        group["lr"] = config.learning_rate
    return float(group["lr"])


def adapt_learning_rate(optimizer: torch.optim.Adam, config: PPOConfig, *, kl: float) -> None:
    """Where the schedule is adaptive, react to how far (nats) the iteration moved the policy."""
    if config.learning_rate_schedule == "adaptive":
        group = optimizer.param_groups[0]
        group["lr"] = adaptive_learning_rate(group["lr"], kl=kl, desired_kl=config.desired_kl)


def linear_learning_rate(initial: float, *, progress: float) -> float:
    """``initial`` falling in a straight line to zero.

    Args:
        initial: Learning rate at the start.
        progress: Share of the run that is done, in [0, 1].

    Raises:
        ValueError: If ``progress`` lies outside [0, 1].
    """
    require(0.0 <= progress <= 1.0, "linear_learning_rate.progress", "lie in [0, 1]", progress)
    return initial * (1.0 - progress)


def adaptive_learning_rate(
    current: float, *, kl: float, desired_kl: float, least: float = 1e-5, greatest: float = 1e-2
) -> float:
    """Slower by 1.5 where the policy moved beyond twice ``desired_kl``, faster below half of it.

    The rule of Schulman et al. 2017 (section 4) with the factor and bounds that rsl_rl uses. A
    ``kl`` that is not finite leaves the rate as it is.
    """
    if kl > 2.0 * desired_kl and kl < float("inf"):
        return max(least, current / 1.5)
    if 0.0 <= kl < 0.5 * desired_kl:
        return min(greatest, current * 1.5)
    return current
