"""A minibatch keeps the fields of each sample together."""

import pytest
import torch

from esper_lightning.core.minibatches import take
from esper_lightning.core.tensor_trees import map_obs
from esper_lightning.core.types import Observation, Samples


def numbered(size: int, *, grouped: bool = False, masked: bool = False) -> Samples:
    """Samples of which every field holds the number of its row."""
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


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fields_of_a_row_stay_together(grouped: bool, masked: bool) -> None:
    samples = numbered(30, grouped=grouped, masked=masked)
    rows = torch.tensor([7, 0, 29, 7])
    batch = take(samples, rows)
    for name, whole in samples._asdict().items():
        got = getattr(batch, name)
        if whole is None:
            assert got is None
        else:
            expected = map_obs(lambda tensor: tensor[rows], whole)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=name)
