"""The environment as a whole obeys its contract, its reward and its independence of hosts."""

import math

import pytest
import torch
from torch.nn import functional

from esper_lightning.core.spaces import FactoredDiscrete
from esper_lightning.envs import check_env
from esper_lightning.envs.contract import sample_action
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.baselines import BASELINES, random_legal
from esper_lightning.envs.morphogenesis.blueprints import (
    BLUEPRINTS,
    FAMILIES,
    count_parameters,
    parts,
    residual,
)
from esper_lightning.envs.morphogenesis.data import load
from esper_lightning.envs.morphogenesis.lifecycle import Op, Stage
from esper_lightning.envs.morphogenesis.network import plan_training, run
from esper_lightning.envs.morphogenesis.observation import feature_names

CPU = torch.device("cpu")
PRESETS = {
    "digits": Morphogenesis.digits(),
    "synthetic": Morphogenesis.synthetic(),
    "cifar10": Morphogenesis.benchmark(),  # the shapes of CIFAR-10, without its data
}


def small(num_envs=4, **changes):
    sizes = {
        "image": (1, 8),
        "channels": (8, 8, 8),
        "train_batches": 2,
        "batch_size": 16,
        "validation_size": 32,
        "epochs": 6,
    }
    return Morphogenesis.synthetic(**{"num_envs": num_envs, **sizes, **changes})


def actions(env, steps, seed=0):
    """Random legal actions that environment ``i`` would also get among more environments."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(env.num_envs)]
    mask = env.action_mask()
    for _ in range(steps):
        rows = [
            sample_action(env.spaces.action, 1, mask[i : i + 1], g)
            for i, g in enumerate(generators)
        ]
        result = env.step(torch.cat(rows))
        mask = result.action_mask
        yield result


def same(first, other, rows=slice(None), other_rows=slice(None)):
    """Whether two results are equal bit for bit in some environments."""
    return all(
        torch.equal(a[rows].nan_to_num(), b[other_rows].nan_to_num())
        for a, b in zip(first, other, strict=True)
    )


def test_the_environment_obeys_the_contract():
    check_env(small(3), steps=14)


def test_the_environment_with_a_static_plan_obeys_the_contract():
    check_env(small(2).build(CPU, 0, static=True), steps=8)


@pytest.mark.parametrize(
    ("count", "changes"),
    [
        (64, {}),
        # Sizes at which matrices of one host would begin at any address.
        pytest.param(19, {"batch_size": 7}, marks=pytest.mark.slow),
        (19, {"batch_size": 10, "classes": 7, "validation_size": 151}),
        pytest.param(
            *(19, {"batch_size": 9, "channels": (10, 6, 14), "kernels": (3, 1, 3)}),
            marks=pytest.mark.slow,
        ),
        (19, {"channels": (10, 14, 6), "blueprints": ("attention",)}),
        pytest.param(
            19, {"channels": (21, 21, 21), "blueprints": ("low_rank",)}, marks=pytest.mark.slow
        ),
    ],
)
def test_environment_7_of_many_equals_environment_7_of_8(count, changes):
    many, few = (small(hosts, epochs=5, **changes).build(CPU, 1) for hosts in (count, 8))
    few.trainer.chunk = 3
    for one, other in zip(actions(many, 12), actions(few, 12), strict=True):
        # Batched products round by their sizes on some processors.
        for a, b in zip(one, other, strict=True):
            exact = {} if a.is_floating_point() else {"rtol": 0, "atol": 0}
            tolerance = exact or {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(a[:8], b, equal_nan=True, **tolerance)


def test_plans_that_read_stages_and_static_plans_agree():
    spec = small(4, epochs=20)
    planned, static = (
        spec.build(CPU, 1, dtype=torch.float64, static=kind) for kind in (False, True)
    )
    for one, other in zip(actions(planned, 10), actions(static, 10), strict=True):
        torch.testing.assert_close(one.obs, other.obs, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(one.reward, other.reward, rtol=1e-6, atol=1e-8)


def an_infinite_weight(host):
    host[7] = math.inf


def a_huge_head(host):
    """Loss and gradients are finite in float32, but not the square of a gradient."""
    host[-90:-10] = 1e25 * torch.randn(80, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("poison", [an_infinite_weight, a_huge_head])
@pytest.mark.parametrize("way", ["planned", "static", "native"])
def test_a_host_that_diverges_changes_no_bit_of_another(way, poison):
    spec = small(5, epochs=8, compiled=way == "native")
    sound, broken = (spec.build(CPU, 2, static=way == "static") for _ in range(2))
    others = [0, 1, 3, 4]
    pairs = zip(actions(sound, 8), actions(broken, 8), strict=True)
    for step, (one, other) in enumerate(pairs):
        assert same(one, other, others, others)
        if step == 3:
            assert other.terminated.tolist() == [False, False, True, False, False]
            assert not other.truncated.any()
            assert other.reached_obs.isfinite().all()
            assert other.episode_length[2] == 4
            assert other.obs[2, 0] == 0  # a new host
            terms = broken.report.terms
            assert terms["divergence"][2] == spec.divergence_penalty
            assert terms["gain"][2] == 0
        if step == 2:
            poison(broken.hosts.weights.host[2])
    assert broken.hosts.weights.host.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("poison", [an_infinite_weight, a_huge_head])
def test_numbers_that_are_not_finite_change_no_parameter(poison, compiled):
    env = small(3, compiled=compiled).build(CPU, 0)
    env.step(torch.tensor([[Op.GERMINATE, 1, 3, 0]] * 3))
    hosts = env.hosts
    poison(hosts.weights.host[1])
    measured = env.trainer.measure(hosts.weights, hosts.slots, env.trainer.splits.validation)
    assert measured.loss[1].isfinite() == (poison is a_huge_head)
    before = [t.clone() for t in (hosts.weights.host, hosts.velocity.host)]
    assert env.trainer.train(hosts, hosts.slots, 0).finite.tolist() == [True, False, True]
    for old, new in zip(before, (hosts.weights.host, hosts.velocity.host), strict=True):
        assert [torch.equal(*rows) for rows in zip(old, new, strict=True)] == [False, True, False]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_seed_that_diverges_in_isolation_does_not_affect_its_host(compiled):
    spec = small(2, epochs=20, compiled=compiled)
    sound, broken = (spec.build(CPU, 0) for _ in range(2))
    germinate = torch.tensor([[Op.GERMINATE, 1, 3, 0]] * 2)
    for env in (sound, broken):
        env.step(germinate)
    broken.hosts.weights.seeds[1][0, 20] = math.inf
    seed = broken.hosts.weights.seeds[1].clone()
    wait = torch.zeros_like(germinate)
    for _ in range(3):
        sound.step(wait)
        other = broken.step(wait)
    assert not other.terminated.any()
    assert torch.equal(sound.hosts.weights.host, broken.hosts.weights.host)
    same_seed = (seed == broken.hosts.weights.seeds[1]).all(1)
    assert same_seed.tolist() == [True, False]  # the sound one has learnt


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_is_resumed_in_the_middle_of_blending(compiled):
    spec = small(3, epochs=30, compiled=compiled)
    env = spec.build(CPU, 4)
    for op in (Op.GERMINATE, Op.BLEND):
        env.step(torch.tensor([[op, 1, kind, 2] for kind in (1, 3, 4)]))
    assert (env.hosts.slots.stage[:, 1] == Stage.BLENDING).all()
    saved = env.state_dict()
    other = spec.build(CPU, 99)
    other.load_state_dict(saved)
    for one, two in zip(actions(env, 10), actions(other, 10), strict=True):
        assert same(one, two)
    for name, tensor in env.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_state_of_other_settings_is_refused():
    env = small(3).build(CPU, 0)
    with pytest.raises(ValueError, match=r"load_state_dict\(\)\[.*other settings"):
        env.load_state_dict(small(2).build(CPU, 0).state_dict())


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_legal(name):
    env = small(12, epochs=28).build(CPU, 0)
    space = env.spaces.action
    assert isinstance(space, FactoredDiscrete)
    done = set()
    for _ in range(28):
        mask, action = env.action_mask(), BASELINES[name](env)
        op, slot, blueprint, ramp = (mask[:, place] for place in space.mask_slices)
        row = torch.arange(12)
        assert op[row, action[:, 0]].all()
        assert slot.unflatten(1, (5, 3))[row, action[:, 0], action[:, 1]].all()
        assert blueprint[row, action[:, 2]].all()
        assert ramp[row, action[:, 3]].all()
        done |= set(action[:, 0].tolist())
        env.step(action)
        assert torch.equal(env.hosts.vitals.changed, (action[:, 0] != 0) & ~env.report.ended)
    expected = {
        "never grow": {0},
        "grow at the start": {0, 1, 2, 3},
        "random legal": {0, 1, 2, 3, 4},
        "plateau": {0, 1, 2, 3, 4},
    }
    assert done == expected[name]


def test_random_actions_are_sampled_evenly_from_legal_actions():
    """Each choice, and each pair of choices, has its expected frequency within five deviations."""
    env = small(4096, channels=(4, 4, 4)).build(CPU, 0)
    slots = env.hosts.slots
    stage = torch.randint(7, slots.stage.shape, generator=torch.Generator().manual_seed(0))
    slots = slots._replace(
        stage=stage, epochs_in_stage=slots.epochs_in_stage + 1, measured=~slots.measured
    )
    env.hosts = env.hosts._replace(slots=slots)
    op, slot, blueprint, ramp = random_legal(env).unbind(1)
    legal = env.legal().double()
    legal[:, Op.WAIT] = 1.0  # WAIT needs no slot
    slots_of_op = legal[torch.arange(4096), op]
    for chosen, allowed in (
        (op, legal.any(2)),
        (slot, slots_of_op),
        (blueprint * 3 + ramp, torch.ones(4096, 21)),
        (slot * 7 + blueprint, slots_of_op.repeat_interleave(7, dim=1)),
    ):
        chance = allowed / allowed.sum(1, keepdim=True)
        off = functional.one_hot(chosen, chance.shape[1]).sum(0) - chance.sum(0)
        assert (off.abs() < 5 * (chance * (1 - chance)).sum(0).sqrt()).all()


def test_shaping_telescopes_and_adds_the_same_to_every_return():
    env = small(6, epochs=12, shaping_weight=0.7, shaping_discount=0.9).build(CPU, 0)
    total = torch.zeros(6)
    for t, result in enumerate(actions(env, 12)):  # noqa: B007
        total += 0.9**t * env.report.terms["shaping"]
    assert result.terminated.all()
    assert not result.truncated.any()
    assert env.report.terms["shaping"].abs().sum() > 0
    torch.testing.assert_close(total, torch.zeros(6), rtol=0, atol=1e-5)


def test_the_reward_is_accuracy_gained_less_rent_and_interventions():
    spec = small(6, epochs=10)
    env = spec.build(CPU, 0)
    total, rent, paid = torch.zeros(6), torch.zeros(6), torch.zeros(6)
    for result in actions(env, 10):
        total += result.reward
        rent += spec.rent_weight * env.report.grown_parameters / env.host_parameters
        paid -= env.report.terms["intervention"]
    gain = spec.gain_weight * (env.report.accuracy - 1 / spec.classes)
    torch.testing.assert_close(total, gain - rent - paid, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.episode_return, total)
    assert rent.min() > 0


def test_rent_counts_the_parameters_of_a_seed():
    env = small(7, epochs=40).build(CPU, 0)
    kinds = torch.arange(7)
    germinate = torch.stack(
        (torch.full_like(kinds, Op.GERMINATE), torch.full_like(kinds, 2), kinds, kinds * 0), 1
    )
    env.step(germinate)
    expected = [count_parameters(name, 8) for name in BLUEPRINTS]
    assert env.report.grown_parameters.tolist() == expected
    used = (env.hosts.velocity.seeds[2] != 0).sum(1)
    assert (used <= torch.tensor(expected)).all()


def test_test_accuracy_is_that_of_the_host_that_ended_and_is_hidden_from_the_agent():
    spec = small(3, epochs=4)
    plain, tested = spec.build(CPU, 0), spec.build(CPU, 0)
    tested.tests_ends = True
    for step, (one, other) in enumerate(zip(actions(plain, 8), actions(tested, 8), strict=True)):
        assert same(one, other)
        assert plain.report.test_accuracy.isnan().all()
        assert tested.report.test_accuracy.isnan().all() == (step % 4 != 3)
        if step % 4 == 2:
            before = tested.test_accuracy()
    assert ((tested.report.test_accuracy - before).abs() < 0.5).all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_seed_starts_near_identity_with_a_gradient_everywhere(preset, name):
    channels = PRESETS[preset].channels[-1]
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(1, 16, 4, 4, channels, generator=generator).relu()
    layout = parts(name, channels).values()
    row = torch.cat(
        [part.mean + part.std * torch.randn(part.size, generator=generator) for part in layout]
    )[None].requires_grad_()
    family = next(f for f, members in FAMILIES.items() if name in members)
    kind = torch.tensor([BLUEPRINTS.index(name)])
    f = residual(family, [name], h, row, kind, torch.ones(1))
    assert f.square().mean().sqrt() < 0.25 * h.square().mean().sqrt()
    (grad,) = torch.autograd.grad((f * torch.randn(f.shape, generator=generator)).sum(), row)
    for piece in grad[0].split([part.size for part in layout]):
        assert piece.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("preset", "epochs"),
    [
        ("digits", 8),
        pytest.param("synthetic", 8, marks=pytest.mark.slow),
        pytest.param("cifar10", 20, marks=pytest.mark.slow),
    ],
)
def test_every_blueprint_lowers_the_loss_of_the_network_in_which_it_is_on(preset, epochs):
    """All blueprints are tried in all slots, in isolation, with a host that does not learn."""
    spec = PRESETS[preset]
    kinds, slots = len(BLUEPRINTS), len(spec.channels)
    large = spec.channels[-1] == 32
    spec = Morphogenesis(
        **{
            **{name: getattr(spec, name) for name in spec.__dataclass_fields__},
            "num_envs": kinds * slots,
            "epochs": 60,
            "train_batches": 1 if large else 4,
            "batch_size": 32 if large else 64,
            "validation_size": 1,
        }
    )
    env = spec.build(CPU, 0)
    wait = torch.zeros(kinds * slots, 4, dtype=torch.int64)
    for _ in range(3):
        env.step(wait)
    env.hosts.weights.host[:] = env.hosts.weights.host[:1]  # the same host in every environment
    # A head a few steps from zero would have hardly any gradient for the seeds.
    head = spec.channels[-1] * 10
    generator = torch.Generator().manual_seed(0)
    env.hosts.weights.host[:, -head - 10 : -10] += 0.3 * torch.randn(head, generator=generator)
    for tensor in (*env.hosts.weights.means, *env.hosts.weights.variances):
        tensor[:] = tensor[:1]
    kind, slot = wait[:, 0].clone(), wait[:, 0].clone()
    kind[:] = torch.arange(kinds).repeat(slots)
    slot[:] = torch.arange(slots).repeat_interleave(kinds)
    host = env.hosts.weights.host.clone()
    env.step(torch.stack((wait[:, 0] + Op.GERMINATE, slot, kind, kind * 0), 1))

    def shadow_loss():
        image, label = (t[:64] for t in env.trainer.splits.training)
        wide = image.expand(kinds * slots, -1, -1, -1, -1)
        plan = plan_training(env.hosts.slots, spec.blueprints, static=True)
        weights = env.hosts.weights._replace(
            host=host,
            means=tuple(t.clone() for t in env.hosts.weights.means),
            variances=tuple(t.clone() for t in env.hosts.weights.variances),
        )
        labels = label.expand(kinds * slots, -1)
        losses = run(weights, spec.architecture(), wide, labels, plan, training=True)
        trunk = losses.trunk[0].mean(1)
        branch = torch.zeros_like(trunk).index_put((plan.branch_host,), losses.branches[0].mean(1))
        return trunk, branch

    for _ in range(epochs):
        env.hosts.weights.host.copy_(host)  # only seeds learn
        env.hosts.velocity.host.zero_()
        env.step(wait)
    with torch.no_grad():
        trunk, branch = shadow_loss()
    better = (branch < trunk).view(slots, kinds)
    assert better.all(), [(trunk - branch).view(slots, kinds), better]


def test_features_are_named():
    spec = small(2)
    assert spec.spaces().obs.shape == (len(feature_names(3)),)
    env = spec.build(CPU, 0)
    obs, _ = env.reset()
    names = feature_names(3)
    assert obs[0, names.index("accuracy_0")] == pytest.approx(1 / spec.classes)
    assert obs[0, names.index("loss_0")] == pytest.approx(1.0)
    env.step(torch.tensor([[Op.GERMINATE, 1, 4, 0]] * 2))
    obs = env.step(torch.zeros(2, 4, dtype=torch.int64)).obs
    assert obs[0, names.index("slot1_stage_training")] == 1
    assert obs[0, names.index("slot1_blueprint_conv_heavy")] == 1
    assert obs[0, names.index("slot1_freshness")] == 1
    assert obs[0, names.index("slot1_grad_norm")] > 0


def test_the_host_of_the_benchmark_has_6418_parameters():
    assert sum(part.size for part in Morphogenesis.benchmark().architecture().parts()) == 6418


def test_splits_never_mix():
    splits = load("digits", folder=None, image=(1, 8), classes=10, noise=0.0, device=CPU)
    assert [len(split.label) for split in splits] == [897, 400, 500]
    assert splits.training.image.mean().abs() < 1e-4


def test_errors_about_settings_name_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"folder must be given.*Download https.*cifar-10-python"):
        Morphogenesis(dataset="cifar10").build(CPU, 0)
    with pytest.raises(ValueError, match=r"hold CIFAR-10.*cifar-10-batches-py"):
        Morphogenesis.cifar10(str(tmp_path)).build(CPU, 0)
    with pytest.raises(ValueError, match=r"Morphogenesis.blueprints must be different names"):
        Morphogenesis(blueprints=("norm", "magic"))
    with pytest.raises(ValueError, match=r"Morphogenesis.pools must have an entry for each of 3"):
        Morphogenesis(pools=(2,))
