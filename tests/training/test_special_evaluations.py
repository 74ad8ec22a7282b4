"""Environments with an evaluation of their own are known by their class."""

import pytest

from esper_lightning.envs import CartPole, Morphogenesis
from esper_lightning.training.special_evaluations import (
    require_special_evaluation,
    special_evaluation,
)


def test_a_class_and_those_that_derive_from_it_have_the_evaluation_of_the_table():
    class Mine(Morphogenesis):
        pass

    for kind in (Morphogenesis, Mine):
        found = special_evaluation(kind)
        assert callable(found.compare_policies)
        assert callable(found.refuse_figures)
        assert require_special_evaluation(kind, "--figures") is found


def test_other_environments_have_none_and_the_error_names_those_that_have_one():
    assert special_evaluation(CartPole) is None
    message = "^--figures must be for an environment with figures: Morphogenesis, got 'CartPole'.$"
    with pytest.raises(ValueError, match=message):
        require_special_evaluation(CartPole, "--figures")
