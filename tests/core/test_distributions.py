"""Action distributions against torch.distributions: masks, tails and samples."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributions

from esper_lightning.compiling.tracing import Traced
from esper_lightning.core.distributions import (
    Categorical,
    DiagonalGaussian,
    Distribution,
    FactoredCategorical,
    TanhGaussian,
)

NVEC = (2, 3, 4)
seeds = st.integers(0, 10_000)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exponential(rows: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.empty(rows, size).exponential_(generator=generator)


def logits_and_mask(
    seed: int, rows: int, choices: int, *, scale: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Random logits, and a mask that allows at least one choice of each row."""
    generator = seeded(seed)
    logits = scale * torch.randn(rows, choices, generator=generator)
    mask = torch.rand(rows, choices, generator=generator) < 0.5
    mask[torch.arange(rows), torch.randint(choices, (rows,), generator=generator)] = True
    return logits, mask


def assert_frequencies(counts: Tensor, probability: Tensor, *, greatest_chi_square: float) -> None:
    """Pearson's test of frequencies; an outcome of probability zero must not have occurred."""
    possible = probability > 0
    assert counts[~possible].sum() == 0
    expected = probability[possible] * counts.sum()
    chi_square = ((counts[possible] - expected).square() / expected).sum().item()
    assert chi_square < greatest_chi_square


# --- one choice ---


@given(seeds, st.sampled_from([0.1, 2.0, 50.0]))
def test_a_categorical_equals_that_of_torch(seed: int, scale: float) -> None:
    logits, _ = logits_and_mask(seed, 6, 4, scale=scale)
    ours, reference = Categorical(logits), distributions.Categorical(logits=logits)
    for choice in range(4):
        action = torch.full((6,), choice)
        torch.testing.assert_close(ours.log_prob(action), reference.log_prob(action))
    torch.testing.assert_close(ours.entropy(), reference.entropy())
    assert torch.equal(ours.mode(), reference.mode)


@given(seeds)
def test_a_mask_leaves_the_renormalised_distribution_over_allowed_choices(seed: int) -> None:
    logits, mask = logits_and_mask(seed, 6, 5)
    ours = Categorical(logits, mask)
    entropy, mode = ours.entropy(), ours.mode()
    for row in range(6):
        allowed = mask[row].nonzero()[:, 0]
        reference = distributions.Categorical(logits=logits[row, allowed])
        torch.testing.assert_close(entropy[row], reference.entropy())
        assert mode[row] == allowed[reference.mode]
        for index, choice in enumerate(allowed):
            log_prob = ours.log_prob(torch.full((6,), int(choice)))[row]
            torch.testing.assert_close(log_prob, reference.log_prob(torch.tensor(index)))
        for choice in (~mask[row]).nonzero()[:, 0]:
            assert ours.log_prob(torch.full((6,), int(choice)))[row].exp() == 0.0


@pytest.mark.parametrize("beyond", [100.0, torch.inf, torch.nan])
@given(seeds)
def test_no_value_and_no_gradient_depends_on_a_forbidden_logit(beyond: float, seed: int) -> None:
    logits, mask = logits_and_mask(seed, 6, 5)

    def gradient(logits: Tensor) -> Tensor:
        logits = logits.clone().requires_grad_()
        ours = Categorical(logits, mask)
        action = ours.mode()
        assert mask.gather(-1, action[:, None]).all()
        (ours.log_prob(action) + ours.entropy()).sum().backward()
        assert logits.grad is not None
        return logits.grad

    got = gradient(logits)
    assert got.isfinite().all()
    assert (got[~mask] == 0.0).all()
    several = mask.sum(-1) > 1
    assert got[several].abs().sum(-1).gt(0).all()
    assert torch.equal(gradient(logits.masked_fill(~mask, beyond)), got)


def test_a_single_allowed_choice_is_certain(generator: torch.Generator) -> None:
    logits = torch.tensor([[3.0, -8.0, 0.0]], requires_grad=True)
    ours = Categorical(logits, torch.tensor([[False, True, False]]))
    action = ours.sample(exponential(1, 3, generator))
    log_prob, entropy = ours.log_prob(action), ours.entropy()
    assert (action.item(), log_prob.item(), entropy.item()) == (1, 0.0, 0.0)
    (log_prob + entropy).backward()
    assert torch.equal(logits.grad, torch.zeros(1, 3))


def test_choices_are_sampled_as_often_as_their_probabilities_say(
    generator: torch.Generator,
) -> None:
    logits = torch.tensor([0.0, 1.0, -1.5, 4.0, 0.5])
    mask = torch.tensor([True, True, True, False, True])
    rows = 40_000
    ours = Categorical(logits.expand(rows, 5), mask.expand(rows, 5))
    counts = torch.bincount(ours.sample(exponential(rows, 5, generator)), minlength=5)
    probability = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    assert_frequencies(counts, probability, greatest_chi_square=16.3)  # 3 degrees of freedom, 0.1%


@given(seeds)
def test_a_forbidden_choice_is_never_sampled(seed: int) -> None:
    logits, mask = logits_and_mask(seed, 500, 6, scale=30.0)
    action = Categorical(logits, mask).sample(exponential(500, 6, seeded(seed)))
    assert mask.gather(-1, action[:, None]).all()


# --- several choices ---


@given(seeds)
def test_log_probability_and_entropy_of_factored_choices_are_sums_over_components(
    seed: int,
) -> None:
    logits, _ = logits_and_mask(seed, 5, sum(NVEC))
    mask = torch.cat([logits_and_mask(seed + n, 5, n)[1] for n in NVEC], -1)
    noise = exponential(5, sum(NVEC), seeded(seed))
    action = FactoredCategorical(logits, NVEC, mask).sample(noise)
    masked = logits.masked_fill(~mask, -torch.inf).split(NVEC, -1)
    parts = [distributions.Categorical(logits=part, validate_args=False) for part in masked]
    ours = FactoredCategorical(logits, NVEC, mask)
    log_prob = sum(part.log_prob(action[:, a]) for a, part in enumerate(parts))
    torch.testing.assert_close(ours.log_prob(action), log_prob)
    torch.testing.assert_close(ours.entropy(), sum(part.entropy() for part in parts))
    assert torch.equal(ours.mode(), torch.stack([part.probs.argmax(-1) for part in parts], -1))


def test_factored_choices_are_sampled_independently(generator: torch.Generator) -> None:
    logits = torch.tensor([0.3, -0.3, 1.0, 0.0, -1.0])
    rows = 40_000
    noise = exponential(rows, 5, generator)
    action = FactoredCategorical(logits.expand(rows, 5), (2, 3)).sample(noise)
    counts = torch.bincount(action[:, 0] * 3 + action[:, 1], minlength=6)
    first, second = (part.softmax(-1) for part in logits.split([2, 3]))
    probability = (first[:, None] * second).flatten()
    assert_frequencies(counts, probability, greatest_chi_square=20.5)  # 5 degrees of freedom, 0.1%


# --- densities ---


def mean_and_log_std(seed: int, rows: int = 6, components: int = 3) -> tuple[Tensor, Tensor]:
    mean, log_std = torch.randn(2, rows, components, generator=seeded(seed))
    return mean, 0.5 * log_std


@given(seeds)
def test_a_diagonal_gaussian_equals_that_of_torch(seed: int) -> None:
    mean, log_std = mean_and_log_std(seed)
    ours = DiagonalGaussian(mean, log_std)
    reference = distributions.Independent(distributions.Normal(mean, log_std.exp()), 1)
    action = 3 * torch.randn(mean.shape, generator=seeded(seed + 1))
    torch.testing.assert_close(ours.log_prob(action), reference.log_prob(action))
    torch.testing.assert_close(ours.entropy(), reference.entropy())
    assert torch.equal(ours.mode(), mean)


@pytest.mark.parametrize("kind", [DiagonalGaussian, TanhGaussian])
def test_gaussian_samples_have_the_given_moments(
    kind: Callable[[Tensor, Tensor], Distribution], generator: torch.Generator
) -> None:
    mean, std = torch.tensor([-2.0, 0.5]), torch.tensor([0.1, 3.0])
    rows = 40_000
    noise = torch.randn(rows, 2, generator=generator)
    sample = kind(mean.expand(rows, 2), std.log().expand(rows, 2)).sample(noise)
    error = std / rows**0.5
    assert ((sample.mean(0) - mean).abs() < 4 * error).all()
    assert ((sample.std(0) - std).abs() < 4 * error).all()
    assert sample.T.corrcoef()[0, 1].abs() < 0.02


@given(seeds)
def test_a_tanh_gaussian_has_the_density_of_the_squashed_action(seed: int) -> None:
    mean, log_std = mean_and_log_std(seed)
    u = 1.5 * torch.randn(mean.shape, generator=seeded(seed + 1))
    base = distributions.Normal(mean.double(), log_std.double().exp())
    squashed = distributions.TransformedDistribution(base, distributions.TanhTransform())
    expected = squashed.log_prob(u.double().tanh()).sum(-1)
    got = TanhGaussian(mean, log_std).log_prob(u)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("u", [20.0, -20.0, 1e4, -1e4])
def test_the_tails_of_a_tanh_gaussian_are_finite(u: float) -> None:
    mean, log_std = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    ours = TanhGaussian(mean, log_std)
    log_prob = ours.log_prob(torch.tensor([[u]]))
    log_prob.sum().backward()
    for value in (log_prob, mean.grad, log_std.grad):
        assert value.isfinite().all()
    # Far out the slope of tanh is 4 exp(-2|u|).
    expected = -0.5 * u**2 - 0.5 * np.log(2 * np.pi) - (np.log(4.0) - 2.0 * abs(u))
    assert log_prob.item() == pytest.approx(expected, rel=1e-6)


def integrated_entropy(mean: float, std: float) -> float:
    """Minus the mean of the log-density of ``tanh(u)``, on a fine grid in double precision."""
    u = np.linspace(mean - 12 * std, mean + 12 * std, 40_001)
    density = np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    log_slope = -2.0 * (np.logaddexp(u, -u) - np.log(2.0))
    log_density = -0.5 * ((u - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi)) - log_slope
    return float(np.trapezoid(-density * log_density, u))


@pytest.mark.parametrize("mean", [0.0, -0.7, 3.0, 10.0])
@pytest.mark.parametrize("std", [0.01, 0.5, 1.0, 2.0])
def test_entropy_of_a_tanh_gaussian_and_its_gradient_are_those_of_the_integral(
    mean: float, std: float
) -> None:
    m, log_std = torch.tensor([[mean]]), torch.tensor([[std]]).log()
    entropy = TanhGaussian(m.requires_grad_(), log_std.requires_grad_()).entropy()
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(integrated_entropy(mean, std), abs=2e-4)
    h = 1e-3
    by_mean = (integrated_entropy(mean + h, std) - integrated_entropy(mean - h, std)) / (2 * h)
    more, less = std * np.exp(h), std * np.exp(-h)
    by_log_std = (integrated_entropy(mean, more) - integrated_entropy(mean, less)) / (2 * h)
    assert m.grad.item() == pytest.approx(by_mean, abs=2e-3)
    assert log_std.grad.item() == pytest.approx(by_log_std, abs=2e-3)


def test_the_entropy_of_a_tanh_gaussian_is_the_mean_surprise_of_its_samples(
    generator: torch.Generator,
) -> None:
    rows = 40_000
    mean, log_std = torch.tensor([0.4, -1.0]), torch.tensor([-0.5, 0.3])
    ours = TanhGaussian(mean.expand(rows, 2), log_std.expand(rows, 2))
    surprise = -ours.log_prob(ours.sample(torch.randn(rows, 2, generator=generator)))
    error = surprise.std().item() / rows**0.5
    assert ours.entropy()[0].item() == pytest.approx(surprise.mean().item(), abs=4 * error)


def test_an_entropy_first_computed_in_inference_mode_can_be_trained_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("esper_lightning.core.distributions._HERMITE", {})
    mean, log_std = torch.zeros(2, 1, 1)
    with torch.inference_mode():
        TanhGaussian(mean, log_std).entropy()
    mean.requires_grad_()
    TanhGaussian(mean + 1.0, log_std).entropy().sum().backward()
    assert mean.grad.abs().sum() > 0


def test_an_entropy_first_computed_in_a_trace_has_numbers_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("esper_lightning.core.distributions._HERMITE", {})
    expected = TanhGaussian(torch.zeros(2, 1), torch.zeros(2, 1)).entropy()
    monkeypatch.setattr("esper_lightning.core.distributions._HERMITE", {})
    args = torch.zeros(2, 1), torch.zeros(2, 1)
    traced = Traced(lambda mean, log_std: TanhGaussian(mean, log_std).entropy(), args)
    assert torch.equal(TanhGaussian(*args).entropy(), expected)
    assert torch.equal(traced.graph(*args)[0], expected)


# --- all of them ---

KINDS: dict[str, Callable[[Tensor], Distribution]] = {
    "categorical": Categorical,
    "factored": lambda output: FactoredCategorical(output, (2, 4)),
    "gaussian": lambda output: DiagonalGaussian(output, torch.zeros_like(output)),
    "tanh": lambda output: TanhGaussian(output, torch.zeros_like(output)),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@each_kind
def test_samples_depend_on_the_noise_alone(make: Callable[[Tensor], Distribution]) -> None:
    distribution = make(torch.randn(200, 6, generator=seeded(0)))
    before = torch.get_rng_state()
    first, then = exponential(2 * 200, 6, seeded(1)).split(200)
    assert torch.equal(distribution.sample(first), distribution.sample(first))
    assert not torch.equal(distribution.sample(first), distribution.sample(then))
    assert torch.equal(torch.get_rng_state(), before)


@each_kind
@pytest.mark.parametrize("autocast", [False, True])
def test_results_are_float32_whatever_the_dtype_of_the_network(
    make: Callable[[Tensor], Distribution], autocast: bool
) -> None:
    output = torch.randn(50, 6, generator=seeded(0)).bfloat16()
    exact = make(output.float())
    noise = exponential(50, 6, seeded(1))
    action = exact.sample(noise)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = make(output)
        got = rounded.log_prob(action), rounded.entropy()
        assert torch.equal(rounded.sample(noise), action)
    for value, expected in zip(got, (exact.log_prob(action), exact.entropy()), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected)
