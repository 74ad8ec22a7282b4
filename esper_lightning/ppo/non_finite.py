"""What PPO does about a number that is not finite, or a mask that allows no action.

Each iteration computes ``is_healthy`` of its rollout and ``UpdateMetrics.finite`` of its update on
the device. Only where one of the two is False does the host look for the cause, and raise an error
that names the cause. Axes: ``T`` step, ``B`` environment, ``M`` sample.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from esper_lightning.core.distributions import allows_choice
from esper_lightning.core.errors import NonFiniteError, Words, require
from esper_lightning.core.last_obs import with_reached_obs
from esper_lightning.core.minibatches import take
from esper_lightning.core.ranks import PeerFailedError
from esper_lightning.core.shapes import Bool
from esper_lightning.core.spaces import ActionSpace
from esper_lightning.core.tensor_trees import map_obs
from esper_lightning.core.types import Observation, Rollout, Samples
from esper_lightning.envs.base import EnvSpec, spec_name
from esper_lightning.envs.inspector import FirstSteps
from esper_lightning.ppo.agent import Agent, Weights
from esper_lightning.ppo.config import PPOConfig
from esper_lightning.ppo.objective import ppo_loss_terms, total_loss

__all__ = [
    "GradientFault",
    "RolloutFault",
    "find_fault",
    "first_non_finite",
    "is_healthy",
    "refuse_extension",
    "refuse_gradient",
    "refuse_rollout",
    "refuse_stuck",
    "refuse_stuck_cause",
]

_LARGE = 1e12  # rewards and gradients above this are nobody's intention


# The rollout.


def is_healthy(rollout: Rollout, space: ActionSpace) -> Bool[Tensor, ""]:
    """Whether every number of a rollout is finite and every mask allows something.

    The result stays on the device.

    Args:
        rollout: Rollout to check.
        space: Action space, which says how masks are read.
    """
    numbers = [value for _, value in _watched(rollout) if value.is_floating_point()]
    sound = [value.isfinite().all() for value in numbers]
    if rollout.action_mask is not None:
        sound.append(allows_choice(space, rollout.action_mask.flatten(0, 1)).all())
    return torch.stack(sound).all()


def refuse_stuck_cause(error: Exception, mask: Bool[Tensor, "B K"] | None, env: FirstSteps) -> None:
    """Refuse a mask that allows nothing, after a step of the environment failed.

    An environment may fail at an action that no mask allowed. The mask is the cause then.

    Args:
        error: Error of the step.
        mask: Mask with which the action was chosen; ``None`` where there are no masks.
        env: Inspector of the environments, for their spaces and their name.

    Raises:
        ValueError: If the mask allows nothing in some environment; its cause is ``error``.
    """
    if mask is None:
        return
    try:
        stuck = not bool(allows_choice(env.spaces.action, mask).all())
    except RuntimeError:  # the device may have failed as well
        return
    if stuck:
        try:
            refuse_stuck(mask, env.spaces.action, env=env.owner)
        except ValueError as cause:
            raise cause from error


def refuse_stuck(
    mask: Bool[Tensor, "... K"], space: ActionSpace, *, env: str, where: str = ""
) -> None:
    """Refuse masks that allow nothing for some component of the action.

    This synchronises with the device.

    Args:
        mask: Masks of environments ``[B, K]``, or of the steps of a rollout ``[T, B, K]``.
        space: Action space of the environments.
        env: Name of the environment, for the error.
        where: Sentence that ends the error.

    Raises:
        ValueError: If a component has no allowed choice. The error names the environment, the
            component and, for a rollout, the first step.
    """
    allowed = allows_choice(space, mask.flatten(0, -2))  # [..., K] -> [N, A]
    stuck = (~allowed).reshape(*mask.shape[:-1], -1)
    places = cast(list[list[int]], stuck.nonzero()[:1].tolist())
    for *step, environment, component in places:
        got = f"none in environment {environment}, component {component}"
        got += "".join(f" at rollout step {t}" for t in step)
        field = f"{env}.step().action_mask"
        require(False, field, "allow a choice for every component", Words(got), where)


class RolloutFault(NamedTuple):
    """The first value of a rollout that is not finite."""

    owner: str  # "policy" or "environment"
    text: str  # value, field, environments and step in words
    name: str  # name of the field
    environments: list[int]  # indices of the environments in which the step has such values
    step: int


def first_non_finite(rollout: Rollout) -> RolloutFault | None:
    """The first value of a rollout that is not finite; ``None`` if all values are finite.

    Within a step, the observation comes before the policy's log-probability, and both come before
    the reward and the observation that the environment returns. This synchronises with the device.
    """
    steps = [(_first_step(value), name, value) for name, value in _watched(rollout)]
    faults = [fault for fault in steps if fault[0] >= 0]
    if not faults:
        return None
    step, name, value = min(faults, key=lambda fault: fault[0])
    bad = ~value[step].isfinite()
    where = bad.flatten(1) if bad.dim() > 1 else bad[:, None]
    envs = cast(list[int], where.any(1).nonzero()[:, 0].tolist())
    columns = cast(list[int], where.any(0).nonzero()[:, 0].tolist())
    of = "" if bad.dim() == 1 else f", column {_some(columns)}"
    found = f"{value[step][bad][0].item()} in {name} of environment {_some(envs)}{of}"
    owner = "policy" if name == "log_prob" else "environment"
    return RolloutFault(owner, f"{found} at rollout step {step}", name, envs, step)


def _first_step(value: Tensor) -> int:
    """First step of ``[T, ...]`` at which a value is not finite; -1 if there is no such step."""
    bad = (~value.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if bad.numel() else -1


def _watched(rollout: Rollout) -> list[tuple[str, Tensor]]:
    """The fields that must be finite, in the order in which a step produces them."""
    return [
        *_groups("obs", rollout.obs),
        ("log_prob", rollout.log_prob),
        ("reward", rollout.reward),
        *_groups("reached_obs", rollout.reached_obs),
        *_groups("last_obs", {} if rollout.last_obs is None else rollout.last_obs.obs),
    ]


def _groups(name: str, obs: Observation) -> list[tuple[str, Tensor]]:
    if isinstance(obs, Tensor):
        return [(name, obs)]
    return [(f"{name}[{group!r}]", value) for group, value in obs.items()]


def _some(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (
        f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    )


def refuse_extension(name: str, *, iteration: int) -> NoReturn:
    """Raise the error for an extension whose reward is not finite, on this rank or another.

    Args:
        name: Class of the extension.
        iteration: Number of the iteration, for the error.

    Raises:
        NonFiniteError: Always.
    """
    kept = "The weights are those of the previous iteration."
    message = f"{name}.prepare must return finite rewards, got others in iteration {iteration}."
    raise NonFiniteError(f"{message} {kept}", phase="advantages", tensors=[f"reward of {name}"])


def refuse_rollout(
    rollout: Rollout, env: EnvSpec, space: ActionSpace, *, iteration: int
) -> NoReturn:
    """Raise the error for a rollout with a number that is not finite or a mask that allows nothing.

    Args:
        rollout: Rollout of the iteration.
        env: Spec of the environments, for the error.
        space: Action space of the environments.
        iteration: Number of the iteration, for the error.

    Raises:
        NonFiniteError: If a number is not finite. The error names the environment or the policy,
            and holds all values of the step in which the number appeared.
        ValueError: If a mask allows nothing. The error names the environment.
        PeerFailedError: If the rollout of this rank is sound, so that another rank's is not.
    """
    rollout = with_reached_obs(rollout)
    fault, name = first_non_finite(rollout), spec_name(env)
    kept = "The weights are those of the previous iteration."
    if fault is None:
        if rollout.action_mask is not None:
            where = f"{kept} (Iteration {iteration}.)"
            refuse_stuck(rollout.action_mask, space, env=name, where=where)
        raise PeerFailedError(f"A rollout of another rank was not sound in iteration {iteration}.")
    if fault.owner == "environment":
        message = f"{name}.step must return finite values, got {fault.text}. {kept}"
    else:
        hint = f"The policy has diverged. Lower PPOConfig.learning_rate. {kept}"
        message = f"PPO.policy must give finite probabilities, got {fault.text}. {hint}"
    raise NonFiniteError(
        f"{message} (Iteration {iteration}.)",
        phase="rollout",
        tensors=[fault.name],
        environments=fault.environments,
        minibatch=_step_of(rollout, fault),
    )


def _step_of(rollout: Rollout, fault: RolloutFault) -> dict[str, Any]:
    """All values of the step in which a fault appeared, of all environments."""

    def row(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[fault.step].clone()

    fields = rollout._asdict().items()
    return {name: map_obs(row, value) for name, value in fields if value is not None}


# The update.


class GradientFault(NamedTuple):
    """A minibatch at which training could not continue."""

    step: int  # number of the gradient step in the iteration
    names: list[str]  # names of the loss terms and gradients that are not finite; may be none
    largest: float  # magnitude of the largest gradient
    largest_name: str
    minibatch: Samples


def find_fault(
    agent: Agent, weights: Weights, samples: Samples, config: PPOConfig, order: Sequence[Tensor]
) -> GradientFault:
    """Find the minibatch whose loss or gradient was not finite, by computing all of them again.

    The weights after the update are those that this minibatch met: from that minibatch on, no step
    was applied.

    Args:
        agent: Agent that was updated.
        weights: Weights after the update.
        samples: Samples of the update.
        config: PPO settings of the update.
        order: Indices of the samples of each gradient step.

    Returns:
        The first minibatch with a loss or gradient that is not finite. Where all are finite, the
        minibatch with the largest gradient: the square of that gradient, or its sum over ranks, may
        still be too large.
    """
    largest: GradientFault | None = None
    for number, index in enumerate(order):
        batch = take(samples, index)
        with torch.enable_grad():
            flat = weights.parameters.detach().requires_grad_()
            other = weights._replace(parameters=flat)
            evaluation, added = agent.with_weights(other, agent.evaluate_minibatch, batch)
            terms = ppo_loss_terms(evaluation, batch, config)
            (gradient,) = torch.autograd.grad(total_loss(terms, added, config).sum(), [flat])
        # The update computes sums, which may be infinite where no term is.
        named = terms._asdict() | added
        watched = {f"loss/{name}": term.sum() for name, term in named.items()}
        gradients = {f"gradient of {k}": v for k, v in agent.named(gradient).items()}
        bad = [name for name, value in (watched | gradients).items() if not value.isfinite().all()]
        peaks = {k: v.abs().max().item() / len(batch.log_prob) for k, v in gradients.items()}
        name = max(peaks, key=peaks.__getitem__)
        fault = GradientFault(number + 1, bad, peaks[name], name, batch)
        if bad:
            return fault
        if largest is None or fault.largest > largest.largest:
            largest = fault
    assert largest is not None
    return largest


def refuse_gradient(
    agent: Agent,
    samples: Samples,
    config: PPOConfig,
    order: Sequence[torch.Tensor],
    *,
    env: str,
    largest_reward: float,
    iteration: int,
    ranks: int,
) -> NoReturn:
    """Raise the error for an update with a loss or gradient that is not finite, or too large.

    Args:
        agent: Agent after the update.
        samples: Samples of the update.
        config: PPO settings of the update.
        order: Indices of the samples of each gradient step.
        env: Name of the environment, for the error.
        largest_reward: Magnitude of the largest reward in the rollout.
        iteration: Number of the iteration, for the error.
        ranks: Number of ranks in the run.

    Raises:
        NonFiniteError: If the fault is on this rank. The error names the gradient step and the
            tensors, and holds the minibatch.
        PeerFailedError: If losses and gradients of this rank are sound, so that another rank's are
            not.
    """
    fault = find_fault(agent, agent.weights, samples, config, order)
    names, size = fault.names, f"{fault.largest_name} of {fault.largest:.1e}"
    if not names:
        if ranks > 1 and fault.largest < _LARGE:
            raise PeerFailedError(
                f"A gradient of another rank was not finite in iteration {iteration}."
            )
        names = [fault.largest_name]
    found = ", ".join(fault.names[:4]) if fault.names else size
    what = "NaN or infinity" if fault.names else "numbers whose squares are infinite"
    got = f"{what} in iteration {iteration}, gradient step {fault.step}: {found}"
    hint = "Lower PPOConfig.learning_rate."
    if largest_reward > _LARGE and not config.normalize_reward:
        hint = f"Rewards of {env} reach {largest_reward:.1e}: set PPOConfig.normalize_reward."
    elif not fault.names and config.max_grad_norm is None:
        hint = "Set PPOConfig.max_grad_norm."
    hint = f"The weights are those before that step. {hint}"
    raise NonFiniteError(
        f"PPO's gradient must be finite, got {got!r}. {hint}",
        phase="update",
        tensors=names,
        minibatch={k: v for k, v in fault.minibatch._asdict().items() if v is not None},
    )
