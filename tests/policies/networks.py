"""Networks that a user might bring."""

from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Layers with torch's own initialisation, of a box or of two groups."""

    def __init__(self, space: Any, width: int = 8, *, layer: str = "Identity") -> None:
        super().__init__()
        boxes = space if isinstance(space, dict) else {"obs": space}
        self.layers = nn.Sequential(
            nn.Linear(sum(box.size for box in boxes.values()), width), nn.Tanh()
        )
        kinds = {"BatchNorm": lambda: nn.BatchNorm1d(width), "Dropout": nn.Dropout}
        self.last = kinds.get(layer, nn.Identity)()

    def forward(self, obs: Any) -> Tensor:
        groups = obs.values() if isinstance(obs, dict) else [obs]
        return self.last(self.layers(torch.cat([group.flatten(1) for group in groups], 1)))


def make(space: Any, **kwargs: Any) -> nn.Module:
    return Net(space, **kwargs)


def number(space: Any) -> int:
    return space.size


class Wrong(nn.Module):
    """Returns something else than features."""

    def __init__(self, space: Any, what: str) -> None:
        super().__init__()
        self._what = what

    def forward(self, obs: Tensor) -> Any:
        match self._what:
            case "tuple":
                return (obs, obs)
            case "double":
                return obs.double()
            case "vector":
                return obs.sum(1)
            case "transposed":
                return obs.T
            case "by batch":
                return obs.new_zeros(len(obs), len(obs))
            case _:
                raise RuntimeError("mat1 and mat2\nshapes")
