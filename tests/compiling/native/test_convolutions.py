"""Convolutions, pooling and the layers around them give what torch gives, for every shape.

Several layers are compiled together; torch computes in float64 what they are compared with.
"""

import itertools
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from esper_lightning.compiling.native.loops import NativeFunction
from esper_lightning.compiling.native.translation import OPERATIONS
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.purity import ImpureError
from esper_lightning.compiling.tracing import Traced

aten = torch.ops.aten


class Layer(NamedTuple):
    """A convolution: its sizes, and how its input lies in memory."""

    images: int
    size: tuple[int, ...]
    groups: int
    channels: int  # of a group
    outputs: int  # of a group
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32

    def tensors(self, generator: torch.Generator) -> list[Tensor]:
        def some(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=self.dtype)

        channels, outputs = self.groups * self.channels, self.groups * self.outputs
        x = some(self.images, channels, *self.size)
        if self.layout == "channels last":
            x = some(self.images, *self.size, channels).movedim(-1, 1)
        if self.layout == "broadcast":
            x = some(1, channels, *self.size).expand(self.images, -1, *self.size)
        if self.layout == "part":
            x = some(self.images, channels + 1, *self.size)[:, 1:]
        weight, bias = some(outputs, self.channels, *self.kernel), some(outputs)
        return [x, weight, bias, torch.randn_like(self.forward(x, weight, bias)).contiguous()]

    @property
    def arguments(self) -> tuple[Any, ...]:
        rest = [0] * len(self.size)
        return (self.stride, self.padding, self.dilation, False, rest, self.groups)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return aten.convolution(x, weight, bias, *self.arguments)

    def everything(self, x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> list[Tensor]:
        def backward(*mask: bool) -> list[Tensor]:
            sizes = [weight.shape[0]]
            found = aten.convolution_backward(gradient, x, weight, sizes, *self.arguments, mask)
            return [tensor for tensor in found if tensor is not None]

        results = [self.forward(x, weight, bias), self.forward(x * 2, weight, None)]
        return [*results, *backward(True, True, True), *backward(False, True, False)]


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    axes = draw(st.sampled_from([1, 2, 2]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, padding, dilation = sizes(1, 4), sizes(0, 2), sizes(1, 2)
    reached = (d * (k - 1) + 1 - 2 * p for k, p, d in zip(kernel, padding, dilation, strict=True))
    return Layer(
        images=draw(st.integers(1, 5)),
        size=tuple(max(1, least) + draw(st.integers(0, 10)) for least in reached),
        groups=draw(st.sampled_from([1, 1, 2, 3])),
        channels=draw(st.integers(1, 5)),
        outputs=draw(st.integers(1, 9)),
        kernel=kernel,
        stride=sizes(1, 3),
        padding=padding,
        dilation=dilation,
        layout=draw(st.sampled_from(["contiguous", "channels last", "broadcast", "part"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float64])),
    )


def compare(chosen: list[Layer], tensors: list[list[Tensor]], got: list[list[Tensor]]) -> None:
    for layer, given_, results in zip(chosen, tensors, got, strict=True):
        expected = layer.everything(*(tensor.double() for tensor in given_))
        eps = torch.finfo(layer.dtype).eps
        for result, right in zip(results, expected, strict=True):
            assert result.dtype == layer.dtype
            atol = 16 * eps * max(1.0, float(right.abs().max()))
            torch.testing.assert_close(result.double(), right, rtol=0, atol=atol, msg=str(layer))


def compiled(chosen: list[Layer]) -> NativeFunction:
    return NativeFunction(
        lambda tensors: [
            layer.everything(*some) for layer, some in zip(chosen, tensors, strict=True)
        ]
    )


@settings(max_examples=3)
@given(st.lists(layers(), min_size=5, max_size=5), st.integers(0, 2**32))
def test_convolutions_give_what_torch_gives(chosen: list[Layer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [layer.tensors(generator) for layer in chosen]
    compare(chosen, tensors, compiled(chosen)(tensors))


MANY = [
    Layer(40, (8, 8), 1, 3, 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    Layer(600, (4,), 2, 2, 5, (3,), (2,), (1,), (1,), "channels last"),
    Layer(7, (20, 20), 1, 4, 6, (8, 8), (4, 4), (0, 0), (1, 1)),
]


@pytest.fixture
def _any_threads():
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_any_threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [layer.tensors(generator) for layer in MANY]
    function, bits = compiled(MANY), list[list[bytes]]()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results = function(tensors)
        bits.append([result.numpy().tobytes() for some in results for result in some])
    assert all(other == bits[0] for other in bits)
    compare(MANY, tensors, results)


def test_what_is_not_finite_stays_where_torch_has_it() -> None:
    layer = Layer(3, (7, 6), 1, 2, 5, (3, 2), (2, 1), (1, 0), (1, 1), dtype=torch.float64)
    x, weight, bias, gradient = layer.tensors(torch.Generator().manual_seed(0))
    function = compiled([layer])
    for odd in (float("nan"), float("inf"), float("-inf")):
        for tensor in (x, gradient):
            tensors = [x.clone(), weight, bias, gradient.clone()]
            tensors[0 if tensor is x else 3][1, 1, 2, 3] = odd
            (results,) = function([tensors])
            for number, right in enumerate(layer.everything(*tensors)):
                good = results[number].isfinite()
                torch.testing.assert_close(results[number][good], right[good])
                if number < 3:  # the sums over images may lose more
                    assert good.equal(right.isfinite())


def window(x: Tensor) -> dict[str, Tensor]:
    """Pooling of every kind, and its gradients."""
    results: dict[str, Tensor] = {}
    maxima = [
        ([3, 3], [2, 2], [1, 1], [1, 1], False),
        ([2, 3], [], [0, 1], [2, 1], False),
        ([2, 2], [3, 2], [1, 1], [1, 1], True),
        ([2], [2], [0], [1], True),
    ]
    for kernel, stride, *rest in maxima:
        y, place = aten.max_pool2d_with_indices(x, kernel, stride, *rest)
        back = aten.max_pool2d_with_indices_backward
        gradient = back(y * 2 + 1, x, kernel, stride or kernel, *rest, place)
        results |= {
            f"max {kernel} {name}": t for name, t in zip("ypg", (y, place, gradient), strict=True)
        }
    means = [
        ([3, 3], [2, 2], [1, 1], False, True, None),
        ([2, 3], [], [1, 1], True, False, None),
        ([2, 2], [3, 2], [1, 1], True, True, None),
        ([4], [3], [0], True, True, None),
        ([2], [2], [0], True, True, 5),
    ]
    for kernel, stride, *rest in means:
        y = aten.avg_pool2d(x, kernel, stride, *rest)
        gradient = aten.avg_pool2d_backward(y * 2 + 1, x, kernel, stride or kernel, *rest)
        results |= {f"mean {kernel} y": y, f"mean {kernel} g": gradient}
    for size in ((3, 4), (1, 1), (7, 9), (5, 2)):
        y = aten._adaptive_avg_pool2d(x, size)
        gradient = aten._adaptive_avg_pool2d_backward(y * 2 + 1, x)
        results |= {f"adaptive {size} y": y, f"adaptive {size} g": gradient}
    return results


def test_pooling_gives_what_torch_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, 7, 9, generator=generator)
    odd = x.clone()
    odd[0, 0, 2, 3], odd[1, 1], odd[2] = float("nan"), float("-inf"), odd[2].round()
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    native = NativeFunction(window)
    for value in (x, odd, last):
        got = native(value)
        for name, expected in window(value).items():
            torch.testing.assert_close(got[name], expected, equal_nan=True, msg=name)


def test_a_place_outside_of_the_image_is_an_error() -> None:
    back = aten.max_pool2d_with_indices_backward
    native = NativeFunction(lambda x, place: back(x, x, [1], [1], [0], [1], False, place))
    x = torch.ones(1, 1, 2, 2)
    native(x, torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(IndexError, match="outside"):
        native(x, torch.full((1, 1, 2, 2), 4))


IMAGE, SEQUENCE = (5, 4, 9, 8), (5, 4, 9)
MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), SEQUENCE),
    "Conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), IMAGE),
    "Conv2d, as large": (nn.Conv2d(4, 6, 3, padding="same"), IMAGE),
    "Conv2d of one image": (nn.Conv2d(4, 6, 3), IMAGE[1:]),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((2, 3)), IMAGE),
    "AdaptiveAvgPool2d to one": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(2), SEQUENCE),
    "MaxPool2d": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "MaxPool1d": (nn.MaxPool1d(3, 2, 1), SEQUENCE),
    "AvgPool2d": (nn.AvgPool2d(3, 2, 1), IMAGE),
    "AvgPool1d": (nn.AvgPool1d(3, 2, 1), SEQUENCE),
    "GroupNorm": (nn.GroupNorm(2, 4), IMAGE),
    "LayerNorm": (nn.LayerNorm([4, 9, 8]), IMAGE),
    "LayerNorm of rows": (nn.LayerNorm(9), SEQUENCE),
    "BatchNorm2d, evaluated": (nn.BatchNorm2d(4).eval(), IMAGE),
    "InstanceNorm2d": (nn.InstanceNorm2d(4, affine=True), IMAGE),
    "PixelShuffle": (nn.PixelShuffle(2), IMAGE),
    "PixelUnshuffle": (nn.PixelUnshuffle(2), (5, 1, 8, 8)),
    "ZeroPad2d": (nn.ZeroPad2d(1), IMAGE),
    "LeakyReLU": (nn.LeakyReLU(), IMAGE),
    "PReLU": (nn.PReLU(4), IMAGE),
    "ReLU6": (nn.ReLU6(), IMAGE),
    "Hardswish": (nn.Hardswish(), IMAGE),
    "Hardsigmoid": (nn.Hardsigmoid(), IMAGE),
    "Mish": (nn.Mish(), IMAGE),
    "Softmax": (nn.Softmax(1), IMAGE),
    "Flatten": (nn.Flatten(), IMAGE),
    "a block": (nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), (64, 4, 4, 4)),
}


def with_gradients(module: nn.Module) -> Callable[..., list[Tensor]]:
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (x, *parameters)]
            y = functional_call(module, dict(zip(names, leaves[1:], strict=True)), (leaves[0],))
            return [y.detach(), *torch.autograd.grad((y * y.sin()).sum(), leaves)]

    return run


def all_modules(inputs: dict[str, tuple[Tensor, list[Tensor]]]) -> dict[str, list[Tensor]]:
    return {name: with_gradients(MODULES[name][0])(*given) for name, given in inputs.items()}


@pytest.mark.parametrize("first", range(4))
def test_common_layers_of_small_networks_are_native(monkeypatch, first: int) -> None:
    # Takes less than half of the time to compile.
    monkeypatch.setenv("CXXFLAGS", f"{os.environ.get('CXXFLAGS', '')} -O1")
    inputs: dict[str, tuple[Tensor, list[Tensor]]] = {}
    generator = torch.Generator().manual_seed(0)
    for name in list(MODULES)[first::4]:
        module, shape = MODULES[name]
        given = [torch.randn(p.shape, generator=generator) for p in module.parameters()]
        inputs[name] = torch.randn(shape, generator=generator), given
    got = NativeFunction(all_modules)(inputs)
    for name, expected in all_modules(inputs).items():
        for result, right in zip(got[name], expected, strict=True):
            atol = 1e-5 * max(1.0, float(right.abs().max()))  # sums of many numbers
            torch.testing.assert_close(result, right, rtol=1e-5, atol=atol, msg=name)


def test_a_layer_reads_its_weights_in_place() -> None:
    norm = nn.LayerNorm(6)
    native, x = NativeFunction(norm.forward), torch.randn(4, 6)
    native(x)
    with torch.no_grad():
        norm.weight.mul_(3)
        torch.testing.assert_close(native(x), norm(x))


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        (nn.ConvTranspose2d(4, 6, 3), IMAGE, "a transposed convolution"),
        (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5), "a convolution of 3 axes"),
        (nn.Conv2d(1, 1, 300), (1, 1, 300, 300), "a convolution as large as of"),
        (nn.AdaptiveMaxPool2d(2), IMAGE, "aten.adaptive_max_pool2d.default"),
        (nn.BatchNorm2d(4), IMAGE, "writing to what it did not make"),
    ],
)
def test_other_layers_are_refused_by_name(module: nn.Module, shape: tuple[int, ...], said: str):
    given = [parameter.detach() for parameter in module.parameters()]
    with pytest.raises((UnsupportedError, ImpureError), match=re.escape(said)):
        NativeFunction(with_gradients(module))(torch.zeros(shape), given)


def used_operations() -> set[str]:
    """The operations that the tests of this file use."""
    tensors = MANY[0].tensors(torch.Generator())
    graphs = [Traced(window, (torch.zeros(1, 1, 7, 9),), functional=True).graph]
    graphs.append(Traced(MANY[0].everything, tuple(tensors), functional=True).graph)
    nodes = itertools.chain.from_iterable(graph.graph.nodes for graph in graphs)
    used = {str(node.target).removeprefix("aten.") for node in nodes}
    return used & set(OPERATIONS)
