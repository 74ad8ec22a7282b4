"""Hosts trained together equal hosts trained alone, whatever grows in them."""

from dataclasses import replace

import pytest
import torch

from esper_lightning.envs.contract import sample_action
from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS
from esper_lightning.envs.morphogenesis.lifecycle import Op
from esper_lightning.envs.morphogenesis.observation import feature_names
from esper_lightning.envs.morphogenesis.population import Population
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, integers
from tests.envs.morphogenesis.reference import LoneHost

CPU = torch.device("cpu")
BATCHES = (slice(8), slice(8, 16))
W, G, B, F, P = ("WAIT", "GERMINATE", "BLEND", "FOSSILIZE", "PRUNE")
# op, slot, blueprint (added to the environment's own), ramp
SCRIPTS = [
    # every transition: isolation, blending, holding, fossilizing
    [(G, 0, 0, 0), (W, 0, 0, 0), (B, 0, 0, 1), (W, 0, 0, 0), (F, 0, 0, 0), (G, 2, 1, 0)],
    # pruned in isolation, in blending, in holding; a second life
    [(G, 1, 0, 0), (P, 1, 0, 0), (W, 0, 0, 0), (G, 1, 2, 0), (B, 1, 0, 1), (P, 1, 0, 0)],
    [(G, 2, 0, 0), (B, 2, 0, 0), (P, 2, 0, 0), (W, 0, 0, 0), (W, 0, 0, 0), (G, 2, 3, 0)],
    # one holds, one is fossilized, one trains
    [(G, 0, 0, 0), (B, 0, 0, 0), (G, 1, 4, 0), (B, 1, 0, 0), (F, 0, 0, 0), (G, 2, 5, 0)],
]


def spec_of(num_envs, **changes):
    return Morphogenesis.synthetic(
        **{
            "num_envs": num_envs,
            "image": (2, 8),
            "classes": 5,
            "channels": (4, 6, 8),
            "kernels": (3, 1, 3),
            "pools": (2, 1, 2),
            "train_batches": 2,
            "batch_size": 8,
            "validation_size": 24,
            "epochs": 20,
            "fade_epochs": 2,
            "learning_rate": 0.1,
            "max_grad_norm": 0.5,
            **changes,
        }
    )


POPULATION = Population(
    classes=(2, 5),
    label_noise=(0.0, 0.4),
    images_per_class=(3, 60),
    learning_rate=(0.02, 0.2),
    width=(0.3, 1.0),
)


@pytest.mark.parametrize("static", [False, True], ids=["planned", "static"])
@pytest.mark.parametrize("script", range(len(SCRIPTS)))
def test_hosts_trained_together_equal_each_trained_alone(script, static):
    count, tight = len(BLUEPRINTS), script % 2 == 1
    shape = ("linear", "cosine", "sigmoid", "linear")[script]
    # The head starts at zero: with so much clipping, only large steps make seeds matter.
    clipping = {"max_grad_norm": 0.01, "learning_rate": 20.0} if tight else {}
    spec = spec_of(count, ramp_shape=shape, **clipping)
    env = spec.build(CPU, 3, dtype=torch.float64, static=static)
    lone = [LoneHost(spec, row, torch.float64) for row in env.hosts.weights.host]
    for op, slot, shift, ramp in SCRIPTS[script]:
        # Each host has a blueprint of its own: together they grow every blueprint in every script.
        step_both(spec, env, lone, [(op, slot, (i + shift) % count, ramp) for i in range(count)])
    if tight:
        assert all(one.clipped == {"joint", "isolated"} for one in lone)


def test_observations_and_rewards_equal_those_of_lone_hosts_under_random_actions():
    """Actions are random, some of them illegal."""
    spec = spec_of(4, epochs=16)
    env = spec.build(CPU, 3, dtype=torch.float64)
    lone = [LoneHost(spec, row, torch.float64) for row in env.hosts.weights.host]
    generator, stages = torch.Generator().manual_seed(1), set()
    for step in range(14):
        mask = env.action_mask() if step % 4 else torch.ones_like(env.action_mask())
        action = sample_action(env.spaces.action, 4, mask, generator).tolist()
        step_both(spec, env, lone, [(Op(op).name, *rest) for op, *rest in action])
        stages |= {slot.stage for one in lone for slot in one.life.slots}
    assert len(stages) == 7


@pytest.mark.parametrize("static", [False, True], ids=["planned", "static"])
def test_hosts_of_every_kind_trained_together_equal_each_trained_alone(static):
    count = 24
    spec = spec_of(count, population=POPULATION, validation_size=40)
    env = spec.build(CPU, 3, dtype=torch.float64, static=static)
    kinds = env.kinds()
    drawn = kinds._asdict() | kinds.traits._asdict()
    for name, choices in vars(POPULATION).items():
        assert len(drawn[name].unique()) == len(choices)  # every choice takes part
    lone = [
        LoneHost(spec, row, torch.float64, kind_of(kinds, i))
        for i, row in enumerate(env.hosts.weights.host)
    ]
    for op, slot, shift, ramp in SCRIPTS[0]:
        actions = [(op, slot, (i + shift) % len(BLUEPRINTS), ramp) for i in range(count)]
        step_both(spec, env, lone, actions)


def kind_of(kinds, host):
    """What the reference must know of a host."""
    return {
        "classes": kinds.traits.class_mask[host].nonzero().flatten().tolist(),
        "channels_used": kinds.traits.channels_used[host].tolist(),
        "learning_rate": kinds.traits.learning_rate[host].item(),
    }


def batches_of(env, place):
    """Images and labels on which the hosts are trained next."""
    kinds, label = env.kinds(), env.trainer.splits.training.label
    if kinds is None:
        image = integers(3, Purpose.BATCHES, place, count=16, high=len(label))
        return image, label[image]
    return env.trainer.sampler.batches(3, kinds, place, count=16)


def step_both(spec, env, lone, actions):
    """A step of the environment and of each host alone; they must agree on everything."""
    tensor = torch.tensor([(Op[name], *rest) for name, *rest in actions])
    place = Place(torch.arange(len(lone)), env.hosts.episode, env.hosts.vitals.step)
    training, validation, _ = (
        (split.image.permute(0, 3, 1, 2), split.label) for split in env.trainer.splits
    )
    image, label = batches_of(env, place)
    drawn = germinated_rows(spec, env, tensor)
    result = env.step(tensor)
    names = feature_names(len(env.architecture.channels))
    for i, one in enumerate(lone):
        batches = [(training[0][image[i, part]], label[i, part]) for part in BATCHES]
        loss, accuracy, contribution = one.step(actions[i], drawn[i], batches, validation)
        host, seeds = one.rows()
        close(env.hosts.weights.host[i], host)
        for s, seed in seeds.items():
            close(env.hosts.weights.seeds[s][i, : len(seed)], seed)
        for s, norm in enumerate(one.host.norms):
            close(env.hosts.weights.means[s][i], norm.running_mean)
            # F.batch_norm and nn.BatchNorm2d both store the unbiased variance.
            close(env.hosts.weights.variances[s][i], norm.running_var)
        close(env.hosts.vitals.losses[i, 0], torch.tensor(loss, dtype=torch.float64))
        assert env.hosts.vitals.accuracies[i, 0].item() == pytest.approx(accuracy, abs=1e-6)
        for s, slot_state in enumerate(one.life.slots):
            assert env.hosts.slots.alpha[i, s].item() == pytest.approx(slot_state.alpha)
        for s, value in contribution.items():
            got = env.hosts.vitals.contribution[i, s].item()
            assert got == pytest.approx(value, abs=1e-6)
        seen = {name: x for name, x in zip(names, result.obs[i].tolist(), strict=True) if x}
        expected = {name: x for name, x in one.observe().items() if x}
        assert seen == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not result.terminated.any()


def germinated_rows(spec, env, action):
    """Parameters of each host's new seed, from a copy of the environment that makes the step."""
    if not (action[:, 0] == Op.GERMINATE).any():
        return [None] * env.num_envs
    slow = {"learning_rate": 1e-300}
    if spec.population is not None:
        slow = {"population": replace(spec.population, learning_rate=(1e-300,))}
    twin = replace(spec, **slow).build(CPU, 3, dtype=torch.float64)
    twin.load_state_dict(env.state_dict())
    twin.step(action)
    # The hosts did learn, by a small amount.
    seeds = [row.masked_fill(row.abs() < 1e-200, 0.0) for row in twin.hosts.weights.seeds]
    return [seeds[slot][i] for i, slot in enumerate(action[:, 1].tolist())]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
