"""The precision in which hosts are trained, whatever precision the policy has."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["own_precision"]


@contextmanager
def own_precision(device: torch.device) -> Generator[None]:
    """A context that trains hosts in their own precision, without autocast and without TF32.

    The mantissas of TF32, which cuDNN uses by default, have 10 bits. Also excluded are algorithms
    of cuDNN that round differently each time. cuDNN still chooses other algorithms for batches of
    other sizes, so on CUDA a host is not the same bits beside 2 hosts and beside 2,000.

    Args:
        device: Device of the hosts.
    """
    settings = _settings() if device.type == "cuda" else []
    before = [getattr(owner, name) for owner, name, _ in settings]
    with torch.autocast(device.type, enabled=False):
        try:
            for owner, name, value in settings:
                setattr(owner, name, value)
            yield
        finally:
            for (owner, name, _), value in zip(settings, before, strict=True):
                setattr(owner, name, value)


def _settings() -> list[tuple[Any, str, Any]]:
    """Attributes of torch, as owner, name and value."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, which refuses to mix both names
        exact = [(matmul, "fp32_precision", "ieee"), (cudnn.conv, "fp32_precision", "ieee")]
    else:
        exact = [(matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    return [*exact, (cudnn, "benchmark", False), (cudnn, "deterministic", True)]
