"""The update: epochs of minibatch steps.

Axes: ``M`` sample, ``S`` gradient step, ``P`` weight.

No host synchronisation: what must not be applied is skipped on the device. It knows nothing of
Lightning.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esper_lightning.compiling.loops import (
    CompileMode,
    compile_function,
    compile_loop,
)
from esper_lightning.core.diagnostics import approx_kl, clip_fraction
from esper_lightning.core.flat_adam import AdamState, adam_step
from esper_lightning.core.losses import clipped_surrogate, value_loss
from esper_lightning.core.minibatches import take
from esper_lightning.core.ranks import ALONE, Ranks
from esper_lightning.core.schedules import adaptive_learning_rate, linear_learning_rate
from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.types import LossTerms, Samples
from esper_lightning.policies.base import Evaluation, Policy
from esper_lightning.ppo.agent import Agent, Weights
from esper_lightning.ppo.config import PPOConfig

__all__ = [
    "GradientFault",
    "UpdateMetrics",
    "Updater",
    "adapt_learning_rate",
    "build_optimizer",
    "find_fault",
    "ppo_loss_terms",
    "schedule_learning_rate",
]


_SCALE = 2.0**-80  # of gradients whose squares would be infinite: float32 ends at 2**128
_LARGEST_SQUARED = 1e18  # a number whose square, and the sum of many such, is finite in float32


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
    """Adam over the policy: what holds its state and learning rate; ``Updater`` takes its steps."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=config.learning_rate, eps=config.adam_eps)


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


def ppo_loss_terms(evaluation: Evaluation, batch: Samples, config: PPOConfig) -> LossTerms:
    """Per-sample terms of the objective under the current weights."""
    policy = clipped_surrogate(
        evaluation.log_prob, batch.log_prob, batch.advantage, clip=config.clip
    )
    return LossTerms(
        policy=_weighted(policy, batch),
        value=value_loss(evaluation.value, batch.value, batch.value_target, clip=config.value_clip),
        entropy=_weighted(evaluation.entropy, batch),
    )


def _weighted(term: Float[Tensor, " M"], batch: Samples) -> Float[Tensor, " M"]:
    """A term of the actor: its mean is that over the steps at which there was a choice."""
    weight = batch.actor_weight
    return term if weight is None else torch.where(weight > 0.0, term * weight, 0.0)


def total_loss(terms: LossTerms, config: PPOConfig) -> Float[Tensor, " M"]:
    """What is minimised, per sample."""
    return terms.policy + config.value_coef * terms.value - config.entropy_coef * terms.entropy


class _Progress(NamedTuple):
    """What one gradient step hands to the next."""

    adam: AdamState
    skip: Bool[Tensor, ""]  # steps are left out from here on
    finite: Bool[Tensor, ""]  # every gradient was, so far
    kl: Float[Tensor, ""]  # sum over the steps of this pass


class _Sums(NamedTuple):
    """Sums over the samples of (a chunk of) a minibatch."""

    gradient: Float[Tensor, " P"]
    figures: Float[Tensor, "6"]  # policy loss, value loss, entropy, KL, clip fraction; samples


class _Constants(NamedTuple):
    samples: Samples
    buffers: dict[str, Tensor]
    learning_rate: Float[Tensor, ""]


class Updater:
    """``epochs`` passes of ``minibatches`` gradient steps.

    Args:
        agent: Whose loss is minimised.
        config: Coefficients and limits.
        mode: How the passes run.
        device: Of everything.
        ranks: Over which gradients and figures are averaged.
    """

    def __init__(
        self,
        agent: Agent,
        config: PPOConfig,
        *,
        mode: CompileMode,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self._agent, self._config, self._device = agent, config, device
        self._mean_of_pass: Tensor | None = None
        part, around = self._sum, mode
        if ranks.size > 1:
            mine = compile_function("gradient", self._sum, mode=mode, device=device)

            def part(progress: _Progress, index: Tensor, constants: _Constants) -> _Sums:
                return ranks.sum(mine(progress, index, constants))

            around = "off"  # compiled steps of two ranks might differ in a rounding
        self._loop = compile_loop("update", self._step, part, mode=around, device=device)

    def order(self, samples: int, generator: torch.Generator) -> Sequence[Tensor]:
        """Which of the ``Samples.parts`` each gradient step takes: anew for each pass.

        ``[S, M]``, or parts of sizes that differ by one where they cannot be equal.
        """
        # The last rollout of a budget may have fewer samples than there are to be minibatches.
        parts = min(self._config.minibatches, samples)
        orders = [
            torch.randperm(samples, generator=generator, device=self._device)
            for _ in range(self._config.epochs)
        ]
        if samples % parts == 0:
            return torch.stack(orders).view(-1, samples // parts)  # pyright: ignore[reportReturnType]
        return [part for order in orders for part in order.tensor_split(parts)]

    def update(
        self,
        adam: AdamState,
        weights: Weights,
        samples: Samples,
        order: Sequence[Tensor],
        *,
        learning_rate: Float[Tensor, ""],
        healthy: Bool[Tensor, ""],
    ) -> tuple[AdamState, UpdateMetrics]:
        """Take every gradient step.

        Args:
            adam: Before; may be changed in place.
            weights: Whose buffers the policy computes with.
            samples: From ``prepare_samples``.
            order: From ``order``.
            learning_rate: Of the whole update.
            healthy: Where False, no step is applied: weights and moments stay as they are.
        """
        mean_of_pass = self._mean_of_pass
        if mean_of_pass is None or len(mean_of_pass) != len(order):
            parts = len(order) // self._config.epochs
            steps = torch.arange(1, len(order) + 1, device=self._device)
            self._mean_of_pass = mean_of_pass = (steps % parts == 0).float() / parts
        start = _Progress(adam, ~healthy, healthy | True, torch.zeros_like(learning_rate))
        constants = _Constants(samples, weights.buffers, learning_rate)
        end, rows = self._loop(start, mean_of_pass, order, constants, None)
        # Where, not a product with the weight: a step that was left out may hold NaN.
        applied = rows[:, -1]
        total = torch.where(applied[:, None] > 0, rows[:, :-1], 0.0).sum(0)
        count = applied.sum()
        figures = [*(total / count).unbind(), count, end.finite.float()]
        return end.adam, UpdateMetrics._make(figures)

    def _sum(self, progress: _Progress, index: Int[Tensor, " M"], constants: _Constants) -> _Sums:
        """Gradient and figures, summed over some samples."""
        batch = take(constants.samples, index)
        with torch.enable_grad():
            weight = progress.adam.weight.detach().requires_grad_()
            weights = Weights(weight, constants.buffers)
            evaluation = self._agent.evaluate(weights, batch)
            terms = ppo_loss_terms(evaluation, batch, self._config)
            loss = total_loss(terms, self._config).sum()
            (gradient,) = torch.autograd.grad(loss, [weight])
        log_prob = evaluation.log_prob.detach()
        kl = _weighted(approx_kl(log_prob, batch.log_prob), batch)
        clipped = clip_fraction(log_prob, batch.log_prob, clip=self._config.clip)
        clipped = _weighted(clipped, batch)
        columns = (*terms, kl, clipped, torch.ones_like(kl))
        figures = torch.stack([column.detach().sum() for column in columns])
        return _Sums(gradient, figures)

    def _step(
        self, progress: _Progress, x: tuple[_Sums, Tensor], constants: _Constants
    ) -> tuple[_Progress, Tensor]:
        """Clip, and step unless something forbids it; returns the figures and whether it did.

        ``mean_of_pass`` is what the last step of a pass multiplies its sum of KL with; before, 0.
        """
        sums, mean_of_pass = x
        config, samples = self._config, sums.figures[-1]
        gradient, figures = sums.gradient / samples, sums.figures[:-1] / samples
        norm = gradient.square().sum().sqrt()
        if config.max_grad_norm is not None:
            if config.max_grad_norm < _LARGEST_SQUARED:
                # The squares of a large gradient are infinite; clipped, it is one like any other.
                scaled = (gradient * _SCALE).square().sum().sqrt() / _SCALE
                norm = torch.where(norm.isfinite(), norm, scaled)
            gradient = gradient * (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        # A NaN or an infinity stops the rest of the update, too.
        finite = progress.finite & norm.isfinite() & figures[:3].isfinite().all()
        skip = progress.skip | ~finite
        adam = adam_step(
            progress.adam,
            gradient,
            learning_rate=constants.learning_rate,
            eps=config.adam_eps,
            skip=skip,
        )
        row = torch.cat([figures, norm[None], (~skip).float()[None]])
        kl = progress.kl + figures[3]
        if config.target_kl is not None:
            skip = skip | (kl * mean_of_pass > config.target_kl)
        return _Progress(adam, skip, finite, torch.where(mean_of_pass > 0, 0.0, kl)), row


class GradientFault(NamedTuple):
    """A minibatch at which training could not go on."""

    step: int  # number of the gradient step in the iteration
    names: list[str]  # of the loss terms and gradients that are not finite; may be none
    largest: float  # magnitude of the largest gradient
    largest_name: str
    minibatch: Samples


def find_fault(
    agent: Agent, weights: Weights, samples: Samples, config: PPOConfig, order: Sequence[Tensor]
) -> GradientFault:
    """Look again for the minibatch whose loss or gradient was not finite.

    The weights are those that it met: no step was applied from it on.

    Args:
        agent: The actor and critic of the update.
        weights: Weights after the update.
        samples: Samples of the update.
        config: PPO settings of the update.
        order: Samples of each gradient step.

    Returns:
        The first minibatch at which something is not finite. Where everything is, the one with the
        largest gradient: squares of it, or sums over ranks, may still be too large.
    """
    largest: GradientFault | None = None
    for number, index in enumerate(order):
        batch = take(samples, index)
        with torch.enable_grad():
            flat = weights.parameters.detach().requires_grad_()
            evaluation = agent.evaluate(weights._replace(parameters=flat), batch)
            terms = ppo_loss_terms(evaluation, batch, config)
            (gradient,) = torch.autograd.grad(total_loss(terms, config).sum(), [flat])
        # Sums, as the update has them: they may be infinite where no term is.
        watched = {f"loss/{name}": term.sum() for name, term in terms._asdict().items()}
        gradients = {f"gradient of {k}": v for k, v in agent.named(gradient).items()}
        bad = [name for name, value in (watched | gradients).items() if not value.isfinite().all()]
        peaks = {k: v.abs().max().item() / len(batch.log_prob) for k, v in gradients.items()}
        name = max(peaks, key=peaks.__getitem__)
        fault = GradientFault(number + 1, bad, peaks[name], name, batch)
        if bad:
            return fault
        if largest is None or fault.largest > largest.largest:
            largest = fault
    assert largest is not None
    return largest
