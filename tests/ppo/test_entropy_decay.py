"""An entropy bonus that decays: its weight over the iterations, and its term of the loss."""

import pytest
import torch

from esper_lightning import EntropyDecay
from tests.ppo.test_extension import SPEC, STEPS, make

COEFFICIENT = 0.4


@pytest.mark.parametrize("wrong", [{"coefficient": 0.0}, {"iterations": 0}])
def test_settings_are_checked(wrong) -> None:
    with pytest.raises(ValueError, match=f"EntropyDecay.{next(iter(wrong))} must"):
        EntropyDecay(**wrong)


def test_the_bonus_falls_in_a_straight_line_to_zero() -> None:
    spec = EntropyDecay(coefficient=COEFFICIENT, iterations=4)
    learner = make(spec.build(SPEC.spaces(), torch.Generator()))
    weights, terms = [], []
    for _ in range(6):
        targets = learner.compute_targets(learner.rollout(STEPS))
        update = learner.update(targets, learning_rate=1e-3)
        weights.append(float(targets.added["entropy_decay/weight"]))
        terms.append(float(update.added["entropy_decay"] / update.own.entropy))
    expected = [COEFFICIENT * share for share in (1.0, 0.75, 0.5, 0.25, 0.0, 0.0)]
    assert weights == pytest.approx(expected)
    assert terms == pytest.approx([-weight for weight in expected], rel=1e-4)


def test_the_weight_is_resumed_with_the_state() -> None:
    spec = EntropyDecay(coefficient=COEFFICIENT, iterations=4)
    first, second = (spec.build(SPEC.spaces(), torch.Generator()) for _ in range(2))
    learner = make(first)
    for _ in range(2):
        learner.compute_targets(learner.rollout(STEPS))
    second.load_state_dict(first.state_dict())
    targets = make(second).compute_targets(learner.rollout(STEPS))
    assert float(targets.added["entropy_decay/weight"]) == pytest.approx(COEFFICIENT / 2)
