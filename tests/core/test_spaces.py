"""Spaces that no environment can have are refused with the reason."""

import math
import re

import pytest

from esper_lightning.core.spaces import (
    Box,
    Discrete,
    EnvSpaces,
    FactoredDiscrete,
    Head,
    MultiDiscrete,
    mask_size,
)

OP = Head("op", 3)


def test_a_box_has_a_bound_for_each_component() -> None:
    box = Box((2, 3), low=-1.0, high=2.0)
    assert (box.size, box.lows, box.highs) == (6, (-1.0,) * 6, (2.0,) * 6)
    each = Box((2,), low=(-1.0, 0.0), high=5.0)
    assert (each.lows, each.highs) == ((-1.0, 0.0), (5.0, 5.0))
    assert Box(()).size == 1


@pytest.mark.parametrize(
    ("box", "bounded"),
    [
        (Box((2,)), False),
        (Box((2,), low=0.0), False),
        (Box((2,), low=-1.0, high=1.0), True),
        (Box((2,), low=(-1.0, -math.inf), high=1.0), False),
    ],
)
def test_a_box_is_bounded_if_every_bound_is_finite(box: Box, bounded: bool) -> None:
    assert box.bounded is bounded


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box((0,)), "Box.shape must have at least one component, got (0,)."),
        (
            lambda: Box((3,), low=(0.0, 0.0)),
            "Box.low must be a number or a tuple of 3 for a flat shape, got (0.0, 0.0).",
        ),
        (
            lambda: Box((2, 2), high=(1.0,) * 4),
            "Box.high must be a number or a tuple of 4 for a flat shape, got (1.0, 1.0, 1.0, 1.0).",
        ),
        (lambda: Box((1,), low=1.0, high=1.0), "Box.low must be less than Box.high=1.0, got 1.0."),
        (
            lambda: Box((2,), low=(0.0, math.nan), high=1.0),
            "Box.low must be less than Box.high=1.0, got (0.0, nan).",
        ),
        (lambda: Discrete(0), "Discrete.n must be at least 1, got 0."),
        (
            lambda: MultiDiscrete(()),
            "MultiDiscrete.nvec must be a non-empty tuple of sizes of at least 1, got ().",
        ),
        (
            lambda: MultiDiscrete((2, 0)),
            "MultiDiscrete.nvec must be a non-empty tuple of sizes of at least 1, got (2, 0).",
        ),
        (lambda: Head("op", 0), "Head.size must be at least 1, got 0."),
        (lambda: FactoredDiscrete(()), "FactoredDiscrete.heads must not be empty, got ()."),
        (
            lambda: FactoredDiscrete((OP, Head("slot", 2), Head("op", 4))),
            "FactoredDiscrete.heads must have different names, got ['op', 'slot', 'op'].",
        ),
        (
            lambda: FactoredDiscrete((Head("op", 3, used_by=(0,)),)),
            "FactoredDiscrete.heads must begin with one that is always used and not conditioned, "
            "got Head(name='op', size=3, used_by=(0,), conditioned=False).",
        ),
        (
            lambda: FactoredDiscrete((Head("op", 3, conditioned=True), Head("slot", 2))),
            "FactoredDiscrete.heads must begin with one that is always used and not conditioned, "
            "got Head(name='op', size=3, used_by=None, conditioned=True).",
        ),
        (
            lambda: FactoredDiscrete((OP, Head("slot", 2), Head("ramp", 2, used_by=(1, 3)))),
            "Head.used_by of 'ramp' must lie in [0, 3), got (1, 3).",
        ),
        (
            lambda: FactoredDiscrete((OP, Head("slot", 2, used_by=(-1,)))),
            "Head.used_by of 'slot' must lie in [0, 3), got (-1,).",
        ),
        (
            lambda: EnvSpaces(obs=Box((1,)), action=Box((1,)), masked=True),
            "EnvSpaces.masked must be False for a continuous action space, got True.",
        ),
        (
            lambda: EnvSpaces(obs={}, action=Discrete(2)),
            "EnvSpaces.obs must have groups, named like Python identifiers, got [].",
        ),
        (
            lambda: mask_size(Box((2,))),
            "mask_size must be asked of a discrete space, got Box(shape=(2,), low=-inf, high=inf, "
            "dtype='float32').",
        ),
    ],
)
def test_an_impossible_space_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_a_mask_holds_the_choices_of_all_components() -> None:
    assert mask_size(Discrete(5)) == 5
    assert mask_size(MultiDiscrete((2, 3, 4))) == 9


def test_factored_choices_have_a_mask_for_every_value_they_are_conditioned_on() -> None:
    heads = (OP, Head("slot", 2, used_by=(1, 2), conditioned=True), Head("ramp", 4, used_by=(2,)))
    space = FactoredDiscrete(heads)
    assert space.nvec == (3, 2, 4)
    assert space.mask_parts == (3, 2, 2, 2, 4)
    assert space.mask_slices == (slice(0, 3), slice(3, 9), slice(9, 13))
    assert mask_size(space) == 13


def test_a_single_head_is_a_choice_like_any_other() -> None:
    space = FactoredDiscrete((OP,))
    assert (space.nvec, space.mask_parts, space.mask_slices) == ((3,), (3,), (slice(0, 3),))
    assert mask_size(space) == mask_size(Discrete(3)) == 3


def test_factored_choices_may_be_masked() -> None:
    space = FactoredDiscrete((OP, Head("slot", 2, used_by=(0, 2))))  # the first and last value
    assert EnvSpaces(obs=Box((1,)), action=space, masked=True).action == space


def test_spaces_with_equal_values_are_equal() -> None:
    first, second = (
        EnvSpaces(obs={"a": Box((2,))}, action=MultiDiscrete((2, 2)), masked=True) for _ in range(2)
    )
    assert first == second
    assert first != EnvSpaces(obs={"a": Box((3,))}, action=MultiDiscrete((2, 2)), masked=True)
