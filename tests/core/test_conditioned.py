"""Factored choices whose first choice gives the others their meaning, against joint actions."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_lightning.core.distributions import ConditionedCategorical, has_choice
from esper_lightning.core.spaces import (
    ActionSpace,
    Discrete,
    FactoredDiscrete,
    Head,
    MultiDiscrete,
    mask_size,
)

ROWS = 5
SPACES = {
    "growth": FactoredDiscrete(
        (
            Head("op", 4),
            Head("slot", 3, used_by=(1, 2), conditioned=True),
            Head("blueprint", 2, used_by=(1,)),
            Head("speed", 2, used_by=(3, 1)),
        )
    ),
    "used by all": FactoredDiscrete((Head("op", 2), Head("a", 2, conditioned=True), Head("b", 3))),
    "used by none": FactoredDiscrete((Head("op", 2), Head("a", 2, used_by=()))),
    "one head": FactoredDiscrete((Head("op", 3),)),
}
each_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
seeds = st.integers(0, 10_000)
Action = tuple[int, ...]


def drawn(space: FactoredDiscrete, seed: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Logits, and masks of which each piece allows a choice."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(rows, mask_size(space), generator=generator)
    parts = []
    for size in space.mask_parts:
        part = torch.rand(rows, size, generator=generator) < 0.4
        part[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] = True
        parts.append(part)
    return logits, torch.cat(parts, -1)


def meanings(space: FactoredDiscrete, mask: Tensor) -> Iterator[tuple[Action, list[int], list]]:
    """Every action that differs from the others in what it means, of one row of masks.

    With it, where in the logits its choices are, and which choices there were.
    """
    for action in itertools.product(*(range(n) for n in space.nvec)):
        index, among = [], []
        for head, place, choice in zip(space.heads, space.mask_slices, action, strict=True):
            if head.used_by is not None and action[0] not in head.used_by:
                if choice:
                    break  # the same action as with 0
                continue
            start = place.start + (action[0] * head.size if head.conditioned else 0)
            index.append(start + choice)
            among.append([k for k in range(start, start + head.size) if mask[k]])
        else:
            if all(mask[k] for k in index):
                yield action, index, among


def enumerated(space: FactoredDiscrete, logits: Tensor, mask: Tensor) -> dict[Action, Tensor]:
    """Log-probabilities of the given actions under one row of logits."""
    return {
        action: sum(
            logits[k] - logits[choices].logsumexp(0)
            for k, choices in zip(index, among, strict=True)
        )
        for action, index, among in meanings(space, mask)
    }


@each_space
@pytest.mark.parametrize("masked", [True, False])
@given(seed=seeds)
def test_a_conditioned_categorical_is_the_distribution_over_all_joint_actions(
    space, masked, seed
) -> None:
    logits, mask = drawn(space, seed)
    logits = logits.double()
    ours = ConditionedCategorical(logits, space, mask if masked else None)
    mask = mask if masked else torch.ones_like(mask)
    entropy, mode = ours.entropy(), ours.mode()
    for row in range(ROWS):
        every = enumerated(space, logits[row], mask[row])
        log_p = torch.stack(list(every.values()))
        assert log_p.exp().sum().item() == pytest.approx(1.0)
        expected = -(log_p.exp() * log_p).sum().float()
        torch.testing.assert_close(entropy[row], expected, rtol=1e-5, atol=1e-5)
        assert bool(has_choice(space, mask)[row]) == (len(every) > 1)
        for action, log_prob in every.items():
            same = torch.tensor(action).expand(ROWS, -1)
            got = ours.log_prob(same)[row]
            torch.testing.assert_close(got, log_prob.float(), rtol=1e-5, atol=1e-5)
        first = [a for a in every if a[0] == mode[row, 0]]
        assert torch.exp(ours.log_prob(mode)[row]) * len(first) > 0.99 * sum(
            every[a].exp() for a in first
        )


@each_space
@given(seed=seeds)
def test_no_gradient_flows_to_forbidden_or_unused_choices(space, seed) -> None:
    logits, mask = drawn(space, seed)
    noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(seed))

    def results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.clone().requires_grad_()
        ours = ConditionedCategorical(logits, space, mask)
        action = ours.sample(noise)
        by_log_prob = torch.autograd.grad(ours.log_prob(action).sum(), logits, retain_graph=True)
        by_entropy = torch.autograd.grad(ours.entropy().sum(), logits)
        return action, by_log_prob[0], by_entropy[0]

    action, by_log_prob, by_entropy = results(logits)
    for row in range(ROWS):
        possible, used = set(), set()
        for other, _, among in meanings(space, mask[row]):
            possible |= {k for choices in among for k in choices}
            if other[0] == action[row, 0]:
                used |= {k for choices in among for k in choices}
        for gradient, allowed in ((by_log_prob, used), (by_entropy, possible)):
            others = [k for k in range(len(mask[row])) if k not in allowed]
            assert (gradient[row, others] == 0.0).all()
        assert (by_entropy[row].abs().sum() > 0) == bool(has_choice(space, mask)[row])
    forbidden = ~mask
    for head, place in zip(space.heads, space.mask_slices, strict=True):
        if head.conditioned:  # given a value that is forbidden itself
            impossible = forbidden[:, space.mask_slices[0]].repeat_interleave(head.size, 1)
            forbidden[:, place] |= impossible
    changed = logits.masked_fill(forbidden, torch.nan)
    for got, expected in zip(results(changed), (action, by_log_prob, by_entropy), strict=True):
        assert torch.equal(got, expected)


@each_space
def test_actions_are_sampled_as_often_as_their_probabilities_say(space) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, mask = drawn(space, 3, rows=1)
    rows = 40_000
    noise = torch.empty(rows, mask_size(space)).exponential_(generator=generator)
    ours = ConditionedCategorical(logits.expand(rows, -1), space, mask.expand(rows, -1))
    sampled = ours.sample(noise)
    for a, head in enumerate(space.heads):
        if head.used_by is not None:
            used = torch.stack([sampled[:, 0] == v for v in head.used_by] or [sampled[:, 0] < 0])
            sampled[:, a] *= used.any(0)
    every = enumerated(space, logits[0], mask[0])
    found, counts = sampled.unique(dim=0, return_counts=True)
    assert {tuple(action) for action in found.tolist()} <= set(every)
    for action, count in zip(found.tolist(), counts.tolist(), strict=True):
        p = every[tuple(action)].exp().item()
        assert abs(count - rows * p) < 4.5 * (rows * p * (1 - p)) ** 0.5 + 1e-6, action


@pytest.mark.parametrize(
    ("space", "mask", "expected"),
    [
        (Discrete(3), [0, 1, 0], False),
        (Discrete(3), [0, 1, 1], True),
        (MultiDiscrete((2, 2)), [1, 0, 0, 1], False),
        (MultiDiscrete((2, 2)), [1, 0, 1, 1], True),
        # Waiting uses nothing; growing has a slot to choose.
        (SPACES["growth"], [1, 0, 0, 0] + [1] * 16, False),
        (SPACES["growth"], [0, 1, 0, 0] + [1, 0, 0] * 4 + [1, 0, 1, 0], False),
        (
            SPACES["growth"],
            [0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 0],
            True,
        ),
        (SPACES["growth"], [0, 1, 0, 0] + [1, 0, 0] * 4 + [1, 1, 1, 0], True),
    ],
)
def test_a_mask_with_more_than_one_action_has_a_choice(
    space: ActionSpace, mask: list[int], expected: bool
) -> None:
    assert has_choice(space, torch.tensor([mask]) == 1).tolist() == [expected]
