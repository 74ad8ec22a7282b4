"""Rules for each single tensor that an environment returns, and the list of broken rules.

Axes: ``B`` environment, ``K`` choice. ``check`` adds the rules that only several steps can show.
"""

import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.errors import Words, require
from esper_lightning.core.shapes import Bool, Shaped
from esper_lightning.core.spaces import (
    ActionSpace,
    Box,
    Discrete,
    EnvSpaces,
    FactoredDiscrete,
    MultiDiscrete,
    mask_parts,
    mask_size,
)

__all__ = [
    "Contract",
    "Problems",
    "Returned",
    "UncheckableError",
    "fingerprint",
    "flatten",
    "sample_action",
    "where",
]


class UncheckableError(Exception):
    """A problem that makes every further check meaningless."""


class Problems:
    """The problems found, one line for each kind of problem, however often it happened."""

    def __init__(self, owner: str) -> None:
        self.owner = owner  # name of the environment, with which each line begins
        self._lines: dict[tuple[str, str], str] = {}

    def expect(self, ok: bool, field: str, rule: str, got: object, hint: str = "") -> bool:
        """Add a problem unless ``ok``, in the form of ``core.errors.require``; return ``ok``."""
        try:
            require(ok, f"{self.owner}.{field}", rule, got, hint)
        except ValueError as error:
            self._lines.setdefault((field, rule), str(error))
        return ok

    def insist(self, ok: bool, field: str, rule: str, got: object, hint: str = "") -> None:
        """Add a problem and raise ``UncheckableError`` unless ``ok``."""
        if not self.expect(ok, field, rule, got, hint):
            raise UncheckableError

    @contextmanager
    def raise_at_end(self) -> Generator[None, None, None]:
        """Raise the problems that are found within the context, at its end.

        An ``UncheckableError`` ends the context early, and is not raised itself.

        Raises:
            ValueError: If there is a problem; one line for each kind of problem.
        """
        with suppress(UncheckableError):
            yield
        self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise a ``ValueError`` with one line for each problem."""
        if self._lines:
            raise ValueError("\n".join(self._lines.values()))


class Returned(NamedTuple):
    """Result of a call: the tensors themselves, and their values at that time, on the CPU."""

    call: str
    live: dict[str, Tensor]
    values: dict[str, Tensor]


class _Leaf(NamedTuple):
    shape: list[int]
    kinds: tuple[str, ...]
    box: Box | None = None  # bounds of the values
    finite: bool = False


class Contract(NamedTuple):
    """Rules that follow from the spaces, the number and the device of environments."""

    spaces: EnvSpaces
    num_envs: int
    device: torch.device

    def inspect(
        self, call: str, fields: Mapping[str, object], problems: Problems, *, finite: bool = True
    ) -> Returned:
        """Check the fields that ``call`` returned.

        Args:
            call: Method of the environment, to name in problems.
            fields: Result of the call, by name of the field.
            problems: List to which problems are added.
            finite: Whether numbers that are not finite are problems.

        Raises:
            UncheckableError: If a field is missing, or of another shape, kind or device.
        """
        found, expected = flatten(fields), self._leaves(fields)
        known = {name.partition("[")[0] for name in expected}
        for name, value in fields.items():
            if isinstance(value, dict) and not value and name not in known:
                found[name] = value
        sound = True
        for name in found.keys() - expected.keys():
            rule = "be declared in EnvSpaces"
            sound &= problems.expect(False, f"{call}.{name}", rule, _describe(found[name]))
        for name, leaf in expected.items():
            got = found.get(name, fields[name.partition("[")[0]])
            sound &= _check_form(got, leaf, self.device, f"{call}.{name}", problems)
        if not sound:
            raise UncheckableError
        live = cast(dict[str, Tensor], found)
        values = {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}
        for name, leaf in expected.items():
            _check_values(values[name], leaf, f"{call}.{name}", problems, finite=finite)
        if self.spaces.masked:
            _check_mask(values["action_mask"], self.spaces.action, f"{call}.action_mask", problems)
        return Returned(call, live, values)

    def groups(self) -> dict[str, Box]:
        """Box of each observation, by suffix of the name ``obs``: ``['group']`` or ''."""
        if isinstance(self.spaces.obs, Box):
            return {"": self.spaces.obs}
        return {f"[{name!r}]": box for name, box in self.spaces.obs.items()}

    def _leaves(self, fields: Mapping[str, object]) -> dict[str, _Leaf]:
        batch = [self.num_envs]
        leaves: dict[str, _Leaf] = {}
        for field in fields:
            if field in ("obs", "reached_obs"):
                for group, box in self.groups().items():
                    kinds = ("a floating", "an integer", "a bool")
                    if box.dtype == "uint8":
                        kinds = ("a torch.uint8",)
                    leaf = _Leaf([*batch, *box.shape], kinds, box, finite=True)
                    leaves[field + group] = leaf
            elif field in ("terminated", "truncated"):
                leaves[field] = _Leaf(batch, ("a bool",))
            elif field == "episode_length":
                leaves[field] = _Leaf(batch, ("an integer",))
            elif field != "action_mask":
                leaves[field] = _Leaf(batch, ("a floating",), finite=field == "reward")
            elif self.spaces.masked:
                leaves[field] = _Leaf([*batch, mask_size(self.spaces.action)], ("a bool",))
        return leaves


def flatten(fields: Mapping[str, object]) -> dict[str, Any]:
    """Every tensor by name, ``obs['group']`` where there are groups; ``None`` is skipped."""
    leaves: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            groups = cast(dict[str, object], value)
            leaves.update({f"{name}[{_text(group)}]": leaf for group, leaf in groups.items()})
        elif value is not None:
            leaves[name] = value
    return leaves


def fingerprint(leaves: Mapping[str, Tensor]) -> dict[str, int]:
    """A checksum of the bits of each tensor."""

    def checksum(leaf: Tensor) -> int:
        flat = leaf.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        return zlib.crc32(flat.view(torch.uint8).numpy().tobytes())

    return {name: checksum(leaf) for name, leaf in leaves.items()}


def where(bad: Bool[Tensor, " B"], value: Shaped[Tensor, " B"]) -> Words:
    """The first bad value and its environment, in words."""
    index = int(bad.int().argmax())
    return Words(f"{value[index].item()} in environment {index}")


def sample_action(
    space: ActionSpace,
    num_envs: int,
    mask: Bool[Tensor, "B K"] | None,
    generator: torch.Generator,
) -> Shaped[Tensor, "B *A"]:
    """Random allowed actions: uniform within finite bounds, normal without finite bounds."""
    if isinstance(space, Box):
        low, high = torch.tensor(space.lows), torch.tensor(space.highs)
        uniform = low + (high - low) * torch.rand(num_envs, space.size, generator=generator)
        normal = torch.randn(num_envs, space.size, generator=generator)
        action = torch.where(uniform.isfinite(), uniform, normal).clamp(low, high)
        return action.reshape(num_envs, *space.shape)
    allowed = torch.ones(num_envs, mask_size(space)) if mask is None else mask.float()
    if isinstance(space, FactoredDiscrete):
        return _sample_factored(space, allowed, generator)
    nvec = [space.n] if isinstance(space, Discrete) else list(space.nvec)
    parts = _split(allowed, nvec)
    action = torch.cat([part.multinomial(1, generator=generator) for part in parts], dim=1)
    return action if isinstance(space, MultiDiscrete) else action[:, 0]


def _sample_factored(
    space: FactoredDiscrete, allowed: Shaped[Tensor, "B K"], generator: torch.Generator
) -> Shaped[Tensor, "B A"]:
    """Samples of the first component, then of each other under the mask given the first."""
    choices: list[Tensor] = []
    for head, place in zip(space.heads, space.mask_slices, strict=True):
        part = allowed[:, place]
        if head.conditioned:
            given = part.reshape(len(part), space.heads[0].size, head.size)
            part = given[torch.arange(len(given)), choices[0]]
        choices.append(part.multinomial(1, generator=generator)[:, 0])
    return torch.stack(choices, dim=1)


def _check_form(
    got: object, leaf: _Leaf, device: torch.device, field: str, problems: Problems
) -> bool:
    if not isinstance(got, Tensor):
        rule = f"be {leaf.kinds[0]} tensor of shape {leaf.shape}"
        is_array = type(got).__module__ == "numpy"
        hint = "torch.as_tensor(array, device=device) makes one." if is_array else ""
        return problems.expect(False, field, rule, _describe(got), hint)
    is_dense = got.layout is torch.strided and not got.is_nested
    layout = Words("a nested tensor") if got.is_nested else got.layout
    if not problems.expect(is_dense, field, "be dense", layout):
        return False
    dtype = got.dtype
    if leaf.kinds == ("a torch.uint8",):
        kind = f"a {dtype}"
    elif dtype.is_floating_point:
        kind = "a floating"
    else:
        kind = {torch.bool: "a bool", torch.complex64: "", torch.complex128: ""}.get(
            dtype, "an integer"
        )
    shape_ok = problems.expect(
        list(got.shape) == leaf.shape, field, f"have shape {leaf.shape}", list(got.shape)
    )
    kind_ok = problems.expect(
        kind in leaf.kinds, field, f"have {' or '.join(leaf.kinds)} dtype", dtype
    )
    device_ok = problems.expect(got.device == device, field, f"be on {device}", Words(got.device))
    hint = "Step under torch.no_grad()."
    problems.expect(not got.requires_grad, field, "not require grad", True, hint)
    return shape_ok and kind_ok and device_ok


def _check_values(
    value: Tensor, leaf: _Leaf, field: str, problems: Problems, *, finite: bool
) -> None:
    flat = value.reshape(value.shape[0], -1)
    if leaf.finite and finite:
        _expect_everywhere(flat.isfinite(), flat, field, "be finite", problems)
    if leaf.box is not None:
        # Bounds are rounded like the observation itself.
        flat = flat if value.is_floating_point() else flat.double()
        low = torch.tensor(leaf.box.lows, dtype=flat.dtype)
        high = torch.tensor(leaf.box.highs, dtype=flat.dtype)
        outside = (flat < low) | (flat > high)
        if not finite:
            outside &= flat.isfinite()
        _expect_everywhere(~outside, flat, field, "lie within its Box", problems)


def _expect_everywhere(
    ok: Tensor, value: Tensor, field: str, rule: str, problems: Problems
) -> None:
    if bool(ok.all()):
        return
    environment, component = divmod(int((~ok).int().argmax()), value.shape[1])
    got = f"{value[environment, component].item()} in environment {environment}"
    many = value.shape[1] > 1
    problems.expect(False, field, rule, Words(got + (f", component {component}" if many else "")))


def _check_mask(mask: Tensor, space: ActionSpace, field: str, problems: Problems) -> None:
    for component, part in enumerate(_split(mask, list(mask_parts(space)))):
        stuck = ~part.any(dim=1)
        place = f"none in environment {int(stuck.int().argmax())}, component {component}"
        rule = "allow a choice for every component"
        problems.insist(not bool(stuck.any()), field, rule, Words(place))


def _split(mask: Tensor, nvec: list[int]) -> tuple[Tensor, ...]:
    return cast(tuple[Tensor, ...], mask.split(nvec, dim=1))  # pyright: ignore[reportUnknownMemberType]


def _describe(value: object) -> Words:
    if isinstance(value, Tensor):
        shape = "unknown shape" if value.is_nested else f"shape {list(value.shape)}"
        return Words(f"{value.dtype} of {shape}")
    if isinstance(value, dict):
        groups = sorted(map(_text, cast(dict[object, object], value)))
        return Words(f"groups [{', '.join(groups)}]")
    text = _text(value)
    return Words(text if len(text) <= 100 and "\n" not in text else f"a {type(value).__name__}")


def _text(value: object) -> str:
    """The ``repr`` of a value that may be of a user's class, whose ``__repr__`` may raise."""
    try:
        return repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"
