"""Adam on one vector equals torch's Adam, and checkpoints and callbacks see no difference."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from esper_lightning.core.flat_adam import FlatParameters, adam_step

RATE, EPS = 3e-3, 1e-5
YES, NO = torch.tensor(True), torch.tensor(False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def adam(module: nn.Module) -> torch.optim.Adam:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=RATE, eps=EPS)


def gradient(module: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in module.parameters()]


def advance(parameters: FlatParameters, flat: torch.Tensor, *, skip: torch.Tensor = NO) -> None:
    state, rate = parameters.state, torch.tensor(RATE)
    parameters.keep(adam_step(state, flat, learning_rate=rate, eps=EPS, skip=skip))


def test_steps_equal_those_of_torch() -> None:
    ours, theirs = network(), network()
    mine, optimizer = FlatParameters(ours, adam(ours)), adam(theirs)
    for step in range(50):
        grads = gradient(ours, step)
        advance(mine, torch.cat([g.flatten() for g in grads]))
        for parameter, grad in zip(theirs.parameters(), grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [1.0, torch.nan, torch.inf])
def test_a_skipped_step_changes_no_bit(bad: float) -> None:
    module = network()
    parameters = FlatParameters(module, adam(module))
    advance(parameters, torch.ones_like(parameters.state.weight))
    before = [value.clone() for value in parameters.state]
    advance(parameters, torch.full_like(parameters.state.weight, bad), skip=YES)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters.state, strict=True))


def test_module_and_optimizer_see_every_step_and_survive_a_checkpoint() -> None:
    module = network()
    optimizer = adam(module)
    parameters = FlatParameters(module, optimizer)
    advance(parameters, torch.ones_like(parameters.state.weight))
    saved = copy.deepcopy((module.state_dict(), optimizer.state_dict()))

    other = network()
    their_optimizer = adam(other)
    other.load_state_dict(saved[0])
    their_optimizer.load_state_dict(saved[1])
    resumed = FlatParameters(other, their_optimizer)
    for mine, theirs in zip(parameters.state, resumed.state, strict=True):
        assert torch.equal(mine, theirs)
    assert resumed.state.step == 1.0
    again = torch.full_like(parameters.state.weight, 2.0)
    advance(parameters, again)
    advance(resumed, again)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Tied(nn.Module):
    """A weight in two modules, a module in two places, and a weight that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.first
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.again(self.second(self.first(x))))


def test_gradients_of_shared_weights_equal_those_of_autograd() -> None:
    torch.manual_seed(0)
    module, x = Tied(), torch.randn(3, 4)
    parameters = FlatParameters(module, adam(module))
    flat = parameters.state.weight.clone().requires_grad_()
    functional_call(module, parameters.placed(flat), (x,), tie_weights=False).sum().backward()
    held = dict(module.named_parameters())
    module(x).sum().backward()
    for name, got in parameters.named(flat.grad).items():
        torch.testing.assert_close(got, held[name].grad, msg=name)
    assert dict(module.named_parameters()).keys() == held.keys()
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in module.parameters())


def test_parameters_of_other_precisions_are_refused() -> None:
    module = network().double()
    with pytest.raises(ValueError, match=r"PPO\.policy must have float32 parameters on one device"):
        FlatParameters(module, adam(module))


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.SGD(weights, lr=RATE),
        lambda weights: torch.optim.AdamW(weights, lr=RATE),
        lambda weights: torch.optim.Adam(weights, lr=RATE, weight_decay=0.1),
        lambda weights: torch.optim.Adam(weights, lr=RATE, betas=(0.5, 0.9)),
        lambda weights: torch.optim.Adam(weights[:2], lr=RATE),
    ],
)
def test_an_optimizer_that_would_be_ignored_is_refused(make) -> None:
    module = network()
    with pytest.raises(ValueError, match="PPO's optimizer must"):
        FlatParameters(module, make(list(module.parameters())))


def test_parameters_that_others_change_are_copied_or_refused() -> None:
    module = network()
    parameters = FlatParameters(module, adam(module))
    weight = module[0].weight
    weight.data = 2.0 * weight.data
    doubled = weight.detach().clone()
    parameters.refresh()
    advance(parameters, torch.zeros_like(parameters.state.weight))
    torch.testing.assert_close(module[0].weight, doubled)
    weight.requires_grad_(False)
    with pytest.raises(ValueError, match="train the parameters that it had"):
        parameters.refresh()


def test_a_saved_state_continues_in_a_plain_adam() -> None:
    module, other = network(), network()
    optimizer, plain = adam(module), adam(other)
    parameters = FlatParameters(module, optimizer)
    advance(parameters, torch.ones_like(parameters.state.weight))
    plain.load_state_dict(optimizer.state_dict())
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    assert {state["step"].item() for state in plain.state.values()} == {2.0}
