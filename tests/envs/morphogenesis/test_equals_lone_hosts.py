"""Hosts trained together equal each trained alone, whatever grows in them."""

import pytest
import torch

from esper_lightning.envs.morphogenesis import Morphogenesis, MorphogenesisEnv
from esper_lightning.envs.morphogenesis.blueprints import BLUEPRINTS
from esper_lightning.envs.morphogenesis.lifecycle import Op
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, integers
from tests.envs.morphogenesis.reference import LoneHost

CPU = torch.device("cpu")
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


def lone_step(lone, env, action, drawn_seed, index):
    op, slot, blueprint, ramp = action
    if lone.life.act(op, slot, blueprint, ramp):
        lone.germinate(slot, drawn_seed)
    lone.life.tick()
    training, validation, _ = env._splits
    image = training.image.permute(0, 3, 1, 2)
    lone.train([(image[rows], training.label[rows]) for rows in index])
    return lone.measure(validation.image.permute(0, 3, 1, 2), validation.label)


@pytest.mark.parametrize("static", [False, True], ids=["planned", "static"])
@pytest.mark.parametrize("script", range(len(SCRIPTS)))
def test_hosts_trained_together_equal_each_trained_alone(script, static):
    count = len(BLUEPRINTS)
    spec = spec_of(count, ramp_shape=("linear", "cosine", "sigmoid", "linear")[script])
    env = MorphogenesisEnv(spec, device=CPU, seed=3, dtype=torch.float64, static=static)
    lone = [LoneHost(spec, row, torch.float64) for row in env.hosts.weights.host]
    for op, slot, shift, ramp in SCRIPTS[script]:
        # Each host its own blueprint: between them they grow every one in every script.
        actions = [(op, slot, (i + shift) % count, ramp) for i in range(count)]
        tensor = torch.tensor([(Op[name], *rest) for name, *rest in actions])
        place = Place(torch.arange(count), env.hosts.episode, env.hosts.vitals.step)
        index = integers(
            3, Purpose.BATCHES, place, count=16, high=env._splits.training.label.shape[0]
        ).unflatten(1, (2, 8))
        drawn = germinated_rows(env, tensor)
        result = env.step(tensor)
        for i, one in enumerate(lone):
            row = None if drawn is None else drawn[i]
            loss, accuracy, contribution = lone_step(one, env, actions[i], row, index[i])
            host, seeds = one.rows()
            close(env.hosts.weights.host[i], host)
            for s, seed in seeds.items():
                close(env.hosts.weights.seeds[s][i, : len(seed)], seed)
            for s, norm in enumerate(one.host.norms):
                close(env.hosts.weights.means[s][i], norm.running_mean)
                # F.batch_norm and nn.BatchNorm2d both keep the unbiased variance.
                close(env.hosts.weights.variances[s][i], norm.running_var)
            close(env.hosts.vitals.losses[i, 0], torch.tensor(loss, dtype=torch.float64))
            assert env.hosts.vitals.accuracies[i, 0].item() == pytest.approx(accuracy, abs=1e-6)
            for s, slot_state in enumerate(one.life.slots):
                assert env.hosts.slots.alpha[i, s].item() == pytest.approx(slot_state.alpha)
            for s, value in contribution.items():
                got = env.hosts.vitals.contribution[i, s].item()
                assert got == pytest.approx(value, abs=1e-6)
        assert not result.terminated.any()


def germinated_rows(env, action):
    """What new seeds will be, from a copy of the environment that makes the same step."""
    if action[0, 0] != Op.GERMINATE:
        return None
    twin = MorphogenesisEnv(
        spec_of(env.num_envs, ramp_shape=env.spec.ramp_shape, learning_rate=1e-300),
        device=CPU,
        seed=3,
        dtype=torch.float64,
    )
    twin.load_state_dict(env.state_dict())
    twin.step(action)
    row = twin.hosts.weights.seeds[int(action[0, 1])]
    return row.masked_fill(row.abs() < 1e-200, 0.0)  # it did learn, by that little


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
