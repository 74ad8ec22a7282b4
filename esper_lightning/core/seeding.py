"""Independent random streams from one seed."""

import hashlib

import torch

__all__ = ["stream", "stream_seed"]


def stream_seed(seed: int, *, rank: int, purpose: str) -> int:
    """A 31-bit seed for one purpose on one rank.

    Streams that share a seed would share their numbers: exploration noise would repeat the initial
    states. 31 bits, because some simulators take no more.
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, *, rank: int, purpose: str, device: torch.device) -> torch.Generator:
    """A generator on ``device`` seeded by ``stream_seed``."""
    return torch.Generator(device).manual_seed(stream_seed(seed, rank=rank, purpose=purpose))
