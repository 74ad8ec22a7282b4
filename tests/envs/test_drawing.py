"""Bodies are where the task has them, in every environment's own picture."""

import math

import pytest
import torch

from esper_lightning.envs import Acrobot, CartPole, MountainCar, Pendulum
from esper_lightning.envs.drawing import BLUE, ORANGE, Canvas, View

VIEW = View(left=-1.0, right=3.0, bottom=-1.0, top=1.0, height=40)
WHITE = [255, 255, 255]


def at(picture: torch.Tensor, view: View, x: float, y: float) -> list[int]:
    """Colour of the pixel at a place of the plane."""
    return picture[int((view.top - y) / view.pixel), int((x - view.left) / view.pixel)].tolist()


def test_a_capsule_covers_its_axis_and_its_width_and_nothing_else():
    canvas = Canvas(2, VIEW, torch.device("cpu"))
    start = torch.tensor([[0.0, 0.0], [0.0, 0.5]])
    canvas.draw(start, start + torch.tensor([2.0, 0.0]), width=0.4, colour=(10.0, 20.0, 30.0))
    first, second = canvas.pictures()
    assert first.shape == (40, 80, 3)
    assert at(first, VIEW, 1.0, 0.1) == [10, 20, 30]
    assert at(first, VIEW, 1.0, 0.3) == WHITE
    assert at(first, VIEW, -0.1, 0.0) == [10, 20, 30]  # the round end
    assert at(first, VIEW, -0.3, 0.0) == WHITE
    assert at(second, VIEW, 1.0, 0.5) == [10, 20, 30]
    assert at(second, VIEW, 1.0, 0.0) == WHITE


@pytest.mark.parametrize("seed", range(8))
def test_every_pixel_that_a_capsule_covers_is_drawn(seed):
    torch.manual_seed(seed)
    start, end = 2.0 * torch.randn(2, 4, 2)  # also beyond the picture
    canvas = Canvas(4, VIEW, torch.device("cpu"))
    canvas.draw(start, end, width=0.4, colour=(0.0, 0.0, 0.0))
    x = VIEW.left + (torch.arange(VIEW.width) + 0.5) * VIEW.pixel
    y = VIEW.top - (torch.arange(VIEW.height) + 0.5) * VIEW.pixel
    place = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    along = torch.linspace(0.0, 1.0, 400)[:, None, None, None, None]
    axis = start[:, None, None] + along * (end - start)[:, None, None]
    distance = (place - axis).square().sum(-1).amin(0).sqrt()
    share = (0.5 + (0.2 - distance) / VIEW.pixel).clamp(0.0, 1.0)
    drawn = 1.0 - canvas.pictures()[..., 0].float() / 255.0
    assert (drawn - share).abs().max() < 0.02


def test_the_area_of_a_disc_is_that_of_the_circle():
    canvas = Canvas(1, View(-1.0, 1.0, -1.0, 1.0, height=200), torch.device("cpu"))
    centre = torch.zeros(1, 2)
    canvas.draw(centre, centre, width=1.0, colour=(0.0, 0.0, 0.0))
    share = 1.0 - canvas.pictures().float().mean().item() / 255.0
    assert share == pytest.approx(math.pi / 4 / 4, rel=0.01)


@pytest.mark.parametrize("task", [Acrobot, CartPole, MountainCar, Pendulum])
def test_a_task_draws_every_environment_as_it_is(task):
    env = task(num_envs=3).build(torch.device("cpu"), 0)
    env.reset()
    pictures = env.render()
    assert (pictures.dtype, pictures.ndim, pictures.shape[-1]) == (torch.uint8, 4, 3)
    assert pictures.shape[1] % 2 == pictures.shape[2] % 2 == 0  # for the encoder of videos
    rows = [env._task.render(state[None])[0] for state in env.episodes().state]
    assert all(torch.equal(a, b) for a, b in zip(pictures, rows, strict=True))
    assert not torch.equal(pictures[0], pictures[1])


def test_the_cart_is_at_its_position_and_the_pole_leans_to_its_side():
    state = torch.tensor([[1.0, 0.0, 0.3, 0.0], [-1.0, 0.0, -0.3, 0.0]])
    right, left = CartPole().render(state).float()
    for picture, side in ((right, 1), (left, -1)):
        columns = torch.arange(picture.shape[1])
        cart = (picture - picture.new_tensor(BLUE)).abs().sum(-1) < 3
        pole = (picture - picture.new_tensor(ORANGE)).abs().sum(-1) < 3
        middle = (picture.shape[1] - 1) / 2
        cart_at, pole_at = (
            (columns * each.any(0)).sum() / each.any(0).sum() for each in (cart, pole)
        )
        assert (cart_at - middle) * side > 40
        assert (pole_at - cart_at) * side > 5


def test_a_task_that_draws_nothing_says_what_it_lacks():
    class Plain(CartPole):
        render = None

    env = Plain(num_envs=1).build(torch.device("cpu"), 0)
    with pytest.raises(ValueError, match=r"Plain must have a method render\(state\)"):
        env.render()
