"""The multi-layer perceptron: its settings, its two sides, and that acting and learning agree."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_lightning.core.spaces import Box, Discrete, EnvSpaces, MultiDiscrete, mask_size
from esper_lightning.core.types import Observation
from esper_lightning.policies import MLP, Policy, PolicySpec

ROWS = 32
GROUPS = {"joints": Box((3,)), "image": Box((2, 2)), "goal": Box((1,))}
BOUNDED = Box((2,), low=(-2.0, 0.0), high=(2.0, 10.0))

CASES = {
    "discrete": (MLP(), EnvSpaces(obs=Box((4,)), action=Discrete(5))),
    "masked": (MLP(), EnvSpaces(obs=Box((4,)), action=Discrete(5), masked=True)),
    "masked choices": (
        MLP(activation="elu"),
        EnvSpaces(obs=Box((2, 2)), action=MultiDiscrete((2, 3)), masked=True),
    ),
    "clip": (MLP(trunk="shared"), EnvSpaces(obs=Box((4,)), action=BOUNDED)),
    "tanh": (MLP(action_bounds="tanh"), EnvSpaces(obs=Box((4,)), action=BOUNDED)),
    "unbounded": (MLP(hidden_sizes=(8,)), EnvSpaces(obs=Box(()), action=Box((2, 3)))),
    "groups": (
        MLP(actor_obs=("joints",), critic_obs=("goal", "image")),
        EnvSpaces(obs=GROUPS, action=Discrete(3)),
    ),
}
each_case = pytest.mark.parametrize(("spec", "spaces"), CASES.values(), ids=CASES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_obs(spaces: EnvSpaces, seed: int = 1) -> Observation:
    generator = seeded(seed)
    if isinstance(spaces.obs, Box):
        return torch.randn(ROWS, *spaces.obs.shape, generator=generator)
    return {
        name: torch.randn(ROWS, *box.shape, generator=generator) for name, box in spaces.obs.items()
    }


def random_mask(spaces: EnvSpaces) -> Tensor | None:
    if not spaces.masked:
        return None
    mask = torch.rand(ROWS, mask_size(spaces.action), generator=seeded(2)) < 0.5
    mask[:, 0] = True  # at least one choice of every component
    if isinstance(spaces.action, MultiDiscrete):
        mask[:, spaces.action.nvec[0]] = True
    return mask


def trained(policy: Policy) -> Policy:
    """Move the weights away from the nearly uniform policy and the zero biases of the start."""
    generator = seeded(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return policy


def refuses(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"hidden_sizes": ()},
            "MLP.hidden_sizes must be one or more widths of at least 1, got ().",
        ),
        (
            {"hidden_sizes": (64, 0)},
            "MLP.hidden_sizes must be one or more widths of at least 1, got (64, 0).",
        ),
        (
            {"activation": "sigmoid"},
            "MLP.activation must be one of tanh, relu, elu, gelu, silu, got 'sigmoid'.",
        ),
        ({"trunk": "twin"}, "MLP.trunk must be one of separate, shared, got 'twin'."),
        (
            {"action_bounds": "squash"},
            "MLP.action_bounds must be one of clip, tanh, got 'squash'.",
        ),
        ({"initial_std": 0.0}, "MLP.initial_std must lie in (0, 100), got 0.0."),
        ({"initial_std": float("nan")}, "MLP.initial_std must lie in (0, 100), got nan."),
        (
            {"actor_obs": ()},
            "MLP.actor_obs must name at least one group, or be None for all, got ().",
        ),
        (
            {"trunk": "shared", "actor_obs": ("a",), "critic_obs": ("b",)},
            "MLP.critic_obs must equal MLP.actor_obs for a shared trunk, got ('b',).",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with refuses(message):
        MLP(**settings)


def test_groups_that_do_not_exist_are_refused() -> None:
    spaces = EnvSpaces(obs=GROUPS, action=Discrete(2))
    with refuses(
        "MLP.critic_obs must name groups of the observation (joints, image, goal), got 'gaol'."
    ):
        MLP(critic_obs=("goal", "gaol")).build(spaces, seeded(0))
    spaces = EnvSpaces(obs=Box((2,)), action=Discrete(2))
    with refuses("MLP.actor_obs must name groups of the observation (it has none), got 'joints'."):
        MLP(actor_obs=("joints",)).build(spaces, seeded(0))


def test_an_action_space_without_a_head_is_refused_in_the_name_of_the_policy() -> None:
    with refuses(
        "MLP.action_bounds must be 'clip' where the action space has no bounds, got 'tanh'."
    ):
        MLP(action_bounds="tanh").build(EnvSpaces(obs=Box((2,)), action=Box((1,))), seeded(0))


def test_any_class_with_build_is_a_spec() -> None:
    class Other:
        def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
            raise NotImplementedError

    assert isinstance(Other(), PolicySpec)
    assert isinstance(MLP(), PolicySpec)
    assert not isinstance(object(), PolicySpec)
    assert MLP() == MLP()


# --- acting and learning ---


@each_case
def test_acting_and_learning_agree_on_log_probability_and_value(
    spec: MLP, spaces: EnvSpaces
) -> None:
    policy = trained(spec.build(spaces, seeded(0)))
    obs, mask = random_obs(spaces), random_mask(spaces)
    with torch.no_grad():
        action, log_prob = policy.act(obs, mask, policy.noise((ROWS,), seeded(3)))
    evaluation = policy.evaluate(obs, action, mask)
    torch.testing.assert_close(evaluation.log_prob, log_prob)
    torch.testing.assert_close(evaluation.value, policy.value(obs))
    assert {value.dtype for value in evaluation} == {torch.float32}
    assert {tuple(value.shape) for value in evaluation} == {(ROWS,)}
    repeated, _ = policy.act(obs, mask, policy.noise((ROWS,), seeded(3)))
    assert torch.equal(action, repeated)


@each_case
def test_acting_deterministically_is_more_probable_than_any_sample(
    spec: MLP, spaces: EnvSpaces
) -> None:
    policy = trained(spec.build(spaces, seeded(0)))
    obs, mask = random_obs(spaces), random_mask(spaces)
    most = policy.act_deterministically(obs, mask)
    if spec.action_bounds == "tanh":  # the median; the mode of the squashed density has no formula
        policy.action_head.log_std.data.fill_(-3.0)
    greatest = policy.evaluate(obs, most, mask).log_prob
    for seed in range(20):
        _, log_prob = policy.act(obs, mask, policy.noise((ROWS,), seeded(seed)))
        if spec.action_bounds == "tanh":
            assert (greatest >= log_prob).float().mean() > 0.5
        else:
            assert (greatest >= log_prob).all()


@each_case
def test_actions_obey_the_space_and_the_mask(spec: MLP, spaces: EnvSpaces) -> None:
    policy = trained(spec.build(spaces, seeded(0)))
    obs, mask = random_obs(spaces), random_mask(spaces)
    space = spaces.action
    sampled, _ = policy.act(obs, mask, policy.noise((ROWS,), seeded(3)))
    for sample in (sampled, policy.act_deterministically(obs, mask)):
        action = policy.to_env(sample)
        if isinstance(space, Box):
            assert action.shape == (ROWS, *space.shape)
            flat = action.flatten(1)
            assert (flat >= torch.tensor(space.lows)).all()
            assert (flat <= torch.tensor(space.highs)).all()
            continue
        sizes = space.nvec if isinstance(space, MultiDiscrete) else (space.n,)
        components = action.view(ROWS, len(sizes))
        assert ((components >= 0) & (components < torch.tensor(sizes))).all()
        if mask is not None:
            for a, allowed in enumerate(mask.split(sizes, -1)):
                assert allowed.gather(-1, components[:, a, None]).all()


@each_case
def test_the_first_weights_depend_on_the_generator_alone(spec: MLP, spaces: EnvSpaces) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        return spec.build(spaces, seeded(seed)).state_dict()

    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(
        not torch.equal(first[name], other[name]) for name in first if name.endswith("weight")
    )
    assert all(value.device.type == "cpu" for value in first.values())


def test_the_value_starts_with_gain_1_and_the_actor_with_a_hundredth() -> None:
    policy = MLP().build(EnvSpaces(obs=Box((4,)), action=Discrete(3)), seeded(0))
    for head, gain in ((policy.value_head, 1.0), (policy.action_head.logits, 0.01)):
        norm = head.weight.norm(dim=1)
        torch.testing.assert_close(norm, torch.full_like(norm, gain))


# --- actor and critic ---


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_the_value_reaches_the_actors_layers_only_through_a_shared_trunk(trunk) -> None:
    spaces = EnvSpaces(obs=Box((4,)), action=Discrete(3))
    policy = MLP(trunk=trunk).build(spaces, seeded(0))
    obs = random_obs(spaces)
    action = policy.act_deterministically(obs, None)

    def touched(of: str) -> set[str]:
        policy.zero_grad()
        getattr(policy.evaluate(obs, action, None), of).sum().backward()
        named = policy.named_parameters(remove_duplicate=False)
        return {
            name.split(".")[0] for name, p in named if p.grad is not None and p.grad.abs().sum() > 0
        }

    both = {"actor", "critic"} if trunk == "shared" else set()
    assert touched("value") == {"critic", "value_head"} | both
    assert touched("log_prob") == {"actor", "action_head"} | both
    assert touched("entropy") == {"actor", "action_head"} | both


def test_a_shared_trunk_is_counted_once() -> None:
    spaces = EnvSpaces(obs=Box((4,)), action=Discrete(3))
    sizes = [
        sum(p.numel() for p in MLP(trunk=trunk).build(spaces, seeded(0)).parameters())
        for trunk in ("separate", "shared")
    ]
    layers = 4 * 64 + 64 + 64 * 64 + 64
    heads = 64 * 3 + 3 + 64 + 1
    assert sizes == [2 * layers + heads, layers + heads]


def test_actor_and_critic_see_their_own_groups() -> None:
    spec, spaces = CASES["groups"]
    policy = trained(spec.build(spaces, seeded(0)))
    obs, other = random_obs(spaces, 1), random_obs(spaces, 2)
    action = policy.act_deterministically(obs, None)
    base = policy.evaluate(obs, action, None)
    for group in GROUPS:
        changed = policy.evaluate({**obs, group: other[group]}, action, None)
        assert torch.equal(changed.log_prob, base.log_prob) == (group != "joints"), group
        assert torch.equal(changed.value, base.value) == (group == "joints"), group


@pytest.mark.parametrize("groups", [None, ("goal", "joints", "image")])
def test_the_order_of_groups_in_an_observation_does_not_matter(groups) -> None:
    spaces = EnvSpaces(obs=GROUPS, action=Discrete(3))
    policy = trained(MLP(actor_obs=groups, critic_obs=groups).build(spaces, seeded(0)))
    obs = random_obs(spaces)
    turned = {name: obs[name] for name in reversed(GROUPS)}
    action = policy.act_deterministically(obs, None)
    for one, other in zip(
        policy.evaluate(obs, action, None), policy.evaluate(turned, action, None), strict=True
    ):
        assert torch.equal(one, other)


@each_case
def test_results_are_single_precision_under_autocast(spec: MLP, spaces: EnvSpaces) -> None:
    policy = trained(spec.build(spaces, seeded(0)))
    obs, mask = random_obs(spaces), random_mask(spaces)
    action, _ = policy.act(obs, mask, policy.noise((ROWS,), seeded(3)))
    exact = policy.evaluate(obs, action, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy.evaluate(obs, action, mask)
        noise = policy.noise((ROWS,), seeded(3))
        assert policy.act(obs, mask, noise).log_prob.dtype == torch.float32
        assert policy.value(obs).dtype == torch.float32
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
