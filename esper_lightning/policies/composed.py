"""Policies around a network of the user's own, which an import path names.

Axes: ``M`` sample, ``*O`` observation, ``H`` feature.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from esper_lightning.core.errors import Words, check_fields, require
from esper_lightning.core.imports import import_object
from esper_lightning.core.spaces import Box, EnvSpaces, ObsSpace
from esper_lightning.core.tensor_trees import map_obs
from esper_lightning.core.types import Observation
from esper_lightning.policies.actor_critic import build_actor_critic
from esper_lightning.policies.base import Policy, PolicySpec
from esper_lightning.policies.encoders import Encoder, EncoderSpec, with_hidden_layers
from esper_lightning.policies.layers import Activation, check_std, check_widest

__all__ = ["Composed", "Imported"]


@dataclass(frozen=True, kw_only=True)
class Composed(PolicySpec):
    """A network of your own for actor and critic, without memory.

    ``encoder`` names a function or class. It is called with the observation space, which is a
    ``Box`` or a dict of boxes by group, and with ``encoder_args``. It must return a module from
    observations ``[M, *O]``, which are a tensor or a dict of tensors by group, to float32 features
    ``[M, H]``. The features of a row must not depend on other rows. Compiled code reads attributes
    of the module once in a run: a temperature that a callback changes must be a buffer, which the
    callback changes in place. During the call of ``encoder`` torch's default generator is seeded
    from the seed of the run.

    Attributes:
        encoder: Function or class that builds the network, as ``package.module:name``; or an
            encoder spec, such as ``Groups(encoders={"image": Image(), "speed": Flat()})``.
        encoder_args: Keyword arguments of ``encoder`` besides the observation space.
        critic_encoder: Encoder of the critic, as ``encoder``, where it sees other groups than the
            actor or sees them through another network. ``None`` means the same as ``encoder``.
        hidden_sizes: Width of each hidden layer behind the network. An empty list means no such
            layer.
        activation: Nonlinearity after each of these hidden layers.
        trunk: Whether actor and critic share network and hidden layers (``shared``) or have their
            own (``separate``).
        action_bounds: Way to keep continuous actions within a bounded action space: ``clip`` cuts
            sampled actions at the bounds, ``tanh`` squashes the distribution into the bounds.
        initial_std: Standard deviation of continuous actions at the start, in units where the
            bounds are -1 and 1.
    """

    encoder: str | EncoderSpec
    encoder_args: dict[str, Any] = field(default_factory=dict[str, Any])
    critic_encoder: str | EncoderSpec | None = None
    hidden_sizes: tuple[int, ...] = ()
    activation: Activation = "tanh"
    trunk: Literal["separate", "shared"] = "shared"
    action_bounds: Literal["clip", "tanh"] = "clip"
    initial_std: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("encoder", "critic_encoder"):
            given: object = getattr(self, name)
            if isinstance(given, str):
                _check_path(f"Composed.{name}", given)
                continue
            ok = isinstance(given, EncoderSpec) or (given is None and name == "critic_encoder")
            require(ok, f"Composed.{name}", "be an import path or an encoder spec", given)
        named = isinstance(self.encoder, str) or isinstance(self.critic_encoder, str)
        rule = "be empty for encoder specs, which have settings of their own"
        require(named or not self.encoder_args, "Composed.encoder_args", rule, self.encoder_args)
        alike = self.trunk == "separate" or self.critic_encoder is None
        rule = "be None for a shared trunk"
        require(alike, "Composed.critic_encoder", rule, self.critic_encoder)
        ok = min(self.hidden_sizes, default=1) >= 1
        require(ok, "Composed.hidden_sizes", "be widths of at least 1", self.hidden_sizes)
        check_widest("Composed.hidden_sizes", *self.hidden_sizes)
        check_std("Composed", self.initial_std)

    @staticmethod
    def of(encoder: Callable[..., nn.Module], **settings: Any) -> "Composed":
        """The spec of a function or class that builds a network.

        Args:
            encoder: Function or class at the top of a module; its import path is stored.
            **settings: Other settings of ``Composed``.

        Raises:
            ValueError: If ``encoder`` cannot be imported by its name.
        """
        return Composed(encoder=_path_of("Composed.encoder", encoder), **settings)

    def build(self, spaces: EnvSpaces, generator: torch.Generator) -> Policy:
        """Build the policy on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If the encoder cannot be imported, builds no module, or returns other
                features than it must; if no head fits the action space.
        """
        actor = critic = self._encoder("encoder", spaces.obs, generator)
        if self.trunk == "separate":
            own = "encoder" if self.critic_encoder is None else "critic_encoder"
            critic = self._encoder(own, spaces.obs, generator)
        return build_actor_critic(
            actor,
            critic,
            spaces.action,
            owner="Composed",
            action_bounds=self.action_bounds,
            initial_std=self.initial_std,
            generator=generator,
        )

    def _encoder(self, field: str, space: ObsSpace, generator: torch.Generator) -> Encoder:
        spec: str | EncoderSpec = getattr(self, field)
        if isinstance(spec, str):
            args = self.encoder_args
            own = _ImportedEncoder(f"Composed.{field}", spec, args, space, generator)
        else:
            own = spec.build_encoder(space, generator)
        return with_hidden_layers(
            own, self.hidden_sizes, activation=self.activation, generator=generator
        )


@dataclass(frozen=True, kw_only=True)
class Imported(EncoderSpec):
    """A network of your own, for ``Recurrent(encoder=Imported(path=...))``.

    ``path`` names a function or class. It is called with the observation space, which is a ``Box``
    or a dict of boxes by group, and with ``args``. It must return a module from observations ``[M,
    *O]``, which are a tensor or a dict of tensors by group, to float32 features ``[M, H]``. The
    features of a row must not depend on other rows.

    Attributes:
        path: Function or class that builds the network, as ``package.module:name``.
        args: Keyword arguments of that function or class besides the observation space.
    """

    path: str
    args: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        check_fields(self)
        _check_path("Imported.path", self.path)

    def build_encoder(self, space: ObsSpace, generator: torch.Generator) -> Encoder:
        """Build the encoder on the CPU; ``generator`` is the only source of randomness.

        Raises:
            ValueError: If ``path`` cannot be imported, builds no module, or its features are not
                what they must be.
        """
        return _ImportedEncoder("Imported.path", self.path, self.args, space, generator)


class _ImportedEncoder(Encoder):
    """A module of the user's own, which is checked once on random observations.

    Args:
        setting: Name of the setting, for errors.
        path: Import path of the function or class that builds the module.
        args: Keyword arguments of that function or class besides the observation space.
        space: Observation space.
        generator: Source of the seed with which the module is built.
    """

    def __init__(
        self,
        setting: str,
        path: str,
        args: dict[str, Any],
        space: ObsSpace,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        seed = torch.randint(2**62, (), generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            try:
                network = import_object(path)(space, **args)
            except Exception as error:  # whatever the user's code raises
                rule = "build a torch.nn.Module from an observation space and its arguments"
                raise _failed(setting, rule, path, error) from error
            rule = "build a torch.nn.Module"
            require(isinstance(network, nn.Module), setting, rule, network)
            self.network = cast(nn.Module, network)
            self.features = _check_features(setting, path, self.network, space)

    def forward(self, obs: Observation) -> Tensor:
        """Features of each row."""
        return self.network(obs)


def _path_of(setting: str, function: Callable[..., nn.Module]) -> str:
    """The import path of a function or class.

    Raises:
        ValueError: If it cannot be imported by its name.
    """
    path = f"{function.__module__}:{getattr(function, '__qualname__', '')}"
    try:
        found = import_object(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    rule = "be a function or class that can be imported by its name"
    require(found is function, setting, rule, path, "Define it at the top of a module.")
    return path


def _check_path(setting: str, path: str) -> None:
    ok = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*[.:][^\W\d]\w*(\.[^\W\d]\w*)*", path) is not None
    require(ok, setting, "name a function or class as package.module:name", path)


def _failed(setting: str, rule: str, path: str, error: Exception) -> ValueError:
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{setting} must {rule}, got {path!r}. {said}")


def _check_features(setting: str, path: str, network: nn.Module, space: ObsSpace) -> int:
    """Number of features ``H`` of a network, found with random observations.

    Args:
        setting: Name of the setting, for errors.
        path: Import path of the network, for errors.
        network: Module to check.
        space: Observation space.

    Raises:
        ValueError: If features are not float32 ``[M, H]``, or those of a row depend on other rows.
    """
    generator = torch.Generator().manual_seed(0)
    boxes = {"": space} if isinstance(space, Box) else space
    groups = {name: _random_rows(box, generator) for name, box in boxes.items()}
    obs = groups[""] if isinstance(space, Box) else groups
    rule = "map observations [M, *O] to float32 features [M, H]"
    results: list[Tensor] = []
    for rows in (3, 2):

        def head(group: Tensor, rows: int = rows) -> Tensor:
            return group[:rows]

        try:
            with torch.no_grad():
                result = network(map_obs(head, obs))
        except Exception as error:  # whatever the user's code raises
            raise _failed(setting, rule, path, error) from error
        what = type(result).__name__
        if isinstance(result, Tensor):
            what = f"{list(result.shape)} of {result.dtype} for {rows} rows"
            ok = result.dim() == 2 and len(result) == rows and result.shape[1] > 0
            if ok and result.dtype == torch.float32:
                results.append(result)
                continue
        require(False, setting, rule, Words(what))
    more, fewer = results
    alike = more.shape[1] == fewer.shape[1] and torch.allclose(more[:2], fewer, 1e-3, 1e-4)
    hint = "Batch normalisation and dropout are not possible: acting and learning would differ."
    rule = "give a row the same features in every batch"
    require(alike, setting, rule, Words("others for 2 rows than for 3"), hint)
    return more.shape[1]


def _random_rows(box: Box, generator: torch.Generator) -> Tensor:
    rows = torch.randn(3, *box.shape, generator=generator)
    if not box.bounded:
        return rows
    low, high = torch.tensor(box.lows), torch.tensor(box.highs)
    return (low + (high - low) * rows.flatten(1).sigmoid()).view(rows.shape)
