"""Fixed schedules grow what they say, when they say it; rules that react do so where they say."""

import math

import pytest
import torch

from esper_lightning.envs.morphogenesis.baselines import plateau, schedule
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS
from esper_lightning.envs.morphogenesis.lifecycle import Op, Stage
from tests.envs.morphogenesis.test_env import small

CPU = torch.device("cpu")
W, G, B = Op.WAIT, Op.GERMINATE, Op.BLEND


def ops_of(env, rule, steps):
    """Op, slot, blueprint and ramp of the first host; all hosts must do the same."""
    found = []
    for _ in range(steps):
        action = rule(env)
        assert (action == action[:1]).all()
        found.append(tuple(action[0].tolist()))
        legal = env.legal()[:, action[0, 0], action[0, 1]].all()
        assert legal or action[0, 0] == W
        env.step(action)
    return found


@pytest.mark.parametrize(
    ("start", "ramp", "expected"),
    [
        (0, 0, [G, B, G, B, W, W, W, W]),
        (2, 0, [W, W, G, B, G, B, W, W]),
        (1, 1, [W, G, B, W, G, B, W, W]),  # the second seed waits for the first to be blended
    ],
)
def test_a_schedule_grows_its_slots_one_after_another(start, ramp, expected):
    env = small(3, epochs=20, ramp_epochs=(1, 2, 4)).build(CPU, 0)
    rule = schedule(blueprint="low_rank", slots=(0, 2), start=start, ramp=ramp)
    found = ops_of(env, rule, 8)
    assert [op for op, *_ in found] == expected
    grown = [(slot, kind, r) for op, slot, kind, r in found if op != W]
    assert [slot for slot, *_ in grown] == [0, 0, 2, 2]
    assert {(kind, r) for _, kind, r in grown} == {(BLUEPRINTS.index("low_rank"), ramp)}
    stages = env.hosts.slots.stage
    held = torch.tensor([Stage.HOLDING, Stage.DORMANT, Stage.HOLDING])
    assert (stages == held).all()


def test_a_schedule_of_no_host_in_particular_ignores_what_it_could_see():
    spec = small(4, epochs=20)
    one, other = spec.build(CPU, 0), spec.build(CPU, 1)
    rule = schedule(blueprint="norm", slots=(1,), start=3)
    assert ops_of(one, rule, 8) == ops_of(other, rule, 8)


def test_a_rule_grows_only_hosts_that_are_below_its_accuracy():
    env = small(4, epochs=20).build(CPU, 0)
    rule = plateau(window=1, rise=math.inf, below=0.5, slots=(1,), judges=False)
    env.step(torch.zeros(4, 4, dtype=torch.int64))
    env.step(torch.zeros(4, 4, dtype=torch.int64))
    env.hosts.vitals.accuracies[:, 0] = torch.tensor([0.2, 0.49, 0.5, 0.9])
    action = rule(env)
    assert action[:, 0].tolist() == [G, G, W, W]
    assert action[:2, 1].tolist() == [1, 1]


def test_a_rule_that_does_not_judge_leaves_seeds_as_they_are():
    done = {}
    for judges in (False, True):
        env = small(4, epochs=20).build(CPU, 0)
        rule = plateau(window=1, rise=math.inf, slots=(1,), training_epochs=1, judges=judges)
        ops = []
        for _ in range(8):
            action = rule(env)
            assert ((action[:, 1] == 1) | (action[:, 0] == W)).all()
            ops += action[:, 0].tolist()
            env.step(action)
        done[judges] = set(ops)
    assert done[False] == {W, G, B}
    assert done[True] & {Op.FOSSILIZE, Op.PRUNE}
