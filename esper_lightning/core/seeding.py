"""Independent random streams from one seed, and the global random state of the process."""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_lightning.core.errors import Words, require

__all__ = [
    "global_random_states",
    "require_torch_defaults",
    "restore_streams",
    "set_global_random_states",
    "stream",
    "stream_seed",
    "why_not_restorable",
]

_GPU_BYTES = 16  # of the state of a generator on a GPU


def stream_seed(seed: int, *, rank: int, purpose: str) -> int:
    """A 31-bit seed for one purpose on one rank.

    Streams that share a seed would share their numbers: exploration noise would repeat the initial
    states. The seed has 31 bits, because some simulators take no more.
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, *, rank: int, purpose: str, device: torch.device) -> torch.Generator:
    """A generator on ``device`` seeded by ``stream_seed``."""
    return torch.Generator(device).manual_seed(stream_seed(seed, rank=rank, purpose=purpose))


def restore_streams(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> bool:
    """Restore the states of generators, unless the states are of another kind of device.

    The state of a generator has other sizes on a CPU and on a GPU.

    Args:
        generators: Generators of a run.
        states: State of each generator.

    Returns:
        Whether the generators have the states; if not, they are unchanged.
    """
    pairs = list(zip(generators, states, strict=True))
    if any(state.shape != generator.get_state().shape for generator, state in pairs):
        return False
    for generator, state in pairs:
        generator.set_state(state.cpu())
    return True


def global_random_states() -> dict[str, Any]:
    """States of the global generators, in types that ``torch.load(weights_only=True)`` reads."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    numpy: Any = np.random.get_state()  # noqa: NPY002 - the global one is what a program may use
    states["numpy"] = [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_global_random_states(states: dict[str, Any]) -> None:
    """Restore the states that ``global_random_states`` returned."""
    torch.set_rng_state(states["torch"].cpu())
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "cuda" in states and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def why_not_restorable(states: dict[str, Any], generators: Sequence[Tensor]) -> str | None:
    """Why random states cannot be restored, in words; ``None`` if they can.

    The states are tried, and those of the process are restored. States of a GPU are not tried.

    Args:
        states: States that ``global_random_states`` may have returned.
        generators: States of the generators of a run.
    """
    before, name = global_random_states(), "global_random"
    try:
        set_global_random_states({n: state for n, state in states.items() if n != "cuda"})
        for state in states.get("cuda", []):
            _require_state(state)
        name = "generators"
        for state in generators:
            _require_state(state)
            if state.numel() != _GPU_BYTES:
                torch.Generator().set_state(state.cpu())
    except Exception as error:  # what is in a file may be anything
        reason = (str(error).splitlines() or [""])[0]
        return f"{name} cannot be restored: {type(error).__name__}: {reason}"
    finally:
        set_global_random_states(before)
    return None


def _require_state(state: Any) -> None:
    is_state = isinstance(state, Tensor) and state.dtype == torch.uint8 and state.ndim == 1
    require(is_state, "A random state", "be bytes", type(state).__name__)


def require_torch_defaults(owner: str) -> None:
    """Refuse a default dtype or device of torch under which ``owner`` would create other tensors.

    Raises:
        ValueError: Unless the default dtype is float32 and the default device the CPU.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    hint = "torch.set_default_dtype(torch.float32) sets it."
    field = f"torch.get_default_dtype() for {owner}"
    require(dtype == torch.float32, field, "be torch.float32", dtype, hint)
    hint = "torch.set_default_device(None) sets it; what runs where is chosen by its own settings."
    field = f"torch.get_default_device() for {owner}"
    require(device.type == "cpu", field, "be cpu", Words(device), hint)
