"""Pictures of simple bodies, drawn for all environments at once.

Axes: ``B`` environment, ``H`` row from the top, ``W`` column. Coordinates are those of the task,
with ``y`` upwards. Everything is a capsule, a line of a given width with round ends and smooth
edges.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.shapes import Float, UInt8

__all__ = ["BLUE", "GREY", "ORANGE", "Canvas", "View"]

Colour = tuple[float, float, float]
BLUE: Colour = (0.0, 114.0, 178.0)
ORANGE: Colour = (213.0, 94.0, 0.0)
GREY: Colour = (120.0, 126.0, 138.0)
_PAPER = 255.0


class View(NamedTuple):
    """The part of the plane that a picture shows, and its height in pixels."""

    left: float
    right: float
    bottom: float
    top: float
    height: int = 240

    @property
    def pixel(self) -> float:
        """Width and height of a pixel, in units of the task."""
        return (self.top - self.bottom) / self.height

    @property
    def width(self) -> int:
        """Width in pixels; even, as encoders of videos want it."""
        return 2 * round((self.right - self.left) / self.pixel / 2)


class Canvas:
    """White pictures of ``B`` environments, on which bodies are drawn one over the other.

    Args:
        num_envs: Number of pictures, ``B``.
        view: Part of the plane that each shows.
        device: Device of the pictures.
    """

    def __init__(self, num_envs: int, view: View, device: torch.device) -> None:
        self._view = view
        x = view.left + (torch.arange(view.width, device=device) + 0.5) * view.pixel
        y = view.top - (torch.arange(view.height, device=device) + 0.5) * view.pixel
        self._place = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [H, W, 2]
        shape = (num_envs, view.height, view.width, 3)
        self._pictures = torch.full(shape, _PAPER, device=device)

    def draw(
        self,
        start: Float[Tensor, "#B 2"],
        end: Float[Tensor, "#B 2"],
        *,
        width: float,
        colour: Colour,
    ) -> None:
        """Draw a capsule in every picture; only the pixels around it are computed.

        Args:
            start: One end of the capsule's axis.
            end: The other end; the same point for a disc.
            width: Width of the capsule, in units of the task.
            colour: Red, green and blue, from 0 to 255.
        """
        count = max(len(start), len(end))
        start, end = start.expand(count, 2), end.expand(count, 2)
        lowest = torch.minimum(start, end) - width / 2
        highest = torch.maximum(start, end) + width / 2
        boxes = cast(list[Any], torch.stack((lowest, highest), dim=1).tolist())  # [B][2][2]
        for row, ((left, bottom), (right, top)) in enumerate(boxes):
            pictures = self._pictures if len(boxes) == 1 else self._pictures[row : row + 1]
            columns = self._pixels(left - self._view.left, right - self._view.left)
            lines = self._pixels(self._view.top - top, self._view.top - bottom)
            way = self._place[lines, columns] - start[row]  # [h, w, 2]
            axis = end[row] - start[row]  # [2]
            length = axis.square().sum(-1).clamp(min=1e-12)
            along = ((way * axis).sum(-1) / length).clamp(0.0, 1.0)
            distance = (way - along[..., None] * axis).square().sum(-1).sqrt()
            share = (0.5 + (width / 2 - distance) / self._view.pixel).clamp(0.0, 1.0)[..., None]
            part = pictures[:, lines, columns]
            part.add_(share * (part.new_tensor(colour) - part))

    def _pixels(self, first: float, last: float) -> slice:
        """The pixels between two distances from the edge of the picture, and those beside."""
        if not (math.isfinite(first) and math.isfinite(last)):
            return slice(0, 0)
        begin, end = (int(max(-1e9, min(1e9, at / self._view.pixel))) for at in (first, last))
        return slice(max(begin - 2, 0), max(end + 3, 0))

    def pictures(self) -> UInt8[Tensor, "B H W 3"]:
        """The pictures: red, green and blue."""
        return self._pictures.round().to(torch.uint8)
