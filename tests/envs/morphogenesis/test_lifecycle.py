"""The life cycle equals an oracle in plain Python, under random actions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.lifecycle import Action, LifeCycle, Op, Slots, Stage, ramp
from esper_lightning.envs.morphogenesis.observation import action_mask, action_space
from tests.envs.morphogenesis.reference import LifeCycleOracle

CHOICES = st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 6), st.integers(0, 2))
HOSTS = 3


@given(
    st.lists(st.lists(CHOICES, min_size=HOSTS, max_size=HOSTS), min_size=1, max_size=25),
    st.sampled_from(["linear", "cosine", "sigmoid"]),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_every_action_has_the_effect_that_the_oracle_expects(
    script, shape, training, dormant, fade, cooldown
):
    spec = Morphogenesis(
        ramp_shape=shape,
        min_training_epochs=training,
        min_dormant_epochs=dormant,
        fade_epochs=fade,
        cooldown_epochs=cooldown,
    )
    cycle = LifeCycle(
        ramp_choices=spec.ramp_epochs,
        ramp_shape=shape,
        min_training_epochs=training,
        min_dormant_epochs=dormant,
        fade_epochs=fade,
        cooldown_epochs=cooldown,
        device=torch.device("cpu"),
    )
    slots = Slots.empty(HOSTS, 3, dtype=torch.float64, device=torch.device("cpu"))
    oracles = [LifeCycleOracle(spec) for _ in range(HOSTS)]
    for step in script:
        legal = cycle.legal(slots)
        for i, oracle in enumerate(oracles):
            expected = [[oracle.legal(op.name, s) for s in range(3)] for op in Op]
            assert legal[i].tolist() == expected
        action = Action(*torch.tensor(step).unbind(1))
        slots, changed = cycle.apply(slots, action)
        for i, (op, slot, _, _) in enumerate(step):
            assert changed[i].tolist() == [
                s == slot and expected_change(legal, i, op, slot) for s in range(3)
            ]
        slots = cycle.tick(slots)
        for oracle, (op, slot, blueprint, epochs) in zip(oracles, step, strict=True):
            oracle.act(Op(op).name, slot, blueprint, epochs)
            oracle.tick()
            oracle.measured()
        judged = (slots.stage >= Stage.TRAINING) & (slots.stage != Stage.EMBARGOED)
        slots = slots._replace(measured=slots.measured | (judged & (slots.stage != 4)))
        for i, oracle in enumerate(oracles):
            for s, slot in enumerate(oracle.slots):
                assert Stage(int(slots.stage[i, s])).name == slot.stage
                assert abs(float(slots.alpha[i, s]) - slot.alpha) < 1e-6
                if slot.live:
                    kind = spec.blueprints[int(slots.blueprint[i, s])]
                    assert kind == slot.blueprint


def expected_change(legal, host, op, slot):
    return bool(legal[host, op, slot])


@given(st.sampled_from(["linear", "cosine", "sigmoid"]))
def test_ramps_rise_from_0_to_1(shape):
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = ramp(share, shape)
    assert abs(float(alpha[0])) < 1e-6
    assert abs(float(alpha[-1]) - 1) < 1e-6
    assert (alpha.diff() > 0).all()
    assert abs(float(alpha[50]) - 0.5) < 1e-6


def test_a_mask_has_the_layout_of_the_space():
    legal = torch.zeros(1, 5, 3, dtype=torch.bool)
    legal[0, Op.GERMINATE, 1:] = True
    mask = action_mask(legal, blueprints=7, ramps=2)[0]
    space = action_space(3, 7, 2)
    op, slot, blueprint, ramps = (mask[place] for place in space.mask_slices)
    assert len(mask) == sum(space.mask_parts) == 5 + 5 * 3 + 7 + 2
    assert op.tolist() == [True, True, False, False, False]
    assert slot.view(5, 3)[Op.GERMINATE].tolist() == [False, True, True]
    assert slot.view(5, 3)[Op.PRUNE].all()  # never used
    assert blueprint.all()
    assert ramps.all()
