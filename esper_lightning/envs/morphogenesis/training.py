"""SGD over all hosts at once, each as if it were alone.

Axes: ``B`` environment, ``M`` image, ``N`` host of a chunk, ``S`` slot. Losses are summed over
hosts, so gradients do not mix. Short sums are written out, because the rounding of ``Tensor.sum``
depends on the number of hosts. Numbers that are not finite change nothing: parameters are updated
with ``where``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.envs.morphogenesis.host import Architecture
from esper_lightning.envs.morphogenesis.layout import unflatten
from esper_lightning.envs.morphogenesis.lifecycle import ATTACHED, JUDGED, LIVE, Slots, Stage, is_in
from esper_lightning.envs.morphogenesis.network import (
    Plan,
    Weights,
    plan_training,
    plan_validation,
    run,
)
from esper_lightning.envs.morphogenesis.population import Traits

__all__ = [
    "SGD",
    "Measured",
    "StaticUpdate",
    "Trained",
    "chunk_bounds",
    "measure",
    "static_update",
    "train",
]


@dataclass(frozen=True, kw_only=True)
class SGD:
    """``torch.optim.SGD`` with momentum and weight decay, after clipping by the norm.

    Attributes:
        learning_rate: Learning rate of hosts and seeds.
        momentum: Factor of the velocity.
        weight_decay: L2 penalty of every parameter.
        max_grad_norm: Greatest norm of the gradient of a host with its attached seeds, and of each
            isolated seed by itself.
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    max_grad_norm: float


class Trained(NamedTuple):
    """Results of an epoch of SGD."""

    finite: Bool[Tensor, " B"]  # whether all losses and gradients of the host were finite
    grad_norm: Float[Tensor, "B S"]  # of each seed in the last batch, before clipping


StaticUpdate = Callable[..., tuple[Tensor, Tensor]]
"""An update with a static plan: ``(weights, velocity, plan, batch, label, traits, attached,
isolated)``.

Weights and velocity are written in place. Returned are the results of ``_update``.
"""


class Measured(NamedTuple):
    """Measurements on the validation split."""

    loss: Float[Tensor, " B"]  # nats
    accuracy: Float[Tensor, " B"]
    contribution: Float[Tensor, "B S"]  # accuracy with the slot on less that with it off
    judged: Bool[Tensor, "B S"]  # whether the contribution has a meaning


def chunk_bounds(count: int, size: int) -> list[tuple[int, int]]:
    """Ranges of about ``size`` hosts; no range has one host alone unless there is only one host.

    The activations of a chunk stay in the cache. A convolution of one group would round
    differently.
    """
    chunks = max(1, min(-(-count // size), count // 2))
    edges = [count * i // chunks for i in range(chunks + 1)]
    return list(pairwise(edges))


def train(
    weights: Weights,
    velocity: Weights,
    slots: Slots,
    image: Float[Tensor, "I H W C"],
    index: Int[Tensor, "B U M"],
    label: Int[Tensor, "B U M"],
    traits: Traits | None,
    architecture: Architecture,
    sgd: SGD,
    *,
    enabled: tuple[str, ...],
    chunk: int,
    static: StaticUpdate | None,
) -> Trained:
    """One epoch of ``U`` updates on the images ``index``; writes into weights and velocity.

    Where there are ``traits``, the learning rate of a host is that of its kind.
    ``static`` is an update whose plan does not depend on the stages, which are then not read.
    """
    finite: list[Tensor] = []
    norms: list[Tensor] = []
    for low, high in chunk_bounds(index.shape[0], chunk):
        part = slice(low, high)
        mine = Slots(*(tensor[part] for tensor in slots))
        plan = plan_training(mine, enabled, static=static is not None)
        rows, speeds = _rows(weights, part), _rows(velocity, part)
        # Only live seeds are trained, where reading the stages costs nothing.
        attached, isolated = is_in(mine.stage, ATTACHED), mine.stage == Stage.TRAINING
        live = is_in(mine.stage, LIVE).unbind(1)
        chosen = None if static is not None else [column.nonzero().squeeze(1) for column in live]
        packed, packed_speeds = _pack(rows, chosen), _pack(speeds, chosen)
        ok = torch.ones(high - low, dtype=torch.bool, device=index.device)
        norm = torch.zeros_like(mine.alpha)
        own = None if traits is None else traits.rows(part)
        for picked, answer in zip(index[part].unbind(1), label[part].unbind(1), strict=True):
            batch = unflatten(image.index_select(0, picked.flatten()), 0, picked.shape)
            given = (plan, batch, answer, own)
            if static is not None:
                batch_finite, norm = static(packed, packed_speeds, *given, attached, isolated)
            else:
                batch_finite, norm = _update(
                    packed,
                    packed_speeds,
                    chosen,
                    *given,
                    architecture,
                    sgd,
                    attached=attached,
                    isolated=isolated,
                )
            ok = ok & batch_finite
        if chosen is not None:
            for whole, live_ones in ((rows, packed), (speeds, packed_speeds)):
                pairs = zip(whole.seeds, chosen, live_ones.seeds, strict=True)
                for target, index_of, seed in pairs:
                    target.index_copy_(0, index_of, seed)
        finite.append(ok)
        norms.append(norm)
    return Trained(torch.cat(finite), torch.cat(norms))


def static_update(architecture: Architecture, sgd: SGD) -> StaticUpdate:
    """An update of all hosts as a function of trees of tensors, which can be compiled.

    Args:
        architecture: Layers of the hosts.
        sgd: Settings of SGD.
    """

    def update(
        weights: Weights,
        velocity: Weights,
        plan: Plan,
        batch: Tensor,
        label: Tensor,
        traits: Traits | None,
        attached: Tensor,
        isolated: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return _update(
            weights,
            velocity,
            None,
            plan,
            batch,
            label,
            traits,
            architecture,
            sgd,
            attached=attached,
            isolated=isolated,
        )

    return update


def _update(
    weights: Weights,
    velocity: Weights,
    chosen: list[Tensor] | None,
    plan: Plan,
    batch: Tensor,
    label: Tensor,
    traits: Traits | None,
    architecture: Architecture,
    sgd: SGD,
    *,
    attached: Bool[Tensor, "N S"],
    isolated: Bool[Tensor, "N S"],
) -> tuple[Bool[Tensor, " N"], Float[Tensor, "N S"]]:
    """One SGD step of every host; return which hosts were finite, and gradient norms of seeds.

    The seeds of a slot are those of the hosts ``chosen``, or of all hosts if ``chosen`` is
    ``None``.
    """
    idle = [seed.shape[0] == 0 for seed in weights.seeds]
    with torch.enable_grad():
        leaf = weights._replace(
            host=weights.host.detach().requires_grad_(),
            seeds=tuple(seed.detach().requires_grad_() for seed in weights.seeds),
        )
        losses = run(leaf, architecture, batch, label, plan, training=True, traits=traits)
        loss = losses.trunk[0].mean(1)
        total = loss.sum()
        if losses.branches is not None:
            assert plan.branch_counts is not None
            total = total + losses.branches[0].mean(1).masked_fill(~plan.branch_counts, 0.0).sum()
        wanted = [leaf.host, *(s for s, skip in zip(leaf.seeds, idle, strict=True) if not skip)]
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    host_grad = next(found)
    grads = [None if skip else next(found) for skip in idle]
    squares = [host_grad.square().sum(1)]
    for s, grad in enumerate(grads):
        square = torch.zeros_like(loss) if grad is None else grad.square().sum(1)
        if grad is not None and chosen is not None:
            square = torch.zeros_like(loss).index_copy(0, chosen[s], square)
        squares.append(square)
    squares = torch.stack(squares, dim=1)  # [N, 1 + S]
    mine = squares[:, 1:].masked_fill(~attached, 0.0)
    joint = sum(mine.unbind(1), squares[:, 0]).sqrt()
    seed_norm = squares[:, 1:].sqrt()
    finite = loss.isfinite() & joint.isfinite()
    norm = torch.where(attached, joint.unsqueeze(1), seed_norm)
    sound = torch.where(attached, finite.unsqueeze(1), isolated & norm.isfinite())
    rate = sgd.learning_rate if traits is None else traits.learning_rate
    _descend(weights.host, velocity.host, host_grad, joint, finite, sgd, rate)
    for s, grad in enumerate(grads):
        if grad is not None:
            row, speed = weights.seeds[s], velocity.seeds[s]
            length, fine, pace = norm[:, s], sound[:, s], rate
            if chosen is not None:
                length, fine = length[chosen[s]], fine[chosen[s]]
                pace = rate[chosen[s]] if isinstance(rate, Tensor) else rate
            _descend(row, speed, grad, length, fine, sgd, pace)
    return finite, seed_norm.detach()


def _descend(
    row: Tensor,
    speed: Tensor,
    grad: Tensor,
    norm: Tensor,
    sound: Tensor,
    sgd: SGD,
    learning_rate: float | Tensor,
) -> None:
    """Clip, decay, apply momentum and step, in place and only where ``sound``."""
    factor = (sgd.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).unsqueeze(1)
    pull = torch.addcmul(row * sgd.weight_decay, grad, factor)
    faster = torch.where(sound.unsqueeze(1), torch.add(pull, speed, alpha=sgd.momentum), speed)
    speed.copy_(faster)
    step = faster.masked_fill_(~sound.unsqueeze(1), 0.0)
    if isinstance(learning_rate, Tensor):
        row.sub_(step * learning_rate.unsqueeze(1))
    else:
        row.sub_(step, alpha=learning_rate)


def measure(
    weights: Weights,
    slots: Slots,
    image: Float[Tensor, "I H W C"],
    label: Int[Tensor, " I"],
    traits: Traits | None,
    architecture: Architecture,
    *,
    enabled: tuple[str, ...],
    chunk: int,
    images_at_once: int,
    static: bool,
    switch: bool = True,
) -> Measured:
    """Loss and accuracy on given images and, with ``switch``, the contribution of each slot.

    Where there are ``traits``, the images of a host are those of its classes.
    """
    loss: list[Tensor] = []
    accuracy: list[Tensor] = []
    contribution: list[Tensor] = []
    for low, high in chunk_bounds(slots.stage.shape[0], chunk):
        part = slice(low, high)
        mine = Slots(*(tensor[part] for tensor in slots))
        plan = plan_validation(mine, enabled, static=static, switch=switch)
        rows = _rows(weights, part)
        own = None if traits is None else traits.rows(part)
        columns: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for start in range(0, image.shape[0], images_at_once):
            some = image[start : start + images_at_once]
            few = label[start : start + images_at_once]
            batch = some.expand(high - low, -1, -1, -1, -1)
            labels = few.expand(high - low, -1)
            losses = run(rows, architecture, batch, labels, plan, training=False, traits=own)
            other = None if losses.branches is None else losses.branches[1].sum(1)
            each = losses.trunk[0]
            if own is not None:  # no image of another class is classified right
                each = each.masked_fill(~own.class_mask[:, few], 0.0)
            columns.append((each.sum(1), losses.trunk[1].sum(1), other))
        count = image.shape[0]
        if own is not None:
            count = own.class_mask[:, label].sum(1)
        total, right = columns[0][0], columns[0][1]
        for column in columns[1:]:
            total, right = total + column[0], right + column[1]
        loss.append(total / count)
        accuracy.append(right / count)
        gained = _contribution(mine, plan, right, [c[2] for c in columns])
        contribution.append(gained / (count if isinstance(count, int) else count.unsqueeze(1)))
    judged = is_in(slots.stage, JUDGED)
    return Measured(torch.cat(loss), torch.cat(accuracy), torch.cat(contribution), judged)


def _contribution(
    slots: Slots, plan: Plan, right: Float[Tensor, " N"], others: list[Tensor | None]
) -> Float[Tensor, "N S"]:
    """Number of images classified right with a slot on, less the number with the slot off."""
    gained = torch.zeros_like(slots.alpha)
    if plan.branch_host is None:
        return gained
    assert plan.branch_slot is not None
    host, slot = plan.branch_host, plan.branch_slot
    switched = torch.stack([other for other in others if other is not None]).sum(0)
    difference = right[host] - switched
    isolated = (slots.stage == Stage.TRAINING)[host, slot]
    signed = torch.where(isolated, -difference, difference)
    # A branch that is computed twice has the same result twice.
    return gained.index_put((host, slot), signed)


def _rows(weights: Weights, part: slice) -> Weights:
    """Views of some hosts."""
    return Weights(
        weights.host[part],
        tuple(seed[part] for seed in weights.seeds),
        tuple(mean[part] for mean in weights.means),
        tuple(variance[part] for variance in weights.variances),
    )


def _pack(weights: Weights, chosen: list[Tensor] | None) -> Weights:
    """Copies of the seeds of the hosts ``chosen``; all other tensors are not copied."""
    if chosen is None:
        return weights
    pairs = zip(weights.seeds, chosen, strict=True)
    return weights._replace(seeds=tuple(seed.index_select(0, index) for seed, index in pairs))
