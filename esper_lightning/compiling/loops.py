"""How the parts of an iteration run: eagerly, compiled, or whole as one program or CUDA graph.

A part is a ``Loop`` (a scan over the leading axis of its inputs) or a plain function. Both are pure
functions of trees of tensors, and ``off``, ``default`` and ``max`` give the same results to float32
rounding. Everything that compiles or captures is in this file.

``default`` compiles one step of a loop, which Python calls; ``max`` compiles the loop itself (CPU)
or captures all of its steps in a CUDA graph. Where a level fails, the one below takes over, with
one warning.
"""

import logging
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from esper_lightning.core.tensor_trees import leaves, map_tree, rebuild

__all__ = [
    "CompileMode",
    "Loop",
    "capture_function",
    "compile_function",
    "compile_loop",
    "in_cache",
    "rational_tanh",
    "tell_reasons_again",
]

CompileMode = Literal["off", "default", "max"]
Tree = Any
Body = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
"""``(carry, x, constants) -> (carry, row)``; with a part, ``x`` is ``(sum of partials, x)``"""
Part = Callable[[Tree, Tree, Tree], Tree]
"""``(carry, chunk, constants) -> partial``, summed over the chunks of a step"""
Loop = Callable[..., tuple[Tree, Tree]]
"""``(carry, xs, chunked, constants, out=None) -> (carry, rows)``"""

_log = logging.getLogger(__name__)
_REASONS_TOLD: set[str] = set()
_ROWS_IN_CACHE = 1024  # of 64 features: activations of one thread then stay in its L2 cache


def compile_loop(
    name: str, body: Body, part: Part | None = None, *, mode: CompileMode, device: torch.device
) -> Loop:
    """A loop ``for t in range(T)`` over ``carry, row = body(carry, xs[t], constants)``.

    What is returned takes ``(carry, xs, chunked, constants, out)`` and returns the last carry and
    all rows, stacked. ``carry`` may be changed in place: go on with what is returned.

    Args:
        name: For messages.
        body: Pure.
        part: Pure; of a step's chunk of ``chunked[t]``. The partials of a step are summed, so that
            a step may be cut into chunks that fit a cache.
        mode: How it runs.
        device: Where.
    """
    eager = _eager_loop(body, part)
    stepwise = _StepwiseLoop(body, part, device)
    ways: list[Callable[..., Tree]] = [eager]
    if mode != "off":
        ways.insert(0, stepwise)
    if mode == "max":
        whole = _Captured(stepwise) if device.type == "cuda" else _ScanLoop(body, part, device)
        ways.insert(0, whole)
    return _FirstThatWorks(name, f"compile={mode!r}", ways)


def compile_function(
    name: str, function: Callable[..., Tree], *, mode: CompileMode, device: torch.device
) -> Callable[..., Tree]:
    """A pure function of trees of tensors, compiled; for ``max`` on CUDA captured as well."""
    compiled = _Compiled(function, device)
    ways: list[Callable[..., Tree]] = [function]
    if mode != "off":
        ways.insert(0, compiled)
    if mode == "max" and device.type == "cuda":
        ways.insert(0, _Captured(compiled))
    return _FirstThatWorks(name, f"compile={mode!r}", ways)


def capture_function(
    name: str, function: Callable[..., Tree], *, device: torch.device
) -> Callable[..., Tree]:
    """A function of trees of tensors, replayed as a CUDA graph; on other devices as it is.

    It may change its arguments, no two of which may share memory, and does nothing else but return.
    The next call overwrites what the first was given and what any returned.
    """
    ways: list[Callable[..., Tree]] = [function]
    if device.type == "cuda":
        ways.insert(0, _Captured(function))
    return _FirstThatWorks(name, "A CUDA graph", ways)


def tell_reasons_again() -> None:
    """A new run begins: why something does not work is told once in each."""
    _REASONS_TOLD.clear()


def rational_tanh(x: Tensor) -> Tensor:
    """``tanh`` as a quotient of polynomials, within 4 units in the last place of float32.

    The coefficients are those of Eigen (``generic_fast_tanh_float``). A library's ``tanh`` costs
    1.3 to 2.6 ns an element; this one, compiled with its neighbours, a fraction of it.
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
    """``addmm`` whose bias is added where the activation is computed.

    The library's copies the bias into every row first. Added, it would be fused back to that.
    """
    if beta != 1.0 or alpha != 1.0:
        return NotImplemented
    return a.mm(b) - (-bias)


def _stack(rows: Sequence[Tree]) -> Tree:
    columns = zip(*(leaves(row) for row in rows), strict=True)
    return rebuild(rows[0], [torch.stack(column) for column in columns])


def _eager_loop(body: Body, part: Part | None) -> Loop:
    def run(
        carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        rows: list[Tree] = []
        for t in range(leaves((xs, chunked))[0].shape[0] if part is None else len(chunked)):
            x = map_tree(lambda value, t=t: value[t], xs)
            if part is not None:
                x = (part(carry, chunked[t], constants), x)
            carry, row = body(carry, x, constants)
            if out is None:
                rows.append(row)
            else:
                for storage, value in zip(leaves(out), leaves(row), strict=True):
                    storage[t] = value
        return carry, _stack(rows) if out is None else out

    return run


# Traced and compiled.


class _Traced:
    """A function of trees as a graph of tensor operations, gradients included.

    Example arguments are copied before: tracing runs the function. Results that are arguments, or
    each other, are copied, which compiled loops ask for.
    """

    def __init__(
        self, function: Callable[..., Tree], example: tuple[Tree, ...], device: torch.device
    ) -> None:
        self.result: Tree = None  # of the function, on the meta device

        def flat(*tensors: Tensor) -> list[Tensor]:
            result = function(*rebuild(example, tensors))
            self.result = map_tree(lambda leaf: torch.empty_like(leaf, device="meta"), result)
            seen = list(tensors)
            return [_fresh(leaf, seen) for leaf in leaves(result)]

        # A gradient is taken within the function, by a call; nothing else is to be recorded.
        with torch.no_grad():
            inputs = [leaf.detach().clone() for leaf in leaves(example)]
            self.graph = _make_fx(flat, inputs, device)


def _fresh(leaf: Tensor, seen: list[Tensor]) -> Tensor:
    storage = leaf.untyped_storage().data_ptr()
    if any(other.untyped_storage().data_ptr() == storage for other in seen):
        leaf = leaf.clone(memory_format=torch.contiguous_format)
    seen.append(leaf)
    return leaf


def _make_fx(
    flat: Callable[..., list[Tensor]], inputs: list[Tensor], device: torch.device
) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415 - imports sympy

    decompositions: dict[Any, Callable[..., Any]] = {}
    if device.type == "cpu":
        decompositions[torch.ops.aten.tanh.default] = _single_tanh
        decompositions[torch.ops.aten.addmm.default] = _mm_and_bias
    return make_fx(flat, decomposition_table=decompositions)(*inputs)


def _compile(function: Callable[..., Any], *, cpp_wrapper: bool = False) -> Callable[..., Any]:
    # Guards ask at every call whether a compilation still serves: 0.2 ms for 40 tensors. Here
    # ``_FirstThatWorks`` compares shapes, and nothing else changes within a run.
    no_guards = getattr(torch.compiler, "skip_all_guards_unsafe", None)  # newer than torch 2.6
    options: dict[str, Any] = {} if no_guards is None else {"guard_filter_fn": no_guards}
    if cpp_wrapper:
        options["cpp_wrapper"] = True
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)  # pyright: ignore[reportCallIssue, reportArgumentType, reportUnknownVariableType]


class _Compiled:
    """A function of trees, traced at its first call."""

    def __init__(self, function: Callable[..., Tree], device: torch.device) -> None:
        self._function, self._device = function, device
        self._run: Callable[..., Any] | None = None
        self._result: Tree = None

    def __call__(self, *args: Tree) -> Tree:
        if self._run is None:
            traced = _Traced(self._function, args, self._device)
            self._run, self._result = _compile(traced.graph), traced.result
        with torch.no_grad():
            return rebuild(self._result, self._run(*leaves(args)))


class _StepwiseLoop:
    """One step compiled, called ``T`` times; it writes carry and rows in place."""

    def __init__(self, body: Body, part: Part | None, device: torch.device) -> None:
        self._body, self._part, self._device = body, part, device
        self._run: Callable[..., Any] | None = None
        self._rows: Tree = None

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        steps = leaves((xs, chunked))[0].shape[0]
        index = torch.zeros(1, dtype=torch.int64, device=self._device)
        if self._run is None:
            self._build(carry, xs, chunked, constants, out, index)
        rows = self._rows if out is None else out
        tensors = leaves((carry, xs, chunked, constants, rows, index))
        assert self._run is not None
        with torch.no_grad():
            for _ in range(steps):
                self._run(*tensors)
        return carry, rows

    def _build(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree, index: Tensor
    ) -> None:
        def step(carry: Tree, xs: Tree, chunked: Any, constants: Tree, rows: Tree, index: Tensor):
            x, chunk = map_tree(lambda value: value.index_select(0, index)[0], (xs, chunked))
            if self._part is not None:
                x = (self._part(carry, chunk, constants), x)
            after, row = self._body(carry, x, constants)
            if rows is None:
                return row
            for storage, value in zip(leaves(rows), leaves(row), strict=True):
                storage.index_copy_(0, index, value[None])
            for buffer, value in zip(leaves(carry), leaves(after), strict=True):
                buffer.copy_(value)
            index.add_(1)
            return None

        if out is None:  # rows of a size that only a trace tells
            row = _Traced(step, (carry, xs, chunked, constants, None, index), self._device).result
            steps = leaves((xs, chunked))[0].shape[0]
            self._rows = map_tree(
                lambda v: torch.empty(steps, *v.shape, dtype=v.dtype, device=self._device), row
            )
        example = (carry, xs, chunked, constants, self._rows if out is None else out, index)
        self._run = _compile(_Traced(step, example, self._device).graph)


class _ScanLoop:
    """The whole loop as one compiled program (CPU): no Python between its steps."""

    def __init__(self, body: Body, part: Part | None, device: torch.device) -> None:
        self._body, self._part, self._device = body, part, device
        self._run: Callable[..., Any] | None = None
        self._result: Tree = None
        self._chunks = 1

    def __call__(
        self, carry: Tree, xs: Tree, chunked: Any, constants: Tree, out: Tree = None
    ) -> tuple[Tree, Tree]:
        del out  # the program allocates what it returns
        if chunked is not None and self._run is None:
            self._chunks = _chunks(chunked.shape[1])
        if chunked is not None and self._chunks > 1:
            chunked = chunked.unflatten(1, (self._chunks, -1))
        if self._run is None:
            self._build(carry, xs, chunked, constants)
        assert self._run is not None
        with torch.no_grad():
            after, rows = self._run(leaves(carry), leaves((xs, chunked)), leaves(constants))
        return rebuild(self._result, [*after, *rows])

    def _build(self, carry: Tree, xs: Tree, chunked: Any, constants: Tree) -> None:
        """Trace body and part, then compile the loop over them: two loops where steps are cut."""
        from torch._higher_order_ops.scan import scan  # noqa: PLC0415 - a prototype of torch's

        x, chunk = map_tree(lambda value: value[0], (xs, chunked))
        part, sums, many = None, list[Tensor](), self._chunks > 1
        if self._part is not None:
            one = chunk[0] if many else chunk
            traced_part = _Traced(self._part, (carry, one, constants), self._device)
            part, sums = traced_part.graph, leaves(traced_part.result)
            zeros = map_tree(lambda t: torch.zeros_like(t, device="cpu"), traced_part.result)
            x = (zeros, x)
        traced = _Traced(self._body, (carry, x, constants), self._device)
        body, self._result = traced.graph, traced.result
        num_carry = len(leaves(carry))

        def program(carry: list[Tensor], xs: list[Tensor], constants: list[Tensor]) -> Any:
            def step(carry: list[Tensor], xs: list[Tensor]) -> Any:
                total: list[Tensor] = []
                x = xs
                if part is not None:
                    *x, chunk = xs

                    def accumulate(total: list[Tensor], chunk: Tensor) -> Any:
                        more: list[Tensor] = part(*carry, chunk, *constants)  # pyright: ignore[reportOptionalCall]
                        after = [a + b for a, b in zip(total, more, strict=True)]
                        return after, chunk[:1].clone()

                    if many:
                        zeros = [torch.zeros(s.shape, dtype=s.dtype) for s in sums]
                        total, _ = scan(accumulate, zeros, chunk)
                    else:
                        total = part(*carry, chunk, *constants)
                results = body(*carry, *total, *x, *constants)
                return list(results[:num_carry]), list(results[num_carry:])

            return scan(step, carry, xs)

        # torch.compile counts recompilations by code object: this one is to have its own.
        own = types.FunctionType(
            program.__code__.replace(), program.__globals__, "program", None, program.__closure__
        )
        self._run = _compile(own, cpp_wrapper=True)


def in_cache(rows: int, *, mode: CompileMode, device: torch.device) -> int:
    """Into how many equal parts to cut so many rows, so that work on a part stays in cache.

    1 where it makes no difference: where parts cost calls, and on a GPU.
    """
    return _chunks(rows) if mode == "max" and device.type == "cpu" else 1


def _chunks(rows: int) -> int:
    """Parts of equal size of about as many rows as fit the caches of all threads."""
    most = _ROWS_IN_CACHE * torch.get_num_threads()
    for count in range(max(1, -(-rows // most)), rows // (most // 4) + 1):
        if rows % count == 0:
            return count
    return 1


class _Captured:
    """A callable captured as a CUDA graph at its first call, and replayed afterwards.

    Arguments that live elsewhere than at the capture are copied to where they lived then; results
    are the same tensors at every call.
    """

    def __init__(self, function: Callable[..., Tree]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._args: list[Tensor] = []
        self._result: Tree = None

    def __call__(self, *args: Tree) -> Tree:
        if self._graph is None:
            self._capture(args)
        for static, value in zip(self._args, leaves(args), strict=True):
            if static.data_ptr() != value.data_ptr():
                static.copy_(value)
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _capture(self, args: tuple[Tree, ...]) -> None:
        """Warm up on copies, so that nothing has happened before the first replay."""
        self._args = leaves(args)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._function(*map_tree(torch.clone, args))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: loggers, watchdogs.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._result = self._function(*args)
        self._graph = graph


class _FirstThatWorks:
    """Ways to run the same thing, from the fastest to the plain one, which is last.

    Compiled ways serve the shapes of the first call; others, such as a shorter last rollout, are
    not worth a compilation and run plainly.
    """

    def __init__(self, name: str, how: str, ways: Sequence[Callable[..., Tree]]) -> None:
        self._name, self._how = name, how
        self._ways = list(ways)
        self._kinds: list[tuple[torch.Size, torch.dtype]] | None = None

    def __call__(self, *args: Tree) -> Tree:
        if len(self._ways) == 1:
            return self._ways[0](*args)
        if any(isinstance(arg, list) for arg in args):  # minibatches of unequal size
            return self._ways[-1](*args)
        kinds = [(leaf.shape, leaf.dtype) for leaf in leaves(args)]
        if kinds == self._kinds:
            return self._ways[0](*args)
        if self._kinds is not None:
            _log.debug("The %s has other shapes than at first and runs plainly.", self._name)
            return self._ways[-1](*args)
        self._kinds = kinds
        while len(self._ways) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", module="torch")  # compilers about themselves
                    return self._ways[0](*args)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # compilers fail in every way there is
                del self._ways[0]
                cause = getattr(error, "inner_exception", error)  # of a compiler's backend
                reason = f"{type(cause).__name__}: {cause}".strip().splitlines()[0][:300]
                text = "%s does not work for the %s, which takes a slower way: %s"
                level = logging.DEBUG if reason in _REASONS_TOLD else logging.WARNING
                _REASONS_TOLD.add(reason)
                _log.log(level, text, self._how, self._name, reason)
                _log.debug("The whole error:", exc_info=error)
        return self._ways[0](*args)
