"""Metrics that show how an update went. No metric enters a gradient."""

import torch
from torch import Tensor

from esper_lightning.core.running_stats import Moments
from esper_lightning.core.shapes import Float

__all__ = ["approx_kl", "clip_fraction", "explained_variance"]


def approx_kl(
    log_prob: Float[Tensor, " M"], old_log_prob: Float[Tensor, " M"]
) -> Float[Tensor, " M"]:
    r"""Per-sample estimate of KL(old || new).

    The estimate is :math:`(\rho - 1) - \log \rho`, unbiased and never negative: the estimator "k3"
    of Schulman, "Approximating KL Divergence" (2020).
    """
    log_ratio = log_prob - old_log_prob
    return log_ratio.expm1() - log_ratio


def clip_fraction(
    log_prob: Float[Tensor, " M"], old_log_prob: Float[Tensor, " M"], *, clip: float
) -> Float[Tensor, " M"]:
    """1 where the probability ratio left ``[1 - clip, 1 + clip]``, else 0.

    The mean of the result is the clip fraction.
    """
    return ((log_prob - old_log_prob).expm1().abs() > clip).to(log_prob.dtype)


def explained_variance(value_target: Moments, error: Moments) -> Float[Tensor, ""]:
    """``1 - Var(error) / Var(target)``, where the error is target minus value.

    1 is a perfect value function, 0 is no better than a constant; NaN for a constant target.
    """
    explained = 1.0 - error.variance / value_target.variance
    return torch.where(value_target.variance > 0.0, explained, torch.nan)
