"""What PPO does about a number that is not finite, or a mask that allows no action.

Each iteration computes ``is_healthy`` of its rollout and ``UpdateMetrics.finite`` of its update on
the device. Only where one is False does the host look for the cause, and raise an error that names
it. Axes: ``T`` step, ``B`` environment, ``M`` sample.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor

from esper_lightning.core.distributions import allows_choice
from esper_lightning.core.errors import NonFiniteError, Words, require
from esper_lightning.core.minibatches import take
from esper_lightning.core.ranks import PeerFailedError
from esper_lightning.core.shapes import Bool
from esper_lightning.core.spaces import ActionSpace
from esper_lightning.core.types import Observation, Rollout, Samples, map_obs
from esper_lightning.envs.base import EnvSpec
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
    "refuse_gradient",
    "refuse_rollout",
    "refuse_stuck",
    "refuse_stuck_cause",
]

_LARGE = 1e12  # rewards and gradients that are nobody's intention


# The rollout.


def is_healthy(rollout: Rollout, space: ActionSpace) -> Bool[Tensor, ""]:
    """Whether every number is finite and every mask allows something; stays on the device."""
    sound = [value.isfinite().all() for _, value in _watched(rollout)]
    if rollout.action_mask is not None:
        sound.append(allows_choice(space, rollout.action_mask.flatten(0, 1)).all())
    return torch.stack(sound).all()


def refuse_stuck_cause(error: Exception, mask: Bool[Tensor, "B K"] | None, env: FirstSteps) -> None:
    """Refuse a mask that allows nothing where a step failed after it.

    Raises:
        ValueError: From ``error``, which is then what became of an action that no mask allowed.
    """
    if mask is None:
        return
    try:
        stuck = not bool(allows_choice(env.spaces.action, mask).all())
    except RuntimeError:  # the device may have failed, too
        return
    if stuck:
        try:
            refuse_stuck(mask, env.spaces.action, env=env.owner)
        except ValueError as cause:
            raise cause from error


def refuse_stuck(
    mask: Bool[Tensor, "... K"], space: ActionSpace, *, env: str, where: str = ""
) -> None:
    """Refuse masks of which a part allows nothing; synchronises.

    Args:
        mask: Of environments ``[B, K]``, or of the steps of a rollout ``[T, B, K]``.
        space: Of their actions.
        env: Name of the environment.
        where: What is to be said after the place.

    Raises:
        ValueError: Naming environment and component, and of a rollout the first step.
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
    text: str
    name: str  # of the field
    environments: list[int]
    step: int


def first_non_finite(rollout: Rollout) -> RolloutFault | None:
    """Say what was not finite first: whose it is, and field, step, environments, columns.

    ``None`` if everything is finite.

    Within a step an observation comes before the policy's answer to it, and that before what the
    environment makes of it. Synchronises.

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
    """First step of ``[T, ...]`` at which not everything is finite; -1 if there is none."""
    bad = (~value.isfinite()).flatten(1).any(1).nonzero()
    return int(bad[0]) if bad.numel() else -1


def _watched(rollout: Rollout) -> list[tuple[str, Tensor]]:
    """In the order in which they come about within a step."""
    return [
        *_groups("obs", rollout.obs),
        ("log_prob", rollout.log_prob),
        ("reward", rollout.reward),
        *_groups("reached_obs", rollout.reached_obs),
    ]


def _groups(name: str, obs: Observation) -> list[tuple[str, Tensor]]:
    if isinstance(obs, Tensor):
        return [(name, obs)]
    return [(f"{name}[{group!r}]", value) for group, value in obs.items()]


def _some(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (
        f" and {len(indices) - 8} more" if len(indices) > 8 else ""
    )


def refuse_rollout(
    rollout: Rollout, env: EnvSpec, space: ActionSpace, *, iteration: int
) -> NoReturn:
    """Stop where a number of the rollout is not finite or a mask allows nothing, and say whose.

    Args:
        rollout: Rollout of the iteration.
        env: Environment, for the error.
        space: Actions of the environment.
        iteration: Number of the iteration.

    Raises:
        NonFiniteError: Naming the environment or the policy, with the step in which it appeared.
        ValueError: Naming the environment whose mask allows nothing.
        PeerFailedError: If it was not this rank's.
    """
    fault, name = first_non_finite(rollout), type(env).__name__
    kept = "The weights are those of the previous iteration."
    if fault is None:
        if rollout.action_mask is not None:
            where = f"{kept} (Iteration {iteration}.)"
            refuse_stuck(rollout.action_mask, space, env=name, where=where)
        raise PeerFailedError(f"A rollout of another rank was not sound in iteration {iteration}.")
    if fault.owner == "environment":
        message = f"{name}.step must return finite values, got {fault.text!r}. {kept}"
    else:
        hint = f"It has diverged. Lower PPOConfig.learning_rate. {kept}"
        message = f"PPO.policy must give finite probabilities, got {fault.text!r}. {hint}"
    raise NonFiniteError(
        f"{message} (Iteration {iteration}.)",
        phase="rollout",
        tensors=[fault.name],
        environments=fault.environments,
        minibatch=_step_of(rollout, fault),
    )


def _step_of(rollout: Rollout, fault: RolloutFault) -> dict[str, Any]:
    """Everything of the step in which it appeared, of all environments."""

    def row(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[fault.step].clone()

    fields = rollout._asdict().items()
    return {name: map_obs(row, value) for name, value in fields if value is not None}


# The update.


class GradientFault(NamedTuple):
    """A minibatch at which training could not go on."""

    step: int  # number of the gradient step in the iteration
    names: list[str]  # of the loss terms and gradients that are not finite; may be none
    largest: float  # magnitude of the largest gradient
    largest_name: str
    minibatch: Samples


def find_fault(
    agent: Agent, weights: Weights, samples: Samples, config: PPOConfig, order: Sequence[Tensor]
) -> GradientFault:
    """Look again for the minibatch whose loss or gradient was not finite.

    The weights are those that it met: no step was applied from it on.

    Args:
        agent: The actor and critic of the update.
        weights: Weights after the update.
        samples: Samples of the update.
        config: PPO settings of the update.
        order: Samples of each gradient step.

    Returns:
        The first minibatch at which something is not finite. Where everything is, the one with the
        largest gradient: squares of it, or sums over ranks, may still be too large.
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
        # Sums, as the update has them: they may be infinite where no term is.
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
    """Stop where a loss or gradient was not finite, or too large, and find the minibatch.

    Args:
        agent: The actor and critic, after the update.
        samples: Samples of the update.
        config: PPO settings of the update.
        order: Samples of each gradient step.
        env: Name of the environment, for the error.
        largest_reward: Magnitude of the largest reward in the rollout.
        iteration: Number of the iteration.
        ranks: Number of ranks.

    Raises:
        NonFiniteError: Naming gradient step and tensors, with the minibatch.
        PeerFailedError: If loss and gradients are sound on this rank, and there are others.
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
    raise NonFiniteError(
        f"PPO's gradient must be finite, got {got!r}. The weights are those of before it. {hint}",
        phase="update",
        tensors=names,
        minibatch={k: v for k, v in fault.minibatch._asdict().items() if v is not None},
    )
