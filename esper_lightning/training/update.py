"""The update: advantages of a rollout, then epochs of minibatch steps.

Axes: ``T`` step, ``B`` environment, ``M`` sample.

No host synchronisation: what must not be applied is skipped on the device. It knows nothing of
Lightning.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esper_lightning.core.diagnostics import approx_kl, clip_fraction
from esper_lightning.core.gae import compute_gae
from esper_lightning.core.losses import clipped_surrogate, normalize_advantage, value_loss
from esper_lightning.core.minibatches import flatten_steps, minibatches
from esper_lightning.core.schedules import adaptive_learning_rate, linear_learning_rate
from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.types import LossTerms, Rollout, Samples
from esper_lightning.policies.base import Evaluation, Policy
from esper_lightning.training.collect import Normalize
from esper_lightning.training.config import PPOConfig

__all__ = [
    "UpdateMetrics",
    "adapt_learning_rate",
    "build_optimizer",
    "find_non_finite",
    "ppo_loss_terms",
    "prepare_samples",
    "schedule_learning_rate",
    "update",
]


class UpdateMetrics(NamedTuple):
    """Means over the applied gradient steps of one iteration; scalars on the device."""

    policy_loss: Float[Tensor, ""]
    value_loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    grad_norm: Float[Tensor, ""]  # before clipping
    gradient_steps: Float[Tensor, ""]  # how many were applied
    finite: Float[Tensor, ""]  # 1 where every gradient was, else 0


def build_optimizer(policy: Policy, config: PPOConfig) -> torch.optim.Adam:
    """Adam, fused: by its ``found_inf`` it can leave out a step without asking the host."""
    return torch.optim.Adam(
        policy.parameters(), lr=config.learning_rate, eps=config.adam_eps, fused=True
    )


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


@torch.no_grad()
def prepare_samples(
    policy: Policy,
    normalize: Normalize,
    rollout: Rollout,
    reward: Float[Tensor, "T B"],
    config: PPOConfig,
) -> Samples:
    """Values, advantages and value targets of a rollout, in one pass over all ``T * B`` states.

    Args:
        policy: The critic that the advantages are measured against.
        normalize: The observation statistics that acting used.
        rollout: What was collected.
        reward: The rollout's rewards, scaled if they are to be.
        config: Discount, lambda and normalisation.
    """
    obs = normalize(flatten_steps(rollout.obs))
    value = policy.value(obs)
    next_value = policy.value(normalize(flatten_steps(rollout.reached_obs)))
    advantages = compute_gae(
        reward,
        value.view_as(reward),
        next_value.view_as(reward),
        rollout.terminated,
        rollout.truncated,
        discount=config.discount,
        lambda_=config.gae_lambda,
    )
    advantage = advantages.advantage.flatten()
    return Samples(
        obs=obs,
        action=rollout.action.flatten(0, 1),
        log_prob=rollout.log_prob.flatten(),
        action_mask=None if rollout.action_mask is None else rollout.action_mask.flatten(0, 1),
        advantage=normalize_advantage(advantage) if config.normalize_advantage else advantage,
        value=value,
        value_target=advantages.value_target.flatten(),
    )


def ppo_loss_terms(evaluation: Evaluation, batch: Samples, config: PPOConfig) -> LossTerms:
    """Per-sample terms of the objective under the current weights."""
    return LossTerms(
        policy=clipped_surrogate(
            evaluation.log_prob, batch.log_prob, batch.advantage, clip=config.clip
        ),
        value=value_loss(evaluation.value, batch.value, batch.value_target, clip=config.value_clip),
        entropy=evaluation.entropy,
    )


def update(
    policy: Policy,
    optimizer: torch.optim.Adam,
    samples: Samples,
    config: PPOConfig,
    *,
    healthy: Bool[Tensor, ""],
    generator: torch.Generator,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> UpdateMetrics:
    """``epochs`` passes of ``minibatches`` gradient steps.

    Args:
        policy: Trained in place.
        optimizer: From ``build_optimizer``.
        samples: From ``prepare_samples``.
        config: Coefficients and limits.
        healthy: Where False, no step is applied: weights, moments and step counts stay as they are.
        generator: Source of the order, on the device.
        backward: How gradients of the loss are computed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # The last rollout of a budget may have fewer samples than there are to be minibatches.
    parts = min(config.minibatches, samples.log_prob.shape[0])
    skip = (~healthy).float()
    finite = torch.ones_like(skip)
    rows: list[Tensor] = []
    applied: list[Tensor] = []
    for _ in range(config.epochs):
        kls: list[Tensor] = []
        for batch in minibatches(samples, parts, generator=generator):
            evaluation = policy.evaluate(batch.obs, batch.action, batch.action_mask)
            terms = ppo_loss_terms(evaluation, batch, config)
            policy_loss, value_loss_, entropy = (term.mean() for term in terms)
            optimizer.zero_grad(set_to_none=True)
            backward(policy_loss + config.value_coef * value_loss_ - config.entropy_coef * entropy)
            max_norm = float("inf") if config.max_grad_norm is None else config.max_grad_norm
            grad_norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            # A NaN or an infinity stops the rest of the update, too.
            finite = torch.minimum(finite, grad_norm.detach().isfinite().float())
            skip = torch.maximum(skip, 1.0 - finite)
            _step_unless(skip, optimizer)

            log_prob = evaluation.log_prob.detach()
            kls.append(approx_kl(log_prob, batch.log_prob).mean())
            clipped = clip_fraction(log_prob, batch.log_prob, clip=config.clip).mean()
            figures = (policy_loss, value_loss_, entropy, kls[-1], clipped, grad_norm)
            rows.append(torch.stack([figure.detach() for figure in figures]))
            applied.append(1.0 - skip)
        if config.target_kl is not None:
            skip = torch.maximum(skip, (torch.stack(kls).mean() > config.target_kl).float())
    # Where, not a product with the weight: a step that was left out may hold NaN.
    weight = torch.stack(applied)
    steps = weight.sum()
    total = torch.where(weight[:, None] > 0, torch.stack(rows), 0.0).sum(0)
    return UpdateMetrics._make([*(total / steps).unbind(), steps, finite])


def find_non_finite(
    policy: Policy, samples: Samples, config: PPOConfig, order: torch.Generator
) -> tuple[int, list[str], Samples] | None:
    """Look again for the minibatch whose loss or gradient was not finite.

    The weights are those that it met: no step was applied from it on.

    Args:
        policy: After the update.
        samples: Of the update.
        config: Likewise.
        order: In the state that the update began with.

    Returns:
        Number of the gradient step in the iteration, names of the loss terms and gradients, and the
        minibatch; ``None`` if it cannot be found.
    """
    parts = min(config.minibatches, samples.log_prob.shape[0])
    named = dict(policy.named_parameters())
    for epoch in range(config.epochs):
        for number, batch in enumerate(minibatches(samples, parts, generator=order)):
            evaluation = policy.evaluate(batch.obs, batch.action, batch.action_mask)
            terms = ppo_loss_terms(evaluation, batch, config)
            loss = (
                terms.policy.mean()
                + config.value_coef * terms.value.mean()
                - config.entropy_coef * terms.entropy.mean()
            )
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            watched = {f"loss/{k}": v for k, v in terms._asdict().items()}
            watched |= {f"gradient of {k}": g for k, g in zip(named, gradients, strict=True)}
            bad = [k for k, v in watched.items() if v is not None and not v.isfinite().all()]
            if bad:
                return epoch * parts + number + 1, bad, batch
    return None


def _step_unless(skip: Float[Tensor, ""], optimizer: torch.optim.Adam) -> None:
    """One step of Adam where ``skip`` is 0; where it is 1, nothing changes. Decided on the device.

    ``found_inf`` is how ``torch.amp.GradScaler`` tells a fused optimizer to leave out a step.
    """
    optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
