"""Native code is compared with the function that it was made of, a little of it now and then.

``holders`` and ``reads`` watch what a function of a user reads. Python has more ways to reach a
value than anybody lists. What they miss is found here, not before some iterations have computed
with an old value, and is told then: by what the function does (``rehearsals``) and by its results.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from typing_extensions import override

from esper_lightning.compiling.rehearsals import Rehearsal
from esper_lightning.core.tensor_trees import leaves, map_tree, named_tensors

__all__ = ["Audit", "FirstRows", "FirstStep", "Whole"]

# In so many calls one is compared, at an irregular place, for a change may come and go regularly;
# before that, in each power of two and at a place between it and the next one.
_EVERY, _EVERY_OF_LARGE, _EVERY_RESULT = 256, 32, 1024
_LARGE = 2**16  # numbers in all arguments of a call, beside which a rehearsal takes no time
_ROWS = 64
_NEAR, _SMALL = 1e-3, 1e-5  # relative to the largest number of a tensor; absolute
_MOST_APART = 0.01  # share of numbers that may differ: a draw between two actions is a tie at times
_CERTAIN, _FEW = 0.5, 8  # if more than this share of more numbers differs, no tie is the reason

_Function = Callable[..., Any]


class Whole:
    """The part of a call that is compared: all of the call of a pure function."""

    def part(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of this part."""
        return args

    def rehearsed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments that are enough to see what the function does."""
        return self.part(args)

    def expected(self, function: _Function, args: tuple[Any, ...]) -> Any:
        """What the function itself returns for this part."""
        return function(*self.part(args))

    def given(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments for native code, so that the function can still be called afterwards."""
        return args

    def of(self, result: Any) -> Any:
        """The part of what native code returned."""
        return result


class FirstRows(Whole):
    """The first rows of a function of rows."""

    @override
    def part(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rows, constants = args
        return self.of(rows), constants

    @override
    def of(self, result: Any) -> Any:
        return map_tree(lambda rows: rows[:_ROWS], result)


class FirstStep(Whole):
    """The first step of a loop: its row, for the carry is known after the last step only."""

    @override
    def part(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        carry, xs, chunked, constants, *_ = args
        first = map_tree(lambda values: values[:1], xs)
        chunked = None if chunked is None else chunked[:1]
        return carry, first, chunked, constants, None

    @override
    def rehearsed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        carry, xs, chunked, constants, _ = self.part(args)
        chunked = None if chunked is None else chunked[:, :_ROWS]  # any chunk will do
        return carry, xs, chunked, constants, None

    @override
    def expected(self, function: _Function, args: tuple[Any, ...]) -> Any:
        return super().expected(function, args)[1]

    @override
    def given(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (map_tree(torch.clone, args[0]), *args[1:])  # a loop may write into its carry

    @override
    def of(self, result: Any) -> Any:
        return map_tree(lambda rows: rows[:1], result[1])


class Audit:
    """The comparisons of one function.

    Args:
        sample: Part of a call that is compared.
    """

    def __init__(self, sample: Whole) -> None:
        self._sample, self._calls, self._suspects = sample, 0, False
        self._latest = 0  # number of the call that was right
        self._rehearsals: list[Rehearsal] = []
        self._every = _EVERY

    def rehearse(self, function: _Function, args: tuple[Any, ...]) -> None:
        """Note what the function does with arguments of this kind, of which a program was made.

        Raises:
            Exception: Of the function, if it cannot be called apart from the program.
        """
        self._rehearsals.append(Rehearsal(function, self._sample.rehearsed(args)))
        is_large = sum(leaf.numel() for leaf in leaves(args)) >= _LARGE
        self._every = min(self._every, _EVERY_OF_LARGE if is_large else _EVERY)

    def is_due(self) -> bool:
        """Whether this call is to be compared."""
        self._calls += 1
        return self._compares() or _is_at(self._calls, self._every)

    def _compares(self) -> bool:
        """Whether results of the present call are compared."""
        return self._suspects or self._calls % _EVERY_RESULT == 0 or _is_power(self._calls)

    def counts(self) -> list[int]:
        """What decides when the next comparison is due, and what it would find."""
        return [self._calls, self._latest, int(self._suspects)]

    def restore(self, counts: Sequence[int]) -> None:
        """Continue from an audit's counts, so that a resumed run compares as the whole one did."""
        self._calls, self._latest, suspects = counts
        self._suspects = bool(suspects)

    def call(
        self, native: _Function, function: _Function, args: tuple[Any, ...]
    ) -> tuple[Any, str | None]:
        """Call native code, and compare.

        Args:
            native: Native code of the function.
            function: The function itself.
            args: Arguments of both.

        Returns:
            The result of the native code, and what differs: what the function does; or its results,
            if that is no tie between two actions: most of a tensor, or something for the second
            time in a row. ``None`` where all is as it should be.
        """
        if (changed := self.changed(self._calls - 1)) is not None:
            return None, changed
        if not self._compares():
            self._latest = self._calls
            return native(*args), None
        result = native(*self._sample.given(args))
        expected = self._sample.expected(function, args)
        name, is_certain = _difference(expected, self._sample.of(result))
        before, self._suspects = self._suspects, name is not None
        if name is None:
            self._latest = self._calls
        if name is None or not (before or is_certain):
            return result, None
        what = f"results that are no longer those of the function: {name}"
        return result, f"{what} {self._wrong(self._calls - 1)}"

    def changed(self, last: int | None = None) -> str | None:
        """What the function does and did not do at first; ``None`` if it does the same.

        Args:
            last: Number of the last call whose results are used; ``None`` for the latest.
        """
        all_changed = (rehearsal.changed() for rehearsal in self._rehearsals)
        found = next((changed for changed in all_changed if changed), None)
        if found is None:
            return None
        return f"other operations than at first: {found} {self._wrong(last)}"

    def _wrong(self, last: int | None) -> str:
        """In how many calls, until the last that counts, results may have been wrong."""
        last = self._calls if last is None else last
        return f"(in {last - self._latest} calls at most)"


def _is_power(number: int) -> bool:
    """Whether a number is a power of two."""
    return number & (number - 1) == 0


def _is_at(number: int, every: int) -> bool:
    """Whether a number is a power of two, or at the irregular place of its block of numbers.

    A block has so many numbers, or those from one power of two to the next.
    """
    if _is_power(number):
        return True
    size = min(1 << number.bit_length() - 1, every)
    start = number - number % size
    return number - start == _mixed(start) % size


def _mixed(number: int) -> int:
    """A number that looks random, the same for the same number (the finalizer of MurmurHash3)."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        number = ((number ^ number >> shift) * factor) & 0xFFFFFFFF
    return number ^ number >> 16


def _difference(expected: Any, got: Any) -> tuple[str | None, bool]:
    """The name of the first tensor that differs by more than rounding; whether most of it does."""
    others = dict(named_tensors(got))
    for name, one in named_tensors(expected):
        other = others[name]
        same = one == other
        if one.is_floating_point():
            size = torch.where(one.isfinite(), one, 0.0).abs().amax() if one.numel() else 0.0
            same |= (one - other).abs() <= _NEAR * size + _SMALL
            same |= one.isnan() & other.isnan()
        apart = 1 - same.double().mean() if same.numel() else 0.0
        if apart > _MOST_APART:
            return name or "the result", bool(apart > _CERTAIN) and same.numel() > _FEW
    return None, False
