"""All parameters as one vector, and Adam on it as a pure function.

Axis: ``P`` weight. With one vector, clipping and the optimizer are two kernels instead of several
for each parameter tensor, and an update is a function of a few tensors, which can be compiled or
captured whole.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import Words, require
from esper_lightning.core.shapes import Bool, Float

__all__ = ["PLAIN_ADAM", "AdamState", "FlatParameters", "adam_step"]

_BETA_1, _BETA_2 = 0.9, 0.999
PLAIN_ADAM = {"betas": (_BETA_1, _BETA_2), "weight_decay": 0, "amsgrad": False, "maximize": False}
"""Settings of Adam whose steps ``adam_step`` takes."""


class AdamState(NamedTuple):
    """Weights, and the moments and step count of Adam."""

    weight: Float[Tensor, " P"]
    mean: Float[Tensor, " P"]  # of gradients
    square: Float[Tensor, " P"]  # mean of squared gradients
    step: Float[Tensor, ""]  # steps taken


def adam_step(
    state: AdamState,
    gradient: Float[Tensor, " P"],
    *,
    learning_rate: Float[Tensor, ""],
    eps: float,
    skip: Bool[Tensor, ""],
) -> AdamState:
    """One step of Adam (Kingma and Ba 2015) as ``torch.optim.Adam`` takes it.

    Args:
        state: State before the step.
        gradient: Gradient of the loss.
        learning_rate: Learning rate; a tensor, so that a schedule changes no compiled code.
        eps: Number that is added to the denominator.
        skip: If True, the state is returned unchanged, whatever the gradient holds.
    """
    step = state.step + 1.0
    mean = torch.lerp(state.mean, gradient, 1.0 - _BETA_1)
    square = state.square * _BETA_2 + gradient * gradient * (1.0 - _BETA_2)
    correction_1 = 1.0 - torch.pow(_BETA_1, step)
    correction_2 = 1.0 - torch.pow(_BETA_2, step)
    denominator = square.sqrt() / correction_2.sqrt() + eps
    weight = state.weight - (learning_rate / correction_1) * mean / denominator
    after = AdamState(weight, mean, square, step)
    chosen = [torch.where(skip, old, new) for old, new in zip(state, after, strict=True)]
    return AdamState._make(chosen)


class FlatParameters:
    """Binds a module and its ``torch.optim.Adam`` to one vector each for weights and moments.

    The module's parameters and the optimizer's state become views of the vectors, so that
    checkpoints, callbacks and ``state_dict`` see no difference.

    Args:
        module: Module on its device, with the weights of a checkpoint already loaded.
        optimizer: Adam over all trainable parameters of the module, in the module's order.

    Raises:
        ValueError: If parameters are not float32 on one device, or the optimizer is not plain Adam,
            whose steps ``adam_step`` takes.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        place = next(iter(named.values())).device
        for name, parameter in named.items():
            owner = "PPO.extensions" if name.startswith("extensions.") else "PPO.policy"
            fits = (parameter.dtype, parameter.device) == (torch.float32, place)
            got = Words(f"{parameter.dtype} on {parameter.device} for {name}")
            require(fits, owner, f"have float32 parameters on one device, {place}", got)
        _require_plain_adam(optimizer, list(named.values()))
        self._names = list(named)
        number = {parameter: i for i, parameter in enumerate(named.values())}
        # A weight may be in several modules; a module that is in several places has one name.
        modules = cast(Iterable[tuple[str, nn.Module]], module.named_modules())
        self._places = {
            f"{path}.{name}" if path else name: number[parameter]
            for path, part in modules
            for name, parameter in part.named_parameters(recurse=False)
            if parameter in number
        }
        self._shapes = [parameter.shape for parameter in named.values()]
        self._sizes = [parameter.numel() for parameter in named.values()]
        parameters = list(named.values())
        device = parameters[0].device
        old = [optimizer.state.get(parameter, {}) for parameter in parameters]
        size = sum(self._sizes)

        def gather(key: str) -> Tensor:
            flat = torch.zeros(size, device=device)
            for part, state in zip(self._split(flat), old, strict=True):
                if key in state:
                    part.copy_(state[key])
            return flat

        weight = torch.cat([parameter.detach().flatten() for parameter in parameters])
        step = next((s["step"] for s in old if "step" in s), torch.zeros(()))
        step = step.detach().to(device, torch.float32, copy=True)
        self.state = AdamState(weight, gather("exp_avg"), gather("exp_avg_sq"), step)
        views = [self._split(flat) for flat in self.state[:3]]
        self._optimizer, self._parameters, self._views = optimizer, parameters, views[0]
        optimizer.register_state_dict_post_hook(_own_steps)
        for parameter, value, mean, square in zip(parameters, *views, strict=True):
            parameter.data = value
            optimizer.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy parameters that others have replaced; no synchronisation with the device.

        Raises:
            ValueError: If the parameters to train are no longer those of the start.
        """
        _require_plain_adam(self._optimizer, self._parameters)
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.data_ptr() != view.data_ptr():  # somebody has set ``parameter.data``
                view.copy_(parameter)
                parameter.data = view

    def named(self, weight: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """Views of a weight vector by parameter name."""
        return dict(zip(self._names, self._split(weight), strict=True))

    def placed(self, weight: Float[Tensor, " P"]) -> dict[str, Tensor]:
        """Views for ``torch.func.functional_call(..., tie_weights=False)``; tied weights twice."""
        views = self._split(weight)
        return {place: views[number] for place, number in self._places.items()}

    def keep(self, state: AdamState) -> None:
        """Store ``state`` as the current state."""
        for buffer, value in zip(self.state, state, strict=True):
            if buffer is not value:
                buffer.copy_(value)

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = cast(tuple[Tensor, ...], flat.split(self._sizes))
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def _require_plain_adam(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    group, *others = optimizer.param_groups
    got = {name: group.get(name) for name in PLAIN_ADAM}
    same = not others and len(group["params"]) == len(trained)
    same = same and all(
        parameter is mine and parameter.requires_grad
        for parameter, mine in zip(group["params"], trained, strict=False)
    )
    kind = type(optimizer)
    if kind is torch.optim.Adam and got == PLAIN_ADAM and same:
        return
    hint = "PPO takes Adam's steps itself; set PPOConfig.learning_rate and PPOConfig.adam_eps."
    require(kind is torch.optim.Adam, "PPO's optimizer", "be torch.optim.Adam", kind.__name__, hint)
    require(got == PLAIN_ADAM, "PPO's optimizer", f"have {PLAIN_ADAM}", got, hint)
    rule = "train the parameters that it had when training began"
    hint = "Freeze what is not to be trained before; it cannot change within a run."
    require(same, "PPO's optimizer", rule, "others", hint)


def _own_steps(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A step count for each parameter, as Adam has it; here all parameters share one tensor."""
    del optimizer
    own = {
        k: {**v, "step": v["step"].clone()} if "step" in v else v for k, v in state["state"].items()
    }
    return {**state, "state": own}
