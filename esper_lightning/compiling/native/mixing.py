"""Whether samples are combined by more than sums, asked of the graph of a function.

Numbers cannot answer this: what a weight of 0 hides today may train tomorrow. So each element of
each value gets a *code*: zero, fixed, a sum over all samples, or the number of the one sample on
which the element depends. Operations that move elements move the codes (torch itself runs them on
the codes); ``rules`` says what all others do. What has no rule is refused.
"""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from esper_lightning.compiling.native.codes import (
    EVEN,
    FIRST,
    FIXED,
    TOTAL,
    ZERO,
    Call,
    MixedError,
    operation_name,
)
from esper_lightning.compiling.native.decompositions import decompose
from esper_lightning.compiling.native.kinds import sizes_at
from esper_lightning.compiling.native.rules import Rules
from esper_lightning.compiling.native.values import UnsupportedError
from esper_lightning.compiling.purity import same_bits

__all__ = ["refuse_mixed_rows", "refuse_other_sums"]

_MADE = {"lift_fresh_copy"}  # the only use of a tensor that a function makes of Python's numbers


def refuse_other_sums(
    graph: fx.GraphModule, larger: fx.GraphModule, sources: range, what: str
) -> None:
    """Refuse a function of samples whose results are not sums over the samples.

    The sum of its results for chunks of samples must be its result for all of them.

    Args:
        graph: Graph of the function for some number of samples.
        larger: Graph of the same function for all samples, which are more.
        sources: Numbers of the arguments that differ from sample to sample.
        what: What is refused, for the message.

    Raises:
        UnsupportedError: If a result is no such sum, or cannot be seen to be one.
    """
    for code, _ in _results(graph, larger, sources, what):
        if not bool(((code == TOTAL) | (code == ZERO)).all()):
            raise UnsupportedError(f"{what} (a result that is no sum)")


def refuse_mixed_rows(
    graph: fx.GraphModule, larger: fx.GraphModule, sources: range, what: str
) -> None:
    """Refuse a function of rows whose rows depend on each other, on their number or their places.

    Args:
        graph: Graph of the function for some number of rows.
        larger: Graph of the same function for all rows, which are more.
        sources: Numbers of the arguments that are rows.
        what: What is refused, for the message.

    Raises:
        UnsupportedError: If a row of a result depends on another row, or may do so.
    """
    number = _number(graph, sources)
    own = torch.arange(number)[:, None] + FIRST
    for code, grows in _results(graph, larger, sources, what):
        rows = code.reshape(number, -1) if grows and code.shape[0] == number else None
        if rows is None or not bool(((rows == own) | (rows < EVEN)).all()):
            raise UnsupportedError(f"{what} (a result that is not the row's own)")


def _number(graph: fx.GraphModule, sources: range) -> int:
    given = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return int(given[sources[0]].meta["val"].shape[0])


def _results(
    graph: fx.GraphModule, larger: fx.GraphModule, sources: range, what: str
) -> list[tuple[Tensor, bool]]:
    """The codes of each result, and whether its shape grows with the number of samples."""
    if _held(graph) != _held(larger):
        raise UnsupportedError(f"{what} (a tensor for each number of samples)")
    numbers = _number(graph, sources), _number(larger, sources)
    graph, larger = decompose(graph), decompose(larger)
    nodes, others = list(graph.graph.nodes), list(larger.graph.nodes)
    if [node.target for node in nodes] != [node.target for node in others]:
        raise UnsupportedError(f"{what} (operations change with the number of samples)")
    places = {node: place for all_ in (nodes, others) for place, node in enumerate(all_)}
    given = [node for node in nodes if node.op == "placeholder"]
    samples = torch.arange(numbers[0], dtype=torch.int32) + FIRST
    rules = Rules(samples)
    known: dict[fx.Node, Any] = {}
    for node, other in zip(nodes, others, strict=True):
        if _arguments(node, places) != _arguments(other, places):
            raise UnsupportedError(f"{what} ({operation_name(node)} of a number of samples)")
        if node.op == "placeholder":
            shape = node.meta["val"].shape
            known[node] = torch.full(shape, FIXED, dtype=torch.int32)
            if given.index(node) in sources:
                known[node] = samples.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        elif node.op == "get_attr":
            tensor: Tensor = getattr(graph, str(node.target))
            known[node] = torch.full(tensor.shape, FIXED, dtype=torch.int32)
            if not same_bits(tensor, getattr(larger, str(other.target))):
                raise UnsupportedError(f"{what} (a tensor for each number of samples)")
        elif node.op == "call_function":
            try:
                known[node] = _of_call(rules, node, other, known)
                _refuse_other_places(node, other, numbers)
            except MixedError as error:
                raise UnsupportedError(f"{what} ({operation_name(node)} {error})") from error
        else:
            pairs = zip(node.args[0], other.args[0], strict=True)
            return [(known[one], _shapes(one) != _shapes(two)) for one, two in pairs]
    raise AssertionError


def _held(graph: fx.GraphModule) -> list[Any]:
    """Place and kind of each tensor that a function holds; those that it makes have another.

    A held tensor may get other numbers later, so that equal numbers are not enough.
    """
    held: list[Any] = []
    for node in graph.graph.nodes:
        if node.op == "get_attr" and {operation_name(user) for user in node.users} != _MADE:
            tensor: Tensor = getattr(graph, str(node.target))
            held.append((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))
    return held


def _refuse_other_places(node: fx.Node, other: fx.Node, numbers: tuple[int, int]) -> None:
    """Refuse results such as those of the first 100 samples, or of all pairs of samples."""
    for one, two in zip(_shapes(node), _shapes(other), strict=True):
        in_proportion = math.prod(one) * numbers[1] == math.prod(two) * numbers[0]
        if one != two and not in_proportion:
            raise MixedError("with places that are not in proportion to the samples")


def _of_call(rules: Rules, node: fx.Node, other: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args: Any = fx.map_arg(node.args, known.__getitem__)
    if node.target is operator.getitem:
        return args[0][args[1]]
    found = rules.run(Call(node, other, args, fx.map_arg(node.kwargs, known.__getitem__)))
    sizes = zip(_all(found), _shapes(node), _shapes(other), strict=True)
    for one, shape, larger in sizes:
        if shape != larger and int(one.max()) in (FIXED, TOTAL):
            raise MixedError("of the number of samples")
        if shape == larger and int(one.max()) >= FIRST:
            raise MixedError("of some of the samples")
    return found


def _all(value: Any) -> list[Tensor]:
    """All results of a call."""
    results = value if isinstance(value, list | tuple) else [value]
    return [one for one in results if one is not None]


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in _all(node.meta["val"])]


def _arguments(node: fx.Node, places: dict[fx.Node, int]) -> str:
    """The arguments, but for the one that is a shape; tensors by their place in the graph."""
    size = sizes_at(operation_name(node))
    args = [None if number == size else one for number, one in enumerate(node.args)]
    return repr(fx.map_arg((args, node.kwargs), lambda one: f"%{places[one]}"))
