"""Recurrent cells over a sequence, as loops within a kernel.

A step of the loop is a graph of its own, and thus a C++ function of its own. Sequences do not
depend on each other: they are divided into groups, each of which runs through all steps, so that
its memories stay in the caches and a team of threads can divide the groups.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from esper_lightning.compiling.native.nests import Kernel
from esper_lightning.compiling.native.operations import Operations, Result
from esper_lightning.compiling.native.program import aligned
from esper_lightning.compiling.native.source import Translation
from esper_lightning.compiling.native.statements import chunk_rows
from esper_lightning.compiling.native.values import (
    Shape,
    UnsupportedError,
    Value,
    literal,
    pointer,
)
from esper_lightning.compiling.native.views import contiguous
from esper_lightning.compiling.tracing import Traced
from esper_lightning.core.recurrence import backward_step, forward_step
from esper_lightning.core.tensor_trees import leaves

__all__ = ["Translate", "recurrences"]


Translate = Callable[[fx.GraphModule, str, Collection[int]], Translation]
"""``(graph, name, unchanged) -> translation`` of a function that one thread runs, in which the
arguments of the numbers ``unchanged`` are the same in all calls of a loop."""


def recurrences(translate: Translate) -> Operations:
    """The translations of the operators in ``core.recurrence``.

    Args:
        translate: Function that translates the graph of a step.
    """
    operations = Operations()

    @operations.register(str(torch.ops.esper_lightning.recurrence.default))
    def _forward(
        kernel: Kernel,
        result: Result,
        cell: str,
        x: Value,
        begins: Value,
        memory: Value,
        weight: Value,
        bias: Value,
    ) -> Value:
        def step(*values: Tensor) -> tuple[Tensor]:
            return (forward_step(cell, *values),)

        loop = _Loop(kernel, translate, step, xs=[x, begins], constants=[weight, bias])
        return loop.run(memory, backwards=False)[0]

    @operations.register(str(torch.ops.esper_lightning.recurrence_backward.default))
    def _backward(
        kernel: Kernel,
        result: Result,
        cell: str,
        gradient: Value,
        begins: Value,
        slopes: Sequence[Value],
        weight: Value,
    ) -> list[Value]:
        zero = literal(0, gradient.dtype)
        none = Value(gradient.shape[1:], gradient.dtype, lambda _: zero)
        xs = [gradient, begins, *slopes]
        loop = _Loop(kernel, translate, partial(backward_step, cell), xs=xs, constants=[weight])
        return loop.run(none, backwards=True)

    return operations


class _Loop:
    """A loop over the steps of sequences.

    Args:
        kernel: Kernel that gets the loop.
        translate: Function that translates the graph of a step.
        step: Function of a step: ``(carry, *xs[t], *constants) -> (carry, *rows)``.
        xs: What each step gets, ``[T, M, ...]``.
        constants: What all steps get.
    """

    def __init__(
        self,
        kernel: Kernel,
        translate: Translate,
        step: Callable[..., tuple[Tensor, ...]],
        *,
        xs: Sequence[Value],
        constants: Sequence[Value],
    ) -> None:
        self._kernel, self._translate, self._of_step = kernel, translate, step
        self._xs = [contiguous(kernel, value) for value in xs]
        self._constants = [contiguous(kernel, value) for value in constants]
        self._steps, self._sequences = xs[0].shape[:2]

    def run(self, carry: Value, *, backwards: bool) -> list[Value]:
        """The carry after each step, and the rows of each step.

        Args:
            carry: Carry before the first step, ``[M, ...]``.
            backwards: Whether the last step is the first to run.
        """
        kernel, name = self._kernel, f"{self._kernel.name}_loop{len(self._kernel.functions)}"
        carry = contiguous(kernel, carry)
        size = chunk_rows(self._sequences)
        groups = self._sequences // size
        example = [
            _zeros((size, *carry.shape[1:]), carry),
            *(_zeros((size, *x.shape[2:]), x) for x in self._xs),
            *(_zeros(value.shape, value) for value in self._constants),
        ]
        with torch.autocast("cpu", enabled=False):
            traced = Traced(self._of_step, tuple(example), functional=True)
        varying = 1 + len(self._xs)
        unchanged = range(varying, varying + len(self._constants))
        body = self._translate(traced.graph, f"{name}_body", unchanged)
        if body.captured:
            raise UnsupportedError("a recurrent step with a tensor of its own")
        rows = leaves(traced.result)
        text = _loop_text(
            name,
            body,
            steps=self._steps,
            groups=groups,
            xs=[_size(value) for value in example[1:varying]],
            constants=len(self._constants),
            rows=[_size(value) for value in rows],
            backwards=backwards,
        )
        kernel.functions.append(text)

        shapes = [(self._steps, self._sequences, *row.shape[1:]) for row in rows]
        results = [
            kernel.new_value(shape, row.dtype) for shape, row in zip(shapes, rows, strict=True)
        ]
        own = kernel.new_buffer(torch.uint8, groups * aligned(body.work_bytes))
        reads = [carry, *self._xs, *self._constants]
        pointers = [f"(const char*)({pointer(value)})" for value in reads]
        pointers += [f"(char*){value.place[0].name}" for value in results]
        arguments = ", ".join([*pointers, f"(char*){own.name}"])
        kernel.call(
            f"{name}({arguments}, {{first}}, {{end}}, team, me);",
            reads=reads,
            writes=results,
            scratch=own,
            number=groups,
        )
        return results


def _loop_text(
    name: str,
    body: Translation,
    *,
    steps: int,
    groups: int,
    xs: Sequence[int],
    constants: int,
    rows: Sequence[int],
    backwards: bool,
) -> str:
    """A C++ function that runs all steps of some groups of sequences.

    Args:
        name: Name of the function.
        body: Step of one group.
        steps: Number of steps.
        groups: Number of groups.
        xs: Bytes of each input of a step of one group.
        constants: Number of inputs that are the same in all steps.
        rows: Bytes of each result of a step of one group, of which the first is the carry.
        backwards: Whether the last step is the first to run.
    """
    names = ["carry", *(f"x{k}" for k in range(len(xs))), *(f"c{k}" for k in range(constants))]
    given = [*(f"const char* {each}" for each in names), *(f"char* y{k}" for k in range(len(rows)))]
    given += ["char* work", "int64_t first", "int64_t end", "Team* team", "int me"]
    others = names[1 + len(xs) :]
    packed = ", ".join(["nullptr"] * (1 + len(xs)) + others)
    now = ", ".join(["before", *(f"x{k} + at * {size}" for k, size in enumerate(xs)), *others])
    out = ", ".join(f"y{k} + at * {size}" for k, size in enumerate(rows))
    return f"""{body.text}
NOINLINE static void {name}({", ".join(given)}) {{
  for (int64_t g = first; g < end; g++) {{
    char* own = work + g * {aligned(body.work_bytes)};
    const void* const packed[] = {{{packed}}};
    {name}_body_pack(packed, own);
    const char* before = carry + g * {rows[0]};
    for (int64_t k = 0; k < {steps}; k++) {{
      const int64_t at = {f"({steps - 1} - k)" if backwards else "k"} * {groups} + g;
      const void* const in[] = {{{now}}};
      void* const out[] = {{{out}}};
      {name}_body(in, out, own, team, me);
      before = (const char*)out[0];
    }}
  }}
}}"""


def _zeros(shape: Shape, like: Value) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype)


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()
