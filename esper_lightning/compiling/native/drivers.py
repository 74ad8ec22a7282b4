"""The C++ text around kernels: calls of a function, of rows chunk by chunk, or of a whole loop.

``p`` is the array of all pointers: arguments, tensors that the traced functions hold, results.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from esper_lightning.compiling.native.program import aligned
from esper_lightning.compiling.native.source import Translation
from esper_lightning.compiling.native.values import C_TYPES

__all__ = ["LoopShapes", "function_text", "loop_text", "map_text"]

_GROUPS = 8  # partial sums of a step, whatever the number of threads
_BEGIN = """struct Job { void* const* p; char* work; int64_t steps; };
static void job(void* argument, Team* team, int me) {
  Job* job = (Job*)argument;
  void* const* p = job->p;
  char* work = job->work;
  const int64_t steps = job->steps;"""
_END = """}
extern "C" int run(void* const* p, char* work, int64_t steps, int threads) {
  Job argument = {p, work, steps};
  return run_team(threads, job, &argument);
}"""


class LoopShapes(NamedTuple):
    """Tensors of a loop, of which shapes and dtypes matter."""

    carry: Sequence[Tensor]
    xs: Sequence[Tensor]  # [T, ...]
    chunked: Sequence[Tensor]  # [T, M], or nothing
    constants: Sequence[Tensor]
    sums: Sequence[Tensor]  # over the chunks of a step
    rows: Sequence[Tensor]  # of one step


def function_text(body: Translation, inputs: int) -> str:
    """A program that calls a kernel once, with all threads.

    Args:
        body: The kernel.
        inputs: Number of arguments and captured tensors.
    """
    return f"""{body.text}
{_BEGIN}
  const void* const* in = (const void* const*)p;
  if (me == 0) body_pack(in, work);  // of tensors that the function holds
  wait_for_all(team, me);
  body(in, p + {inputs}, work, team, me);
{_END}"""


def map_text(
    body: Translation, rows: Sequence[Tensor], constants: int, results: Sequence[Tensor]
) -> str:
    """A program that calls a kernel for each chunk of rows; the threads divide the chunks.

    Args:
        body: The kernel, for one chunk.
        rows: Rows of one chunk.
        constants: Number of constants and captured tensors.
        results: Results of one chunk.
    """
    first = len(rows) + constants
    inputs = [_step_of(f"p[{k}]", "t", leaf) for k, leaf in enumerate(rows)]
    inputs += [f"p[{k}]" for k in range(len(rows), first)]
    outputs = [_step_of(f"p[{first + k}]", "t", leaf) for k, leaf in enumerate(results)]
    return f"""{body.text}
{_BEGIN}
  work += me * (int64_t){aligned(body.work_bytes)};
  const int64_t first = share(steps, 1, team->size, me), end = share(steps, 1, team->size, me + 1);
  for (int64_t t = first; t < end; t++) {{
    {_inputs(inputs)}
    {_outputs(outputs)}
    if (t == first) body_pack(in, work);
    body(in, out, work, team, me);
  }}
{_END}"""


def loop_text(
    shapes: LoopShapes, body: Translation, chunk: Translation | None, chunks: int
) -> tuple[str, int, int]:
    """A program of a whole loop.

    In a step, the threads divide the chunks into groups, whose number does not depend on the number
    of threads; so the sums are the same for any number. The carry lies in two sets of memory in
    turn: the first step reads the caller's carry, and the last step writes the caller's result.

    Args:
        shapes: Tensors of the loop.
        body: Kernel of a step.
        chunk: Kernel of a chunk; ``None`` where the steps have no chunks.
        chunks: Number of chunks in a step.

    Returns:
        The text, the bytes that all threads share, and the bytes of each thread.
    """
    carry, groups = shapes.carry, min(_GROUPS, chunks)
    first_x = len(carry)
    first_chunked = first_x + len(shapes.xs)
    first_constant = first_chunked + len(shapes.chunked)
    first_captured = first_constant + len(shapes.constants)
    of_chunk = [] if chunk is None else chunk.captured
    first_result = first_captured + len(body.captured) + len(of_chunk)
    constants = [f"p[{first_constant + k}]" for k in range(len(shapes.constants))]

    sets_at = aligned(body.work_bytes)
    set_bytes = sum(map(_size, carry))
    sums_at, sum_bytes = sets_at + 2 * set_bytes, sum(map(_size, shapes.sums))
    shared_bytes = sums_at + groups * sum_bytes
    own_bytes = 0 if chunk is None else sum_bytes + aligned(chunk.work_bytes)

    now = [f"now[{k}]" for k in range(len(carry))]
    inputs = [*now, *(f"sums + {at}" for at in _offsets(shapes.sums))]
    inputs += [_step_of(f"p[{first_x + k}]", "t", leaf[0]) for k, leaf in enumerate(shapes.xs)]
    varying = len(inputs)
    inputs += [*constants, *(f"p[{first_captured + k}]" for k in range(len(body.captured)))]
    outputs = [f"next[{k}]" for k in range(len(carry))]
    outputs += [
        _step_of(f"p[{first_result + len(carry) + k}]", "t", leaf)
        for k, leaf in enumerate(shapes.rows)
    ]
    swap = [
        f"now[{k}] = t == 0 ? p[{k}] : before + {at};"
        f" next[{k}] = t == steps - 1 ? p[{first_result + k}] : after + {at};"
        for k, at in enumerate(_offsets(carry))
    ]
    over_chunks: list[str] = []
    if chunk is not None:
        captured = [f"p[{first_captured + len(body.captured) + k}]" for k in range(len(of_chunk))]
        chunked = _step_of(f"p[{first_chunked}]", "t", shapes.chunked[0][0])
        others = [*constants, *captured]
        over_chunks = _over_chunks(shapes, chunked, now, others, chunks, groups)
    text = "\n".join(
        [
            body.text,
            "" if chunk is None else chunk.text,
            _BEGIN,
            f"char *sets = work + {sets_at}, *sums = work + {sums_at};",
            f"char* own = work + {shared_bytes} + me * (int64_t){own_bytes};",
            f"const void* now[{max(1, len(carry))}];",
            f"void* next[{max(1, len(carry))}];",
            "if (me == 0) {",
            _inputs(["nullptr"] * varying + inputs[varying:]),
            "body_pack(in, work);",
            "}",
            "wait_for_all(team, me);",
            "for (int64_t t = 0; t < steps; t++) {",
            f"char *before = sets + (t & 1) * {set_bytes}, *after = sets + (~t & 1) * {set_bytes};",
            *swap,
            *over_chunks,
            _inputs(inputs),
            _outputs(outputs),
            "body(in, out, work, team, me);",
            "wait_for_all(team, me);",
            "}",
            _END,
        ]
    )
    return text, shared_bytes, own_bytes


def _over_chunks(
    shapes: LoopShapes,
    chunked: str,
    now: Sequence[str],
    others: Sequence[str],
    chunks: int,
    groups: int,
) -> list[str]:
    """Sums over the chunks of each group, and then over the groups."""
    sizes = [(C_TYPES[leaf.dtype], max(1, leaf.numel())) for leaf in shapes.sums]
    offsets, sum_bytes = _offsets(shapes.sums), sum(map(_size, shapes.sums))
    chunk_bytes = _bytes(shapes.chunked[0][0]) // chunks
    lines = [
        "{",
        _inputs([*now, "nullptr", *others]),
        f"chunk_pack(in, own + {sum_bytes});",
        "}",
        f"const int64_t end = share({groups}, 1, team->size, me + 1);",
        f"for (int64_t g = share({groups}, 1, team->size, me); g < end; g++) {{",
        f"const int64_t first = {chunks} * g / {groups};",
        f"char* total = sums + g * {sum_bytes};",
        f"for (int64_t c = first; c < {chunks} * (g + 1) / {groups}; c++) {{",
        "char* to = c == first ? total : own;",
        _inputs([*now, f"{chunked} + c * {chunk_bytes}", *others]),
        _outputs([f"to + {at}" for at in offsets]),
        f"chunk(in, out, own + {sum_bytes}, team, me);",
        "if (c == first) continue;",
    ]
    for (kind, number), at in zip(sizes, offsets, strict=True):
        lines.append(f"add<{kind}>(total + {at}, own + {at}, 0, {number});")
    lines += ["}", "}", "wait_for_all(team, me);"]
    if groups > 1:
        lines.append(f"for (int64_t g = 1; g < {groups}; g++) {{")
        for (kind, number), at in zip(sizes, offsets, strict=True):
            mine = f"share({number}, 64, team->size, me), share({number}, 64, team->size, me + 1)"
            lines.append(f"add<{kind}>(sums + {at}, sums + g * {sum_bytes} + {at}, {mine});")
        lines += ["}", "wait_for_all(team, me);"]
    return lines


def _bytes(leaf: Tensor) -> int:
    return leaf.numel() * leaf.element_size()


def _size(leaf: Tensor) -> int:
    return aligned(max(1, leaf.numel()) * leaf.element_size())


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins, if they lie one after another."""
    sizes = list(map(_size, tensors))
    return [sum(sizes[:k]) for k in range(len(sizes))]


def _step_of(pointer: str, step: str, leaf: Tensor) -> str:
    """A pointer to the rows of a step, which ``leaf`` has the shape of."""
    return f"(char*){pointer} + {step} * (int64_t){_bytes(leaf)}"


def _inputs(pointers: Sequence[str]) -> str:
    return f"const void* const in[] = {{{', '.join(pointers) or 'nullptr'}}};"


def _outputs(pointers: Sequence[str]) -> str:
    return f"void* const out[] = {{{', '.join(pointers) or 'nullptr'}}};"
