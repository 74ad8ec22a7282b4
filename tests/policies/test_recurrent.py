"""Policies with memory: their settings, and that acting and learning agree."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from esper_lightning.core.spaces import (
    Box,
    Discrete,
    EnvSpaces,
    FactoredDiscrete,
    Head,
    MultiDiscrete,
    mask_size,
)
from esper_lightning.core.types import Observation
from esper_lightning.policies import MLP, Policy, PolicySpec, Recurrent

STEPS, ROWS = 7, 6
FACTORED = FactoredDiscrete(
    (Head("op", 3), Head("slot", 2, used_by=(1,), conditioned=True), Head("kind", 2, used_by=(2,)))
)
CASES = {
    "gru": (Recurrent(), EnvSpaces(obs=Box((4,)), action=Discrete(5))),
    "lstm": (Recurrent(cell="lstm"), EnvSpaces(obs=Box((4,)), action=Discrete(5))),
    "no encoder": (
        Recurrent(encoder_sizes=(), hidden_sizes=(8, 8), memory_size=5),
        EnvSpaces(obs=Box(()), action=MultiDiscrete((2, 3)), masked=True),
    ),
    "factored": (
        Recurrent(activation="relu"),
        EnvSpaces(obs=Box((2, 2)), action=FACTORED, masked=True),
    ),
    "continuous": (
        Recurrent(cell="lstm", action_bounds="tanh"),
        EnvSpaces(obs=Box((3,)), action=Box((2,), low=-2.0, high=2.0)),
    ),
    "groups": (
        Recurrent(),
        EnvSpaces(obs={"b": Box((2,)), "a": Box((2, 2))}, action=Discrete(3)),
    ),
}
each_case = pytest.mark.parametrize(("spec", "spaces"), CASES.values(), ids=CASES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(spec: PolicySpec, spaces: EnvSpaces) -> Policy:
    """A policy with weights unlike those of the start, in double precision."""
    policy, generator = spec.build(spaces, seeded(0)), seeded(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return policy


def random_obs(spaces: EnvSpaces, dtype: torch.dtype = torch.float32) -> Observation:
    """[T, M, *O]"""
    boxes = {"": spaces.obs} if isinstance(spaces.obs, Box) else spaces.obs
    obs = {
        name: torch.randn(STEPS, ROWS, *box.shape, generator=seeded(1)).to(dtype)
        for name, box in boxes.items()
    }
    return obs[""] if isinstance(spaces.obs, Box) else obs


def at(obs: Observation, t: int) -> Observation:
    return obs[t] if isinstance(obs, Tensor) else {name: value[t] for name, value in obs.items()}


def flat(obs: Observation) -> Observation:
    if isinstance(obs, Tensor):
        return obs.flatten(0, 1)
    return {name: value.flatten(0, 1) for name, value in obs.items()}


def ends() -> Tensor:
    ended = torch.rand(STEPS, ROWS, generator=seeded(2)) < 0.3
    ended[2, 0] = True
    return ended


def random_mask(spaces: EnvSpaces) -> Tensor | None:
    if not spaces.masked:
        return None
    mask = torch.rand(STEPS, ROWS, mask_size(spaces.action), generator=seeded(3)) < 0.5
    mask[..., ::2] = True  # no two neighbours are forbidden
    return mask


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cell": "rnn"}, "Recurrent.cell must be one of gru, lstm, got 'rnn'."),
        ({"memory_size": 0}, "Recurrent.memory_size must be at least 1, got 0."),
        (
            {"encoder_sizes": (0,)},
            "Recurrent.encoder_sizes must be widths of at least 1, got (0,).",
        ),
        (
            {"hidden_sizes": ()},
            "Recurrent.hidden_sizes must be one or more widths of at least 1, got ().",
        ),
        (
            {"activation": "sin"},
            "Recurrent.activation must be one of tanh, relu, elu, gelu, silu, got 'sin'.",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Recurrent(**settings)


def test_an_action_space_without_a_head_is_refused_in_the_name_of_the_policy() -> None:
    spaces = EnvSpaces(obs=Box((2,)), action=Box((1,)))
    with pytest.raises(ValueError, match=r"^Recurrent\.action_bounds must be 'clip' where"):
        Recurrent(action_bounds="tanh").build(spaces, seeded(0))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sequence_unrolls_as_it_was_seen_step_by_step(spec, spaces, dtype) -> None:
    """Episodes end within the sequence; in double precision results agree to their last bit."""
    policy = trained(spec, spaces).to(dtype)
    obs, mask, ended = random_obs(spaces, dtype), random_mask(spaces), ends()
    noise = policy.noise((STEPS, ROWS), seeded(4))
    first = torch.randn(ROWS, policy.memory_size, generator=seeded(6)).to(dtype)
    memory, acted, values = first, [], []
    with torch.no_grad():
        for t in range(STEPS):
            seen, memory = policy.step_memory(at(obs, t), memory)
            acted.append(policy.act(seen, None if mask is None else mask[t], noise[t]))
            values.append(policy.value(seen))
            memory = policy.reset_memory(memory, ended[t])
        begins = torch.cat([torch.zeros_like(ended[:1]), ended[:-1]])
        # Some sequences alone, as in a minibatch.
        for rows in (slice(None), slice(1, 3), slice(3, 4)):
            of_rows = flat(
                obs[:, rows] if isinstance(obs, Tensor) else {k: v[:, rows] for k, v in obs.items()}
            )
            seen, _ = policy.unroll_memory(of_rows, first[rows], begins[:, rows].flatten())
            action = torch.stack([a.action for a in acted])[:, rows].flatten(0, 1)
            allowed = None if mask is None else mask[:, rows].flatten(0, 1)
            evaluation = policy.evaluate(seen, action, allowed)
            log_prob = torch.stack([a.log_prob for a in acted])[:, rows].flatten()
            value = torch.stack(values)[:, rows].flatten()
            if dtype == torch.float64:  # densities themselves are computed in single precision
                assert isinstance(spaces.action, Box) or torch.equal(evaluation.log_prob, log_prob)
                assert torch.equal(evaluation.value, value)
            torch.testing.assert_close(evaluation.log_prob, log_prob, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(evaluation.value, value, rtol=1e-5, atol=2e-6)
    assert {result.dtype for result in evaluation} == {torch.float32}


@each_case
def test_every_weight_learns(spec, spaces) -> None:
    policy = trained(spec, spaces)
    obs, mask = random_obs(spaces), random_mask(spaces)
    first = policy.initial_memory(at(obs, 0))
    assert first is not None
    assert first.shape == (ROWS, policy.memory_size)
    assert not first.any()
    seen, _ = policy.unroll_memory(flat(obs), first, ends().flatten())
    allowed = None if mask is None else mask.flatten(0, 1)
    action = policy.act_deterministically(seen, allowed)
    evaluation = policy.evaluate(seen, action, allowed)
    (evaluation.value.sum() + evaluation.log_prob.sum() + evaluation.entropy.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_earlier_observations_count_until_the_episode_ends() -> None:
    spec, spaces = CASES["gru"]
    policy = trained(spec, spaces)
    obs = random_obs(spaces)
    other = obs.clone()
    other[0] += 1.0
    begins = torch.zeros(STEPS, ROWS, dtype=torch.bool)
    begins[3, 0] = True
    first = torch.zeros(ROWS, policy.memory_size)
    one, two = (
        policy.value(policy.unroll_memory(flat(o), first, begins.flatten())[0]).view(STEPS, ROWS)
        for o in (obs, other)
    )
    same = one == two
    assert same[3:, 0].all()
    assert not same[:3].any()
    assert not same[:, 1:].any()


def test_the_first_weights_depend_on_the_generator_alone() -> None:
    spec, spaces = CASES["lstm"]
    before = torch.get_rng_state()
    first, again, other = (spec.build(spaces, seeded(s)).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name]) or not name.endswith("weight")
    for gate in first["from_memory.weight"].chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=0, atol=1e-5)


def test_a_policy_without_memory_carries_nothing() -> None:
    policy = MLP().build(EnvSpaces(obs=Box((4,)), action=Discrete(2)), seeded(0))
    obs, no = torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool)
    assert policy.initial_memory(obs) is None
    for seen, memory in (policy.step_memory(obs, None), policy.unroll_memory(obs, None, None)):
        assert seen is obs
        assert memory is None
    assert policy.reset_memory(None, no) is None


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_results_are_single_precision_under_autocast(cell) -> None:
    _, spaces = CASES["gru"]
    policy = trained(Recurrent(cell=cell), spaces)
    obs = random_obs(spaces)

    def results() -> tuple[Tensor, ...]:
        first = policy.initial_memory(at(obs, 0))
        seen, _ = policy.unroll_memory(flat(obs), first, ends().flatten())
        action = torch.zeros(STEPS * ROWS, dtype=torch.int64)
        return seen, *policy.evaluate(seen, action, None)

    exact = results()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results()
    for got, expected in zip(rounded, exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)
