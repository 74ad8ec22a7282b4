"""Action heads: the spaces that they fit, the actions that they return, and what they refuse."""

import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import distributions

from esper_lightning.core.spaces import ActionSpace, Box, Discrete, MultiDiscrete
from esper_lightning.policies.heads import ActionHead, GaussianHead, action_head

FEATURES = 8


def make(space: ActionSpace, *, bounds="clip", initial_std: float = 1.0) -> ActionHead:
    generator = torch.Generator().manual_seed(0)
    return action_head(
        FEATURES,
        space,
        owner="MLP",
        bounds=bounds,
        initial_std=initial_std,
        generator=generator,
    )


def features(rows: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("space", [Discrete(5), MultiDiscrete((2, 3))])
def test_the_first_policy_over_choices_is_nearly_uniform(space: ActionSpace) -> None:
    sizes = space.nvec if isinstance(space, MultiDiscrete) else (space.n,)
    entropy = make(space)(features(20), None).entropy()
    uniform = sum(math.log(n) for n in sizes)
    torch.testing.assert_close(entropy, torch.full((20,), uniform), rtol=0, atol=1e-3)


@pytest.mark.parametrize("space", [Discrete(5), MultiDiscrete((2, 3))])
def test_choices_reach_the_environment_as_they_are(
    space: ActionSpace, generator: torch.Generator
) -> None:
    head = make(space)
    action = head(features(20), None).sample(head.noise((20,), generator))
    assert action.dtype == torch.int64
    assert torch.equal(head.to_env(action), action)


def test_a_mask_reaches_every_component(generator: torch.Generator) -> None:
    mask = torch.tensor([True, False, False, True, False]).expand(50, 5)
    head = make(MultiDiscrete((2, 3)))
    action = head(features(50), mask).sample(head.noise((50,), generator))
    assert torch.equal(action, torch.tensor([0, 1]).expand(50, 2))


@pytest.mark.parametrize("initial_std", [0.5, 2.0])
def test_the_first_gaussian_has_mean_near_zero_and_the_deviation_asked_for(
    initial_std: float,
) -> None:
    distribution = make(Box((3,), low=-5.0, high=5.0), initial_std=initial_std)(features(20), None)
    assert distribution.mode().abs().max() < 0.1
    normal = distributions.Normal(0.0, initial_std)
    torch.testing.assert_close(distribution.entropy(), 3 * normal.entropy().expand(20))


@example(-2.9, 8.2, 0)  # in single precision low + (high - low) lies above high
@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(0, 1000))
def test_actions_stay_within_the_bounds_and_reach_them(low: float, width: float, seed: int) -> None:
    space = Box((2,), low=(low, -1.0), high=(low + width, 3.0))
    lows, highs = torch.tensor(space.lows), torch.tensor(space.highs)
    sample = 100.0 * torch.randn(50, 2, generator=torch.Generator().manual_seed(seed))
    sample = torch.cat([sample, torch.full((1, 2), 1e6), torch.full((1, 2), -1e6)])
    for bounds in ("clip", "tanh"):
        action = make(space, bounds=bounds).to_env(sample)
        assert ((lows <= action) & (action <= highs)).all()
        rounding = 1e-6 * max(abs(low), width, 3.0)
        torch.testing.assert_close(action[-2], highs, rtol=0, atol=rounding)
        torch.testing.assert_close(action[-1], lows, rtol=0, atol=rounding)


def test_the_units_of_a_bounded_gaussian_are_minus_1_to_1() -> None:
    space = Box((2,), low=(-2.0, 0.0), high=(2.0, 10.0))
    sample = torch.tensor([[0.0, 0.5], [-0.5, 3.0], [1.0, -1.0]])
    clipped = make(space).to_env(sample)
    torch.testing.assert_close(clipped, torch.tensor([[0.0, 7.5], [-1.0, 10.0], [2.0, 0.0]]))
    squashed = make(space, bounds="tanh").to_env(sample)
    torch.testing.assert_close(squashed, make(space).to_env(sample.tanh()))


def test_without_bounds_actions_are_taken_as_they_are() -> None:
    sample = torch.tensor([[1e6, -3.0]])
    assert torch.equal(make(Box((2,))).to_env(sample), sample)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_actions_get_the_shape_of_the_space(
    shape: tuple[int, ...], generator: torch.Generator
) -> None:
    for space in (Box(shape), Box(shape, low=-1.0, high=1.0)):
        head = make(space)
        sample = head(features(4), None).sample(head.noise((4,), generator))
        assert sample.shape == (4, math.prod(shape))
        action = head.to_env(sample)
        assert action.shape == (4, *shape)
        torch.testing.assert_close(action.flatten(), head.to_env(sample).reshape(-1))


def test_squashing_changes_the_density_and_clipping_does_not() -> None:
    space, u = Box((1,), low=-1.0, high=1.0), torch.tensor([[0.7]])
    log_prob = {}
    for bounds in ("clip", "tanh"):
        log_prob[bounds] = make(space, bounds=bounds)(features(1), None).log_prob(u).item()
    slope = 1.0 - math.tanh(0.7) ** 2
    assert log_prob["tanh"] - log_prob["clip"] == pytest.approx(-math.log(slope), rel=1e-4)


def test_bounds_move_with_the_head_but_are_no_weights() -> None:
    head = make(Box((2,), low=-1.0, high=1.0))
    assert isinstance(head, GaussianHead)
    assert set(head.state_dict()) == {"mean.weight", "mean.bias", "log_std"}
    assert {head.to("meta").low.device.type, head.high.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("space", "bounds", "message"),
    [
        (
            Box((2,), low=0.0),
            "clip",
            "MLP's action space must be bounded everywhere or nowhere, got "
            "Box(shape=(2,), low=0.0, high=inf, dtype='float32'). Bound both sides of every "
            "component, or none.",
        ),
        (
            Box((2,), low=(-1.0, -math.inf), high=(1.0, math.inf)),
            "tanh",
            "MLP's action space must be bounded everywhere or nowhere, got Box(shape=(2,), "
            "low=(-1.0, -inf), high=(1.0, inf), dtype='float32'). Bound both sides of every "
            "component, or none.",
        ),
        (
            Box((2,)),
            "tanh",
            "MLP.action_bounds must be 'clip' where the action space has no bounds, got 'tanh'.",
        ),
        (
            "Text",
            "clip",
            "MLP's action space must be Discrete, MultiDiscrete, FactoredDiscrete or Box, "
            "got 'Text'.",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_spaces_that_fit_no_head_are_refused(space, bounds: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(space, bounds=bounds)
