"""Export of a trained policy to a file that needs neither this package nor the environment.

The file holds a function from observations, as the environment returns them, to deterministic
actions, as the environment takes them. Observations are normalised inside the function; it holds
neither the critic nor anything random. The function of a policy with memory also takes the memory
before the observations and returns the memory after them: the caller must carry the memory from
step to step.

Axes: ``M`` sample, ``K`` choice, ``S`` number in a memory.
"""

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # the one that torch.export is built on

from esper_lightning.core.errors import one_of, require
from esper_lightning.core.paths import require_output
from esper_lightning.core.spaces import (
    ActionSpace,
    Box,
    Discrete,
    EnvSpaces,
    FactoredDiscrete,
    MultiDiscrete,
    mask_size,
)
from esper_lightning.core.tensor_trees import map_obs
from esper_lightning.core.types import Observation
from esper_lightning.envs.base import built_env
from esper_lightning.forensics.files import write_atomically
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.training.checkpoint.spaces import StoredEnv
from esper_lightning.training.checkpoint.states import refuse_non_finite
from esper_lightning.training.module import PPO
from esper_lightning.training.specs import evaluation_spec

__all__ = ["ExportFormat", "Exported", "export_policy", "output_at"]

ExportFormat = Literal["torch", "onnx"]
_BATCHES = (1, 2, 61, 960)  # numbers of samples
_BEGINS = rb"PK\x03\x04.{26}archive/(?!data\.pkl)|\x08.\x12\x07pytorch"  # a program, or onnx
_WIDE = 1e6  # bounds so far apart say nothing of the numbers between
_TOLERANCE = 1e-5  # for float32; relative where numbers are greater than 1


class Exported(NamedTuple):
    """The result of an export: its inputs and outputs, and how they compare with the original.

    Attributes:
        inputs: Example batch of each input, by name; the first axis may have any length.
        outputs: Outputs of the exported function for these inputs, by name.
        difference: Greatest difference between outputs of the file and of the original policy.
        samples: Number of random observations over which outputs were compared.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    difference: float
    samples: int


class Inputs(NamedTuple):
    """A batch of inputs of an exported policy; inputs that it does not take are ``None``."""

    obs: Observation  # [M, *O]
    action_mask: Tensor | None = None  # [M, K]
    memory: Tensor | None = None  # [M, S]

    @property
    def args(self) -> tuple[Observation] | tuple[Observation, Tensor]:
        """Positional arguments of the exported function."""
        return (self.obs,) if self.action_mask is None else (self.obs, self.action_mask)

    @property
    def kwargs(self) -> dict[str, Tensor]:
        """Keyword arguments of the exported function."""
        return {} if self.memory is None else {"memory": self.memory}

    @property
    def named(self) -> dict[str, Tensor]:
        """All inputs by name, in their order.

        Raises:
            ValueError: If a group of observations has the name of another input or output.
        """
        groups = {"obs": self.obs} if isinstance(self.obs, Tensor) else self.obs
        optional = {"action_mask": self.action_mask, "memory": self.memory}
        others = {name: value for name, value in optional.items() if value is not None}
        taken = [*others, *_outputs(self.memory)]
        rule, hint = f"not be {', '.join(taken)}", "Other inputs and outputs have these names."
        require(groups.keys().isdisjoint(taken), "Group of observations", rule, [*groups], hint)
        return groups | others


Function = Callable[[Inputs], dict[str, Tensor]]


def _outputs(memory: Tensor | None) -> tuple[str, ...]:
    return ("action",) if memory is None else ("action", "next_memory")


class DeterministicPolicy(nn.Module):
    """The function that is exported: from observations to deterministic actions.

    Args:
        model: Trained module. Its policy is copied to the CPU, in float32.
    """

    def __init__(self, model: PPO) -> None:
        super().__init__()
        self.policy = copy.deepcopy(model.policy).cpu()
        self.normalizer = copy.deepcopy(model.obs_normalizer)
        self.cpu().eval().requires_grad_(False)

    def forward(
        self, obs: Observation, action_mask: Tensor | None = None, *, memory: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Actions ``[M, ...]`` for observations ``[M, *O]``.

        Args:
            obs: Observations as the environment returns them.
            action_mask: Mask ``[M, K]``, in which True means allowed.
            memory: Memory ``[M, S]`` before the observations; zeros at the first step of an
                episode.

        Returns:
            The actions; with ``memory``, the actions and the memory after the observations.
        """
        seen, memory = self.policy.step_memory(prepare_obs(obs, self.normalizer), memory)
        action = self.policy.to_env(self.policy.act_deterministically(seen, action_mask))
        return action if memory is None else (action, memory)


def export_policy(model: PPO, path: str | Path, file_format: ExportFormat) -> Exported:
    """Write a policy to a file, after comparing the file with the original on random observations.

    The inputs of the written function are ``obs`` or, for a grouped observation, its groups (for
    ``torch`` in one dict). ``action_mask`` follows where the environment has masks, and ``memory``
    (for ``torch`` by name) where the policy has memory: ``DeterministicPolicy.forward`` explains
    all of them. The outputs are ``action`` and, with memory, ``next_memory``.

    Args:
        model: Trained module.
        path: File to write. An earlier export at the same place is replaced.
        file_format: ``torch`` for a program that ``torch.export.load`` reads, or ``onnx``.

    Raises:
        ValueError: If something other than an export is at ``path``; if a weight is not finite; if
            the format is unknown or needs a package that is missing; if the exported function acts
            differently; if a group of observations has the name of another input or output.
        OSError: If the file cannot be written.
    """
    formats = get_args(ExportFormat)
    one_of("--format", file_format, formats)
    path = output_at(path)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("extensions.")}
    refuse_non_finite({"state_dict": weights}, type(model).__name__, field="The policy")
    policy, example = DeterministicPolicy(model), _example(model)
    original, inputs = _function(policy), example.named
    outputs = original(example)
    with _quiet(), _refusals_in_one_line(file_format):
        program = _program(policy, example)
        if file_format == "torch":
            content = _as_torch(program)
            function = _function(torch.export.load(io.BytesIO(content)).module())
        else:
            content = _as_onnx(program, list(inputs), list(outputs))
            function = _from_onnx(content)
        difference = _compare(original, function, example, model.env_spaces.action)
    write_atomically(path, content)
    return Exported(inputs, outputs, difference, sum(_BATCHES))


def output_at(path: str | Path) -> Path:
    """The path of an export, with symbolic links resolved.

    Args:
        path: Path that the user gave.

    Raises:
        ValueError: If no file can be written there, or something other than an earlier export is
            there.
    """
    return require_output("--output", path, "export", _BEGINS)


# Formats.


@contextlib.contextmanager
def _refusals_in_one_line(file_format: ExportFormat) -> Generator[None]:
    """Turn what a converter of torch says about a network into one line."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        first = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0]
        hint = "forward() may neither branch on numbers nor change buffers."
        got = f"{type(error).__name__}: {first[:120]}"
        said = f"The policy must be a program for --format {file_format}, got {got}. {hint}"
        raise ValueError(said) from error


def _program(policy: nn.Module, example: Inputs) -> torch.export.ExportedProgram:
    given = {name: value for name, value in example._asdict().items() if value is not None}
    leaves, structure = pytree.tree_flatten(given)
    any_batch = {0: torch.export.Dim("batch", min=1)}
    shapes = pytree.tree_unflatten([any_batch] * len(leaves), structure)
    return torch.export.export(policy, example.args, example.kwargs, dynamic_shapes=shapes)


def _function(program: nn.Module) -> Function:
    def run(inputs: Inputs) -> dict[str, Tensor]:
        result = program(*inputs.args, **inputs.kwargs)
        values = (result,) if isinstance(result, Tensor) else result
        return dict(zip(_outputs(inputs.memory), values, strict=True))

    return run


def _as_torch(program: torch.export.ExportedProgram) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _as_onnx(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> bytes:
    try:
        import onnx  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]
        import onnxscript  # noqa: F401, PLC0415  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        hint = "pip install 'esper_lightning[export]' brings them."
        raise ValueError(f"--format onnx needs onnx and onnxscript: {error}. {hint}") from error
    converted = torch.onnx.export(
        program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False
    )
    assert converted is not None
    return converted.model_proto.SerializeToString()


def _from_onnx(content: bytes) -> Function:
    import numpy as np  # noqa: PLC0415
    import onnx  # noqa: PLC0415
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415

    session = ReferenceEvaluator(onnx.load_from_string(content))

    def run(inputs: Inputs) -> dict[str, Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.named.items()}
        with np.errstate(all="ignore"):  # log(0) of forbidden choices would warn
            results = cast(list[Any], session.run(None, arrays))
        named = zip(cast(list[str], session.output_names), results, strict=True)
        return {name: torch.from_numpy(result) for name, result in named}

    return run


# Inputs.


def _example(model: PPO) -> Inputs:
    """Inputs with four observations, their masks if any, and blank memory.

    Where the environments of a checkpoint cannot be built, observations are sampled.
    """
    if isinstance(model.env, StoredEnv):
        obs, mask = _sample(model.env_spaces, 4)
        return Inputs(obs, mask, model.policy.initial_memory(obs))
    with built_env(evaluation_spec(model.env, None), torch.device("cpu"), 0) as env:
        obs, mask = env.reset()

    def four(leaf: Tensor) -> Tensor:
        return leaf[torch.arange(4) % len(leaf)]

    obs = map_obs(four, obs)
    return Inputs(obs, None if mask is None else four(mask), model.policy.initial_memory(obs))


def _sample(spaces: EnvSpaces, samples: int) -> tuple[Observation, Tensor | None]:
    """Random observations within their bounds, of standard normal numbers where there are none."""
    generator = torch.Generator().manual_seed(0)

    def sample(box: Box) -> Tensor:
        low, high = (torch.tensor(ends).view(box.shape) for ends in (box.lows, box.highs))
        shape = (samples, *box.shape)
        within = low + torch.rand(shape, generator=generator) * (high - low)
        wide = torch.randn(shape, generator=generator).clamp(low, high)
        finite = low.isfinite() & high.isfinite() & (high - low < _WIDE)
        dtype = torch.uint8 if box.dtype == "uint8" else torch.float32
        return torch.where(finite, within, wide).to(dtype)

    obs = spaces.obs
    sampled = sample(obs) if isinstance(obs, Box) else {n: sample(box) for n, box in obs.items()}
    if not spaces.masked:
        return sampled, None
    return sampled, torch.ones(samples, mask_size(spaces.action), dtype=torch.bool)


def _random_inputs(
    example: Inputs, space: ActionSpace, samples: int, generator: torch.Generator
) -> Inputs:
    """Random inputs around an example and at its scale.

    Random masks allow at least one choice wherever a mask must allow one.

    Args:
        example: Inputs around which observations and memory are sampled.
        space: Action space of the environment.
        samples: Number of samples ``M``.
        generator: Source of the random numbers.
    """

    def around(leaf: Tensor) -> Tensor:
        rows = leaf[torch.randint(len(leaf), (samples,), generator=generator)]
        noise = torch.randn(2, *rows.shape, generator=generator)
        return (rows * (1.0 + noise[0]) + noise[1]).to(leaf.dtype)

    obs = map_obs(around, example.obs)
    memory = None if example.memory is None else around(example.memory)
    if example.action_mask is None:
        return Inputs(obs, memory=memory)
    masks: list[Tensor] = []
    for choices in _section_sizes(space):
        allowed = torch.rand(samples, choices, generator=generator) < 0.5
        always = torch.randint(choices, (samples, 1), generator=generator)
        masks.append(allowed.scatter(1, always, True))
    return Inputs(obs, torch.cat(masks, 1), memory)


def _section_sizes(space: ActionSpace) -> tuple[int, ...]:
    """Lengths of the sections of a mask, each of which must allow a choice."""
    if isinstance(space, FactoredDiscrete):
        return space.mask_parts
    assert isinstance(space, Discrete | MultiDiscrete)
    return (space.n,) if isinstance(space, Discrete) else space.nvec


# Comparison.


def _compare(original: Function, other: Function, example: Inputs, space: ActionSpace) -> float:
    """The greatest difference between the outputs of two functions on random inputs.

    Args:
        original: Function of the policy.
        other: Function of the exported file.
        example: Inputs around which the random inputs lie.
        space: Action space of the environment.

    Raises:
        ValueError: If a difference is greater than rounding explains.
    """
    generator, greatest = torch.Generator().manual_seed(0), 0.0
    owner, rule = "The exported policy", "act like the original on random observations"
    for samples in _BATCHES:
        inputs = _random_inputs(example, space, samples, generator)
        got = other(inputs)
        for name, expected in original(inputs).items():
            value = got[name]
            alike = value.shape == expected.shape and value.dtype == expected.dtype
            require(alike, owner, rule, f"{name} {list(value.shape)} of {value.dtype}")
            difference = (value.double() - expected.double()).abs()
            scale = expected.double().abs().clamp(min=1.0)
            close = bool((difference <= _TOLERANCE * scale).all())  # not so for NaN
            greatest = max(greatest, difference.max().item())
            require(close, owner, rule, f"a difference of {difference.max().item()} in {name}")
    return greatest


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """A context without torch's warnings and log messages about its own exporter."""
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
