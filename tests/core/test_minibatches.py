"""A pass over the samples is a partition of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper_lightning.core.minibatches import flatten_steps, minibatches
from esper_lightning.core.types import Observation, Samples, map_obs


def numbered(size: int, *, grouped: bool = False, masked: bool = False) -> Samples:
    """Every field holds the number of its row, each in its own way."""
    row = torch.arange(size)
    obs: Observation = torch.stack([row, -row], -1).float()
    if grouped:
        obs = {"a": obs, "b": 2.0 * row[:, None]}
    return Samples(
        obs=obs,
        action=10 * row,
        log_prob=row + 0.5,
        action_mask=torch.stack([row % 2 == 0, row % 3 == 0], -1) if masked else None,
        advantage=-1.0 * row,
        value=row / 4,
        value_target=row + 100.0,
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(batch: Samples) -> Tensor:
    return (batch.log_prob - 0.5).long()


@given(st.integers(1, 60), st.data(), st.integers(0, 10_000))
def test_every_row_comes_exactly_once_in_parts_of_nearly_equal_size(
    size: int, data: st.DataObject, seed: int
) -> None:
    count = data.draw(st.integers(1, size))
    parts = [rows_of(batch) for batch in minibatches(numbered(size), count, generator=seeded(seed))]
    assert len(parts) == count
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fields_of_a_row_stay_together(grouped: bool, masked: bool) -> None:
    samples = numbered(30, grouped=grouped, masked=masked)
    for batch in minibatches(samples, 4, generator=seeded(0)):
        rows = rows_of(batch)
        for name, whole in samples._asdict().items():
            got = getattr(batch, name)
            if whole is None:
                assert got is None
            else:
                expected = map_obs(lambda tensor, rows=rows: tensor[rows], whole)
                torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=name)


def test_the_order_is_random_and_decided_by_the_generator() -> None:
    def order(generator: torch.Generator) -> Tensor:
        batches = minibatches(numbered(40), 4, generator=generator)
        return torch.cat([rows_of(batch) for batch in batches])

    before = torch.get_rng_state()
    generator = seeded(1)
    first, second = order(generator), order(generator)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, order(seeded(1)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(40))


def test_flattening_keeps_the_rows_of_a_step_together_and_copies_nothing() -> None:
    value = torch.arange(24).view(2, 3, 4)
    flat = flatten_steps(value)
    assert torch.equal(flat[4], value[1, 1])
    assert flat.data_ptr() == value.data_ptr()
    groups = flatten_steps({"a": value, "b": value[..., 0]})
    assert {name: tuple(group.shape) for name, group in groups.items()} == {"a": (6, 4), "b": (6,)}
