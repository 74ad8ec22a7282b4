"""Inspection of the results of an environment, call after call, against its contract.

``check_env`` inspects every step that it takes, and training inspects the first steps of a run, by
the same rules. Axes: ``B`` environment.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from esper_lightning.core.errors import Words, missing_members, require
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import kind, leaves, map_tree
from esper_lightning.core.types import Observation, StepResult
from esper_lightning.envs.base import BatchedEnv, EnvSpec, FunctionalEnv, spec_name
from esper_lightning.envs.contract import (
    Contract,
    Problems,
    Returned,
    fingerprint,
    where,
)

__all__ = [
    "ENV_MEMBERS",
    "FIRST_STEPS",
    "STATE_RULE",
    "FirstSteps",
    "Inspector",
    "check_built",
    "check_declared",
    "is_count",
    "refuse_unsavable",
    "require_members",
    "same_values",
    "unsavable",
]

ENV_MEMBERS = ("reset", "step", "state_dict", "load_state_dict")
TOLERANCE = 1e-4  # for the return of an episode, relative to the sum of absolute rewards
FIRST_STEPS = 8  # number of steps of a run that are inspected
STATE_RULE = "hold tensors only, by names"
_ADAPTERS = "Gymnasium(...) and Custom(...) adapt environments of Gymnasium's interface."


def require_members(owner: object, members: tuple[str, ...], problems: Problems) -> None:
    """Raise ``UncheckableError`` unless ``owner`` has all members."""
    missing = missing_members(owner, members)
    got = Words(f"{type(owner).__name__} without {', '.join(missing)}")
    hint = _ADAPTERS if hasattr(owner, "observation_space") else ""
    problems.insist(not missing, "members", f"be {', '.join(members)}", got, hint)


def check_declared(num_envs: object, spaces: object, problems: Problems) -> None:
    """Raise ``UncheckableError`` unless number and spaces of environments can be used."""
    problems.insist(isinstance(spaces, EnvSpaces), "spaces", "be an EnvSpaces", spaces)
    problems.insist(is_count(num_envs), "num_envs", "be an integer of at least 1", num_envs)


def is_count(value: object) -> bool:
    """Whether a value can be a number of environments."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_built(spec: EnvSpec, spaces: object, env: Any, problems: Problems) -> tuple[Any, Any]:
    """Compare number and spaces of a spec with those of the environment that it built.

    Returns:
        Number and spaces of the environment as built.
    """
    problems.insist(env is not None, "build()", "return an environment", env)
    require_members(env, ENV_MEMBERS, problems)
    num_envs = spec.num_envs
    built = getattr(env, "num_envs", num_envs)
    problems.expect(num_envs == built, "num_envs", f"equal {built}, as built", num_envs)
    shown = getattr(env, "spaces", spaces)
    problems.expect(spaces == shown, "spaces()", f"equal {shown}, as built", spaces)
    return built, shown


def unsavable(state: object) -> object:
    """What of an environment's ``state_dict()`` no checkpoint would give back.

    Returns:
        Names and types of the values that are not dense tensors, or the type of a state that is no
        mapping; an empty mapping where all can be saved.
    """
    if not isinstance(state, Mapping):
        return type(state).__name__
    return {
        name: Words(type(value).__name__)
        for name, value in cast(Mapping[Any, Any], state).items()
        if not (isinstance(name, str) and isinstance(value, Tensor) and not value.is_sparse)
    }


def refuse_unsavable(env: BatchedEnv) -> None:
    """Refuse environments whose state a checkpoint would not give back, before they train.

    Raises:
        ValueError: If the state of the environments is neither ``None`` nor tensors by names.
    """
    state: object = env.state_dict()
    others = unsavable({} if state is None else state)
    hint = "Return None if the state cannot be saved: a resumed run then begins new episodes."
    field = f"{type(env).__name__}.state_dict()"
    require(others == {}, field, STATE_RULE, others, hint)


@dataclass
class _Books:
    """Sums of rewards and lengths of the running episodes."""

    total: Tensor
    scale: Tensor
    length: Tensor


class Inspector:
    """Checks the results of an environment, call after call, against its contract.

    Args:
        contract: Rules for each single tensor.
        problems: List to which problems are added.
        finite: Whether numbers that are not finite are problems. Training finds such numbers by
            itself.

    Attributes:
        last: Result of the latest call.
        ends: Number of episodes that ended so far.
        reached_differs: Whether ``reached_obs`` ever differed from the observation after a reset.
    """

    def __init__(self, contract: Contract, problems: Problems, *, finite: bool = True) -> None:
        self._contract, self._problems, self._finite = contract, problems, finite
        self.last: Returned | None = None
        self.ends = 0
        self.reached_differs = False
        self._books: _Books | None = None  # unknown until a reset
        self._dtypes: dict[str, torch.dtype] = {}

    def begin(self, returned: object) -> None:
        """Inspect the result of ``reset()``.

        Raises:
            UncheckableError: If further calls cannot be inspected.
        """
        pair, kind = cast(tuple[object, object], returned), type(returned).__name__
        is_pair = isinstance(returned, tuple) and len(pair) == 2
        has_info = is_pair and issubclass(type(pair[1]), dict)
        got = Words("(obs, info)" if has_info else kind)
        hint = f"The mask is None without one. {_ADAPTERS}" if has_info else ""
        ok = is_pair and not has_info
        self._problems.insist(ok, "reset()", "return (obs, action_mask)", got, hint)
        self._inspect("reset()", {"obs": pair[0], "action_mask": pair[1]})
        zeros = torch.zeros(self._contract.num_envs, dtype=torch.float64)
        self._books = _Books(zeros, zeros, torch.zeros_like(zeros, dtype=torch.int64))

    def proceed(self, result: object) -> None:
        """Inspect the result of ``step()``, and whether the step wrote into the result before.

        Raises:
            UncheckableError: If further calls cannot be inspected.
        """
        fields = self._fields(result)
        self._check_kept()
        values = self._inspect("step()", fields).values
        self._check_ends(values)
        self._check_reached(values)

    def look(self, result: object) -> None:
        """Inspect each tensor of the result of ``step()`` by itself, whatever came before.

        Raises:
            UncheckableError: If a tensor is missing, or of another shape, kind or device.
        """
        self._inspect("step()", self._fields(result))

    def action_kept(self, before: Tensor, after: Tensor) -> None:
        """Check that a call did not change the action that it was given."""
        kept = torch.equal(after.cpu(), before.cpu())
        self._problems.expect(kept, "step().action", "be left as it was", Words("another"))

    def _fields(self, result: object) -> dict[str, object]:
        got, ok = Words(type(result).__name__), isinstance(result, StepResult)
        of_gymnasium = isinstance(result, tuple) and len(cast(tuple[Any, ...], result)) in (4, 5)
        hint = _ADAPTERS if of_gymnasium else ""
        self._problems.insist(ok, "step()", "return a StepResult", got, hint)
        return cast(StepResult, result)._asdict()

    def _inspect(self, call: str, fields: Mapping[str, object]) -> Returned:
        self.last = self._contract.inspect(call, fields, self._problems, finite=self._finite)
        for name, value in self.last.live.items():
            if name.startswith(("obs", "reached_obs")):
                first = self._dtypes.setdefault(name.removeprefix("reached_"), value.dtype)
                rule = f"keep the dtype {first} of the first observation"
                self._problems.expect(value.dtype == first, f"{call}.{name}", rule, value.dtype)
        return self.last

    def _check_kept(self) -> None:
        if self.last is None:
            return
        before, now = fingerprint(self.last.values), fingerprint(self.last.live)
        for name, value in now.items():
            kept = value == before[name]
            rule, got = "keep its values when stepped on", Words("others")
            hint = "Return a tensor that is not written to again."
            self._problems.expect(kept, f"{self.last.call}.{name}", rule, got, hint)

    def _check_ends(self, values: dict[str, Tensor]) -> None:
        """Check flags, and return and length of episodes that ended."""

        def expect(bad: Tensor, field: str, rule: str) -> None:
            ok = not bool(bad.any())
            self._problems.expect(ok, f"step().{field}", rule, where(bad, values[field]))

        terminated, truncated = values["terminated"], values["truncated"]
        expect(terminated & truncated, "truncated", "be False where terminated")
        ended = terminated | truncated
        got, steps = values["episode_return"].double(), values["episode_length"]
        expect(~ended & ~got.isnan(), "episode_return", "be NaN where no episode ended")
        expect(~ended & (steps != 0), "episode_length", "be 0 where no episode ended")
        if self._books is None:
            return
        reward = values["reward"].double()
        total = self._books.total + reward
        scale = self._books.scale + reward.abs()
        length = self._books.length + 1
        close = ((got - total).abs() <= TOLERANCE * (1 + scale)) | (got.isnan() & total.isnan())
        judged = ended if self._finite else ended & total.isfinite() & ~got.isinf()
        expect(judged & ~close, "episode_return", "be the sum of the episode's rewards")
        expect(ended & (steps != length), "episode_length", "count the episode's steps")
        self._books.total = total.masked_fill(ended, 0.0)
        self._books.scale = scale.masked_fill(ended, 0.0)
        self._books.length = length.masked_fill(ended, 0)

    def _check_reached(self, values: dict[str, Tensor]) -> None:
        ended = values["terminated"] | values["truncated"]
        self.ends += int(ended.sum())
        for group in self._contract.groups():
            obs, reached = values[f"obs{group}"], values[f"reached_obs{group}"]
            same = (obs == reached) | (obs.isnan() & reached.isnan())
            if not self._finite:  # training reports numbers that are not finite by itself
                same |= ~(obs.isfinite() & reached.isfinite())
            differs = ~same.flatten(1).all(dim=1)
            bad = differs & ~ended
            got = Words(f"another in environment {int(bad.int().argmax())}")
            rule = f"equal obs{group} where no episode ended"
            field = f"step().reached_obs{group}"
            self._problems.expect(not bool(bad.any()), field, rule, got)
            self.reached_differs |= bool((differs & ended).any())


class FirstSteps:
    """The environment of a run, whose first steps are checked against the contract.

    Later results cost a look at their shapes and dtypes: torch would repeat a reward of
    shape ``[1]`` for every environment without a word.

    Args:
        spec: Spec of the environment, whose class names the environment in errors.
        spaces: Spaces of the spec.
        env: Object that the spec built, which may turn out not to be an environment.
        device: Device of the run, on which the results must be.
        steps: Number of steps to inspect; with 0, only the form of results is.

    Attributes:
        owner: Name of the environment in errors.
        spaces: Spaces of the spec.
        left: Number of steps that are still to be inspected.

    Raises:
        ValueError: If the environment, or a result of it, breaks the contract; one line for each
            broken rule.
    """

    def __init__(
        self,
        spec: EnvSpec,
        spaces: EnvSpaces,
        env: Any,
        device: torch.device,
        *,
        steps: int = FIRST_STEPS,
    ) -> None:
        self.owner, self.spaces, self.left = spec_name(spec), spaces, steps
        self._env, self._problems = env, Problems(self.owner)
        self._kind: Hashable = None  # of results that fit the contract
        place = torch.empty(0, device=device).device  # with its index
        contract = Contract(spaces, spec.num_envs, place)
        self._inspector = Inspector(contract, self._problems, finite=False)
        with self._problems.raise_at_end():
            check_built(spec, spaces, env, self._problems)

    def reset(self) -> tuple[Observation, Tensor | None]:
        """Start a new episode everywhere."""
        returned = self._env.reset()
        if self.left > 0:
            with self._problems.raise_at_end():
                self._inspector.begin(returned)
        return returned

    def step(self, action: Tensor) -> StepResult:
        """Act in every environment."""
        if self.left == 0:
            result = self._env.step(action)
            if not self._is_of_known_kind(result):
                with self._problems.raise_at_end():
                    self._inspector.look(result)
                self._kind = kind(result)
            return result
        given = action.clone()
        result = self._env.step(action)
        with self._problems.raise_at_end():
            self._inspector.action_kept(given, action)
            self._judge(result)
        return result

    def rehearse(self, episodes: Any, action: Tensor, drawn: Any) -> tuple[Any, StepResult]:
        """``transition`` of a functional environment; raises if it changes its arguments."""
        env, given = cast(FunctionalEnv, self._env), map_tree(torch.clone, (episodes, action))
        returned = cast(object, env.transition(episodes, action, drawn))
        with self._problems.raise_at_end():
            got = Words(type(returned).__name__)
            is_pair = isinstance(returned, tuple) and len(cast(tuple[Any, ...], returned)) == 2
            rule = "return (episodes, StepResult)"
            self._problems.insist(is_pair, "transition()", rule, got)
            got = Words("other episodes() after it")
            kept = same_values(given[0], episodes)
            self._problems.expect(kept, "transition()", "change nothing", got)
            self._inspector.action_kept(given[1], action)
            self._judge(cast(tuple[Any, Any], returned)[1])
        return cast(tuple[Any, StepResult], returned)

    def _judge(self, result: object) -> None:
        self._inspector.proceed(result)
        self._kind = kind(result)
        self.left -= 1

    def _is_of_known_kind(self, result: object) -> bool:
        try:
            return kind(result) == self._kind
        except (ValueError, RuntimeError):  # no tensor, or a nested one: it is then named
            return False


def same_values(tree: Any, other: Any) -> bool:
    """Whether two trees hold equal tensors; NaN equals NaN."""
    pairs = zip(leaves(tree), leaves(other), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
