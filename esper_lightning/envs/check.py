"""Check that an environment obeys the contract that training relies on, with random actions.

All comparisons happen on the CPU, between the steps. The check cannot see whether the physics are
right, nor what happens after its last step.
"""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.buffer import memory_bytes, rollout_bytes
from esper_lightning.core.errors import Words, at_least, check_arguments, require
from esper_lightning.core.seeding import require_torch_defaults
from esper_lightning.core.spaces import EnvSpaces
from esper_lightning.core.tensor_trees import map_tree, named_tensors
from esper_lightning.envs.base import (
    BatchedEnv,
    EnvSpec,
    FunctionalEnv,
    RunProgress,
    close_env,
    is_functional,
    reseed_env,
    spec_name,
)
from esper_lightning.envs.contract import (
    Contract,
    Problems,
    UncheckableError,
    fingerprint,
    flatten,
    sample_action,
)
from esper_lightning.envs.inspector import (
    ENV_MEMBERS,
    STATE_RULE,
    Inspector,
    check_built,
    check_declared,
    is_count,
    require_members,
    same_values,
    unsavable,
)

__all__ = ["check_env"]

logger = logging.getLogger(__name__)

DECLARED_MEMBERS = ("num_envs", "spaces")  # members of a spec; without a spec, of the environment
TRANSITION_STEPS = 100
WARM_UP_STEPS = 3  # may compile and allocate, hence synchronise
_ENDS_IN_A_ROW = 20  # after which an environment is taken for one that begins no new episode

_Trajectory = list[dict[str, int]]
"""Fingerprint of every tensor, for every step."""


@check_arguments
def check_env(
    env: BatchedEnv | EnvSpec,
    *,
    steps: int = 600,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> None:
    """Step an environment with random allowed actions, and compare its results with the contract.

    The check takes about ``3 * steps`` steps (``6 * steps`` for a spec) and does not restore the
    state of the environment. Resetting is checked only where episodes end within ``steps``; a
    warning is logged if no episode ended.

    Args:
        env: A spec, whose environments and seeds are checked; or an environment, which must then
            have the members ``num_envs`` and ``spaces``, like the environments of this package.
        steps: Number of steps of a trajectory; the default outlasts a time limit of 500.
        seed: Seed of the actions, and of the environments that a spec builds.
        device: Device on which a spec is built; an environment is checked on its own device.

    Raises:
        ValueError: If the environment breaks the contract; one line for each broken rule. Errors
            that the environment itself raises pass through.
    """
    if isinstance(env, type):
        rule = "be a spec or an environment, not a class"
        require(False, "check_env.env", rule, Words(env.__name__), f"Give {env.__name__}().")
    at_least("check_env.steps", steps, 1)
    at_least("check_env.seed", seed, 0)
    require_torch_defaults("check_env")
    problems = Problems(spec_name(env))
    try:
        if hasattr(env, "build"):
            require_members(env, ("num_envs", "spaces", "build"), problems)
            _check_spec(cast(EnvSpec, env), problems, steps, seed, _place(device))
        else:
            require_members(env, DECLARED_MEMBERS + ENV_MEMBERS, problems)
            num_envs, spaces = (getattr(env, name) for name in DECLARED_MEMBERS)
            _check_env(cast(BatchedEnv, env), num_envs, spaces, problems, steps, seed, None)
    except UncheckableError:
        pass
    problems.raise_if_any()


def _place(device: str | torch.device) -> torch.device:
    """The device, with its index.

    Raises:
        ValueError: If this machine has no such device.
    """
    rule, reason = "be a device of this machine", ""
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        place, reason = torch.device("meta"), str(error).splitlines()[0]
    require(place.type != "meta", "check_env.device", rule, str(device), reason)
    return place


class _Run(NamedTuple):
    """The environment to check, its contract, and the number of steps."""

    env: BatchedEnv
    contract: Contract
    problems: Problems
    steps: int
    seed: int


def _refuse_huge(
    num_envs: object, spaces: object, problems: Problems, device: torch.device
) -> None:
    """Give up where what a step returns does not fit into the memory; nothing is built then."""
    if is_count(num_envs) and isinstance(spaces, EnvSpaces):
        memory = memory_bytes(device)
        taken = rollout_bytes(spaces, 1, cast(int, num_envs))
        rule = f"give steps that fit into the memory, {memory / 1e9:.0f} GB"
        got = Words(f"{num_envs}, which take {taken / 1e9:,.0f} GB each")
        problems.insist(taken <= memory, "num_envs", rule, got)


def _check_spec(
    spec: EnvSpec, problems: Problems, steps: int, seed: int, device: torch.device
) -> None:
    spaces = spec.spaces()
    _refuse_huge(spec.num_envs, spaces, problems, device)
    env = spec.build(device, seed)
    try:
        _check_built_spec(spec, env, problems, steps, seed, device)
    finally:
        close_env(spec, env)


def _check_built_spec(
    spec: EnvSpec, env: BatchedEnv, problems: Problems, steps: int, seed: int, device: torch.device
) -> None:
    built, shown = check_built(spec, spec.spaces(), env, problems)
    run = _check_env(env, built, shown, problems, steps, seed, device)

    def trajectory(env_seed: int) -> tuple[_Trajectory, bool]:
        env = spec.build(device, env_seed)
        try:
            obs, mask = env.reset()
            start = flatten({"obs": obs})
            random_start = any(bool((leaf != leaf[:1]).any()) for leaf in start.values())
            return [fingerprint(start), *_trajectory(run._replace(env=env), mask)], random_start
        finally:
            close_env(spec, env)

    if getattr(spec, "shared", False) and not reseed_env(env, seed):
        return  # one simulator, whose random numbers cannot be repeated
    first, random_start = trajectory(seed)
    again, _ = trajectory(seed)
    hint = "Sample all random numbers from one generator, seeded in build()."
    got = _first_difference(first, again)
    problems.expect(got is None, "build().seed", "decide everything", got, hint)
    # Where every episode starts alike there may be no random numbers that a seed could decide.
    same = first == trajectory(seed + 1)[0] if random_start else False
    got = Words(f"one trajectory for the seeds {seed} and {seed + 1}")
    problems.expect(not same, "build().seed", "make a difference", got, hint)


def _check_env(
    env: BatchedEnv,
    num_envs: Any,
    spaces: Any,
    problems: Problems,
    steps: int,
    seed: int,
    device: torch.device | None,
) -> _Run:
    check_declared(num_envs, spaces, problems)
    if device is None:
        devices = [tensor.device for _, tensor in named_tensors(env.reset())]
        device = devices[0] if devices else torch.device("cpu")
    run = _Run(env, Contract(spaces, num_envs, device), problems, steps, seed)
    if callable(curriculum := getattr(env, "begin_iteration", None)):
        curriculum(RunProgress(iteration=0, env_steps=0, planned_env_steps=None))
    generator = torch.Generator().manual_seed(seed)
    inspector, seen = Inspector(run.contract, problems), _Seen()
    _drive(run._replace(steps=WARM_UP_STEPS), generator, inspector, seen, forbid_sync=False)
    # The second trajectory begins with a reset within running episodes.
    mask = _drive(run, generator, inspector, seen, forbid_sync=True)
    _conclude(run, inspector, seen)
    _check_state(run, mask)
    if is_functional(env):
        _check_transition(run._replace(env=env))
    _check_reseed(run)
    return run


def _check_reseed(run: _Run) -> None:
    """Check that episodes start alike after the same seed, where an environment takes seeds."""
    starts: list[dict[str, int]] = []
    for _ in range(2):
        if not reseed_env(run.env, run.seed):
            return
        starts.append(fingerprint(flatten({"obs": run.env.reset()[0]})))
    hint = "Return False from reseed() if a reset takes no seed."
    same, rule = starts[0] == starts[1], "decide the next reset"
    run.problems.expect(same, "reseed().seed", rule, Words("other observations"), hint)


def _check_transition(run: _Run) -> None:
    """Check that ``step`` equals ``transition`` with ``draw``, and ``transition`` is pure."""
    env, contract, problems = cast(FunctionalEnv, run.env), run.contract, run.problems
    generator = torch.Generator().manual_seed(run.seed)
    _, mask = env.reset()
    if env.state_dict() is None:  # the state before a step cannot be restored
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
        kept = same_values(before, env.episodes())
        problems.expect(kept, "transition()", "change nothing", Words("other episodes() after it"))
        env.load_state_dict(saved)
        result = env.step(action)
        hint = "step(action) is transition(episodes(), action, draw(1)[0]), then keep()."
        same = same_values(pure, tuple(result)) and same_values(after, env.episodes())
        problems.insist(same, "transition()", "do what step() does", Words("something else"), hint)
        mask = result.action_mask


@dataclass
class _Seen:
    """Findings that only a whole trajectory can show."""

    obs_moves: bool = False
    envs_differ: bool = False
    unended: int = 0  # steps of single environments that ended no episode
    after_end: int = 0  # steps of single environments in which an episode ended before
    ended_again: int = 0  # of those, steps that ended an episode, too


def _conclude(run: _Run, inspector: Inspector, seen: _Seen) -> None:
    """Judge the findings of ``run.steps`` steps."""
    problems, ends = run.problems, inspector.ends
    if ends == 0:
        message = "%s: no episode ended within %d steps, so resetting was not checked."
        logger.warning(message, problems.owner, run.steps)
    if run.contract.num_envs > 1 and not seen.envs_differ:
        message = "%s: all environments looked alike under random actions, step after step."
        logger.warning(message, problems.owner)
    copied = ends > 0 and seen.obs_moves and not inspector.reached_differs
    rule = "be what the last action led to, where an episode ended"
    got = Words(f"the observation after the reset at each of {ends} ends")
    problems.expect(not copied, "step().reached_obs", rule, got, "Observe before the reset.")
    never_begins = seen.ended_again == seen.after_end >= _ENDS_IN_A_ROW and seen.unended > 0
    rule = "begin a new episode where one ended"
    got = Words("an end in every step that follows the first end")
    hint = "A simulator of tensors that leaves resets to others says so: auto_reset=False."
    problems.expect(not never_begins, "step()", rule, got, hint)


def _drive(
    run: _Run, generator: torch.Generator, inspector: Inspector, seen: _Seen, *, forbid_sync: bool
) -> Tensor | None:
    """Reset the environment, check every step, and return the last action mask."""
    env, contract, problems, steps, _ = run
    inspector.begin(env.reset())
    assert inspector.last is not None
    start = {k: v for k, v in inspector.last.values.items() if k != "action_mask"}
    ended_before = torch.zeros(contract.num_envs, dtype=torch.bool)
    for _ in range(steps):
        mask = inspector.last.values.get("action_mask")
        action = sample_action(contract.spaces.action, contract.num_envs, mask, generator)
        given = action.to(contract.device, copy=True)
        result = _step(env, given, problems, contract.device, forbid_sync=forbid_sync)
        inspector.action_kept(action, given)
        inspector.proceed(result)
        values = inspector.last.values
        for name, value in start.items():
            seen.obs_moves |= not torch.equal(values[name], value)
            seen.envs_differ |= bool((values[name] != values[name][:1]).any())
        ended = values["terminated"] | values["truncated"]
        seen.unended += int((~ended).sum())
        seen.after_end += int(ended_before.sum())
        seen.ended_again += int((ended & ended_before).sum())
        ended_before |= ended
    return inspector.last.live.get("action_mask")


def _step(
    env: BatchedEnv, action: Tensor, problems: Problems, device: torch.device, *, forbid_sync: bool
) -> object:
    with _sync_is_error(forbid_sync and device.type == "cuda"):
        try:
            return env.step(action)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            rule = "not wait for the device"
            hint = "torch.cuda.set_sync_debug_mode('error') shows where."
            problems.insist(False, "step()", rule, Words(error), hint)
            raise


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


def _check_state(run: _Run, mask: Tensor | None) -> None:
    """Check saving and loading: copies, bit for bit, and no state of another size."""
    env, contract, problems, *_ = run
    saved = env.state_dict()
    if saved is None:
        return
    others = unsavable(saved)
    problems.insist(others == {}, "state_dict()", STATE_RULE, others)
    before = fingerprint(saved)
    first = _trajectory(run, mask)
    kept = fingerprint(saved) == before
    problems.insist(kept, "state_dict()", "return copies", Words("what later steps change"))
    env.load_state_dict(saved)
    got = _first_difference(first, _trajectory(run, mask))
    hint = "Save all state that determines the future, the generator too."
    problems.expect(got is None, "load_state_dict()", "continue bit for bit", got, hint)
    kept = fingerprint(saved) == before
    problems.insist(kept, "load_state_dict()", "copy", Words("a state that later steps change"))
    smaller = {
        name: value[:-1] if value.shape[:1] == (contract.num_envs,) else value
        for name, value in saved.items()
    }
    got = _error_of(lambda: env.load_state_dict(smaller))
    rule = "raise ValueError for a state of another size"
    problems.expect(got is ValueError, "load_state_dict()", rule, got)


def _error_of(function: Callable[[], None]) -> type[Exception] | None:
    try:
        function()
    except Exception as error:  # the caller asks for the type of any error
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
