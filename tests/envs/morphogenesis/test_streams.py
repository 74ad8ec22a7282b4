"""Counter-based random numbers depend on their place alone and have the right distributions."""

import pytest
import torch

from esper_lightning.envs.morphogenesis.streams import (
    Place,
    Purpose,
    integers,
    normals,
    philox,
    uniforms,
)

# kat_vectors of Random123 (philox4x32, 10 rounds): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def place(envs, episode=0, step=0):
    env = torch.arange(envs)
    return Place(env, torch.full_like(env, episode), torch.full_like(env, step))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_returns_the_published_numbers(counter, key, expected):
    words = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(words, key)) == expected


def test_numbers_depend_on_the_place_and_not_on_the_number_of_environments():
    many = integers(5, Purpose.BATCHES, place(64), count=10, high=1000)
    few = integers(5, Purpose.BATCHES, place(8), count=7, high=1000)
    assert torch.equal(many[:8, :7], few)


def test_numbers_depend_on_every_component_of_the_key_and_the_place():
    draws = [
        uniforms(1, Purpose.HOST, place(2), count=50),
        uniforms(2, Purpose.HOST, place(2), count=50),
        uniforms(1, Purpose.SEED, place(2), count=50),
        uniforms(1, Purpose.HOST, place(2, episode=1), count=50),
        uniforms(1, Purpose.HOST, place(2, step=1), count=50),
    ]
    rows = torch.cat(draws)
    agreement = (rows.unsqueeze(0) == rows.unsqueeze(1)).float().mean(2)
    assert (agreement - torch.eye(len(rows))).max() < 0.05


def test_integers_are_uniform():
    drawn = integers(0, Purpose.BATCHES, place(100), count=1000, high=10)
    counts = drawn.flatten().bincount(minlength=10).double()
    chi_square = ((counts - 10_000).square() / 10_000).sum()
    assert chi_square < 27.9  # exceeded once in a thousand with 9 degrees of freedom
    assert uniforms(0, Purpose.BATCHES, place(100), count=1000).lt(1.0).all()


def test_normals_have_the_moments_of_a_normal_distribution():
    drawn = normals(0, Purpose.HOST, place(100), count=1001).flatten()
    moments = torch.stack([drawn.pow(k).mean() for k in (1, 2, 3, 4)])
    expected = torch.tensor([0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(moments, expected, rtol=0, atol=0.06)
