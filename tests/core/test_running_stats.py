"""Running statistics merge batches exactly, change only in updates, and are saved whole."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_lightning.core.running_stats import Moments, ObsNormalizer, RunningStats
from esper_lightning.core.spaces import Box


def state(stats: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stats.state_dict().items()}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10_000))
def test_batches_one_by_one_equal_one_batch_of_all(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = 1e4 + 3.0 * torch.randn(sum(sizes), 2, 3, generator=generator, dtype=torch.float64)
    stats = RunningStats((2, 3))
    for batch in row.split(sizes):
        stats.update(Moments.of(batch, (2, 3)))
    assert stats.count == len(row)
    np.testing.assert_allclose(stats.mean, row.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, row.numpy().var(0), rtol=1e-6, atol=1e-9)


def test_all_leading_axes_count_as_one_batch(generator: torch.Generator) -> None:
    batch = torch.randn(5, 4, 3, generator=generator)
    nested, flat = RunningStats((3,)), RunningStats((3,))
    nested.update(Moments.of(batch, (3,)))
    flat.update(Moments.of(batch.flatten(0, 1), (3,)))
    assert_same_bits(state(nested), state(flat))
    scalar = RunningStats(())
    scalar.update(Moments.of(batch))
    assert scalar.mean.item() == pytest.approx(batch.mean().item(), abs=1e-6)


def test_normalised_data_has_mean_0_and_deviation_1(generator: torch.Generator) -> None:
    batch = 5.0 + 20.0 * torch.randn(1000, 2, generator=generator)
    stats = RunningStats((2,))
    stats.update(Moments.of(batch, (2,)))
    got = stats.normalize(batch, clip=100.0)
    torch.testing.assert_close(got.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.std(0, correction=0), torch.ones(2))
    scaled = stats.scale(batch, clip=100.0)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(2))
    assert torch.equal(scaled.sign(), batch.sign())


def test_statistics_are_the_identity_before_the_first_update(generator: torch.Generator) -> None:
    batch = torch.randn(9, 3, generator=generator)
    stats = RunningStats((3,))
    assert torch.equal(stats.normalize(batch, clip=10.0), batch)
    assert torch.equal(stats.scale(batch, clip=10.0), batch)


def test_results_are_clipped_and_keep_their_dtype() -> None:
    stats = RunningStats((1,))
    for dtype in (torch.float32, torch.float64):
        batch = torch.tensor([[-9.0], [1.0], [9.0]], dtype=dtype)
        for function in (stats.normalize, stats.scale):
            got = function(batch, clip=5.0)
            assert got.dtype == dtype
            assert got[:, 0].tolist() == pytest.approx([-5.0, 1.0, 5.0])


def test_a_component_that_never_varies_stays_finite() -> None:
    stats = RunningStats((1,))
    stats.update(Moments.of(torch.full((7, 1), 3.0), (1,)))
    assert stats.normalize(torch.full((1, 1), 3.0), clip=10.0).item() == 0.0


@pytest.mark.parametrize("bad", [1.0, torch.nan])
def test_a_merge_where_the_condition_is_false_changes_no_bit(
    bad: float, generator: torch.Generator
) -> None:
    before = Moments.of(torch.randn(9, 3, generator=generator), (3,))
    batch = Moments.of(torch.full((4, 3), bad), (3,))
    after = before.merged(batch, where=torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_merge_where_the_condition_is_true_equals_one_without_condition(
    generator: torch.Generator,
) -> None:
    before, batch = (Moments.of(torch.randn(n, 3, generator=generator), (3,)) for n in (9, 4))
    asked, unasked = before.merged(batch, where=torch.tensor(True)), before.merged(batch)
    assert all(torch.equal(a, b) for a, b in zip(asked, unasked, strict=True))


def test_normalising_changes_no_statistics_and_lets_gradients_through(
    generator: torch.Generator,
) -> None:
    stats = RunningStats((3,))
    stats.update(Moments.of(2.0 * torch.randn(9, 3, generator=generator), (3,)))
    before = state(stats)
    batch = torch.randn(4, 3, generator=generator, requires_grad=True)
    stats.normalize(batch, clip=100.0).sum().backward()
    assert_same_bits(state(stats), before)
    std = stats.variance.sqrt().float()
    torch.testing.assert_close(batch.grad, (1.0 / std).expand(4, 3))
    assert not any(True for _ in stats.parameters())


def grouped(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    return {
        "joints": 2.0 + torch.randn(rows, 3, generator=generator),
        "image": 50.0 * torch.rand(rows, 2, 2, generator=generator),
    }


def test_groups_are_normalised_each_by_its_own_statistics(generator: torch.Generator) -> None:
    boxes = {"joints": Box((3,)), "image": Box((2, 2))}
    normalizer = ObsNormalizer(boxes, clip=10.0)
    obs = grouped(generator, 64)
    normalizer.update(obs)
    got = normalizer(obs)
    assert got.keys() == obs.keys()
    for name, box in boxes.items():
        alone = ObsNormalizer(box, clip=10.0)
        alone.update(obs[name])
        assert torch.equal(got[name], alone(obs[name]))
    assert {name.split(".")[-2] for name in normalizer.state_dict()} == {
        "group_joints",
        "group_image",
    }


@pytest.mark.parametrize("groups", [True, False])
def test_the_state_dict_holds_all_statistics(groups: bool, generator: torch.Generator) -> None:
    boxes = {"joints": Box((3,)), "image": Box((2, 2))}
    obs, more = grouped(generator, 16), grouped(generator, 8)
    if not groups:
        boxes, obs, more = boxes["joints"], obs["joints"], more["joints"]
    first, second = ObsNormalizer(boxes, clip=10.0), ObsNormalizer(boxes, clip=10.0)
    first.update(obs)
    second.load_state_dict(first.state_dict())
    for normalizer in (first, second):
        normalizer.update(more)
    assert_same_bits(state(first), state(second))
    assert all(value.dtype == torch.float64 for value in state(second).values())


def test_observations_are_clipped(generator: torch.Generator) -> None:
    obs = 100.0 * torch.randn(50, 3, generator=generator)
    assert ObsNormalizer(Box((3,)), clip=2.0)(obs).abs().max() == 2.0


def test_a_spread_that_is_small_beside_the_mean_is_found() -> None:
    """In single precision, the error of the mean of such numbers exceeds their spread."""
    row = torch.tensor([2.0**23 + k for k in range(-3, 4)] * 1000)
    moments = Moments.of(row)
    assert (moments.mean, moments.variance) == (2.0**23, 4.0)


@pytest.mark.parametrize("chooses", [True, False])
def test_single_numbers_are_summed_in_double_precision(
    chooses: bool, generator: torch.Generator
) -> None:
    row = 1e4 + torch.randn(50_000, generator=generator)
    where = torch.rand(50_000, generator=generator) < 0.5 if chooses else None
    moments = Moments.of(row, where=where)
    expected = (row if where is None else row[where]).numpy().astype(np.float64)
    np.testing.assert_allclose(moments.mean, expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, expected.var(), rtol=1e-9)


def test_returns_that_never_vary_leave_rewards_finite() -> None:
    stats = RunningStats(())
    stats.update(Moments.of(torch.zeros(7)))
    assert stats.scale(torch.tensor([0.0, 1.0, -1.0]), clip=10.0).tolist() == [0.0, 10.0, -10.0]
