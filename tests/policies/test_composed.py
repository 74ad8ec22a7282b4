"""Policies around a user's own network: built from a path, checked, reproducible."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.policies import Composed, Image, Imported, PolicySpec, Recurrent

VECTOR = EnvSpaces(obs=Box((4,)), action=Discrete(3))
GROUPS = EnvSpaces(obs={"a": Box((2,)), "b": Box((1, 2), low=0.0, high=1.0)}, action=Discrete(3))


@pytest.fixture(autouse=True)
def _users_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("networks", None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def refuses(message: str) -> Any:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


@pytest.mark.parametrize("path", ["", "Net", "networks:", "net works:Net", "networks.py/Net"])
def test_text_that_is_no_import_path_is_refused(path: str) -> None:
    rule = "must name a function or class as package.module:name"
    with refuses(f"Composed.encoder {rule}, got {path!r}."):
        Composed(encoder=path)
    with refuses(f"Imported.path {rule}, got {path!r}."):
        Imported(path=path)


BUILDS = "must build a torch.nn.Module from an observation space and its arguments, got"
MAPS = "must map observations [M, *O] to float32 features [M, H], got"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "networks:Nat"}, f"{BUILDS} 'networks:Nat'. AttributeError: "),
        ({"encoder": "nets.of.mine:Net"}, f"{BUILDS} 'nets.of.mine:Net'. ModuleNotFoundError: "),
        (
            {"encoder": "networks:Net", "encoder_args": {"witdh": 3}},
            f"{BUILDS} 'networks:Net'. TypeError: ",
        ),
        ({"encoder": "networks:number"}, "must build a torch.nn.Module, got 4."),
        *(
            ({"encoder": "networks.Wrong", "encoder_args": {"what": what}}, f"{MAPS} {got}")
            for what, got in {
                "tuple": "tuple.",
                "double": "[3, 4] of torch.float64 for 3 rows.",
                "vector": "[3] of torch.float32 for 3 rows.",
                "transposed": "[4, 3] of torch.float32 for 3 rows.",
                "raises": "'networks.Wrong'. RuntimeError: mat1 and mat2 shapes",
            }.items()
        ),
        *(
            (
                {"encoder": "networks.Net", "encoder_args": {"layer": layer}},
                "must give a row the same features in every batch, got others for 2 rows than for "
                "3. Batch normalisation and dropout are not possible",
            )
            for layer in ("BatchNorm", "Dropout")
        ),
        (
            {"encoder": "networks.Wrong", "encoder_args": {"what": "by batch"}},
            "must give a row the same features in every batch",
        ),
    ],
)
def test_a_network_that_cannot_serve_is_refused(settings: dict[str, Any], message: str) -> None:
    with refuses(f"Composed.encoder {message}"):
        Composed(**settings).build(VECTOR, seeded(0))


@pytest.mark.parametrize(
    ("spec", "spaces"),
    [
        (Composed(encoder="networks:Net"), VECTOR),
        (Composed(encoder="networks.Net", trunk="separate", hidden_sizes=(6,)), GROUPS),
        (Composed(encoder="networks:make", encoder_args={"width": 5}), GROUPS),
        (Recurrent(encoder=Imported(path="networks:make", args={"width": 5})), GROUPS),
        (
            Recurrent(
                encoder=Image(channels=(4,), kernels=(3,), strides=(1,), hidden_sizes=()),
                encoder_sizes=(),
            ),
            EnvSpaces(obs=Box((1, 5, 5), low=0.0, high=255.0), action=Discrete(3)),
        ),
    ],
)
def test_every_weight_learns_and_begins_by_the_generator_alone(
    spec: PolicySpec, spaces: EnvSpaces
) -> None:
    before = torch.get_rng_state()
    policy, again, other = (spec.build(spaces, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert not name.endswith("weight") or not torch.equal(value, other.state_dict()[name])
    boxes = {"": spaces.obs} if isinstance(spaces.obs, Box) else spaces.obs
    groups = {name: torch.rand(6, *box.shape, generator=seeded(1)) for name, box in boxes.items()}
    obs = groups[""] if isinstance(spaces.obs, Box) else groups
    first = groups[next(iter(groups))][:2]
    memory = None if policy.memory_size == 0 else policy.initial_memory(first)
    seen, _ = policy.unroll_memory(obs, memory, torch.zeros(6, dtype=torch.bool))
    result = policy.evaluate(seen, torch.arange(6) % 3, None)
    (result.log_prob.square().sum() + result.value.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_actor_and_critic_may_have_networks_of_their_own() -> None:
    separate = Composed(encoder="networks:Net", trunk="separate").build(VECTOR, seeded(0))
    actor, critic = separate.actor.state_dict(), separate.critic.state_dict()
    assert not torch.equal(actor["network.layers.0.weight"], critic["network.layers.0.weight"])
    shared = Composed(encoder="networks:Net").build(VECTOR, seeded(0))
    assert shared.actor is shared.critic


@pytest.mark.usefixtures("unchecked_types")
def test_an_encoder_that_is_no_spec_is_refused() -> None:
    with refuses("Recurrent.encoder must be an encoder spec, such as Image(), or None, got 'cnn'."):
        Recurrent(encoder="cnn")  # pyright: ignore[reportArgumentType]
