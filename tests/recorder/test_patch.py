"""Patches of other objects are undone in any order, and beneath other patches."""

import itertools

import pytest

from esper_lightning.recorder.patch import Patch


class Counter:
    def value(self):
        return []


class TestAPatch:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_is_taken_back_in_any_order(self, order):
        counter, patches = Counter(), []

        def adding(number):
            def value():
                return [number, *patches[number].original()]

            return value

        patches += [Patch(counter, "value", adding(number)) for number in range(3)]
        living = [0, 1, 2]
        assert counter.value() == living[::-1]
        for number in order:
            patches[number].undo()
            living.remove(number)
            assert counter.value() == living[::-1]
        assert vars(counter) == {}

    def test_under_somebody_elses_calls_the_original(self):
        counter = Counter()
        patch = Patch(counter, "value", lambda: ["ours"])
        ours = counter.value
        theirs = counter.value = lambda: ["theirs", *ours()]
        assert counter.value() == ["theirs", "ours"]
        patch.undo()
        assert counter.value is theirs
        assert counter.value() == ["theirs"]
