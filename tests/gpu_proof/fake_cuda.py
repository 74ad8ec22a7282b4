"""Code runs "on CUDA" where there is none: shapes, dtypes and devices are real, numbers are not.

Within ``FakeCuda`` every new tensor is fake, and the device ``cuda:0`` works, autograd included.
What needs a number on the host raises an error, and so does an operation on tensors of two devices:
``item``, ``bool``, ``tolist``, ``nonzero``, an index of booleans, ``equal``. Copies between host
and device are noted, for such a copy waits, too. This is for programs under ``with_fake_cuda``.
"""

import collections
import contextlib
import traceback
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper_lightning.core import constants


class Generator(torch.Generator):
    """It keeps its device, and is never asked for a number."""

    device: Any = None

    def __new__(cls, device: Any = "cpu") -> "Generator":
        self = super().__new__(cls)
        self.device = torch.device(device)
        return self

    def manual_seed(self, seed: int) -> "Generator":
        return self

    def get_state(self) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        assert state.device.type == "cpu"


class FakeCuda:
    """A context with a fake ``cuda:0``.

    Attributes:
        kernels: Number of operations on the device so far, by name; views are none.
        copies: What a device would wait for: number of copies between host and device, by place.
    """

    def __init__(self) -> None:
        self.kernels: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        self._modes = [FakeTensorMode(), _Rules(self), _WithoutGenerators()]
        # Addresses of fake tensors: those of their storages.
        self._replaced = [
            (torch, "Generator", Generator),
            (torch.Tensor, "data_ptr", lambda t: t.untyped_storage()._cdata + t.storage_offset()),
            (constants, "_disable_current_modes", contextlib.nullcontext),  # real ones cannot be
        ]

    def __enter__(self) -> "FakeCuda":
        self._before = [getattr(owner, name) for owner, name, _ in self._replaced]
        for owner, name, value in self._replaced:
            setattr(owner, name, value)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        for (owner, name, _), value in zip(self._replaced, self._before, strict=True):
            setattr(owner, name, value)

    def count(self) -> int:
        """Number of operations on the device so far."""
        return sum(self.kernels.values())


def move(module: torch.nn.Module) -> torch.nn.Module:
    """A module that was built outside the context, on the fake device; shared weights stay so."""
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for part in module.modules():
        for kind in (part._parameters, part._buffers):
            for name, old in kind.items():
                if old is None:
                    continue
                if old not in moved:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda:0")
                    if kind is part._parameters:
                        new = torch.nn.Parameter(new, old.requires_grad)
                    moved[old] = new
                kind[name] = moved[old]
    return module


class _WithoutGenerators(TorchFunctionMode):
    """Operations do not see a stand-in of a generator, but its device must be theirs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("generator"), Generator):
            generator = kwargs.pop("generator")
            where = kwargs.get("device", getattr(args[0], "device", None) if args else None)
            same = where is None or torch.device(where).type == generator.device.type
            assert same, "a generator of another device"
        return func(*args, **kwargs)


class _Rules(TorchDispatchMode):
    """Counts operations on the device, and notes copies."""

    def __init__(self, found: FakeCuda) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in (*given, *made)}
        if "cuda" in kinds:
            storages = {tensor.untyped_storage()._cdata for tensor in given}
            fresh = any(tensor.untyped_storage()._cdata not in storages for tensor in made)
            allocates = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
            if func._schema.is_mutable or (fresh and not allocates):
                self._found.kernels[str(func)] += 1
            if "cpu" in kinds:
                self._found.copies[f"{func} at {_place()}"] += 1
        return result


def _place() -> str:
    """Lines of the package that led to an operation, the innermost first."""
    frames = [f for f in traceback.extract_stack() if "/esper_lightning/" in f.filename]
    names = [f"{f.filename.split('/esper_lightning/')[-1]}:{f.lineno}" for f in frames]
    return " < ".join(names[:-4:-1])
