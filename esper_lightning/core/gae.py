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
    r"""Generalised advantage estimation (Schulman et al. 2016), backwards in time.

    .. math::
        \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t), \qquad A_t = \delta_t + \gamma \lambda A_{t+1}

    ``next_value[t]`` is the value of the state the environment *reached* at ``t``, before any
    autoreset: a termination removes the bootstrap, a truncation keeps it; both stop the advantage
    from leaking across episodes.

    Args:
        reward: Reward of each step.
        value: Value of the state acted on.
        next_value: Value of the state reached; read where ``terminated`` is False.
        terminated: The task ended with this step.
        truncated: The episode was cut after this step.
        discount: ``gamma``, in [0, 1].
        lambda_: ``lambda``, in [0, 1]: 0 is the one-step TD error, 1 the discounted return minus
            the value.

    Returns:
        Advantage and value target (advantage plus value) of each step.
    """
    delta = reward + discount * next_value.masked_fill(terminated, 0.0) - value
    decay = (~(terminated | truncated)).to(reward.dtype) * (discount * lambda_)
    advantage = torch.empty_like(delta)
    tail = torch.zeros_like(delta[0])
    for t in range(delta.shape[0] - 1, -1, -1):
        tail = torch.addcmul(delta[t], decay[t], tail)
        advantage[t] = tail
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

    Its variance is what rewards are scaled by (Engstrom et al. 2020, section 3).

    Args:
        reward: Reward of each step.
        ended: An episode ended with this step, so that the next one starts from zero.
        carried: What the previous call returned second; zero at first.
        discount: ``gamma``, in [0, 1].

    Returns:
        The return so far at each step, and what to carry to the next call.
    """
    returns = torch.empty_like(reward)
    for t in range(reward.shape[0]):
        so_far = discount * carried + reward[t]
        returns[t] = so_far
        carried = so_far.masked_fill(ended[t], 0.0)
    return returns, carried
