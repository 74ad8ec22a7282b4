"""Initial weights of layers."""

import math

import pytest
import torch
from torch import nn

from esper_lightning.policies.layers import mlp, orthogonal_linear


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 64), (64, 4), (16, 16)])
@pytest.mark.parametrize("gain", [0.01, 1.0, math.sqrt(2.0)])
def test_weights_are_orthogonal_with_the_gain_and_biases_zero(
    inputs: int, outputs: int, gain: float, generator: torch.Generator
) -> None:
    layer = orthogonal_linear(inputs, outputs, gain=gain, generator=generator)
    weight = layer.weight.detach() / gain
    gram = weight @ weight.T if outputs <= inputs else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(min(inputs, outputs)), rtol=0, atol=1e-5)
    assert torch.equal(layer.bias, torch.zeros(outputs))


def test_weights_depend_on_the_generator_alone() -> None:
    def weight(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return orthogonal_linear(8, 8, gain=1.0, generator=generator).weight.detach()

    before = torch.get_rng_state()
    first = weight(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, weight(0))
    assert not torch.equal(first, weight(1))


@pytest.mark.parametrize(
    ("activation", "of_minus_one"),
    [
        ("tanh", math.tanh(-1.0)),
        ("relu", 0.0),
        ("elu", math.expm1(-1.0)),
        ("gelu", -0.5 * (1.0 + math.erf(-1.0 / math.sqrt(2.0)))),
        ("silu", -1.0 / (1.0 + math.e)),
    ],
)
def test_an_activation_follows_each_layer(
    activation, of_minus_one: float, generator: torch.Generator
) -> None:
    network = mlp(3, (5, 7), activation=activation, generator=generator)
    widths = [(layer.in_features, layer.out_features) for layer in network[::2]]
    assert widths == [(3, 5), (5, 7)]
    assert len(network) == 4
    for function in network[1::2]:
        assert not isinstance(function, nn.Linear)
        assert function(torch.tensor(-1.0)).item() == pytest.approx(of_minus_one)
    scale = network[0].weight.detach().T @ network[0].weight.detach()
    torch.testing.assert_close(scale, 2.0 * torch.eye(3))
