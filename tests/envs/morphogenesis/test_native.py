"""Hosts in native code equal hosts by operations of torch, whatever grows in them."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from esper_lightning.compiling.loops import log_reasons_again
from esper_lightning.core.tensor_trees import leaves, map_tree
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS, count_parameters
from esper_lightning.envs.morphogenesis.data import Split
from esper_lightning.envs.morphogenesis.lifecycle import LIVE, Op, Stage
from esper_lightning.envs.morphogenesis.native import NativeHosts, Traits
from tests.envs.morphogenesis.test_env import actions, same, small
from tests.envs.morphogenesis.test_equals_lone_hosts import SCRIPTS, spec_of

CPU = torch.device("cpu")
SHAPES = {
    "digits": Morphogenesis.synthetic(image=(1, 8), train_batches=2),
    "pools": Morphogenesis.synthetic(
        image=(3, 12),
        channels=(8, 16),
        kernels=(3, 3),
        pools=(2, 2),
        batch_size=64,
        train_batches=1,
    ),
    # Rows and columns outside of windows, blocks that are not full, channels of no even number.
    "odd": Morphogenesis.synthetic(
        image=(2, 7),
        classes=5,
        channels=(5, 6, 21),
        kernels=(5, 3, 1),
        pools=(2, 1, 2),
        train_batches=2,
    ),
    "one block": Morphogenesis.synthetic(
        image=(1, 6), classes=3, channels=(13,), kernels=(7,), pools=(3,), batch_size=7
    ),
    "large": Morphogenesis.benchmark(train_batches=1),
}


def grown(spec):
    """Environments in which every blueprint is in every live stage, in every slot.

    In every other host, all slots are in the same stage: several seeds train in isolation.
    """
    count, slots = len(BLUEPRINTS) * len(LIVE), len(spec.channels)
    env = replace(spec, num_envs=count, compiled=True, validation_size=45).build(CPU, 3)
    number, slot = torch.arange(count).unsqueeze(1), torch.arange(slots)
    kind = (number + slot) % len(BLUEPRINTS)
    stage = torch.tensor(LIVE)[(number // len(BLUEPRINTS) + slot * (number % 2)) % len(LIVE)]
    alpha = torch.where(stage == Stage.BLENDING, 0.4, torch.where(stage == Stage.FADING, 0.7, 1.0))
    alpha = alpha.masked_fill(stage == Stage.TRAINING, 0.0)
    generator = torch.Generator().manual_seed(0)
    hosts, noise = env.hosts, lambda t: torch.randn(t.shape, generator=generator)
    hosts.weights.host.add_(0.1 * noise(hosts.weights.host))  # a head of zeros has no gradient
    hosts.weights.host.mul_(noise(hosts.weights.host).sign())  # scales of batch norm, too
    hosts.velocity.host.copy_(0.01 * noise(hosts.velocity.host))
    for s, channels in enumerate(spec.channels):
        sizes = torch.tensor([count_parameters(name, channels) for name in BLUEPRINTS])
        row = hosts.weights.seeds[s]
        used = torch.arange(row.shape[1]) < sizes[kind[:, s : s + 1]]
        row.copy_(0.15 * noise(row) * used)
    slots_of_hosts = hosts.slots._replace(stage=stage, blueprint=kind, alpha=alpha)
    env.hosts = hosts._replace(slots=slots_of_hosts)
    return env


def trained(env, dtype):
    """Two epochs and a measurement after each."""
    spec_hosts = map_tree(
        lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone(), env.hosts
    )
    validation = env.trainer.splits.validation
    results = []
    for seed in range(2):
        results.append(env.trainer.train(spec_hosts, spec_hosts.slots, seed))
        results.append(env.trainer.measure(spec_hosts.weights, spec_hosts.slots, validation))
    return [*results, spec_hosts.weights, spec_hosts.velocity]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "large")) for n in SHAPES]
)
def test_native_code_computes_what_operations_of_torch_compute(name):
    native = grown(SHAPES[name])
    assert native.trainer._native is not None
    exact = replace(
        SHAPES[name], num_envs=native.num_envs, validation_size=45, compiled=False
    ).build(CPU, 3, dtype=torch.float64)
    exact.hosts = native.hosts
    found, expected = trained(native, torch.float32), trained(exact, torch.float64)
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        error = (a.double() - b.double()).abs() / b.double().abs().max().clamp(min=1e-9)
        # Where a number is at the edge of a relu, the rounding decides about its gradient. Large
        # images have many such numbers.
        assert (error > (1e-3 if name == "large" else 1e-5)).sum() <= max(3, 0.01 * error.numel())
        assert error.max() < 1e-2


@pytest.mark.parametrize("script", range(len(SCRIPTS)))
def test_whole_lives_equal_those_of_exact_hosts(script):
    """The exact hosts equal hosts that are trained alone, in these scripts."""
    count = len(BLUEPRINTS)
    spec = spec_of(count, ramp_shape=("linear", "cosine", "sigmoid", "linear")[script])
    native = replace(spec, compiled=True).build(CPU, 3)
    exact = spec.build(CPU, 3, dtype=torch.float64)
    for op, slot, shift, ramp in SCRIPTS[script]:
        rows = [(Op[op], slot, (i + shift) % count, ramp) for i in range(count)]
        one, other = (env.step(torch.tensor(rows)) for env in (native, exact))
        torch.testing.assert_close(one.obs.double(), other.obs.double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.reward.double(), other.reward, rtol=1e-4, atol=1e-5)
    for a, b in zip(leaves(native.hosts), leaves(exact.hosts), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-4)


def test_a_host_is_the_same_bits_among_others_alone_and_on_more_threads():
    spec = small(7, epochs=5, compiled=True, batch_size=10, validation_size=151)
    many, few, alone = (replace(spec, num_envs=count).build(CPU, 1) for count in (7, 3, 1))
    for one, other, lone in zip(*(actions(env, 12) for env in (many, few, alone)), strict=True):
        torch.set_num_threads(1 if many.hosts.vitals.step[0] % 2 else 2)
        assert same(one, other, slice(3))
        assert same(one, lone, slice(1))
    torch.set_num_threads(1)
    for a, b in zip(leaves(many.hosts), leaves(few.hosts), strict=True):
        assert torch.equal(a[:3], b) if a.dim() else True


def test_a_state_of_native_code_is_continued_by_operations_of_torch():
    spec = small(4, epochs=30, compiled=True)
    env = spec.build(CPU, 4)
    for _ in actions(env, 6):
        pass
    others = [replace(spec, compiled=kind).build(CPU, 99) for kind in (True, False)]
    for other in others:
        other.load_state_dict(env.state_dict())
    results = zip(*(actions(each, 3, seed=5) for each in (env, *others)), strict=True)
    for one, native, by_torch in results:
        assert same(one, native)
        torch.testing.assert_close(one.obs, by_torch.obs, rtol=1e-4, atol=1e-4)


def test_hosts_may_differ_in_learning_rate_classes_and_channels():
    spec = small(2, classes=5, compiled=True)
    env = grown(replace(spec, channels=(6, 8), kernels=(3, 3), pools=(1, 2)))
    architecture, sgd, count = env.architecture, spec.sgd(), env.num_envs
    training = env.trainer.splits.training
    index = torch.arange(count * 2 * 40).view(count, 2, 40) * 7 % len(training.label)
    label = training.label[index] % 3

    def run(hosts, architecture, rate, mask, used, validation=training):
        hosts = map_tree(torch.clone, hosts)
        native = NativeHosts(architecture, sgd)
        traits = Traits(rate, mask, used)
        result = native.train(
            *(hosts.weights, hosts.velocity, hosts.slots),
            *(training.image, label, index, traits),
        )
        measured = native.measure(hosts.weights, hosts.slots, *validation, traits)
        return result, measured, hosts

    all_used = torch.tensor(architecture.channels).expand(count, -1)
    whole = torch.ones(count, 5, dtype=torch.bool)
    three = whole & (torch.arange(5) < 3)
    fast, slow = torch.full((count,), 0.2), torch.full((count,), 0.01)
    mixed = torch.where(torch.arange(count) % 2 == 0, fast, slow)
    outcomes = [run(env.hosts, architecture, rate, whole, all_used) for rate in (mixed, fast, slow)]
    for one, quick, calm in zip(*map(leaves, outcomes), strict=True):
        assert torch.equal(one[::2], quick[::2]) if one.dim() else True
        assert torch.equal(one[1::2], calm[1::2]) if one.dim() else True

    # A class that does not occur is a class that the network does not have.
    few = replace(architecture, classes=3)
    row = env.hosts.weights.host
    head, bias = row[:, -45:-5].unflatten(1, (8, 5))[:, :, :3], row[:, -5:-2]
    narrow = torch.cat((row[:, :-45], head.flatten(1), bias), 1)
    hosts = env.hosts._replace(
        weights=env.hosts.weights._replace(host=narrow),
        velocity=env.hosts.velocity._replace(host=torch.zeros_like(narrow)),
    )
    masked = env.hosts._replace(
        velocity=env.hosts.velocity._replace(host=torch.zeros_like(row)),
    )
    images = Split(*(tensor[training.label < 3] for tensor in training))
    other = run(hosts, few, fast, three[:, :3], all_used, images)
    same_host = run(masked, architecture, fast, three, all_used)
    torch.testing.assert_close(other[:2], same_host[:2])
    torch.testing.assert_close(other[2].weights.seeds, same_host[2].weights.seeds)

    # A channel that is not used is a channel without scale and shift.
    used = all_used - torch.tensor([2, 3])
    silent = row.clone()
    first = 6 * 9
    silent[:, first + 4 : first + 6] = silent[:, first + 10 : first + 12] = 0
    second = first + 12 + 8 * 6 * 9
    silent[:, second + 5 : second + 8] = silent[:, second + 13 : second + 16] = 0
    hosts = masked._replace(weights=masked.weights._replace(host=silent))
    masked = run(masked, architecture, fast, whole, used)
    by_zeros = run(hosts, architecture, fast, whole, all_used)
    assert all(map(torch.equal, masked[1], by_zeros[1]))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_number_that_is_not_finite_is_lost_in_no_relu_and_no_pooling(compiled):
    """A pixel of 0 times an infinite weight is NaN; the other pixels become minus infinity."""
    spec = small(2, channels=(4,), kernels=(1,), pools=(2,), compiled=compiled)
    env = spec.build(CPU, 0)
    image = -torch.ones(8, 8, 8, 1)
    image[:, 1, 1] = 0
    host = env.hosts.weights.host
    host[:, :4] = 1.0
    host[1, 0] = math.inf
    split = Split(image, torch.zeros(8, dtype=torch.int64))
    loss = env.trainer.measure(env.hosts.weights, env.hosts.slots, split).loss
    assert loss.isnan().tolist() == [False, True]


def test_without_a_compiler_hosts_run_by_operations_of_torch(monkeypatch, native_code, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    log_reasons_again()
    spec = small(2)
    with caplog.at_level(logging.WARNING):
        assert [spec.build(CPU, 0).trainer._native for _ in range(2)] == [None, None]
    (record,) = caplog.records
    assert "training of hosts" in record.getMessage()
    assert "'no-such-compiler' is no program" in record.getMessage()
    with pytest.raises(ValueError, match=r"^Morphogenesis\.compiled must be None or False where"):
        replace(spec, compiled=True).build(CPU, 0)


def test_a_host_of_very_many_blocks_is_refused():
    ones = (1,) * 65
    spec = small(2, channels=(4,) * 65, kernels=ones, pools=ones, compiled=True)
    with pytest.raises(ValueError, match=r"Reason: a host of more than 64 blocks\."):
        spec.build(CPU, 0)


def test_native_code_is_for_float32_on_a_cpu_where_the_user_wants_it(native_code):
    spec = small(2)
    assert spec.build(CPU, 0).trainer._native is not None
    assert spec.build(CPU, 0, dtype=torch.float64).trainer._native is None
    assert spec.build(CPU, 0, static=True).trainer._native is None
    assert replace(spec, compiled=False).build(CPU, 0).trainer._native is None


def test_compilers_that_are_switched_off_are_not_missed(caplog):
    assert small(2).build(CPU, 0).trainer._native is None
    assert not caplog.records
