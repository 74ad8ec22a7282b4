"""What each operation makes of codes: the rules of ``mixing``."""
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper_lightning.compiling.native.codes import (
    EVEN,
    FIRST,
    FIXED,
    TOTAL,
    ZERO,
    Call,
    MixedError,
    alike,
    alone,
    chosen,
    code_of,
    has_code,
    largest,
    refuse_uneven,
    require_that,
    rows_of,
    together,
)
from esper_lightning.compiling.native.kinds import (
    ADDS,
    ELEMENTS,
    MOVES,
    POOLS,
    REDUCTIONS,
    SAME,
    TURNS,
    VALUES,
)

__all__ = ["Rules"]


class Rules:
    """The codes of results from the codes of arguments.

    Args:
        samples: The code of each sample, ``[M]``.
    """

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples
        self._rules: dict[str, Callable[[Call], Any]] = {
            **dict.fromkeys({*SAME, *ADDS, *ELEMENTS, "div", "mul", "where"}, self._elements),
            **dict.fromkeys(MOVES, self._moved),
            **dict.fromkeys(REDUCTIONS, self._reduced),
            **dict.fromkeys(POOLS, self._pooled),
            **dict.fromkeys(("_unsafe_view", "view"), self._viewed),
            **dict.fromkeys(("full", "ones", "zeros", "scalar_tensor"), self._constant),
            **dict.fromkeys(("new_full", "new_ones", "new_zeros"), self._constant),
            **dict.fromkeys(("fill", "full_like", "ones_like", "zeros_like"), self._constant_like),
            **dict.fromkeys(("mm", "addmm"), self._product),
            "mv": lambda call: self._of_product(call.args[0], call.args[1][:, None])[:, 0],
            "dot": lambda call: self._over(*call.args)[0],
            "bmm": self._products,
            **dict.fromkeys(("index", "index_select"), self._indexed),
            **dict.fromkeys(("scatter", "scatter_add"), self._scattered),
            **dict.fromkeys(("recurrence", "recurrence_backward"), self._recurrent),
            **dict.fromkeys(("_log_softmax", "_log_softmax_backward_data"), self._log_softmax),
            "arange": self._constant,
            "constant_pad_nd": self._padded,
            "convolution": self._convolution,
            "convolution_backward": self._convolution_backward,
            "copy": lambda call: call.args[1].expand(call.shape),
            "expand": self._expanded,
            "gather": self._gathered,
            "index_put": self._put,
            "index_add": self._put,
            "masked_fill": self._masked,
        }

    @property
    def names(self) -> set[str]:
        """Names of the operations that have a rule."""
        return set(self._rules)

    @torch.no_grad()
    def run(self, call: Call) -> Any:
        """The codes of the results of a call.

        Args:
            call: Call of an operation.

        Raises:
            MixedError: If the operation combines samples by more than a sum, or has no rule.
        """
        rule = self._rules.get(call.name)
        if rule is None:
            raise MixedError("is not known here")
        _refuse_rounding(call)
        return rule(call)

    # Elements

    def _elements(self, call: Call) -> Tensor:
        name = call.name
        linear = name in ADDS or name in SAME
        given = call.args if linear else [*call.args, *call.kwargs.values()]
        given = [*map(code_of, filter(has_code, given))]
        refuse_uneven(given)
        values = torch.broadcast_tensors(*given)
        if any(bool((value == TOTAL).any()) for value in values):
            require_that(not bool(_not_linear(call, values).any()), "of a sum")
        both = together(values)
        if linear:
            return both
        none = torch.zeros_like(both, dtype=torch.bool)
        if name == "mul":
            none = torch.stack([value == ZERO for value in values]).any(0)
        elif name == "div" or name.endswith("_backward"):
            none = values[0] == ZERO
        elif name == "where":
            none = (values[1] == ZERO) & (values[2] == ZERO)
        return both.clamp(min=FIXED).masked_fill(none, ZERO)

    def _masked(self, call: Call) -> Tensor:
        refuse_uneven([*map(code_of, call.args)])
        x, mask, filled = torch.broadcast_tensors(*map(code_of, call.args))
        for one, other in ((x, filled), (filled, x)):
            if TOTAL in one:
                require_that(largest(mask) <= FIXED and largest(other) == ZERO, "of a sum")
        return together([x, mask, filled]).masked_fill((x == ZERO) & (filled == ZERO), ZERO)

    def _put(self, call: Call) -> Tensor:
        x, where, *rest = call.args
        places = where if isinstance(where, list | tuple) else [where]
        given: Any = call.node.args[1]
        mask = given[0] if isinstance(given, list | tuple) and len(given) == 1 else None
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            mask = places[0].reshape(*places[0].shape, *[1] * (x.dim() - places[0].dim()))
            return self._masked(call._replace(args=(x, mask, rest[0])))
        codes = [one for one in (x, *rest, *places) if isinstance(one, Tensor)]
        require_that(max(map(largest, codes)) <= FIXED, "at computed places")
        return x.clamp(min=FIXED)

    # Constants

    def _constant(self, call: Call) -> Tensor:
        code = torch.full(call.shape, ZERO if _is_zero(call) else FIXED, dtype=torch.int32)
        return code if call.name == "arange" else self._along(code, call)

    def _constant_like(self, call: Call) -> Tensor:
        x = call.args[0]
        if call.name == "fill" and largest(code_of(call.args[1])) > FIXED:
            return call.args[1].expand(call.shape)
        like = (x >= FIRST) | (x == EVEN)
        return torch.zeros_like(x) if _is_zero(call) else torch.where(like, x, FIXED)

    def _expanded(self, call: Call) -> Tensor:
        x, shape = call.args[0], call.shape
        first = len(shape) - x.dim()
        grown = [axis for axis, extent in enumerate(shape) if extent != call.larger[axis]]
        if all(axis >= first and x.shape[axis - first] == shape[axis] for axis in grown):
            return x.expand(shape)
        require_that(largest(x) < EVEN, "to the number of samples")
        return self._along(x.expand(shape), call, even=x.numel() == 1)

    def _along(self, code: Tensor, call: Call, *, even: bool = True) -> Tensor:
        """Give each place along an axis that grows with the samples to the sample there.

        Args:
            code: Code of something fixed.
            call: Call with the result.
            even: Whether the result is the same at all places.
        """
        grown = [axis for axis, extent in enumerate(call.shape) if extent != call.larger[axis]]
        if not grown or largest(code) == ZERO:
            return code
        fits = len(grown) == 1 and call.shape[grown[0]] == len(self._samples)
        if even and not fits:  # each sample has several places, in one order or another
            return code.masked_fill(code == FIXED, EVEN)
        require_that(fits, "of the number of samples")
        own = self._samples.view(-1, *[1] * (code.dim() - 1 - grown[0]))
        return torch.where(code == ZERO, ZERO, own.expand(call.shape))

    # Places

    def _moved(self, call: Call) -> Any:
        target: Any = call.node.target
        given = [*call.args, *(call.args[0] if isinstance(call.args[0], list | tuple) else [])]
        tensors = [one for one in given if isinstance(one, Tensor)]
        even = any(EVEN in one for one in tensors)
        require_that(not even or call.name in TURNS, "of the number of samples")
        return target(*call.args, **call.kwargs)

    def _viewed(self, call: Call) -> Tensor:
        return call.args[0].reshape(call.shape)

    def _padded(self, call: Call) -> Tensor:
        x, pad, *value = call.args
        require_that(EVEN not in x, "of the number of samples")
        filled = FIXED if any((*value, *call.kwargs.values())) else ZERO
        return torch.nn.functional.pad(x, pad, value=filled)

    def _gathered(self, call: Call) -> Tensor:
        x, dim, index = call.args[:3]
        x = alike(x, dim)
        for axis, extent in enumerate(index.shape):
            x = x if axis == dim % x.dim() else x.narrow(axis, 0, extent)
        return chosen(x.expand(index.shape), index)

    def _indexed(self, call: Call) -> Tensor:
        x, where, *index = call.args
        if call.name == "index":
            used = [axis for axis, one in enumerate(where) if one is not None]
            require_that(len(used) == 1, "with several indices")
            where, index = used[0], [where[used[0]]]
        axis, index = where % x.dim(), index[0]
        x = alike(x, axis)
        x = x.reshape(*x.shape[:axis], *[1] * index.dim(), *x.shape[axis + 1 :])
        index = index.reshape(*index.shape, *[1] * (x.dim() - axis - index.dim()))
        return chosen(*torch.broadcast_tensors(x, index)).expand(call.shape)

    def _scattered(self, call: Call) -> Tensor:
        x, index, source = (code_of(call.args[number]) for number in (0, 2, 3))
        dim: int = call.args[1]
        require_that(index.shape[dim] == 1, "of several elements")
        for one in (x, index, source):
            require_that(TOTAL not in one and EVEN not in one, "of a sum")
        values = torch.broadcast_tensors(alike(x, dim), index, source)
        return together(values).clamp(min=FIXED).expand(x.shape)

    # Reductions and products

    def _reduced(self, call: Call) -> Tensor:
        x, position = call.args[0], REDUCTIONS[call.name]
        axes: Any = call.args[position] if len(call.args) > position else call.kwargs.get("dim")
        if axes == [] and call.name in ("all", "any"):
            return x.clamp(min=FIXED)
        axes = [axes] if isinstance(axes, int) else axes
        axes = [axis % x.dim() for axis in axes] if axes else list(range(x.dim()))
        if EVEN in x:
            return self._summed_evenly(call, x, axes)
        if call.name in ("sum", "mean"):
            return self._summed(x, axes, means=call.name == "mean").reshape(call.shape)
        return alone(x, axes).clamp(min=FIXED).reshape(call.shape)

    def _summed(self, x: Tensor, axes: Sequence[int], *, means: bool = False) -> Tensor:
        """The codes of sums over axes, which are 1 in the result."""
        kept = [1 if axis in axes else extent for axis, extent in enumerate(x.shape)]
        rows = rows_of(x, axes)
        high, low = rows.amax(1), rows.masked_fill(rows < FIRST, largest(x)).amin(1)
        total, fixed = (rows == TOTAL).any(1), (rows == FIXED).any(1)
        mixed = (high >= FIRST) & (low != high)
        require_that(not bool((total & (fixed | (high >= FIRST))).any()), "of a sum and more")
        if bool(mixed.any()):
            require_that(not means and not bool((mixed & fixed).any()), "over samples")
            found, number = rows[mixed], len(self._samples)
            at = torch.arange(len(found))[:, None] * number + (found - FIRST)
            counts = at[found >= FIRST].bincount(minlength=len(found) * number).view(-1, number)
            require_that(bool((counts == counts[:, :1]).all()), "over some of the samples")
        return torch.where(total | mixed, TOTAL, high).reshape(kept)

    def _summed_evenly(self, call: Call, x: Tensor, axes: Sequence[int]) -> Tensor:
        """The code of a sum over all places of what is the same at all of them: their number."""
        grown = call.grown_axes_of_first
        is_count = call.name == "sum" and grown <= {*axes} and FIXED not in x
        require_that(bool(grown) and is_count, "of the number of samples")
        return torch.full(call.shape, TOTAL, dtype=torch.int32)

    def _product(self, call: Call) -> Tensor:
        code = self._of_product(*call.args[-2:]).expand(call.shape)
        if call.name == "mm":
            return code
        refuse_uneven([call.args[0], code])
        added = torch.broadcast_tensors(call.args[0].expand(call.shape), code)
        if any(TOTAL in one for one in added):
            require_that(not any(FIXED in one for one in added), "of a sum and more")
        return together(added)

    def _products(self, call: Call) -> Tensor:
        """The codes of a batch of products: of one sample each, or with what is fixed."""
        a, b = call.args
        if largest(b) <= FIXED:
            code = alone(a, [2])
        elif largest(a) <= FIXED:
            code = alone(b, [1])
        else:
            code = together([alone(a, [1, 2]), alone(b, [1, 2])])
        return code.clamp(min=FIXED).expand(call.shape)

    def _of_product(self, a: Tensor, b: Tensor) -> Tensor:
        """The codes of a product of matrices, which may have 1 in the place of an extent."""
        rows, columns = a.shape[0], b.shape[1]
        most_a, most_b = largest(a), largest(b)
        if ZERO in (most_a, most_b):
            code = torch.zeros((), dtype=torch.int32)
        elif TOTAL in (most_a, most_b):
            total, other = (a, most_b) if most_a == TOTAL else (b, most_a)
            require_that(FIXED not in total and other == FIXED, "of a sum")
            code = torch.tensor(TOTAL, dtype=torch.int32)
        elif FIXED in (most_a, most_b):
            code = alone(a, [1]) if most_b == FIXED else alone(b, [0])
        else:  # over samples, or all of one sample
            code = self._over(alone(a, [0])[0], alone(b, [1])[:, 0])
        return code.expand(rows, columns)

    def _over(self, *factors: Tensor) -> Tensor:
        """The code of a sum of products over all places of the factors."""
        none = torch.stack([factor == ZERO for factor in factors]).any(0)
        return self._summed(together(factors).masked_fill(none, ZERO), [0])

    def _log_softmax(self, call: Call) -> Tensor:
        dim = next(one for one in call.args if isinstance(one, int))
        both = together([one for one in call.args if isinstance(one, Tensor)])
        return alone(both, [dim % both.dim()]).clamp(min=FIXED).expand(both.shape)

    # Images and sequences

    def _convolution(self, call: Call) -> Tensor:
        x, weight, bias = call.args[:3]
        fixed = largest(weight) <= FIXED and (bias is None or largest(bias) <= FIXED)
        require_that(fixed, "of weights")
        return call.results(_by_image(x).clamp(min=FIXED).view(-1, *[1] * (x.dim() - 1)))

    def _convolution_backward(self, call: Call) -> list[Tensor | None]:
        gradient, x, weight = call.args[:3]
        require_that(largest(weight) <= FIXED, "of weights")
        of_gradient, of_x = _by_image(gradient), _by_image(x)
        by_x = of_gradient.clamp(min=FIXED).view(-1, *[1] * (x.dim() - 1))
        codes = [by_x, self._over(of_gradient, of_x), self._over(of_gradient)]
        results: Any = call.node.meta["val"]
        return [
            None if like is None else code.expand(like.shape)
            for code, like in zip(codes, results, strict=True)
        ]

    def _pooled(self, call: Call) -> Any:
        given = [one for one in call.args if isinstance(one, Tensor)]
        planes = [alone(one, [one.dim() - 2, one.dim() - 1]) for one in given]
        return call.results(together(planes).clamp(min=FIXED))

    def _recurrent(self, call: Call) -> Any:
        if call.name == "recurrence":
            x, begins, memory, *weights = call.args[1:]
            parts = [alone(x, [0, 2]), alone(begins, [0]), alone(memory, [1])]
        else:
            gradient, begins, slopes, *weights = call.args[1:]
            parts = [alone(begins, [0])]
            parts += [alone(one, [0, *range(2, one.dim())]) for one in (gradient, *slopes)]
        require_that(max(map(largest, weights)) <= FIXED, "of weights")
        code = together([part.flatten() for part in parts]).clamp(min=FIXED)
        return call.results(code[None, :, None])


def _is_zero(call: Call) -> bool:
    """Whether a constant is 0."""
    name = call.name
    return name.startswith(("zeros", "new_zeros")) or (
        name in VALUES and not call.args[VALUES[name]]
    )


def _refuse_rounding(call: Call) -> None:
    """Refuse a sum as an integer, which is not the sum of what its parts are as integers."""
    after: Any = call.node.meta["val"]
    if not isinstance(after, Tensor) or after.dtype.is_floating_point:
        return
    given: Any = call.node.args
    for node, code in zip(given, call.args, strict=True):
        if isinstance(code, Tensor) and TOTAL in code:
            require_that(node.meta["val"].dtype == after.dtype, "of a sum")


def _not_linear(call: Call, values: Sequence[Tensor]) -> Tensor:
    """Where an operation on elements is not linear in those that are sums."""
    name, is_sum = call.name, torch.stack([value == TOTAL for value in values]).any(0)
    beside = [(value != TOTAL) & (value != ZERO) for value in values]
    if name in ADDS:
        return is_sum & torch.stack(beside).any(0)
    if name == "mul":
        totals = torch.stack([value == TOTAL for value in values]).sum(0)
        return is_sum & ((totals > 1) | torch.stack([v >= FIRST for v in values]).any(0))
    if name == "div" and not call.kwargs:  # and does not round
        return is_sum & (values[1] >= TOTAL)
    if name == "where":
        return is_sum & ((values[0] >= TOTAL) | torch.stack(beside[1:]).any(0))
    return is_sum & (name not in SAME)


def _by_image(x: Tensor) -> Tensor:
    return alone(x, range(1, x.dim())).flatten()
