"""Hosts of a population have the kinds that were asked for, and nothing but training tells them."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis import env as env_module
from esper_lightning.envs.morphogenesis.baselines import random_legal
from esper_lightning.envs.morphogenesis.lifecycle import Op, Stage
from esper_lightning.envs.morphogenesis.observation import feature_names
from esper_lightning.envs.morphogenesis.population import KindSampler, Population
from esper_lightning.envs.morphogenesis.streams import Place
from tests.envs.morphogenesis.test_captured import Replayed, equal, play
from tests.envs.morphogenesis.test_env import actions, same

CPU = torch.device("cpu")
MANY = Population(
    classes=(2, 3, 5),
    label_noise=(0.0, 0.3),
    images_per_class=(4, 40),
    learning_rate=(0.02, 0.1),
    width=(0.25, 1.0),
)
SPEC = Morphogenesis.synthetic(
    num_envs=24, image=(1, 4), classes=5, channels=(8, 8), kernels=(3, 1), pools=(2, 1),
    train_batches=2, batch_size=8, validation_size=64, epochs=8, population=MANY,
)  # fmt: skip
LABEL = torch.arange(5).repeat(60)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]


def sampler_of(population, **changes):
    given = {"classes": 5, "channels": (4, 10), "dtype": torch.float32, **changes}
    return KindSampler(population, LABEL, **given)


def place_of(envs, episode=0, step=0):
    env = torch.arange(envs)
    return Place(env, torch.full_like(env, episode), torch.full_like(env, step))


def test_every_choice_is_drawn_as_often_as_another_and_independently():
    hosts = 6000
    kinds = sampler_of(MANY).kinds(1, torch.zeros(hosts, dtype=torch.int64))
    names, values = list(vars(MANY)), kinds._asdict() | kinds.traits._asdict()
    drawn = {
        name: torch.stack([values[name] == choice for choice in getattr(MANY, name)]).double()
        for name in names
    }
    for name, each in drawn.items():
        assert (each.sum(0) == 1).all(), name
        for other in names[: names.index(name) + 1]:
            share = each @ drawn[other].T / hosts
            expected = 1 / (len(each) * len(drawn[other]))
            if name == other:
                share, expected = share.diagonal(), 1 / len(each)
            assert (share - expected).abs().max() < 0.03, (name, other)
    assert torch.equal(kinds.traits.class_mask.sum(1), kinds.classes)
    assert (
        kinds.traits.class_mask.double().mean(0) - 10 / 15
    ).abs().max() < 0.03  # no class is rare
    first = kinds.class_order.argsort(1) < kinds.classes.unsqueeze(1)
    assert torch.equal(first, kinds.traits.class_mask)
    narrow = kinds.width == 0.25
    assert kinds.traits.channels_used[narrow].unique(dim=0).tolist() == [[1, 2]]
    assert kinds.traits.channels_used[~narrow].unique(dim=0).tolist() == [[4, 10]]


def test_kinds_depend_on_environment_and_episode_and_not_on_the_number_of_environments():
    sampler = sampler_of(MANY)
    many, few, later = (
        sampler.kinds(1, torch.full((count,), episode))
        for count, episode in ((64, 0), (8, 0), (64, 1))
    )
    trees = [dict(named_tensors(kinds._asdict())) for kinds in (many, few, later)]
    for name in trees[0]:
        assert torch.equal(trees[0][name][:8], trees[1][name]), name
        assert not torch.equal(trees[0][name], trees[2][name]), name


def batches_over_steps(population, *, hosts, steps, count=200):
    """Kinds, and images and labels ``[B, steps * count]``."""
    sampler = sampler_of(population)
    kinds = sampler.kinds(1, torch.zeros(hosts, dtype=torch.int64))
    found = [
        sampler.batches(1, kinds, place_of(hosts, step=step), count=count) for step in range(steps)
    ]
    return kinds, *(torch.cat(column, 1) for column in zip(*found, strict=True))


def test_hosts_are_trained_on_as_many_images_of_their_classes_as_they_shall_be():
    population = replace(MANY, images_per_class=(1, 7, 60))
    kinds, image, _ = batches_over_steps(population, hosts=60, steps=10)
    for host in range(60):
        seen = image[host].unique()
        count = LABEL[seen].bincount(minlength=5)
        assert torch.equal(count > 0, kinds.traits.class_mask[host])
        most = kinds.images_per_class[host]
        if most < 60:  # 2,000 images hold all of 7 in 5 classes, though not all of 60
            assert (count[count > 0] == most).all()
        assert count.max() <= most
        often = LABEL[image[host]].bincount(minlength=5)[kinds.traits.class_mask[host]] / 2000
        assert (often * kinds.classes[host] - 1).abs().max() < 0.2


def test_hosts_of_the_same_classes_are_trained_on_other_images():
    population = Population(classes=(5,), images_per_class=(4,))
    _, image, _ = batches_over_steps(population, hosts=30, steps=2)
    sets = {tuple(row.unique().tolist()) for row in image}
    assert len(sets) == 30


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.9])
def test_a_share_of_the_images_has_one_wrong_label_of_the_host_for_the_whole_episode(noise):
    population = replace(MANY, label_noise=(noise,), images_per_class=(60,))
    kinds, image, label = batches_over_steps(population, hosts=60, steps=10)
    wrong_images, images = 0, 0
    for host in range(60):
        pairs = torch.stack((image[host], label[host]), 1).unique(dim=0)
        seen = pairs[:, 0]
        assert len(seen.unique()) == len(seen)  # an image has one label
        assert kinds.traits.class_mask[host][pairs[:, 1]].all()
        wrong_images += int((LABEL[seen] != pairs[:, 1]).sum())
        images += len(seen)
    assert wrong_images / images == pytest.approx(noise, abs=0.02)
    assert (wrong_images == 0) == (noise == 0)


def test_wrong_labels_are_spread_over_the_other_classes():
    population = Population(classes=(5,), label_noise=(0.8,), images_per_class=(60,))
    _, image, label = batches_over_steps(population, hosts=60, steps=4)
    often = torch.zeros(5, 5).index_put_(
        (LABEL[image].flatten(), label.flatten()), torch.ones(()), accumulate=True
    )
    assert (often / often.sum(1, keepdim=True) - 0.2).abs().max() < 0.03


def test_noise_is_another_in_the_next_episode():
    sampler = sampler_of(Population(classes=(5,), label_noise=(0.5,), images_per_class=(60,)))
    labels = []
    for episode in (0, 1):
        kinds = sampler.kinds(1, torch.full((1,), episode))
        image, label = sampler.batches(1, kinds, place_of(1, episode), count=4000)
        by_image = torch.full((300,), -1).scatter(0, image[0], label[0])
        labels.append(by_image)
    both = (labels[0] >= 0) & (labels[1] >= 0)
    assert both.sum() > 200
    agree = (labels[0] == labels[1])[both].double().mean().item()
    assert agree == pytest.approx(0.5 * 0.5 + 0.5 * 0.5 / 4, abs=0.1)


def test_a_host_never_predicts_a_class_that_it_does_not_have():
    env = SPEC.build(CPU, 1)
    env.reset()
    env.step(random_legal(env))
    kinds, hosts, split = env.kinds(), env.hosts, env.trainer.splits.validation
    before = env.trainer.measure(hosts.weights, hosts.slots, split, kinds)
    biases = hosts.weights.host[:, -5:]
    biases[~kinds.traits.class_mask] = 1e6
    after = env.trainer.measure(hosts.weights, hosts.slots, split, kinds)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert (before.accuracy[kinds.classes == 2] > 0.2).all()
    images = kinds.traits.class_mask[:, split.label].sum(1)
    right = before.accuracy * images  # whole images of the host's classes
    torch.testing.assert_close(right, right.round(), rtol=0, atol=1e-4)
    env.step(torch.zeros(24, 4, dtype=torch.int64))
    assert (biases[~kinds.traits.class_mask] > 9e5).all()  # there is nothing to learn from
    assert env.report.accuracy.isfinite().all()


def test_the_first_observation_tells_nothing_of_the_kind():
    env, alike = SPEC.build(CPU, 1), replace(SPEC, population=None).build(CPU, 1)
    first = env.reset()[0]
    assert torch.equal(first, first[:1].expand_as(first))
    assert torch.equal(first, alike.reset()[0])
    for _ in range(SPEC.epochs):
        result = env.step(random_legal(env))
    assert result.terminated.all()
    assert torch.equal(result.obs, first)
    assert not torch.equal(result.reached_obs[0], result.reached_obs[1])


MEASURED = ("loss_", "accuracy_", "_contribution", "_grad_norm", "_gain_since_germination")


def test_hidden_training_is_hidden_and_nothing_else_is():
    env, blind = (replace(SPEC, hide_training=hidden).build(CPU, 1) for hidden in (False, True))
    names = feature_names(2)
    measured = torch.tensor([any(part in name for part in MEASURED) for name in names])
    assert measured.sum() == 10 + 3 * 2
    seen = torch.zeros(len(names), dtype=torch.bool)
    pairs = [(env.reset()[0], blind.reset()[0])]
    for _ in range(SPEC.epochs - 1):
        action = random_legal(env)
        one, other = env.step(action), blind.step(action)
        assert torch.equal(one.reward, other.reward)
        pairs.append((one.obs, other.obs))
    for one, other in pairs:
        assert torch.equal(one[:, ~measured], other[:, ~measured])
        assert (other[:, measured] == 0).all()
        seen |= (one != 0).any(0)
    assert seen[measured].all()


def test_an_episode_of_another_seed_has_other_kinds():
    env = SPEC.build(CPU, 1)
    kinds = env.kinds()
    assert env.reseed(2)
    assert not torch.equal(kinds.class_order, env.kinds().class_order)
    env.reset()
    again = env.kinds()
    env.step(torch.tensor([[Op.WAIT, 0, 0, 0]] * 24))
    assert torch.equal(again.class_order, env.kinds().class_order)  # the same in every epoch


WAYS = {
    "planned": ({}, {}),
    "static": ({}, {"static": True}),
    "native": ({"compiled": True}, {}),
    "exact": ({}, {"dtype": torch.float64}),
}


def build(way, num_envs=24, seed=1):
    changes, how = WAYS[way]
    return replace(SPEC, num_envs=num_envs, **changes).build(CPU, seed, **how)


@pytest.mark.parametrize("way", ["planned", "static", "native"])
def test_every_way_computes_what_exact_hosts_compute(way):
    """Exact hosts equal hosts that are trained alone, whatever their kind."""
    one, other = build(way, 12), build("exact", 12)
    for a, b in zip(actions(one, 9), actions(other, 9), strict=True):
        torch.testing.assert_close(a.obs, b.obs.float(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.reward, b.reward.float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["planned", "static", "native"])
def test_environment_7_of_64_equals_environment_7_of_8(way):
    many, few, again = build(way, 64), build(way, 8), build(way, 8)
    few.trainer.chunk, steps = 3, 10 if way == "native" else 4
    for a, b, c in zip(*(actions(env, steps) for env in (many, few, again)), strict=True):
        assert same(b, c)  # two runs of a seed
        for one, other in zip(a, b, strict=True):
            exact = {} if one.is_floating_point() else {"rtol": 0, "atol": 0}
            tolerance = exact or {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(one[:8], other, equal_nan=True, **tolerance)


@pytest.mark.parametrize("way", ["planned", "native"])
def test_a_run_is_resumed_in_the_middle_of_blending(way):
    env, other = build(way), build(way, seed=99)
    for op in (Op.GERMINATE, Op.BLEND):
        env.step(torch.tensor([[op, 1, kind % 7, 2] for kind in range(24)]))
    assert (env.hosts.slots.stage[:, 1] == Stage.BLENDING).all()
    other.load_state_dict(env.state_dict())
    for one, two in zip(actions(env, 10), actions(other, 10), strict=True):
        assert same(one, two)  # over the end of an episode, after which kinds are others
    for name, tensor in env.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_replayed_step_equals_a_plain_step(monkeypatch):
    spec = replace(SPEC, num_envs=4)
    expected = play(spec.build(CPU, 4, static=True), 10, tests_ends=(3, 7))
    monkeypatch.setattr(env_module, "capture_function", lambda _, f, *, device: Replayed(f))
    at_once, later, end = play(spec.build(CPU, 4, static=True), 10, tests_ends=(3, 7))
    assert equal(at_once, expected[0])
    assert equal(later, expected[0])
    assert equal(end, expected[2])


@pytest.fixture
def _as_users_run_it():
    """Switches off the type checks of the test run, which would raise another error first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_as_users_run_it")
@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        ("classes", (), "be a tuple of integers of at least 2, got"),
        ("classes", (1, 2), "be a tuple of integers of at least 2, got"),
        ("classes", (2.5,), "be a tuple of integers of at least 2, got"),
        ("label_noise", (), "be a tuple of numbers in"),
        ("label_noise", (1.0,), "be a tuple of numbers in"),
        ("label_noise", (-0.1,), "be a tuple of numbers in"),
        ("label_noise", (float("nan"),), "be a tuple of numbers in"),
        ("images_per_class", (0,), "be a tuple of integers of at least 1, got"),
        ("learning_rate", (0.0,), "be a tuple of positive numbers, got"),
        ("learning_rate", (float("inf"),), "be a tuple of positive numbers, got"),
        ("width", (0.0,), "be a tuple of numbers in"),
        ("width", (1.1,), "be a tuple of numbers in"),
        ("width", 1.0, "be a tuple of numbers in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, values, rule):
    with pytest.raises(ValueError, match=rf"^Population\.{name} must {rule}"):
        Population(**{name: values})


def test_populations_that_the_data_cannot_serve_are_refused():
    with pytest.raises(ValueError, match=r"Population\.classes must be at most classes = 5, got"):
        replace(SPEC, population=Population(classes=(2, 6)))
    most = Morphogenesis.digits(population=Population(images_per_class=(8, 500)))
    with pytest.raises(ValueError, match=r"images_per_class must be at most \d\d, the training im"):
        most.check_data(CPU)
    few = replace(SPEC, validation_size=2)
    with pytest.raises(ValueError, match=r"validation_size must leave images of every class"):
        few.build(CPU, 0)
