"""Tensors that are kept have numbers, whoever asks for them first."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from esper_lightning.core import distributions
from esper_lightning.core.constants import made_to_keep
from esper_lightning.envs.morphogenesis import operations

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
def test_what_is_made_to_keep_has_numbers_and_takes_gradients(mode):
    with mode():
        with made_to_keep():
            kept = torch.tensor([2.0])
        assert isinstance(torch.ones(1), FakeTensor) == (mode is FakeTensorMode)
    weight = torch.ones(1, requires_grad=True)
    (weight * kept).sum().backward()
    assert weight.grad.item() == 2.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: operations._taps(2, 3, 3, torch.float32, CPU),
        lambda: distributions._hermite_nodes(CPU)[0],
    ],
    ids=["taps", "Hermite nodes"],
)
def test_the_tensors_of_a_cache_have_numbers_after_a_trace(make, monkeypatch):
    monkeypatch.setattr(distributions, "_HERMITE", {})
    operations._taps.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        make()
    assert not isinstance(make(), FakeTensor)
    assert make().abs().sum().item() > 0
