"""Functions that combine samples by more than sums are refused, whatever their numbers are."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper_lightning.compiling.native.mixing import refuse_mixed_rows, refuse_other_sums
from esper_lightning.compiling.native.rules import Rules
from esper_lightning.compiling.native.translation import OPERATIONS
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.tracing import Traced

SAMPLES = 6
TABLE = torch.linspace(-1.0, 1.0, 24).view(12, 2)
TABLE_AGAIN, OTHER = TABLE.clone(), 2.0 * TABLE

# Functions of values ``[M]``, of features ``[M, 3]`` and of a fixed number.
SUMS: dict[str, Any] = {
    "values": lambda v, x, w: (v * w).exp().sum(),
    "of another order": lambda v, x, w: v.flip(0).sum() + x.t().reshape(-1).sum(),
    "their number": lambda v, x, w: torch.ones_like(v).sum(),
    "a fixed term of each": lambda v, x, w: (v + w.square().expand(len(v))).sum(),
    "linear afterwards": lambda v, x, w: -2.0 * torch.stack([v.sum(), (x.sum() / w)])[1] + 0.0,
    "of places": lambda v, x, w: TABLE[v.long().clamp(0, 1)].sum(0),
    "a product over samples": lambda v, x, w: x.t() @ torch.cat([x, v[:, None]], 1),
    "products of each": lambda v, x, w: torch.bmm(x[:, :, None], x[:, None]).sum(0) * w,
    "a dot product": lambda v, x, w: (
        torch.dot(v, x[:, 0]) + x.t().mv(v).sum() + x.mv(w.expand(3)).sum()
    ),
    "a mean of features": lambda v, x, w: x.mean(1).sum() + x.softmax(-1)[:, 0].sum(),
    "nothing": lambda v, x, w: torch.zeros(3) * v.sum(),
    "filled with a sum": lambda v, x, w: torch.zeros(2).fill_(v.sum()) * w.sum(),
    "a sum by a mask": lambda v, x, w: torch.zeros(2).masked_fill(TABLE[0] > TABLE[1], v.sum()),
    "numbers": lambda v, x, w: (x * torch.tensor([1.0, 2.0, math.nan]).nan_to_num()).sum(),
    "numbers of a table": lambda v, x, w: (x * torch.linspace(0.0, 1.0, 3)).sum(),
    "chosen features": lambda v, x, w: x.gather(1, v.long().clamp(0, 2)[:, None]).sum(),
    "a mask": lambda v, x, w: (written(x, v > 0.0) * w).sum() + written(x, x > 0.5).sum(),
    "a gradient": lambda v, x, w: gradient(lambda w: (x @ w.expand(3, 2)).tanh().square().sum(), w),
    "several places of each": lambda v, x, w: folded(x).exp().sum() + (w * folded(x)).sum(),
    "their number, several times": lambda v, x, w: gradient(
        lambda w: (w.expand(3 * len(v)) + folded(x)).sum(), w
    ),
    "of pieces": lambda v, x, w: x.reshape(-1, 1).expand(-1, 4).reshape(-1, 12).sum(0).view(3, 4),
}
MIXED: dict[str, Any] = {
    "the largest": lambda v, x, w: w * v.max(),
    "the mean": lambda v, x, w: w * v.mean(),
    "their number": lambda v, x, w: (v * w).sum() / len(v),
    "another sample": lambda v, x, w: (v + w * v * v.flip(0)).sum(),
    "all pairs": lambda v, x, w: (w * (x @ x.t()).log_softmax(-1).diagonal()).sum(),
    "products of all": lambda v, x, w: torch.bmm(x[None], x.t()[None]).sum() * w,
    "all pairs, as sums": lambda v, x, w: (v[:, None] * v[None, :]).sum(),
    "their places": lambda v, x, w: (v + w * torch.arange(len(v))).sum(),
    "something fixed": lambda v, x, w: v.sum() + w * w,
    "a norm": lambda v, x, w: v.sum() + w * v.norm(),
    "a variance": lambda v, x, w: v.sum() + w * v.var(),
    "halves": lambda v, x, w: (v + w * v * v.view(2, -1).flip(0).reshape(-1)).sum(),
    "the first one": lambda v, x, w: v[0] * w,
    "the first one, beside": lambda v, x, w: (v * v[0] * w).sum(),
    "all but the first one": lambda v, x, w: v[1:].sum() * w,
    "some twice": lambda v, x, w: torch.cat([v, v[:2]]).sum() * w,
    "all of them": lambda v, x, w: v.sum() * w.where((v > 0).all(), w + 1.0),
    "a square of a sum": lambda v, x, w: v.sum().square() * w,
    "a product of sums": lambda v, x, w: v.sum() * x.sum() * w,
    "copies for each": lambda v, x, w: v[:, None].expand(len(v), len(v)).sum() * w,
    "a sum beside each": lambda v, x, w: (v * w + v.sum()).sum(),
    "as many as there are": lambda v, x, w: torch.zeros(len(v)).exp().sum() * w,
    "a table of their places": lambda v, x, w: (v * TABLE[: len(v), 0] * w).sum(),
    "normalised by the batch": lambda v, x, w: (batch_norm(x) * w).square().sum(),
    "a rounded sum": lambda v, x, w: v.sum().long(),
    "all places but one": lambda v, x, w: w.expand(3 * len(v))[1:].sum(),
    "a softmax over places": lambda v, x, w: w.expand(3 * len(v)).log_softmax(0)[:1] * w,
    "a mean over places": lambda v, x, w: w.expand(3 * len(v)).mean(),
    "a fixed pattern": lambda v, x, w: (
        w.expand(3, 2 * len(v)) * TABLE[:3, :1]
    ).reshape(-1).sum() * 0.0,
    "some of another scale": lambda v, x, w: (torch.cat([v[:2] * w, v[2:]]) * w).sum(),
    "places by a mask": lambda v, x, w: (v * w * written(x, torch.arange(len(v)) > 2)[:, 0]).sum(),
    "computed places": lambda v, x, w: x.index_put((v.long(),), w).sum(),
    "their number as a tensor": lambda v, x, w: (v * torch.tensor(1.0 / len(v))).sum(),
    "their number like them": lambda v, x, w: (v * v.new_tensor(len(v))).sum(),
    "whether they are many": lambda v, x, w: v.where(torch.tensor(len(v) > SAMPLES), -v).sum(),
    "a tensor for many": lambda v, x, w: (v * (TABLE if len(v) > SAMPLES else OTHER)[0, 0]).sum(),
    "an equal tensor for many": lambda v, x, w: (
        v * (TABLE if len(v) > SAMPLES else TABLE_AGAIN)[0, 0]
    ).sum(),
    "another order of arguments": lambda v, x, w: (
        (v - x[:, 0]) if len(v) > SAMPLES else (x[:, 0] - v)
    ).sum(),
    "another result": lambda v, x, w: [v.sum(), (v * w).sum()][:: 1 if len(v) > SAMPLES else -1],
    "all pairs of places": lambda v, x, w: w.expand(len(v), len(v)).sum(),
    "ones for all pairs": lambda v, x, w: torch.ones(len(v), len(v)).sum(),
    "ones for all but one": lambda v, x, w: torch.ones(len(v) - 1).sum(),
    "the first few": lambda v, x, w: v[: SAMPLES + 1].sum(),
    "few places": lambda v, x, w: torch.ones(min(len(v), SAMPLES + 1)).sum(),
    "a sum beside something fixed": lambda v, x, w: torch.ones(2).masked_fill(
        TABLE[0] > TABLE[1], v.sum()
    ),
    "a factor that is a sum": lambda v, x, w: (v * torch.zeros(()).add(1.0).fill_(v.sum())).sum(),
    "a sum in an integer": lambda v, x, w: torch.zeros(2, dtype=torch.int64).copy_(v.sum()),
    "a sum summed as an integer": lambda v, x, w: v.sum()[None].sum(dtype=torch.int64),
    "a wrong fold": lambda v, x, w: (x.t().reshape(-1, 3) * x * w).sum(),
}  # fmt: skip
ROWS: dict[str, Any] = {
    "linear": lambda v, x, w: functional.linear(x, TABLE.view(8, 3)).relu() * w,
    "normalised": lambda v, x, w: functional.layer_norm(x, (3,)) + v[:, None],
    "the same for all": lambda v, x, w: w.expand(len(v)),
    "ones": lambda v, x, w: torch.ones_like(v),
    "folded": lambda v, x, w: x.reshape(-1).view(-1, 3) * w,
    "images": lambda v, x, w: functional.conv1d(x[:, None], TABLE.view(4, 1, 6)[..., :2]),
}
MIXED_ROWS: dict[str, Any] = {
    "another row": lambda v, x, w: v + w * v.flip(0),
    "the first row": lambda v, x, w: x + w * x[:1],
    "all rows": lambda v, x, w: x + w * (x @ x.t()).sum(1, keepdim=True),
    "a softmax over rows": lambda v, x, w: v + w * v.softmax(0),
    "their places": lambda v, x, w: v + w * torch.arange(len(v)),
    "another order": lambda v, x, w: x.t().reshape(-1, 3) * w,
    "the row before": lambda v, x, w: v + functional.pad(v[:-1], (1, 0)),
    "a sum": lambda v, x, w: v.sum() * w,
    "a constant": lambda v, x, w: w + torch.ones(SAMPLES),
    "some of another scale": lambda v, x, w: torch.cat([v[:2] * 2, v[2:]]),
    "more than some number": lambda v, x, w: v * w if len(v) > SAMPLES else v,
    "a part of their number": lambda v, x, w: v * (len(v) // SAMPLES),
    "a tensor of their number": lambda v, x, w: v * torch.tensor(len(v) // SAMPLES),
}


def folded(x: Tensor) -> Tensor:
    """Three places of each sample, as one axis."""
    return x.t().reshape(-1)


def written(x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = 2.0
    return y


def batch_norm(x: Tensor) -> Tensor:
    return functional.batch_norm(x, None, None, training=True)


def gradient(function: Any, weight: Tensor) -> Tensor:
    with torch.enable_grad():
        weight = weight.detach().requires_grad_()
        (result,) = torch.autograd.grad(function(weight), [weight])
    return result


def ask(refuse: Any, function: Any) -> None:
    """Ask of a function of samples whether it mixes them."""

    def graph(number: int) -> torch.fx.GraphModule:
        example = (torch.rand(number) * 3.0, torch.rand(number, 3), torch.zeros(()))
        return Traced(function, example, functional=True).graph

    refuse(graph(SAMPLES), graph(2 * SAMPLES), range(2), "mixed")


@pytest.mark.parametrize("name", SUMS)
def test_sums_over_samples_pass(name: str) -> None:
    function, w = SUMS[name], torch.tensor(0.7)
    ask(refuse_other_sums, function)
    v, x = torch.rand(2 * SAMPLES) * 3.0, torch.rand(2 * SAMPLES, 3)
    parts = [function(v[k::2], x[k::2], w) for k in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], function(v, x, w))


@pytest.mark.parametrize("name", MIXED)
def test_what_is_more_than_a_sum_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="mixed \\(") as caught:
        ask(refuse_other_sums, MIXED[name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_depend_on_themselves_pass(name: str) -> None:
    ask(refuse_mixed_rows, ROWS[name])


@pytest.mark.parametrize("name", MIXED_ROWS)
def test_rows_that_depend_on_others_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match="mixed \\("):
        ask(refuse_mixed_rows, MIXED_ROWS[name])


def test_the_gradients_of_networks_are_sums() -> None:
    """Also of images, and of weights that are used twice."""
    networks = {
        "images": nn.Sequential(
            nn.Unflatten(1, (1, 3, 1)),
            *(nn.Conv2d(1, 2, (2, 1)), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 1)),
            *(nn.MaxPool2d((2, 1)), nn.Flatten()),
        ),
        "features": nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.GELU(), nn.Linear(2, 2)),
    }
    for network in networks.values():

        def sums(v: Tensor, x: Tensor, w: Tensor, network: nn.Module = network) -> list[Tensor]:
            with torch.enable_grad():
                weights = {k: p.detach().requires_grad_() for k, p in network.named_parameters()}
                y = torch.func.functional_call(network, weights, (x,))
                loss = (y.log_softmax(-1)[:, 0] * v + y.sum(-1) * w).sum()
                return list(torch.autograd.grad(loss, list(weights.values())))

        ask(refuse_other_sums, sums)


def test_every_operation_has_a_rule() -> None:
    names = {str(name).removeprefix("esper_lightning.").split(".")[0] for name in OPERATIONS}
    assert Rules(torch.arange(1)).names == names
