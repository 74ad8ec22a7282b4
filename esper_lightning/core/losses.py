"""Terms of the PPO objective, per sample; the caller reduces them once. Axis: ``M`` sample."""

import torch
from torch import Tensor

from esper_lightning.core.running_stats import Moments
from esper_lightning.core.shapes import Float

__all__ = ["clipped_surrogate", "normalize_advantage", "value_loss"]


def clipped_surrogate(
    log_prob: Float[Tensor, " M"],
    old_log_prob: Float[Tensor, " M"],
    advantage: Float[Tensor, " M"],
    *,
    clip: float,
) -> Float[Tensor, " M"]:
    r"""The clipped surrogate of Schulman et al. 2017 (equation 7), negated to be minimised.

    .. math::
        -\min(\rho A, \mathrm{clip}(\rho, 1 - \epsilon, 1 + \epsilon) A),
        \qquad \rho = \pi(a|s) / \pi_{old}(a|s)

    Args:
        log_prob: Log-probability under the policy being trained.
        old_log_prob: Log-probability under the policy that acted.
        advantage: Advantage of the action, usually normalised.
        clip: ``epsilon``, in (0, 1).
    """
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def value_loss(
    value: Float[Tensor, " M"],
    old_value: Float[Tensor, " M"],
    value_target: Float[Tensor, " M"],
    *,
    clip: float | None,
) -> Float[Tensor, " M"]:
    """Squared error of the value.

    With ``clip``, the greater of this error and of the error of the value clamped to within
    ``clip`` of the old value.

    Args:
        value: Value under the critic being trained.
        old_value: Value when acting.
        value_target: Target of the regression.
        clip: Greatest change that lowers the loss, in units of value; ``None`` for no limit.
    """
    error = (value - value_target).square()
    if clip is None:
        return error
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return torch.maximum(error, (clipped - value_target).square())


def normalize_advantage(
    advantage: Float[Tensor, " *N"], moments: Moments, *, eps: float = 1e-8
) -> Float[Tensor, " *N"]:
    """Shift and scale to mean 0 and standard deviation 1 over the samples of ``moments``.

    The result is zero if all advantages are equal.
    """
    mean = moments.mean.to(advantage.dtype)  # the double mean of equal numbers is exact
    correction = moments.number / (moments.number - 1.0).clamp(min=1.0)
    std = (moments.variance * correction).sqrt().to(advantage.dtype)
    return (advantage - mean) / (std + eps)
