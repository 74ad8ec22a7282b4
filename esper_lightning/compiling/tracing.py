"""Functions of trees of tensors as graphs of tensor operations, and their compilation.

A *body* computes one step of a loop. A *chunk body* computes what a step sums over its chunks. Both
are pure functions.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from esper_lightning.compiling.holders import unchanged
from esper_lightning.core.errors import require
from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = [
    "MOST_OPERATIONS",
    "OPTIONS",
    "Body",
    "ChunkBody",
    "Compiled",
    "Traceable",
    "Traced",
    "Tree",
    "allow_other_strides",
    "compile_graph",
    "count_operations",
    "suit_compiler",
]

OPTIONS = {"combo_kernels": True, "benchmark_combo_kernel": False}
"""Settings of Inductor on CUDA.

Kernels that do not depend on each other are launched as one, such as those of an actor and of a
critic: replayed graphs of small kernels take as long as their launches.
"""

MOST_OPERATIONS = 8192
"""Greatest number of operations that are compiled together, or captured in one graph of a loop.

The time that a compiler takes grows faster than the number of operations.
"""

Tree = Any
Body = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
"""A step of a loop: ``(carry, x, constants) -> (carry, row)``.

With a chunk body, ``x`` is ``(sum of partials, x)``.
"""
ChunkBody = Callable[[Tree, Tree, Tree], Tree]
"""A chunk of a step: ``(carry, chunk, constants) -> partial``, summed over the chunks."""


class Traced:
    """A function of trees as a graph of tensor operations, gradients included.

    Tracing runs the function on tensors without numbers, of the shapes of the example. A result
    that shares memory with an argument or with another result is copied in the graph, because
    compiled loops need that.

    Args:
        function: Pure function of trees of tensors.
        example: Arguments of the shapes that the graph will serve.
        functional: Whether operations in place become operations that return new tensors.

    Raises:
        ImpureError: If the trace has changed an attribute of what the function holds. The attribute
            has been restored, so that no tensor without numbers is left in it.

    Attributes:
        graph: Function from the tensors of the arguments to the tensors of the result.
        result: Result of the function, as a tree of tensors on the meta device.
        held: Tensors that the graph reads besides its arguments, where they lie.
    """

    def __init__(
        self,
        function: Callable[..., Tree],
        example: tuple[Tree, ...],
        *,
        functional: bool = False,
    ) -> None:
        self.result: Tree = None

        def flat(*tensors: Tensor) -> list[Tensor]:
            result = function(*rebuild(example, tensors))
            self.result = map_tree(lambda leaf: torch.empty_like(leaf, device="meta"), result)
            seen = list(tensors)
            return [_fresh(leaf, seen) for leaf in leaves(result)]

        # A function that needs a gradient computes it itself; nothing outside needs autograd.
        inputs = [leaf.detach() for leaf in leaves(example)]
        on_cpu = all(leaf.device.type == "cpu" for leaf in inputs)
        plain = _plain_attention if on_cpu else contextlib.nullcontext
        with unchanged(function), torch.no_grad(), Traceable(), plain():
            self.graph = _make_fx(flat, inputs, functional)
        nodes = [node for node in self.graph.graph.nodes if node.op == "get_attr"]
        self.held: list[Tensor] = [getattr(self.graph, str(node.target)) for node in nodes]


@contextlib.contextmanager
def _plain_attention() -> Generator[None]:
    """On a CPU, attention is products and a softmax rather than an operation of torch's kernels."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Traceable(TorchFunctionMode):
    """Computes ``one_hot`` without the numbers of a tensor, which torch asks for its checks."""

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 1:  # the largest number of the tensor
        return torch.nn.functional.one_hot(tensor, num_classes)
    zeros = tensor.new_zeros((*tensor.shape, num_classes))
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)  # an index outside of it is an error, too


def _fresh(leaf: Tensor, seen: list[Tensor]) -> Tensor:
    storage = StorageWeakRef(leaf.untyped_storage())
    others = [StorageWeakRef(other.untyped_storage()) for other in seen]
    if storage in others:
        leaf = leaf.clone(memory_format=torch.contiguous_format)
    seen.append(leaf)
    return leaf


def _make_fx(
    flat: Callable[..., list[Tensor]], inputs: list[Tensor], functional: bool
) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - imports sympy

    # Fake tensors have no numbers: nothing is computed. Tensors that a function holds are real.
    fake: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    graph = make_fx(flat, **fake)(*inputs)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    if functional and any(_is_mutable(target) for target in targets):
        # Only now: functionalize cannot be applied to a function that asks for gradients.
        graph = make_fx(torch.func.functionalize(graph, remove="mutations"), **fake)(*inputs)
    if functional:
        graph.graph.eliminate_dead_code()
    return graph


def _is_mutable(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]


def count_operations(graph: torch.fx.GraphModule) -> int:
    """Number of tensor operations of a graph, views included."""
    return sum(node.op == "call_function" for node in graph.graph.nodes)


def compile_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a graph or function for the shapes of its first call.

    Args:
        function: Graph or function of tensors.

    Raises:
        ValueError: If the graph has more than ``MOST_OPERATIONS`` operations.
    """
    if isinstance(function, torch.fx.GraphModule):
        count, rule = count_operations(function), f"have at most {MOST_OPERATIONS} operations"
        require(count <= MOST_OPERATIONS, "A compiled function", rule, count)
        suit_compiler(function)
    # Guards check at every call whether a compilation is still valid: 0.2 ms for 40 tensors. Here
    # the caller (``loops``) compares shapes, and nothing else changes within a run.
    no_guards = getattr(torch.compiler, "skip_all_guards_unsafe", None)  # newer than torch 2.6
    options: dict[str, Any] = dict(OPTIONS)
    options |= {} if no_guards is None else {"guard_filter_fn": no_guards}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)  # pyright: ignore[reportCallIssue, reportArgumentType, reportUnknownVariableType]


def suit_compiler(graph: torch.fx.GraphModule) -> None:
    """Replace what a compiler refuses in a graph by what it compiles, in place."""
    _write_copies(graph)
    allow_other_strides(graph)


def _write_copies(graph: torch.fx.GraphModule) -> None:
    """Let results of ``out=`` be copies: torch 2.11 refuses to compile some, and fuses a copy."""
    for node in list(graph.graph.nodes):
        functional = _without_out(node.target) if "out" in node.kwargs else None
        if functional is None:
            continue
        kwargs = dict(node.kwargs)
        out = kwargs.pop("out")
        with graph.graph.inserting_before(node):
            value = graph.graph.call_function(functional, node.args, kwargs)
            written = graph.graph.call_function(torch.ops.aten.copy_.default, (out, value))
        node.replace_all_uses_with(written)
        graph.graph.erase_node(node)


def _without_out(overload: Any) -> OpOverload | None:
    """The operation that returns what the other writes into ``out``; ``None`` if there is none."""
    if not isinstance(overload, OpOverload):
        return None
    schema = overload._schema  # pyright: ignore[reportPrivateUsage]
    given = [(a.name, str(a.type)) for a in schema.arguments if not a.is_out]
    for name in overload.overloadpacket.overloads():
        other = getattr(overload.overloadpacket, name)
        if [(a.name, str(a.type)) for a in other._schema.arguments] == given:
            return other
    return None


def allow_other_strides(graph: torch.fx.GraphModule) -> None:
    """Let views of a graph be copies, in place.

    Results of other operations than those that were traced may lie otherwise in memory, so that
    they cannot be viewed in the same shapes.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()


class Compiled:
    """A function of trees that is traced and compiled at its first call.

    Args:
        function: Pure function of trees of tensors.
    """

    def __init__(self, function: Callable[..., Tree]) -> None:
        self._function = function
        self._run: Callable[..., Any] | None = None
        self._result: Tree = None

    def __call__(self, *args: Tree) -> Tree:
        """Run the function; the first call compiles."""
        if self._run is None:
            traced = Traced(self._function, args)
            self._run, self._result = compile_graph(traced.graph), traced.result
        with torch.no_grad():
            return rebuild(self._result, self._run(*leaves(args)))
