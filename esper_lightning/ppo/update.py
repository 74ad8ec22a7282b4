"""The update: epochs of minibatch steps.

Axes: ``M`` sample, ``S`` gradient step, ``P`` weight.

Nothing here synchronises with the host: a step that must not be applied is skipped on the device.
This file knows nothing of Lightning.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esper_lightning.compiling.loops import CompileMode, compile_loop
from esper_lightning.core.diagnostics import approx_kl, clip_fraction
from esper_lightning.core.flat_adam import AdamState, adam_step
from esper_lightning.core.minibatches import take
from esper_lightning.core.ranks import SINGLE_RANK, Ranks
from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild
from esper_lightning.core.types import Samples
from esper_lightning.ppo.agent import Agent, Weights
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.objective import ppo_loss_terms, total_loss, weighted

__all__ = ["UpdateMetrics", "Updater"]


_SCALE = 2.0**-80  # of gradients whose squares would be infinite: float32 ends at 2**128
_LARGEST_SQUARED = 1e18  # a number whose square, and the sum of many such, is finite in float32


class OwnMetrics(NamedTuple):
    """PPO's own metrics of samples: sums or means over them; ``[S]`` where steps are stacked."""

    policy_loss: Float[Tensor, "*S"]
    value_loss: Float[Tensor, "*S"]
    entropy: Float[Tensor, "*S"]
    approx_kl: Float[Tensor, "*S"]
    clip_fraction: Float[Tensor, "*S"]


class UpdateMetrics(NamedTuple):
    """Means over the applied gradient steps of one iteration; scalars on the device."""

    own: OwnMetrics
    grad_norm: Float[Tensor, ""]  # before clipping
    gradient_steps: Float[Tensor, ""]  # how many were applied
    finite: Float[Tensor, ""]  # 1 where every gradient was, else 0
    added: dict[str, Float[Tensor, ""]]  # terms of extensions


class _Progress(NamedTuple):
    """State that one gradient step passes to the next step."""

    adam: AdamState
    skip: Bool[Tensor, ""]  # steps are skipped from here on
    finite: Bool[Tensor, ""]  # every gradient was, so far
    kl: Float[Tensor, ""]  # sum over the steps of this pass


class GradientSums(NamedTuple):
    """Sums over the samples of a minibatch, or of a chunk of it."""

    gradient: Float[Tensor, " P"]
    own: OwnMetrics
    samples: Float[Tensor, ""]  # how many
    added: dict[str, Float[Tensor, ""]]  # terms of extensions


class _StepMetrics(NamedTuple):
    """Means over the samples of one gradient step; ``[S]`` where all steps are stacked."""

    own: OwnMetrics
    grad_norm: Float[Tensor, "*S"]
    applied: Float[Tensor, "*S"]  # 1 where the step was applied, else 0
    added: dict[str, Float[Tensor, "*S"]]  # terms of extensions


class _Constants(NamedTuple):
    """Inputs that all gradient steps of an update share."""

    samples: Samples
    buffers: dict[str, Tensor]
    learning_rate: Float[Tensor, ""]


class Updater:
    """The update of an iteration: ``epochs`` passes of ``minibatches`` gradient steps each.

    Args:
        agent: Agent whose loss is minimised.
        config: PPO settings.
        mode: Compile mode of the passes.
        device: Device of agent and samples.
        ranks: All ranks of the run, over which gradients and metrics are averaged.
    """

    def __init__(
        self,
        agent: Agent,
        config: PPOConfig,
        *,
        mode: CompileMode,
        device: torch.device,
        ranks: Ranks = SINGLE_RANK,
    ) -> None:
        self._agent, self._config, self._device = agent, config, device
        self._mean_of_pass: Tensor | None = None
        gradient_sums, around = self._sum, mode
        if ranks.size > 1:
            mine = compile_loop("gradient", _sums_alone, self._sum, mode=mode, device=device)
            self._gradient = mine  # among the stages of a learner

            def gradient_sums(
                progress: _Progress, index: Tensor, constants: _Constants
            ) -> GradientSums:
                first = torch.zeros(1, device=device)  # of one step; it is not used
                _, sums = mine(progress, first, index[None], constants, None)
                return ranks.sum(map_tree(lambda total: total[0], sums))

            around = "off"  # compiled steps of two ranks might differ in a rounding
        self._loop = compile_loop("update", self._step, gradient_sums, mode=around, device=device)

    def order(self, units: int, generator: torch.Generator) -> Sequence[Tensor]:
        """Random minibatches for all gradient steps, shuffled anew for each pass.

        Args:
            units: Number of units to shuffle: ``Samples.units``.
            generator: Source of the order, on the device.

        Returns:
            Indices of the units of each gradient step: ``[S, M]``, or a list of minibatches whose
            sizes differ by one where equal sizes are not possible.
        """
        # The last rollout of a budget may have fewer units than there are to be minibatches.
        minibatches = min(self._config.minibatches, units)
        orders = [
            torch.randperm(units, generator=generator, device=self._device)
            for _ in range(self._config.epochs)
        ]
        if units % minibatches == 0:
            return torch.stack(orders).view(-1, units // minibatches)  # pyright: ignore[reportReturnType]
        return [minibatch for order in orders for minibatch in order.tensor_split(minibatches)]

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
        """Take every gradient step of an iteration.

        Args:
            adam: Weights and moments before the update, which may be changed in place.
            weights: Weights of the agent, of which the update uses the buffers.
            samples: Samples from ``prepare_samples``.
            order: Minibatches from ``order``.
            learning_rate: Learning rate of all steps.
            healthy: Whether the rollout is sound on every rank. If not, no step is applied, and
                weights and moments stay as they are.

        Returns:
            Weights and moments after the update, and its metrics.
        """
        mean_of_pass = self._mean_of_pass
        if mean_of_pass is None or len(mean_of_pass) != len(order):
            minibatches = len(order) // self._config.epochs
            steps = torch.arange(1, len(order) + 1, device=self._device)
            self._mean_of_pass = mean_of_pass = (steps % minibatches == 0).float() / minibatches
        start = _Progress(adam, ~healthy, healthy | True, torch.zeros_like(learning_rate))
        constants = _Constants(samples, weights.buffers, learning_rate)
        end, steps = self._loop(start, mean_of_pass, order, constants, None)
        return end.adam, _mean_over_applied(steps, finite=end.finite)

    def _sum(
        self, progress: _Progress, index: Int[Tensor, " M"], constants: _Constants
    ) -> GradientSums:
        """Sums of gradient and metrics over a minibatch, or over a chunk of it.

        Args:
            progress: State before the step.
            index: Indices of the samples.
            constants: Inputs that all steps share.
        """
        agent, batch = self._agent, take(constants.samples, index)
        with torch.enable_grad():
            weight = progress.adam.weight.detach().requires_grad_()
            weights = Weights(weight, constants.buffers)
            evaluation, added = agent.with_weights(weights, agent.evaluate_minibatch, batch)
            terms = ppo_loss_terms(evaluation, batch, self._config)
            loss = total_loss(terms, added, self._config).sum()
            (gradient,) = torch.autograd.grad(loss, [weight])
        log_prob = evaluation.log_prob.detach()
        kl = weighted(approx_kl(log_prob, batch.log_prob), batch)
        clipped = clip_fraction(log_prob, batch.log_prob, clip=self._config.clip)
        own = OwnMetrics(
            policy_loss=terms.policy.detach().sum(),
            value_loss=terms.value.detach().sum(),
            entropy=terms.entropy.detach().sum(),
            approx_kl=kl.sum(),
            clip_fraction=weighted(clipped, batch).sum(),
        )
        samples = torch.ones_like(kl).sum()
        added = {name: term.detach().sum() for name, term in added.items()}
        return GradientSums(gradient, own, samples, added)

    def _step(
        self, progress: _Progress, x: tuple[GradientSums, Tensor], constants: _Constants
    ) -> tuple[_Progress, _StepMetrics]:
        """Clip the gradient, and apply the step unless it must be skipped.

        Args:
            progress: State before the step.
            x: The sums over the minibatch, and a factor that turns the sum of KL divergences over a
                pass into their mean. The factor is 0 for every step but the last of a pass.
            constants: Inputs that all steps share.
        """
        sums, mean_of_pass = x
        config = self._config
        gradient = sums.gradient / sums.samples
        own, added = map_tree(lambda total: total / sums.samples, (sums.own, sums.added))
        norm = gradient.square().sum().sqrt()
        if config.max_grad_norm is not None:
            if config.max_grad_norm < _LARGEST_SQUARED:
                # The squares of a large gradient are infinite; clipped, it is one like any other.
                scaled = (gradient * _SCALE).square().sum().sqrt() / _SCALE
                norm = torch.where(norm.isfinite(), norm, scaled)
            gradient = gradient * (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        # A NaN or an infinity stops the rest of the update, too.
        finite = progress.finite & norm.isfinite()
        for term in (own.policy_loss, own.value_loss, own.entropy, *added.values()):
            finite = finite & term.isfinite()
        skip = progress.skip | ~finite
        adam = adam_step(
            progress.adam,
            gradient,
            learning_rate=constants.learning_rate,
            eps=config.adam_eps,
            skip=skip,
        )
        step = _StepMetrics(own, norm, (~skip).float(), added)
        kl_of_pass = progress.kl + own.approx_kl
        if config.target_kl is not None:
            skip = skip | (kl_of_pass * mean_of_pass > config.target_kl)
        kl_of_pass = torch.where(mean_of_pass > 0, 0.0, kl_of_pass)
        return _Progress(adam, skip, finite, kl_of_pass), step


def _sums_alone(
    progress: _Progress, x: tuple[GradientSums, Tensor], constants: _Constants
) -> tuple[_Progress, GradientSums]:
    """A step that is the sums over the minibatch, and no more."""
    del constants
    return progress, x[0]


def _mean_over_applied(steps: _StepMetrics, *, finite: Bool[Tensor, ""]) -> UpdateMetrics:
    """Mean of each metric over the gradient steps that were applied."""
    averaged = (steps.own, steps.grad_norm, steps.added)
    metrics = torch.stack(leaves(averaged), dim=1)
    # Where, not a product with the weight: a step that was skipped may hold NaN.
    total = torch.where(steps.applied[:, None] > 0, metrics, 0.0).sum(0)
    count = steps.applied.sum()
    own, grad_norm, added = rebuild(averaged, list((total / count).unbind()))
    return UpdateMetrics(
        own=own, grad_norm=grad_norm, gradient_steps=count, finite=finite.float(), added=added
    )
