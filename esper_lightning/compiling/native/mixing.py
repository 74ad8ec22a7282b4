"""Whether samples are combined by more than sums, asked of the graph of a function.

Numbers cannot answer this alone: a clip of a norm over all samples, or a hinge on their mean, may
begin to matter only later in a run. A value that depends on samples and whose size does not grow
with their number has *lost* the samples' axis.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from esper_lightning.compiling.native.values import UnsupportedError

__all__ = ["refuse_mixed"]

_OF_SHAPES = {  # operations that use the shapes of their arguments, and not the numbers
    *("empty_like", "full_like", "ones_like", "zeros_like"),
    *("new_empty", "new_full", "new_ones", "new_zeros"),
}
_LINEAR = {  # operations that are linear in all tensors together
    *("add", "alias", "as_strided", "cat", "clone", "detach", "diagonal", "expand", "flip"),
    *("getitem", "mean", "neg", "permute", "reshape", "select", "slice", "split", "sub", "rsub"),
    *("split_with_sizes", "squeeze", "stack", "sum", "t", "transpose", "unbind", "unsqueeze"),
    *("view", "_reshape_alias", "_to_copy", "_unsafe_view", "constant_pad_nd"),
}
_PRODUCTS = {"bmm", "dot", "mm", "mul", "mv"}  # linear in each tensor alone
_LINEAR_IN_FIRST = {"div", "gather", "index", "index_select", "masked_fill"}
_LINEAR_IN = {  # positions of the arguments together in which an operation is linear
    "where": {1, 2},
    "scatter_add": {0, 3},
}


def refuse_mixed(
    graph: GraphModule, larger: GraphModule, sources: range, what: str, *, sums: bool
) -> None:
    """Refuse a function that combines samples by more than sums.

    An operation along the samples' axis that has this axis in its result, such as a cumulative sum,
    is not found.

    Args:
        graph: Graph of the function, for some number of samples.
        larger: Graph of the same function for more samples.
        sources: Numbers of the arguments that differ from sample to sample.
        what: What is refused, for the message.
        sums: Whether the results are sums over samples. Otherwise no value may lose the axis.

    Raises:
        UnsupportedError: If a value that has lost the axis meets one that has it, or goes through
            an operation that is not linear; or if the two graphs differ in their operations.
    """
    nodes, others = list(graph.graph.nodes), list(larger.graph.nodes)
    if [node.target for node in nodes] != [node.target for node in others]:
        raise UnsupportedError(f"{what} (operations change with the number of samples)")
    placeholders = [node for node in nodes if node.op == "placeholder"]
    dependent, lost = {placeholders[number] for number in sources}, set[Node]()
    for node, other in zip(nodes, others, strict=True):
        inputs = set(node.all_input_nodes)
        if node.op == "output" or not inputs & dependent or _name(node) in _OF_SHAPES:
            continue
        dependent.add(node)
        mixes = not inputs.isdisjoint(lost)
        if mixes and not (inputs & dependent <= lost and _is_linear(node, lost)):
            raise UnsupportedError(f"{what} ({_name(node)} of a sum)")
        if mixes or not _grows(node, other):
            if not sums:
                raise UnsupportedError(f"{what} ({_name(node)} over all of them)")
            lost.add(node)


def _name(node: Node) -> str:
    """Name of an operation without its overload, such as ``add``."""
    target: Any = node.target
    packet = target.overloadpacket if isinstance(target, OpOverload) else target
    return str(getattr(packet, "__name__", packet))


def _is_linear(node: Node, lost: set[Node]) -> bool:
    """Whether an operation is linear in those of its arguments that are ``lost``."""
    name = _name(node)
    positions = {
        number
        for number, argument in enumerate(node.args)
        if any(one in lost for one in _nodes(argument))
    }
    if any(one in lost for one in _nodes(list(node.kwargs.values()))):
        return False
    if name in _LINEAR_IN_FIRST or name.endswith(("_backward", "_backward_data")):
        return positions == {0}
    if name in _PRODUCTS:
        return len(positions) == 1
    return name in _LINEAR or positions <= _LINEAR_IN.get(name, set[int]())


def _nodes(argument: Any) -> Iterator[Node]:
    if isinstance(argument, Node):
        yield argument
    elif isinstance(argument, list | tuple):
        for one in argument:  # pyright: ignore[reportUnknownVariableType]
            yield from _nodes(one)


def _grows(node: Node, other: Node) -> bool:
    """Whether a tensor of the result has more elements where there are more samples."""
    return _sizes(node.meta.get("val")) != _sizes(other.meta.get("val"))


def _sizes(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [value.numel()]
    if isinstance(value, list | tuple):
        return [size for one in value for size in _sizes(one)]  # pyright: ignore[reportUnknownVariableType]
    return []
