"""Tensors that are made once and kept, whoever asks for them first."""

import contextlib
from collections.abc import Generator

import torch
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

__all__ = ["made_to_keep"]


@contextlib.contextmanager
def made_to_keep() -> Generator[None]:
    """Make tensors that may be kept in a cache, also within a trace or in inference mode.

    In a trace a tensor has no numbers, and every later call would get it: after a compiler had
    failed on an H100, the eager way computed with such tensors. In inference mode a tensor would
    spoil later gradients.
    """
    with torch.inference_mode(False), _disable_current_modes():
        yield
