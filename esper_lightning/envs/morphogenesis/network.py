"""Hosts with their seeds, run as they are (the trunk) and with a slot switched (the branches).

Axes: ``M`` image, ``N`` host, ``S`` slot, ``E`` branch. A branch is a host with one of its slots
switched: off where the seed is attached, on where the seed trains in isolation. A branch leaves the
trunk at that slot, so the layers before the slot are computed once.

A plan, made from the stages alone, says which hosts run which computation. On a CPU the plan reads
the stages and names the hosts of each computation. Where reading would wait for the device, the
plan is static: every computation runs for every host, and gates switch results off.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float, Int
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS, FAMILIES, residual
from esper_lightning.envs.morphogenesis.host import (
    BATCH_NORM_MOMENTUM,
    Architecture,
    image_loss,
    run_block,
)
from esper_lightning.envs.morphogenesis.layout import split_rows
from esper_lightning.envs.morphogenesis.lifecycle import ATTACHED, JUDGED, LIVE, Slots, Stage, is_in
from esper_lightning.envs.morphogenesis.population import Traits

__all__ = ["Losses", "Plan", "Weights", "plan_training", "plan_validation", "run"]


class Weights(NamedTuple):
    """Parameters and running statistics of ``N`` hosts."""

    host: Tensor  # [N, P]
    seeds: tuple[Tensor, ...]  # of each slot [N, P of the slot]
    means: tuple[Tensor, ...]  # of each block [N, C]
    variances: tuple[Tensor, ...]


class _Bucket(NamedTuple):
    """Seeds of one family in one slot."""

    family: str
    names: tuple[str, ...]  # blueprints of the seeds
    kind: Tensor | tuple[int, ...]  # [n], or the number of seeds of each name, in order
    gate: Tensor  # [n]


class _Seeds(NamedTuple):
    """Seeds of one slot, one bucket after another."""

    position: Tensor | None  # [n] hosts of the seeds; None: every bucket for every host
    row: Tensor  # [n] rows of the parameters
    learns: Tensor | None  # [n] bool: whether the parameters get gradients; None: all
    buckets: list[_Bucket]


class _Level(NamedTuple):
    """Computations of one slot."""

    joins: Tensor | None  # [j] hosts of the branches that begin here
    seeds: _Seeds | None


class Plan(NamedTuple):
    """Which hosts run which computation; branches come after hosts, in order of their slots."""

    levels: list[_Level]
    branch_host: Tensor | None  # [E]
    branch_slot: Tensor | None  # [E]
    branch_counts: Tensor | None  # [E] bool: False for branches whose results are not used


class Losses(NamedTuple):
    """Loss of each image in nats, and 1 where the image is classified right, else 0."""

    trunk: tuple[Tensor, Tensor]  # [N, M]
    branches: tuple[Tensor, Tensor] | None  # [E, M]


def plan_training(slots: Slots, enabled: tuple[str, ...], *, static: bool) -> Plan:
    """The plan of a training batch; branches have a slot that trains in isolation switched on.

    Unless ``static``, the seeds of a slot are those of the hosts in which they are live.
    """
    training = slots.stage == Stage.TRAINING
    if not static:
        return _plan(slots, training, packed=True)
    # One branch for each host, from the first slot on; unused where no seed of the host trains.
    hosts = torch.arange(training.shape[0], device=training.device)
    first = torch.zeros_like(hosts)
    gate = torch.where(training, 1.0, _trunk_gate(slots))
    return _plan_static(slots, enabled, hosts, first, gate, training, training.any(1))


def plan_validation(
    slots: Slots, enabled: tuple[str, ...], *, static: bool, switch: bool = True
) -> Plan:
    """The plan of a validation; with ``switch``, a branch for each slot to be judged."""
    judged = is_in(slots.stage, JUDGED) & switch
    if not static:
        return _plan(slots, judged, packed=False)
    hosts, count = judged.shape
    host = torch.arange(hosts, device=judged.device).repeat(count)
    slot = torch.arange(count, device=judged.device).repeat_interleave(hosts)
    gate = _switched(slots, host, slot)
    learns = torch.zeros_like(gate, dtype=torch.bool)
    return _plan_static(slots, enabled, host, slot, gate, learns, judged.T.flatten())


def run(
    weights: Weights,
    architecture: Architecture,
    image: Float[Tensor, "N M H W C"],
    label: Int[Tensor, "N M"],
    plan: Plan,
    *,
    training: bool,
    traits: Traits | None = None,
) -> Losses:
    """Losses of the trunk and of the branches.

    ``traits`` limits the classes and the channels of each host; without it, hosts have all.

    In training, batch norm uses the batch and the trunk updates the running statistics in place;
    gradients of a branch reach the seed that trains in it and nothing else.
    """
    hosts, branch = image.shape[0], plan.branch_host
    rows = weights.host
    if traits is not None and branch is not None:
        traits = Traits(*(torch.cat((t, t.index_select(0, branch))) for t in traits))
    if branch is not None:
        rows = torch.cat((rows, rows.detach().index_select(0, branch)))
    blocks, head, bias = architecture.unpack(rows)
    h = image
    for s, (level, block, seeds, *running) in enumerate(
        zip(plan.levels, blocks, weights.seeds, weights.means, weights.variances, strict=True)
    ):
        count = h.shape[0]
        if training:
            h, found = run_block(h, block.first(count), None)
            assert found is not None
            for target, value in zip(running, found, strict=True):
                target.lerp_(value[:hosts], BATCH_NORM_MOMENTUM)
        else:
            mean, variance = running
            if branch is not None and count > hosts:
                some = branch[: count - hosts]
                mean, variance = (torch.cat((t, t.index_select(0, some))) for t in running)
            h, _ = run_block(h, block.first(count), (mean, variance))
        if traits is not None:
            channel = torch.arange(h.shape[4], device=h.device)
            used = channel < traits.channels_used[:count, s].unsqueeze(1)
            h = torch.where(used[:, None, None, None], h, 0.0)
        if level.joins is not None:
            h = torch.cat((h, h.detach().index_select(0, level.joins)))
        if level.seeds is not None:
            h = _grow(h, seeds, level.seeds)
    class_mask = None if traits is None else traits.class_mask
    if branch is None:
        return Losses(image_loss(h, head, bias, label, class_mask), None)
    label = torch.cat((label, label.index_select(0, branch)))
    loss, right = image_loss(h, head, bias, label, class_mask)
    return Losses((loss[:hosts], right[:hosts]), (loss[hosts:], right[hosts:]))


def _grow(h: Tensor, parameters: Tensor, seeds: _Seeds) -> Tensor:
    """The activations after the seeds of a slot are added."""
    row = parameters.index_select(0, seeds.row)
    if seeds.learns is not None:
        row = torch.where(seeds.learns.unsqueeze(1), row, row.detach())
    if seeds.position is None:
        grown = h
        for family, names, kind, gate in seeds.buckets:
            # A seed that is not in the network must not affect it, also not as 0 * inf.
            mine = torch.where((gate != 0).unsqueeze(1), row, 0.0)
            grown = grown + residual(family, names, h, mine, kind, gate)
        return grown
    sizes = [bucket.gate.shape[0] for bucket in seeds.buckets]
    pieces = zip(
        seeds.buckets,
        split_rows(h.index_select(0, seeds.position), sizes),
        split_rows(row, sizes),
        strict=True,
    )
    found = [
        residual(bucket.family, bucket.names, where, mine, bucket.kind, bucket.gate)
        for bucket, where, mine in pieces
    ]
    return h.index_add(0, seeds.position, torch.cat(found))


def _trunk_gate(slots: Slots) -> Float[Tensor, "N S"]:
    return slots.alpha.masked_fill(~is_in(slots.stage, ATTACHED), 0.0)


def _switched(
    slots: Slots, host: Int[Tensor, " E"], slot: Int[Tensor, " E"]
) -> Float[Tensor, "E S"]:
    """Gates of branches: those of the trunk, except for the switched slot."""
    gate = _trunk_gate(slots)[host]
    on = (slots.stage == Stage.TRAINING)[host].to(gate.dtype)
    chosen = torch.arange(gate.shape[1], device=gate.device) == slot.unsqueeze(1)
    return torch.where(chosen, on, gate)


def _plan(slots: Slots, switched: Bool[Tensor, "N S"], *, packed: bool) -> Plan:
    """A plan that names the hosts of each computation, from stages that can be read.

    With ``packed``, the parameters of a slot are those of live seeds alone.
    """
    hosts, count = switched.shape
    everyone = torch.arange(hosts)
    # By slot, then host.
    slot, branch = switched.T.nonzero(as_tuple=True)
    gate = torch.cat((_trunk_gate(slots), _switched(slots, branch, slot)))
    isolated = (slots.stage == Stage.TRAINING)[branch] & (torch.arange(count) == slot.unsqueeze(1))
    learns = torch.cat((torch.ones(hosts, count, dtype=torch.bool), isolated))
    host = torch.cat((everyone, branch))
    live = is_in(slots.stage, LIVE)
    levels: list[_Level] = []
    for s in range(count):
        joins = branch[slot == s]
        row = live[:, s].cumsum(0) - 1 if packed else everyone
        so_far = hosts + int((slot <= s).sum())
        found = host[:so_far]
        levels.append(
            _Level(
                joins if len(joins) else None,
                _seeds(
                    row[found],
                    slots.blueprint[found, s],
                    gate[:so_far, s],
                    learns[:so_far, s],
                    twice=hosts > 1,
                ),
            )
        )
    if not len(branch):
        return Plan(levels, None, None, None)
    return Plan(levels, branch, slot, torch.ones_like(branch, dtype=torch.bool))


def _seeds(
    row: Tensor, kind: Tensor, gate: Tensor, learns: Tensor, *, twice: bool
) -> _Seeds | None:
    """The seeds that are in the network; with ``twice``, a lone seed of a family runs twice."""
    active = gate != 0
    present = set(cast(list[int], kind[active].tolist()))
    buckets: list[_Bucket] = []
    positions: list[Tensor] = []
    for family, members in FAMILIES.items():
        names = tuple(name for name in members if BLUEPRINTS.index(name) in present)
        if not names:
            continue
        mine = [(active & (kind == BLUEPRINTS.index(name))).nonzero().squeeze(1) for name in names]
        position = torch.cat(mine)
        counts, factor = tuple(len(some) for some in mine), gate[position]
        if twice and len(position) == 1:
            # A convolution of one group takes another path, which rounds differently.
            position, counts = position.repeat(2), (2,)
            factor = torch.cat((factor, torch.zeros_like(factor)))
        positions.append(position)
        buckets.append(_Bucket(family, names, counts, factor))
    if not buckets:
        return None
    position = torch.cat(positions)
    learning = learns[position]
    return _Seeds(position, row[position], None if bool(learning.all()) else learning, buckets)


def _plan_static(
    slots: Slots,
    enabled: tuple[str, ...],
    branch: Tensor,
    slot: Tensor,
    gate: Tensor,
    learns: Tensor,
    counts: Tensor,
) -> Plan:
    """A plan of the same work whatever the stages are: every family for every host."""
    hosts, count = slots.stage.shape
    everyone = torch.arange(hosts, device=branch.device)
    host = torch.cat((everyone, branch))
    gate = torch.cat((_trunk_gate(slots), gate))
    learns = torch.cat((torch.ones_like(learns[:hosts]), learns))
    begin = slot.shape[0] // hosts  # branches of a host: one, or one for each slot
    levels: list[_Level] = []
    for s in range(count):
        so_far = hosts + min(s + 1, begin) * hosts
        found = host[:so_far]
        kind = slots.blueprint[:, s].index_select(0, found)
        buckets: list[_Bucket] = []
        for family, members in FAMILIES.items():
            names = tuple(name for name in members if name in enabled)
            if names:
                factor = gate[:so_far, s].masked_fill(~_is_one_of(kind, names), 0.0)
                buckets.append(_Bucket(family, names, kind, factor))
        seeds = _Seeds(None, found, learns[:so_far, s], buckets)
        levels.append(_Level(everyone if s < begin else None, seeds))
    return Plan(levels, branch, slot, counts)


def _is_one_of(kind: Tensor, names: tuple[str, ...]) -> Tensor:
    found = kind == BLUEPRINTS.index(names[0])
    for name in names[1:]:
        found = found | (kind == BLUEPRINTS.index(name))
    return found
