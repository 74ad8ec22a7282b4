"""A trained policy as a file that needs neither this package nor the environment.

What is written takes observations as the environment gives them and returns the deterministic
action as the environment takes it: the statistics of observations are inside, the critic and
everything random are not. Axes: ``M`` sample, ``K`` choice.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # the one that torch.export is built on

from esper_lightning.core.spaces import ActionSpace, Discrete, MultiDiscrete
from esper_lightning.core.types import Observation, map_obs
from esper_lightning.core.validate import require
from esper_lightning.forensics.files import write_atomically
from esper_lightning.training.agent import as_seen
from esper_lightning.training.module import PPO
from esper_lightning.training.specs import for_evaluation

__all__ = ["ExportFormat", "Exported", "export_policy"]

ExportFormat = Literal["torch", "onnx"]
Inputs = tuple[Observation] | tuple[Observation, Tensor]
Function = Callable[..., Tensor]
_BATCHES = (1, 2, 61, 960)  # samples
_TOLERANCE = 1e-5  # of float32, relative to actions greater than 1


class Exported(NamedTuple):
    """What was written.

    Attributes:
        batch: A batch of each input, by its name, and of ``action``; the first axis may have any
            length.
        difference: The greatest between an action of the file and one of the original.
        samples: Random observations over which that was looked for.
    """

    batch: dict[str, Tensor]
    difference: float
    samples: int


class DeterministicPolicy(nn.Module):
    """Observations in, actions out.

    Args:
        model: Copied; in float32 on the CPU whatever it was trained on.
    """

    def __init__(self, model: PPO) -> None:
        super().__init__()
        self.policy = copy.deepcopy(model.policy).cpu()
        self.normalizer = copy.deepcopy(model.obs_normalizer)
        self.cpu().eval().requires_grad_(False)

    def forward(self, obs: Observation, action_mask: Tensor | None = None) -> Tensor:
        """Actions ``[M, ...]`` for observations ``[M, *O]``; masks ``[M, K]``, True = allowed."""
        seen = as_seen(obs, self.normalizer)
        return self.policy.to_env(self.policy.act_deterministically(seen, action_mask))


def export_policy(model: PPO, path: str | Path, file_format: ExportFormat) -> Exported:
    """Write a policy, after comparing what is written with the original on random observations.

    Args:
        model: Trained.
        path: File to write, or to replace.
        file_format: ``torch`` for a program that ``torch.export.load`` reads, or ``onnx``. Inputs
            are ``obs``, or the groups of a grouped observation (for ``torch``: in one dict), then
            ``action_mask`` where the environment has masks.

    Raises:
        ValueError: If the format is unknown, needs a package that is missing, or what came out of
            it acts differently.
        OSError: If the file cannot be written.
    """
    formats = get_args(ExportFormat)
    require(file_format in formats, "--format", f"be one of {', '.join(formats)}", file_format)
    path = Path(path)
    require(not path.is_dir(), "--output", "name a file", str(path))
    policy, example = DeterministicPolicy(model), _example(model)
    names = _names(example)
    with _quiet():
        program = _program(policy, example)
        if file_format == "torch":
            content = _as_torch(program)
            function: Function = torch.export.load(io.BytesIO(content)).module()
        else:
            content = _as_onnx(program, names)
            function = _from_onnx(content, names)
        difference = _compare(policy, function, example, model)
    write_atomically(path, content)
    tensors = [*_leaves(example), policy(*example)]
    batch = dict(zip([*names, "action"], tensors, strict=True))
    return Exported(batch, difference, sum(_BATCHES))


# Formats.


def _program(policy: nn.Module, example: Inputs) -> torch.export.ExportedProgram:
    leaves, structure = pytree.tree_flatten(example)
    any_batch = {0: torch.export.Dim("batch", min=1)}
    shapes = pytree.tree_unflatten([any_batch] * len(leaves), structure)
    return torch.export.export(policy, example, dynamic_shapes=shapes)


def _as_torch(program: torch.export.ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _as_onnx(program: torch.export.ExportedProgram, names: list[str]) -> bytes:
    try:
        import onnx  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        hint = "pip install 'esper_lightning[export]' brings them."
        raise ValueError(f"--format onnx needs onnx and onnxscript: {error}. {hint}") from error
    converted = torch.onnx.export(
        program, input_names=names, output_names=["action"], dynamo=True, verbose=False
    )
    assert converted is not None
    return converted.model_proto.SerializeToString()


def _from_onnx(content: bytes, names: list[str]) -> Function:
    import numpy as np  # noqa: PLC0415
    import onnx  # noqa: PLC0415
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

    session = ReferenceEvaluator(onnx.load_from_string(content))

    def run(*inputs: Any) -> Tensor:
        arrays = [leaf.numpy() for leaf in _leaves(inputs)]
        with np.errstate(all="ignore"):  # the logarithm of a forbidden choice's probability, 0
            (action,) = cast(list[Any], session.run(None, dict(zip(names, arrays, strict=True))))
        return torch.from_numpy(action)

    return run


# Inputs.


def _example(model: PPO) -> Inputs:
    """Four observations of the environment, and masks where it has them."""
    env = for_evaluation(model.env, None).build(torch.device("cpu"), 0)
    obs, mask = env.reset()

    def four(leaf: Tensor) -> Tensor:
        return leaf[torch.arange(4) % len(leaf)]

    return pytree.tree_map(four, (obs,) if mask is None else (obs, mask))


def _names(example: Inputs) -> list[str]:
    obs = example[0]
    names = ["obs"] if isinstance(obs, Tensor) else list(obs)
    names += ["action_mask"] * (len(example) - 1)
    hint = "That is what the input for masks is called."
    require(
        len(set(names)) == len(names), "Group of observations", "not be action_mask", names, hint
    )
    return names


def _leaves(inputs: object) -> list[Tensor]:
    return cast(list[Tensor], pytree.tree_leaves(inputs))


def _random_inputs(
    example: Inputs, space: ActionSpace, samples: int, generator: torch.Generator
) -> Inputs:
    """Around the observations of ``example`` and at their scale; masks that allow something."""

    def around(leaf: Tensor) -> Tensor:
        rows = leaf[torch.randint(len(leaf), (samples,), generator=generator)]
        noise = torch.randn(2, *rows.shape, generator=generator)
        return (rows * (1.0 + noise[0]) + noise[1]).to(leaf.dtype)

    obs = map_obs(around, example[0])
    if len(example) == 1:
        return (obs,)
    assert isinstance(space, Discrete | MultiDiscrete)
    masks: list[Tensor] = []
    for choices in (space.n,) if isinstance(space, Discrete) else space.nvec:
        allowed = torch.rand(samples, choices, generator=generator) < 0.5
        always = torch.randint(choices, (samples, 1), generator=generator)
        masks.append(allowed.scatter(1, always, True))
    return obs, torch.cat(masks, 1)


# Comparison.


def _compare(original: Function, other: Function, example: Inputs, model: PPO) -> float:
    """The greatest difference of actions.

    Raises:
        ValueError: If it is greater than rounding makes it.
    """
    generator, greatest = torch.Generator().manual_seed(0), 0.0
    space = model.env.spaces().action
    for samples in _BATCHES:
        inputs = _random_inputs(example, space, samples, generator)
        expected, action = original(*inputs), other(*inputs)
        alike = action.shape == expected.shape and action.dtype == expected.dtype
        owner, rule = "The exported policy", "act like the original on random observations"
        got = f"actions {list(action.shape)} of {action.dtype}"
        require(alike, owner, rule, got)
        difference = (action.double() - expected.double()).abs()
        scale = expected.double().abs().clamp(min=1.0)
        close = bool((difference <= _TOLERANCE * scale).all())  # not so for NaN
        greatest = max(greatest, difference.max().item())
        require(close, owner, rule, f"a difference of {greatest}")
    return greatest


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without what torch says about its own inside."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)
