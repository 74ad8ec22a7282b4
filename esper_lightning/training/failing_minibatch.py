"""The minibatch of which an update died, computed again: where the first bad value arises.

``nan.pt`` holds the minibatch, ``crash.ckpt`` the weights that it met. Axis: ``M`` sample.
"""

import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from esper_lightning.core.errors import require
from esper_lightning.core.tensor_trees import named_tensors
from esper_lightning.core.types import Samples
from esper_lightning.forensics.layout import RankLayout
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.objective import ppo_loss_terms, total_loss
from esper_lightning.training.checkpoint.files import read_checkpoint
from esper_lightning.training.module import PPO

__all__ = ["MinibatchFinding", "examine_minibatch"]

_TORCH = str(Path(torch.__file__).parent) + os.sep
_MOST = 8  # names and samples that are listed


class MinibatchFinding(NamedTuple):
    """What computing a minibatch again has shown."""

    found: bool
    """Whether a value that is not finite was found."""
    lines: list[str]
    """The finding in words."""


class _Place(NamedTuple):
    """The operation that made the first value that is not finite."""

    operation: str
    pass_: str  # forward, or backward
    stack: list[str]  # lines of a traceback, the innermost last
    rows: list[int]  # indices along the first axis at which the result is not finite
    shape: tuple[int, ...]
    inputs: list[str]  # each tensor that went in, with its range


class _FirstNonFinite(TorchDispatchMode):
    """Notes the first operation with finite inputs and a result that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.place: _Place | None = None

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.place is None:
            given = [value for value in tree_leaves((args, kwargs or {})) if _has_numbers(value)]
            made = [value for value in tree_leaves(result) if _has_numbers(value)]
            bad = next((value for value in made if not _is_finite(value)), None)
            if bad is not None and all(map(_is_finite, given)):
                self.place = self._describe(func, bad, given)
        return result

    def _describe(self, func: Any, bad: Tensor, given: list[Tensor]) -> _Place:
        node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage]
        name = str(func).removesuffix(".default")
        if node is None:
            return _Place(name, "forward", _own_stack(), _rows(bad), (*bad.shape,), _ranges(given))
        texts: Sequence[str] = node.metadata.get("traceback_", ())
        forward = [line for text in texts if _TORCH not in text for line in text.splitlines()]
        forward = forward[-_MOST:]
        name = f"{name}, of {node.name()}"
        return _Place(name, "backward", forward, _rows(bad), (*bad.shape,), _ranges(given))


def examine_minibatch(files: RankLayout) -> MinibatchFinding:
    """Compute the minibatch of which a rank died again, and find where a bad value arises.

    Args:
        files: Folder of the rank that died.

    Raises:
        ValueError: If the rank left no minibatch, or no weights with which it can be computed.
    """
    path = files.bad_minibatch
    rule = "hold the minibatch of a run that died of a value that is not finite"
    require(path.exists(), "RUN_DIR", rule, str(files.directory))
    minibatch = read_checkpoint(path)
    inputs = [(name, tensor) for name, tensor in named_tensors(minibatch) if not _is_finite(tensor)]
    lines = [f"Minibatch: {path}, {len(next(iter(minibatch.values())))} samples"]
    for name, tensor in inputs[:_MOST]:
        lines.append(f"Not finite before anything is computed: {name}, in {_some(_rows(tensor))}")
    if "advantage" not in minibatch:
        lines.append("It is one step of a rollout, of all environments: an environment or the")
        lines.append("policy has returned these values.")
        return MinibatchFinding(len(inputs) > 0, lines)
    if inputs:
        return MinibatchFinding(True, lines)
    checkpoint = files.crash_checkpoint
    rule = "hold crash.ckpt, with the weights that the minibatch met"
    require(checkpoint.exists(), "RUN_DIR", rule, str(files.directory))
    model = PPO.load_from_checkpoint(checkpoint)
    bad = [name for name, value in model.state_dict().items() if not _is_finite(value)]
    if bad:
        return MinibatchFinding(True, [*lines, f"Weights are not finite: {', '.join(bad[:_MOST])}"])
    return _compute(model, Samples(**_filled(minibatch)), lines)


def _compute(model: PPO, samples: Samples, lines: list[str]) -> MinibatchFinding:
    agent = Agent(model.policy, model.obs_normalizer, model.extensions)
    trained = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    # So that each operation of the backward pass knows its line in the forward pass.
    with torch.autograd.set_detect_anomaly(True, check_nan=False), _FirstNonFinite() as watch:
        evaluation, added = agent.evaluate_minibatch(samples)
        terms = ppo_loss_terms(evaluation, samples, model.ppo)
        loss = total_loss(terms, added, model.ppo).mean()
        gradients: Any = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    if watch.place is not None:
        return MinibatchFinding(True, [*lines, *_in_words(watch.place)])
    found = ((name, g) for name, g in zip(trained, gradients, strict=True) if g is not None)
    peaks = {name: float(gradient.abs().max()) for name, gradient in found}
    largest = max(peaks, key=lambda name: peaks[name])
    lines += [
        f"Every value is finite this time. The loss is {loss.item():.6g}, and the largest gradient",
        f"{peaks[largest]:.6g}, of {largest}. Its square or the sum over ranks may be infinite.",
    ]
    return MinibatchFinding(False, lines)


def _in_words(place: _Place) -> list[str]:
    return [
        f"The first bad value arises in the {place.pass_} pass, in {place.operation}:",
        f"    result {list(place.shape)}, not finite in {_some(place.rows)} of its first axis",
        *(f"    from {each}" for each in place.inputs[:_MOST]),
        *(f"    {line}" for line in place.stack if line.strip()),
    ]


def _filled(minibatch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``Samples``; fields that a minibatch does not have are ``None``."""
    return {"action_mask": None, **minibatch}


def _has_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _rows(tensor: Tensor) -> list[int]:
    bad = ~tensor.isfinite()
    flat = bad.reshape(len(bad), -1).any(1) if bad.dim() else bad.reshape(1)
    return cast(list[int], flat.nonzero()[:, 0].tolist())


def _ranges(tensors: list[Tensor]) -> list[str]:
    return [
        f"{list(t.shape)} from {float(t.min()):.6g} to {float(t.max()):.6g}"
        for t in tensors
        if t.numel()
    ]


def _some(indices: list[int]) -> str:
    more = f" and {len(indices) - _MOST} more" if len(indices) > _MOST else ""
    return ", ".join(map(str, indices[:_MOST])) + more


def _own_stack() -> list[str]:
    """Lines of the stack below this module, without those of torch; the innermost last."""
    frames = traceback.extract_stack()
    first = max(i for i, frame in enumerate(frames) if frame.name == _compute.__name__) + 1
    own = [f for f in frames[first:] if not f.filename.startswith((_TORCH, __file__))]
    return "".join(traceback.format_list(own)).splitlines()
