"""The objective of PPO: terms of the loss for each sample, and their sum. Axis: ``M`` sample."""

from collections.abc import Mapping

import torch
from torch import Tensor

from esper_lightning.core.losses import clipped_surrogate, value_loss
from esper_lightning.core.shapes import Float
from esper_lightning.core.types import LossTerms, Samples
from esper_lightning.policies.base import Evaluation
from esper_lightning.ppo.config import PPOConfig

__all__ = ["ppo_loss_terms", "total_loss", "weighted"]


def ppo_loss_terms(evaluation: Evaluation, batch: Samples, config: PPOConfig) -> LossTerms:
    """Terms of the objective for each sample, under the weights that are being trained.

    Args:
        evaluation: Log-probability, entropy and value of the samples under these weights.
        batch: Samples of a minibatch.
        config: PPO settings: ``clip`` and ``value_clip`` are used.
    """
    policy = clipped_surrogate(
        evaluation.log_prob, batch.log_prob, batch.advantage, clip=config.clip
    )
    return LossTerms(
        policy=weighted(policy, batch),
        value=value_loss(evaluation.value, batch.value, batch.value_target, clip=config.value_clip),
        entropy=weighted(evaluation.entropy, batch),
    )


def weighted(term: Float[Tensor, " M"], batch: Samples) -> Float[Tensor, " M"]:
    """A term of the actor's loss, weighted so that only steps with a choice count in its mean.

    Args:
        term: One number for each sample.
        batch: The samples, with their ``actor_weight``.
    """
    weight = batch.actor_weight
    return term if weight is None else torch.where(weight > 0.0, term * weight, 0.0)


def total_loss(
    terms: LossTerms, added: Mapping[str, Float[Tensor, " M"]], config: PPOConfig
) -> Float[Tensor, " M"]:
    """The loss that training minimises, for each sample.

    Args:
        terms: Terms from ``ppo_loss_terms``.
        added: Terms of extensions, by their names.
        config: PPO settings: the coefficients of the terms.
    """
    loss = terms.policy + config.value_coef * terms.value - config.entropy_coef * terms.entropy
    for term in added.values():
        loss = loss + term
    return loss
