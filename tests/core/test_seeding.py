"""Random streams differ by seed, rank and purpose, and are the same in every version."""

import itertools
import random

import numpy as np
import torch

from esper_lightning.core.seeding import (
    global_random_states,
    restore_streams,
    set_global_random_states,
    stream,
    stream_seed,
)

CPU = torch.device("cpu")

# (seed, rank, purpose): the seed in every version. A change would make old runs unrepeatable.
GOLDEN = {
    (0, 0, "exploration"): 1921995601,
    (0, 1, "exploration"): 478513774,
    (1, 0, "exploration"): 1629380666,
    (0, 0, "environments"): 1964342003,
}


def test_seeds_equal_those_of_every_earlier_version() -> None:
    got = {key: stream_seed(key[0], rank=key[1], purpose=key[2]) for key in GOLDEN}
    assert got == GOLDEN


def test_streams_differ_by_seed_rank_and_purpose() -> None:
    # 1 and 11 in neighbouring places: a key without separators would repeat.
    keys = list(itertools.product([0, 1, 11, 111], [0, 1, 11, 111], ["policy", "1", "11", "env"]))
    seeds = {stream_seed(seed, rank=rank, purpose=purpose) for seed, rank, purpose in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(seeds) > 2**30  # all bits are used


def test_a_stream_repeats_itself_and_differs_from_others() -> None:
    def numbers(seed: int, rank: int, purpose: str) -> torch.Tensor:
        generator = stream(seed, rank=rank, purpose=purpose, device=CPU)
        return torch.rand(8, generator=generator)

    first = numbers(0, 0, "a")
    assert torch.equal(first, numbers(0, 0, "a"))
    for other in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        assert not torch.equal(first, numbers(*other))


def test_a_stream_does_not_change_the_global_one() -> None:
    before = torch.get_rng_state()
    torch.rand(8, generator=stream(0, rank=0, purpose="a", device=CPU))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_are_restored_unless_they_are_of_another_kind_of_device() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    saved = [generator.get_state() for generator in generators()]
    later = generators()
    expected = [torch.rand(3, generator=generator) for generator in later]
    assert restore_streams(later, saved)
    assert torch.equal(torch.rand(3, generator=later[1]), expected[1])
    of_gpu = torch.zeros(16, dtype=torch.uint8)
    assert not restore_streams(later, [saved[0], of_gpu])
    assert not torch.equal(torch.rand(3, generator=later[1]), expected[1])  # it was not reset


def test_global_generators_continue_from_a_saved_state(tmp_path) -> None:
    def numbers() -> list[float]:
        own = [random.random(), random.gauss(0.0, 1.0), float(np.random.rand())]  # noqa: NPY002
        return [*own, float(np.random.normal()), torch.rand(()).item()]  # noqa: NPY002

    before = global_random_states()
    try:
        numbers()  # half of a pair of normal numbers remains for the next call
        torch.save(global_random_states(), tmp_path / "states.pt")
        expected = [numbers() for _ in range(3)]
        set_global_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
        assert [numbers() for _ in range(3)] == expected
    finally:
        set_global_random_states(before)
