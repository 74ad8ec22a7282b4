"""Functions of trees of tensors as graphs of tensor operations, and their compilation.

A *body* computes one step of a loop. A *chunk body* computes what a step sums over its chunks. Both
are pure functions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = [
    "Body",
    "ChunkBody",
    "Compiled",
    "Traced",
    "Tree",
    "compile_graph",
    "rational_tanh",
    "traced_for_inductor",
]

Tree = Any
Body = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
"""A step of a loop: ``(carry, x, constants) -> (carry, row)``.

With a chunk body, ``x`` is ``(sum of partials, x)``.
"""
ChunkBody = Callable[[Tree, Tree, Tree], Tree]
"""A chunk of a step: ``(carry, chunk, constants) -> partial``, summed over the chunks."""


class Traced:
    """A function of trees as a graph of tensor operations, gradients included.

    Tracing runs the function, on copies of the example arguments. A result that shares memory with
    an argument or with another result is copied in the graph, because compiled loops need that.

    Args:
        function: Pure function of trees of tensors.
        example: Arguments of the shapes that the graph will serve.
        functional: Whether operations in place become operations that return new tensors.
        decompositions: Functions in the place of operations.

    Attributes:
        graph: Function from the tensors of the arguments to the tensors of the result.
        result: Result of the function, as a tree of tensors on the meta device.
    """

    def __init__(
        self,
        function: Callable[..., Tree],
        example: tuple[Tree, ...],
        *,
        functional: bool = False,
        decompositions: dict[Any, Callable[..., Any]] | None = None,
    ) -> None:
        self.result: Tree = None

        def flat(*tensors: Tensor) -> list[Tensor]:
            result = function(*rebuild(example, tensors))
            self.result = map_tree(lambda leaf: torch.empty_like(leaf, device="meta"), result)
            seen = list(tensors)
            return [_fresh(leaf, seen) for leaf in leaves(result)]

        # A function that needs a gradient computes it itself; nothing outside needs autograd.
        with torch.no_grad():
            inputs = [leaf.detach().clone() for leaf in leaves(example)]
            self.graph = _make_fx(flat, inputs, functional, decompositions)


def _fresh(leaf: Tensor, seen: list[Tensor]) -> Tensor:
    storage = leaf.untyped_storage().data_ptr()
    if any(other.untyped_storage().data_ptr() == storage for other in seen):
        leaf = leaf.clone(memory_format=torch.contiguous_format)
    seen.append(leaf)
    return leaf


def _make_fx(
    flat: Callable[..., list[Tensor]],
    inputs: list[Tensor],
    functional: bool,
    decompositions: dict[Any, Callable[..., Any]] | None,
) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - imports sympy

    graph = make_fx(flat, decomposition_table=decompositions)(*inputs)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    if functional and any(_is_mutable(target) for target in targets):
        # Only now: functionalize cannot be applied to a function that asks for gradients.
        graph = make_fx(torch.func.functionalize(graph, remove="mutations"))(*inputs)
    if functional:
        graph.graph.eliminate_dead_code()
    return graph


def _is_mutable(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]


def traced_for_inductor(
    function: Callable[..., Tree], example: tuple[Tree, ...], device: torch.device
) -> Traced:
    """A function as a graph that Inductor compiles well.

    Args:
        function: Pure function of trees of tensors.
        example: Arguments of the shapes that the graph will serve.
        device: Device of all tensors.
    """
    pieces = _FOR_INDUCTOR if device.type == "cpu" else None
    return Traced(function, example, decompositions=pieces)


def compile_graph(function: Callable[..., Any], *, cpp_wrapper: bool = False) -> Callable[..., Any]:
    """Compile a graph or function for the shapes of its first call.

    Args:
        function: Graph or function of tensors.
        cpp_wrapper: Whether the code that calls the kernels is compiled as well.
    """
    # Guards check at every call whether a compilation is still valid: 0.2 ms for 40 tensors. Here
    # the caller (``loops``) compares shapes, and nothing else changes within a run.
    no_guards = getattr(torch.compiler, "skip_all_guards_unsafe", None)  # newer than torch 2.6
    options: dict[str, Any] = {} if no_guards is None else {"guard_filter_fn": no_guards}
    if cpp_wrapper:
        options["cpp_wrapper"] = True
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)  # pyright: ignore[reportCallIssue, reportArgumentType, reportUnknownVariableType]


class Compiled:
    """A function of trees that is traced and compiled at its first call.

    Args:
        function: Pure function of trees of tensors.
        device: Device of all tensors.
    """

    def __init__(self, function: Callable[..., Tree], device: torch.device) -> None:
        self._function, self._device = function, device
        self._run: Callable[..., Any] | None = None
        self._result: Tree = None

    def __call__(self, *args: Tree) -> Tree:
        """Run the function; the first call compiles."""
        if self._run is None:
            traced = traced_for_inductor(self._function, args, self._device)
            self._run, self._result = compile_graph(traced.graph), traced.result
        with torch.no_grad():
            return rebuild(self._result, self._run(*leaves(args)))


def rational_tanh(x: Tensor) -> Tensor:
    """``tanh`` as a quotient of polynomials, within 4 units in the last place of float32.

    The coefficients are those of Eigen (``generic_fast_tanh_float``). A library's ``tanh`` costs
    1.3 to 2.6 ns an element. This function, compiled together with its neighbours, costs a fraction
    of that.
    """
    x = x.clamp(-7.90531110763549805, 7.90531110763549805)
    square = x * x
    numerator = torch.full_like(x, -2.76076847742355e-16)
    for coefficient in (
        2.00018790482477e-13,
        -8.60467152213735e-11,
        5.12229709037114e-08,
        1.48572235717979e-05,
        6.37261928875436e-04,
        4.89352455891786e-03,
    ):
        numerator = numerator * square + coefficient
    denominator = torch.full_like(x, 1.19825839466702e-06)
    for coefficient in (1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03):
        denominator = denominator * square + coefficient
    return x * numerator / denominator


def _single_tanh(x: Tensor) -> Tensor:
    return rational_tanh(x) if x.dtype == torch.float32 else NotImplemented


def _mm_and_bias(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """``addmm`` as a product and a bias, which is added where the activation is computed.

    The library's ``addmm`` copies the bias into every row first. The bias is written as a
    subtraction because the compiler would fuse an addition into ``addmm`` again.
    """
    if beta != 1.0 or alpha != 1.0:
        return NotImplemented
    return a.mm(b) - (-bias)


_FOR_INDUCTOR: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.tanh.default: _single_tanh,
    torch.ops.aten.addmm.default: _mm_and_bias,
}
"""Operations that Inductor does better in pieces, on a CPU."""
