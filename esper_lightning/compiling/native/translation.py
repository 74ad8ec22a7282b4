"""A traced graph as a kernel: the walk over its nodes."""

import operator
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx

from esper_lightning.compiling.native import (
    activations,
    constants,
    convolutions,
    elementwise,
    indexing,
    pooling,
    recurrences,
    reductions,
    views,
)
from esper_lightning.compiling.native.decompositions import decompose
from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import Operation, Result
from esper_lightning.compiling.native.source import Source, Translation
from esper_lightning.compiling.native.values import C_TYPES, UnsupportedError, Value
from esper_lightning.compiling.tracing import MOST_OPERATIONS, count_operations

__all__ = ["OPERATIONS", "translate"]

OPERATIONS: dict[str, Operation] = {
    **activations.OPERATIONS,
    **constants.OPERATIONS,
    **convolutions.OPERATIONS,
    **elementwise.OPERATIONS,
    **indexing.OPERATIONS,
    **pooling.OPERATIONS,
    **reductions.OPERATIONS,
    **views.OPERATIONS,
}
"""Every operation that native code knows."""


def translate(
    graph: fx.GraphModule, name: str, *, shared: bool, unchanged: Collection[int] = ()
) -> Translation:
    """Translate a graph of static shapes into a C++ function.

    Args:
        graph: Graph from ``make_fx``, without operations that write in place.
        name: Name of the C++ function.
        shared: Whether a team of threads runs the function together.
        unchanged: Numbers of the arguments that are the same in all calls of a loop.

    Raises:
        UnsupportedError: If the graph holds what has no translation, or more than
            ``MOST_OPERATIONS`` operations; the message says what.
    """
    count = count_operations(graph)
    if count > MOST_OPERATIONS:
        raise UnsupportedError(f"{count} operations, of which at most {MOST_OPERATIONS} compile")
    graph = decompose(graph)
    kernel = Kernel(name, shared=shared)
    values: dict[fx.Node, Any] = {}
    uses = _count_uses(graph.graph)
    captured: list[Tensor] = []
    attributes: list[fx.Node] = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            meta = node.meta["val"]
            number = len(kernel.inputs)
            values[node] = kernel.add_input(
                tuple(meta.shape), meta.dtype, is_constant=number in unchanged
            )
        elif node.op == "get_attr":
            attributes.append(node)
    for node in attributes:
        tensor: Tensor = getattr(graph, str(node.target))
        captured.append(tensor)
        values[node] = kernel.add_input(tuple(tensor.shape), tensor.dtype, is_constant=True)
    for node in graph.graph.nodes:
        if node.op == "call_function":
            value = _call(kernel, node, values)
            if isinstance(value, Value) and uses[node] > 1:
                kernel.named(value)
            values[node] = value
        elif node.op == "output":
            for result in node.args[0]:
                kernel.add_output(values[result])
        elif node.op not in ("placeholder", "get_attr"):
            raise UnsupportedError(f"a node {node.op}")
    source = Source(kernel)
    return Translation(source.text, source.work_bytes, captured)


def _count_uses(graph: fx.Graph) -> Counter[fx.Node]:
    """How often each node is an argument, repetitions in one call included."""
    uses: Counter[fx.Node] = Counter()

    def count(node: fx.Node) -> fx.Node:
        uses[node] += 1
        return node

    for node in graph.nodes:
        fx.map_arg((node.args, node.kwargs), count)
    return uses


def _call(kernel: Kernel, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    arguments: Any = fx.map_arg(node.args, values.__getitem__)
    keywords: Any = fx.map_arg(node.kwargs, values.__getitem__)
    if node.target is operator.getitem:
        return arguments[0][arguments[1]]
    name = str(node.target)
    function = OPERATIONS.get(name.removeprefix("aten."))
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:  # of what the function did not make itself
        raise UnsupportedError(f"writing to an argument ({name})")
    if function is None:
        raise UnsupportedError(f"the operation {name}")
    meta: Any = node.meta["val"]
    # Of several results, some may not be asked for.
    first: Any = meta if isinstance(meta, Tensor) else next(one for one in meta if one is not None)
    if not isinstance(first, Tensor) or first.dtype not in C_TYPES:
        raise UnsupportedError(f"a result of {name} that is {getattr(first, 'dtype', first)}")
    if not all(isinstance(extent, int) for extent in first.shape):
        raise UnsupportedError(f"a shape that depends on the numbers of a tensor, of {name}")
    if first.numel() == 0:
        raise UnsupportedError(f"an empty result of {name}")
    try:
        return function(kernel, Result(tuple(first.shape), first.dtype), *arguments, **keywords)
    except TypeError as error:
        raise UnsupportedError(f"{name} with these arguments ({error})") from error
    except ZeroDivisionError as error:  # an axis modulo the number of axes
        raise UnsupportedError(f"{name} of a number") from error


def _step(graph: fx.GraphModule, name: str, unchanged: Collection[int]) -> Translation:
    return translate(graph, name, shared=False, unchanged=unchanged)


OPERATIONS.update(recurrences.recurrences(_step))
