"""Generalised advantage estimation over columns that may hold several episodes.

Axes: ``T`` step, ``B`` environment.
"""

import torch
from torch import Tensor

from esper_lightning.core.shapes import Bool, Float
from esper_lightning.core.types import Advantages

__all__ = ["compute_gae", "discounted_returns"]


def compute_gae(
    reward: Float[Tensor, "T B"],
    value: Float[Tensor, "T B"],
    next_value: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    truncated: Bool[Tensor, "T B"],
    *,
    discount: float,
    lambda_: float,
) -> Advantages:
    r"""Generalised advantage estimation (Schulman et al. 2016).

    .. math::
        \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t), \qquad A_t = \delta_t + \gamma \lambda A_{t+1}

    ``next_value[t]`` is the value of the state the environment *reached* at ``t``, before any
    autoreset: a termination removes the bootstrap, a truncation keeps it; both stop the advantage
    from leaking across episodes.

    Args:
        reward: Reward of each step.
        value: Value of the state acted on.
        next_value: Value of the state reached; read where ``terminated`` is False.
        terminated: Whether the task ended with this step.
        truncated: Whether the episode was cut after this step.
        discount: ``gamma``, in [0, 1].
        lambda_: ``lambda``, in [0, 1]: 0 is the one-step TD error, 1 the discounted return minus
            the value.

    Returns:
        Advantage and value target (advantage plus value) of each step.
    """
    delta = reward + discount * next_value.masked_fill(terminated, 0.0) - value
    decay = (~(terminated | truncated)).to(reward.dtype) * (discount * lambda_)
    advantage = _solve(delta, decay)
    return Advantages(advantage, advantage + value)


def discounted_returns(
    reward: Float[Tensor, "T B"],
    ended: Bool[Tensor, "T B"],
    carried: Float[Tensor, " B"],
    *,
    discount: float,
) -> tuple[Float[Tensor, "T B"], Float[Tensor, " B"]]:
    r"""Discounted return *so far* in each running episode, forwards in time.

    :math:`R_t = \gamma R_{t-1} + r_t`.

    Rewards are scaled by the variance of this return (Engstrom et al. 2020, section 3).

    Args:
        reward: Reward of each step.
        ended: Whether an episode ended with this step, so that the next episode starts from zero.
        carried: Second result of the previous call; zero in the first call.
        discount: ``gamma``, in [0, 1].

    Returns:
        The return so far at each step, and what to carry to the next call.
    """
    first = (reward[0] + discount * carried)[None]
    goes_on = torch.cat([torch.zeros_like(ended[:1]), ~ended[:-1]])  # into step t
    terms, factors = torch.cat([first, reward[1:]]), goes_on.to(reward.dtype) * discount
    returns = _solve(terms.flip(0), factors.flip(0)).flip(0)
    return returns, returns[-1].masked_fill(ended[-1], 0.0)


def _solve(term: Float[Tensor, "T B"], factor: Float[Tensor, "T B"]) -> Float[Tensor, "T B"]:
    """``x[t] = term[t] + factor[t] * x[t + 1]``, with nothing beyond the end.

    The solution is computed by doubling (Hillis and Steele 1986): after ``k`` passes ``x[t]``
    includes ``2**k`` steps. This takes ``log2(T)`` operations on whole rollouts, where the
    recursion takes ``T`` operations on single steps. A factor of 0 stops everything, also numbers
    that are not finite.
    """
    reach, steps = 1, term.shape[0]
    while reach < steps:
        beyond = (0, 0, 0, reach)
        term_ahead = torch.nn.functional.pad(term[reach:], beyond)
        factor_ahead = torch.nn.functional.pad(factor[reach:], beyond)
        term = torch.where(factor != 0.0, term + factor * term_ahead, term)
        factor = factor * factor_ahead
        reach *= 2
    return term
