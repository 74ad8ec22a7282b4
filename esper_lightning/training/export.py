"""A trained policy as a file that needs neither this package nor the environment.

What is written takes observations as the environment gives them and returns the deterministic
action as the environment takes it: the statistics of observations are inside, the critic and
everything random take no part. A policy with memory takes that too, and returns it as it is after
the observations: whoever runs the file carries it from step to step.

Axes: ``M`` sample, ``K`` choice, ``S`` number in a memory.
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

from esper_lightning.core.errors import require, require_output
from esper_lightning.core.spaces import ActionSpace, Discrete, FactoredDiscrete, MultiDiscrete
from esper_lightning.core.types import Observation, map_obs
from esper_lightning.forensics.files import write_atomically
from esper_lightning.ppo.agent import prepare_obs
from esper_lightning.training.checkpoint.states import refuse_non_finite
from esper_lightning.training.module import PPO
from esper_lightning.training.specs import evaluation_spec

__all__ = ["ExportFormat", "Exported", "export_policy", "output_at"]

ExportFormat = Literal["torch", "onnx"]
_BATCHES = (1, 2, 61, 960)  # samples
_BEGINS = rb"PK\x03\x04.{26}archive/(?!data\.pkl)|\x08.\x12\x07pytorch"  # a program, or onnx
_TOLERANCE = 1e-5  # of float32, relative to numbers greater than 1


class Exported(NamedTuple):
    """What was written.

    Attributes:
        inputs: A batch of each input, by its name; the first axis may have any length.
        outputs: What they lead to, by name.
        difference: The greatest between an output of the file and one of the original.
        samples: Random observations over which that was looked for.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    difference: float
    samples: int


class Inputs(NamedTuple):
    """A batch of what the policy is given; what it does not take is ``None``."""

    obs: Observation  # [M, *O]
    action_mask: Tensor | None = None  # [M, K]
    memory: Tensor | None = None  # [M, S]

    @property
    def args(self) -> tuple[Observation] | tuple[Observation, Tensor]:
        """Given by position."""
        return (self.obs,) if self.action_mask is None else (self.obs, self.action_mask)

    @property
    def kwargs(self) -> dict[str, Tensor]:
        """Given by name."""
        return {} if self.memory is None else {"memory": self.memory}

    @property
    def named(self) -> dict[str, Tensor]:
        """In their order.

        Raises:
            ValueError: If a group of observations is called as another input or output.
        """
        groups = {"obs": self.obs} if isinstance(self.obs, Tensor) else self.obs
        optional = {"action_mask": self.action_mask, "memory": self.memory}
        others = {name: value for name, value in optional.items() if value is not None}
        taken = [*others, *_outputs(self.memory)]
        rule, hint = f"not be {', '.join(taken)}", "Other inputs and outputs are called so."
        require(groups.keys().isdisjoint(taken), "Group of observations", rule, [*groups], hint)
        return groups | others


Function = Callable[[Inputs], dict[str, Tensor]]


def _outputs(memory: Tensor | None) -> tuple[str, ...]:
    return ("action",) if memory is None else ("action", "next_memory")


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

    def forward(
        self, obs: Observation, action_mask: Tensor | None = None, *, memory: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Actions ``[M, ...]`` for observations ``[M, *O]``.

        Args:
            obs: As the environment gives them.
            action_mask: ``[M, K]``, True = allowed.
            memory: ``[M, S]``, before the observations: zeros at the first of an episode. With it
                come actions and the memory after the observations.
        """
        seen, memory = self.policy.step_memory(prepare_obs(obs, self.normalizer), memory)
        action = self.policy.to_env(self.policy.act_deterministically(seen, action_mask))
        return action if memory is None else (action, memory)


def export_policy(model: PPO, path: str | Path, file_format: ExportFormat) -> Exported:
    """Write a policy, after comparing what is written with the original on random observations.

    Args:
        model: Trained.
        path: File to write; or to replace, if an earlier export is there.
        file_format: ``torch`` for a program that ``torch.export.load`` reads, or ``onnx``. Inputs
            are ``obs``, or the groups of a grouped observation (for ``torch``: in one dict), then
            ``action_mask`` where the environment has masks, then ``memory`` (for ``torch``: by
            name) where the policy has one: see ``DeterministicPolicy.forward``. Outputs are
            ``action``, then ``next_memory``.

    Raises:
        ValueError: If something else is at ``path``; if a weight is not finite; if the format is
            unknown, needs a package that is missing, or what came out of it acts differently; if a
            group of observations is called as another input or output.
        OSError: If the file cannot be written.
    """
    formats = get_args(ExportFormat)
    require(file_format in formats, "--format", f"be one of {', '.join(formats)}", file_format)
    path = output_at(path)
    refuse_non_finite({"state_dict": model.state_dict()}, type(model).__name__, field="The policy")
    policy, example = DeterministicPolicy(model), _example(model)
    original, inputs = _function(policy), example.named
    outputs = original(example)
    with _quiet():
        program = _program(policy, example)
        if file_format == "torch":
            content = _as_torch(program)
            function = _function(torch.export.load(io.BytesIO(content)).module())
        else:
            content = _as_onnx(program, list(inputs), list(outputs))
            function = _from_onnx(content)
        difference = _compare(original, function, example, model.env.spaces().action)
    write_atomically(path, content)
    return Exported(inputs, outputs, difference, sum(_BATCHES))


def output_at(path: str | Path) -> Path:
    """Where an export goes: behind a symbolic link, what that leads to.

    Raises:
        ValueError: If no file can be there, or something else than an earlier export is.
    """
    return require_output("--output", path, "export", _BEGINS)


# Formats.


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
        with np.errstate(all="ignore"):  # the logarithm of a forbidden choice's probability, 0
            results = cast(list[Any], session.run(None, arrays))
        named = zip(cast(list[str], session.output_names), results, strict=True)
        return {name: torch.from_numpy(result) for name, result in named}

    return run


# Inputs.


def _example(model: PPO) -> Inputs:
    """Four observations of the environment, blank memory, and masks where it has them."""
    env = evaluation_spec(model.env, None).build(torch.device("cpu"), 0)
    obs, mask = env.reset()

    def four(leaf: Tensor) -> Tensor:
        return leaf[torch.arange(4) % len(leaf)]

    obs = map_obs(four, obs)
    return Inputs(obs, None if mask is None else four(mask), model.policy.initial_memory(obs))


def _random_inputs(
    example: Inputs, space: ActionSpace, samples: int, generator: torch.Generator
) -> Inputs:
    """Around observations and memory of ``example`` and at their scale; masks that allow something.

    Of each part of a mask that must.
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
    for choices in _mask_parts(space):
        allowed = torch.rand(samples, choices, generator=generator) < 0.5
        always = torch.randint(choices, (samples, 1), generator=generator)
        masks.append(allowed.scatter(1, always, True))
    return Inputs(obs, torch.cat(masks, 1), memory)


def _mask_parts(space: ActionSpace) -> tuple[int, ...]:
    if isinstance(space, FactoredDiscrete):
        return space.mask_parts
    assert isinstance(space, Discrete | MultiDiscrete)
    return (space.n,) if isinstance(space, Discrete) else space.nvec


# Comparison.


def _compare(original: Function, other: Function, example: Inputs, space: ActionSpace) -> float:
    """The greatest difference of actions and of memories.

    Raises:
        ValueError: If it is greater than rounding makes it.
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
