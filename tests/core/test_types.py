"""The records of an iteration."""

import pytest
import torch

from esper_lightning.core.types import Samples

STEPS, ENVS = 3, 2


@pytest.mark.parametrize(("memory", "units"), [(None, STEPS * ENVS), (torch.zeros(ENVS, 4), ENVS)])
def test_units_to_shuffle_are_steps_or_with_memory_the_sequences_of_environments(memory, units):
    number = torch.zeros(STEPS * ENVS)
    samples = Samples(
        obs=number[:, None],
        action=number,
        log_prob=number,
        action_mask=None,
        advantage=number,
        value=number,
        value_target=number,
        memory=memory,
    )
    assert samples.units == units
