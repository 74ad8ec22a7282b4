"""Does an environment keep the contract that training relies on? Random actions tell.

All comparing happens on the CPU, between the steps. It cannot tell whether the physics are right,
nor what happens later than it looked.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import leaves, map_tree
from esper_lightning.core.types import StepResult
from esper_lightning.core.validate import require
from esper_lightning.envs.base import BatchedEnv, EnvSpec, FunctionalEnv, is_functional
from esper_lightning.envs.contract import (
    Contract,
    Report,
    Returned,
    UncheckableError,
    Words,
    fingerprint,
    flatten,
    sample_action,
    where,
)

__all__ = ["check_env"]

logger = logging.getLogger(__name__)

ENV_MEMBERS = ("reset", "step", "state_dict", "load_state_dict")
TELLING_MEMBERS = ("num_envs", "spaces")  # what a spec tells, and else the environment must
TRANSITION_STEPS = 100
WARM_UP_STEPS = 3  # may compile and allocate, hence synchronise
TOLERANCE = 1e-4  # of an episode's return, relative to the sum of its absolute rewards

_Trajectory = list[dict[str, int]]
"""Fingerprint of every tensor, for every step."""


def check_env(
    env: BatchedEnv | EnvSpec,
    *,
    steps: int = 600,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> None:
    """Drive an environment with random allowed actions; compare all it returns with the contract.

    It takes about ``3 * steps`` steps (``6 * steps`` for a spec) and leaves the environment
    elsewhere than it was. Only where episodes end within ``steps`` is resetting checked; a warning
    is logged if none did.

    Args:
        env: A spec: then what it builds is checked, and its seeds. Or an environment, which must
            then tell its ``num_envs`` and ``spaces``, as ours do.
        steps: How long to drive; the default outlasts a time limit of 500.
        seed: Of the actions, and of the environments that a spec builds.
        device: Where a spec is built; an environment is checked where it lives.

    Raises:
        ValueError: If it breaks the contract; one line for each way in which it does. What the
            environment itself raises passes through.
    """
    require(steps >= 1, "check_env.steps", "be at least 1", steps)
    report = Report(type(env).__name__)
    try:
        if hasattr(env, "build"):
            _require_members(env, ("num_envs", "spaces", "build"), report)
            place = torch.empty(0, device=device).device  # with its index
            _check_spec(cast(EnvSpec, env), report, steps, seed, place)
        else:
            _require_members(env, TELLING_MEMBERS + ENV_MEMBERS, report)
            num_envs, spaces = (getattr(env, name) for name in TELLING_MEMBERS)
            _check_env(cast(BatchedEnv, env), num_envs, spaces, report, steps, seed, None)
    except UncheckableError:
        pass
    report.raise_if_any()


class _Run(NamedTuple):
    """What is checked, against what, for how long."""

    env: BatchedEnv
    contract: Contract
    report: Report
    steps: int
    seed: int


def _check_spec(spec: EnvSpec, report: Report, steps: int, seed: int, device: torch.device) -> None:
    env = spec.build(device, seed)
    _require_members(env, ENV_MEMBERS, report)
    num_envs, spaces = spec.num_envs, spec.spaces()
    built = getattr(env, "num_envs", num_envs)
    report.expect(num_envs == built, "num_envs", f"equal {built}, as built", num_envs)
    shown = getattr(env, "spaces", spaces)
    report.expect(spaces == shown, "spaces()", f"equal {shown}, as built", spaces)
    run = _check_env(env, built, shown, report, steps, seed, device)

    def trajectory(env_seed: int) -> tuple[_Trajectory, bool]:
        env = spec.build(device, env_seed)
        obs, mask = env.reset()
        start = flatten({"obs": obs})
        random_start = any(bool((leaf != leaf[:1]).any()) for leaf in start.values())
        return [fingerprint(start), *_trajectory(run._replace(env=env), mask)], random_start

    first, random_start = trajectory(seed)
    again, _ = trajectory(seed)
    hint = "Draw all randomness from one generator, seeded in build()."
    got = _first_difference(first, again)
    report.expect(got is None, "build().seed", "decide everything", got, hint)
    # Where every episode starts alike there may be no randomness for a seed to decide.
    same = first == trajectory(seed + 1)[0] if random_start else False
    got = Words(f"one trajectory for the seeds {seed} and {seed + 1}")
    report.expect(not same, "build().seed", "make a difference", got, hint)


def _check_env(
    env: BatchedEnv,
    num_envs: Any,
    spaces: Any,
    report: Report,
    steps: int,
    seed: int,
    device: torch.device | None,
) -> _Run:
    report.insist(isinstance(spaces, EnvSpaces), "spaces", "be an EnvSpaces", spaces)
    is_int = isinstance(num_envs, int) and not isinstance(num_envs, bool) and num_envs >= 1
    report.insist(is_int, "num_envs", "be an integer of at least 1", num_envs)
    if device is None:
        found = flatten(_start(env, report)).values()
        devices = [leaf.device for leaf in found if isinstance(leaf, Tensor)]
        device = devices[0] if devices else torch.device("cpu")
    run = _Run(env, Contract(spaces, num_envs, device), report, steps, seed)
    generator = torch.Generator().manual_seed(seed)
    seen = _Seen()
    _drive(run._replace(steps=WARM_UP_STEPS), generator, seen, forbid_sync=False)
    # Again, so that one reset falls within episodes.
    mask = _drive(run, generator, seen, forbid_sync=True)
    seen.conclude(run)
    _check_state(run, mask)
    if is_functional(env):
        _check_transition(run._replace(env=env))
    return run


def _check_transition(run: _Run) -> None:
    """``step`` must be ``transition`` of what ``draw`` gives, and ``transition`` change nothing."""
    env, contract, report = cast(FunctionalEnv, run.env), run.contract, run.report
    generator = torch.Generator().manual_seed(run.seed)
    mask = cast(Tensor | None, _start(env, report)["action_mask"])
    if env.state_dict() is None:  # it cannot be taken back to before a step
        return
    for _ in range(min(run.steps, TRANSITION_STEPS)):
        allowed = None if mask is None else mask.cpu()
        action = sample_action(contract.spaces.action, contract.num_envs, allowed, generator)
        action = action.to(contract.device)
        saved, before = env.state_dict(), map_tree(torch.clone, env.episodes())
        assert saved is not None
        drawn = map_tree(lambda rows: rows[0], env.draw(1))
        after, pure = env.transition(env.episodes(), action, drawn)
        after, pure = map_tree(torch.clone, (after, tuple(pure)))
        kept = _same(before, env.episodes())
        report.expect(kept, "transition()", "change nothing", Words("other episodes() after it"))
        env.load_state_dict(saved)
        result = env.step(action)
        hint = "step(action) is transition(episodes(), action, draw(1)[0]), then keep()."
        same = _same(pure, tuple(result)) and _same(after, env.episodes())
        report.insist(same, "transition()", "do what step() does", Words("something else"), hint)
        mask = result.action_mask


def _same(tree: Any, other: Any) -> bool:
    pairs = zip(leaves(tree), leaves(other), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _require_members(owner: object, members: tuple[str, ...], report: Report) -> None:
    missing = [name for name in members if not hasattr(owner, name)]
    got = Words(f"{type(owner).__name__} without {', '.join(missing)}")
    report.insist(not missing, "members", f"be {', '.join(members)}", got)


def _start(env: BatchedEnv, report: Report) -> dict[str, object]:
    start = cast(tuple[object, object], env.reset())
    got = Words(type(start).__name__)
    is_pair = isinstance(start, tuple) and len(start) == 2  # pyright: ignore[reportUnnecessaryIsInstance]
    report.insist(is_pair, "reset()", "return (obs, action_mask)", got)
    return {"obs": start[0], "action_mask": start[1]}


@dataclass
class _Seen:
    """What only a whole drive can show."""

    ends: int = 0
    reached_differs: bool = False  # from the observation after a reset
    obs_moves: bool = False
    envs_differ: bool = False

    def conclude(self, run: _Run) -> None:
        """Judge what was seen in ``run.steps`` steps."""
        report = run.report
        if self.ends == 0:
            message = "%s: no episode ended within %d steps, so resetting was not checked."
            logger.warning(message, report.owner, run.steps)
        if run.contract.num_envs > 1 and not self.envs_differ:
            message = "%s: all environments looked alike under random actions, step after step."
            logger.warning(message, report.owner)
        copied = self.ends > 0 and self.obs_moves and not self.reached_differs
        rule = "be what the last action led to, where an episode ended"
        got = Words(f"the observation after the reset at each of {self.ends} ends")
        report.expect(not copied, "step().reached_obs", rule, got, "Observe before the reset.")


@dataclass
class _Books:
    """The running episodes, as their rewards tell."""

    total: Tensor
    scale: Tensor
    length: Tensor


def _drive(
    run: _Run, generator: torch.Generator, seen: _Seen, *, forbid_sync: bool
) -> Tensor | None:
    """Reset, then check every step; returns the last action mask."""
    env, contract, report, steps, _ = run
    last = contract.inspect("reset()", _start(env, report), report)
    start = {name: value for name, value in last.values.items() if name != "action_mask"}
    zeros = torch.zeros(contract.num_envs, dtype=torch.float64)
    books = _Books(zeros, zeros, torch.zeros(contract.num_envs, dtype=torch.int64))
    for _ in range(steps):
        mask = last.values.get("action_mask")
        action = sample_action(contract.spaces.action, contract.num_envs, mask, generator)
        given = action.to(contract.device, copy=True)
        result = _step(env, given, report, contract.device, forbid_sync=forbid_sync)
        unchanged = torch.equal(given.cpu(), action)
        report.expect(unchanged, "step().action", "be left as it was", Words("another"))
        _check_kept(last, report)
        last = contract.inspect("step()", result._asdict(), report)
        _check_ends(last.values, books, report)
        _check_reached(last.values, list(contract.groups()), report, seen)
        for name, value in start.items():
            seen.obs_moves |= not torch.equal(last.values[name], value)
            seen.envs_differ |= bool((last.values[name] != last.values[name][:1]).any())
    return last.live.get("action_mask")


def _step(
    env: BatchedEnv, action: Tensor, report: Report, device: torch.device, *, forbid_sync: bool
) -> StepResult:
    with _sync_is_error(forbid_sync and device.type == "cuda"):
        try:
            result = cast(object, env.step(action))
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            rule = "not wait for the device"
            hint = "torch.cuda.set_sync_debug_mode('error') shows where."
            report.insist(False, "step()", rule, Words(error), hint)
            raise
    got = Words(type(result).__name__)
    report.insist(isinstance(result, StepResult), "step()", "return a StepResult", got)
    return cast(StepResult, result)


@contextmanager
def _sync_is_error(active: bool) -> Generator[None, None, None]:
    if not active:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _check_kept(returned: Returned, report: Report) -> None:
    before, now = fingerprint(returned.values), fingerprint(returned.live)
    for name, value in now.items():
        kept = value == before[name]
        rule, got = "keep its values when stepped on", Words("others")
        hint = "Return a tensor that is not written to again."
        report.expect(kept, f"{returned.call}.{name}", rule, got, hint)


def _check_ends(values: dict[str, Tensor], books: _Books, report: Report) -> None:
    """Flags, and the return and length of episodes that ended."""

    def expect(bad: Tensor, field: str, rule: str) -> None:
        report.expect(not bool(bad.any()), f"step().{field}", rule, where(bad, values[field]))

    terminated, truncated = values["terminated"], values["truncated"]
    expect(terminated & truncated, "truncated", "be False where terminated")
    ended = terminated | truncated
    reward = values["reward"].double()
    total, scale = books.total + reward, books.scale + reward.abs()
    length = books.length + 1
    got = values["episode_return"].double()
    expect(~ended & ~got.isnan(), "episode_return", "be NaN where no episode ended")
    close = ((got - total).abs() <= TOLERANCE * (1 + scale)) | (got.isnan() & total.isnan())
    expect(ended & ~close, "episode_return", "be the sum of the episode's rewards")
    steps = values["episode_length"]
    expect(~ended & (steps != 0), "episode_length", "be 0 where no episode ended")
    expect(ended & (steps != length), "episode_length", "count the episode's steps")
    books.total = total.masked_fill(ended, 0.0)
    books.scale = scale.masked_fill(ended, 0.0)
    books.length = length.masked_fill(ended, 0)


def _check_reached(
    values: dict[str, Tensor], groups: list[str], report: Report, seen: _Seen
) -> None:
    ended = values["terminated"] | values["truncated"]
    seen.ends += int(ended.sum())
    for group in groups:
        obs, reached = values[f"obs{group}"], values[f"reached_obs{group}"]
        same = (obs == reached) | (obs.isnan() & reached.isnan())
        differs = ~same.flatten(1).all(dim=1)
        bad = differs & ~ended
        got = Words(f"another in environment {int(bad.int().argmax())}")
        rule = f"equal obs{group} where no episode ended"
        report.expect(not bool(bad.any()), f"step().reached_obs{group}", rule, got)
        seen.reached_differs |= bool((differs & ended).any())


def _check_state(run: _Run, mask: Tensor | None) -> None:
    """Saving and loading: copies, bit for bit, and no state of another size."""
    env, contract, report, *_ = run
    saved = env.state_dict()
    if saved is None:
        return
    others = {name: type(value) for name, value in saved.items() if not isinstance(value, Tensor)}  # pyright: ignore[reportUnnecessaryIsInstance]
    report.insist(not others, "state_dict()", "hold tensors only", others)
    before = fingerprint(saved)
    first = _trajectory(run, mask)
    kept = fingerprint(saved) == before
    report.insist(kept, "state_dict()", "return copies", Words("what later steps change"))
    env.load_state_dict(saved)
    got = _first_difference(first, _trajectory(run, mask))
    hint = "Save all that decides the future, the generator too."
    report.expect(got is None, "load_state_dict()", "continue bit for bit", got, hint)
    kept = fingerprint(saved) == before
    report.insist(kept, "load_state_dict()", "copy", Words("a state that later steps change"))
    smaller = {
        name: value[:-1] if value.shape[:1] == (contract.num_envs,) else value
        for name, value in saved.items()
    }
    got = _error_of(lambda: env.load_state_dict(smaller))
    rule = "raise ValueError for a state of another size"
    report.expect(got is ValueError, "load_state_dict()", rule, got)


def _error_of(function: Callable[[], None]) -> type[Exception] | None:
    try:
        function()
    except Exception as error:  # its type is what is asked for
        return type(error)
    return None


def _trajectory(run: _Run, mask: Tensor | None) -> _Trajectory:
    env, contract, _, steps, seed = run
    generator = torch.Generator().manual_seed(seed)
    trajectory: _Trajectory = []
    for _ in range(steps):
        allowed = None if mask is None else mask.cpu()
        action = sample_action(contract.spaces.action, contract.num_envs, allowed, generator)
        result = env.step(action.to(contract.device))
        mask = result.action_mask
        trajectory.append(fingerprint(flatten(result._asdict())))
    return trajectory


def _first_difference(first: _Trajectory, second: _Trajectory) -> Words | None:
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        if one != other:
            names = [name for name in one if one[name] != other.get(name)]
            return Words(f"another {', '.join(names)} in step {step}")
    return None
