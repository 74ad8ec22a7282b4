"""Learning rates over a run, as functions of how far it is and how far the policy moved.

Host numbers, no tensors.
"""

from esper_lightning.core.errors import require

__all__ = ["adaptive_learning_rate", "linear_learning_rate"]


def linear_learning_rate(initial: float, *, progress: float) -> float:
    """``initial`` falling in a straight line to zero.

    Args:
        initial: Learning rate at the start.
        progress: Share of the run that is done, in [0, 1].

    Raises:
        ValueError: If ``progress`` lies outside [0, 1].
    """
    require(0.0 <= progress <= 1.0, "linear_learning_rate.progress", "lie in [0, 1]", progress)
    return initial * (1.0 - progress)


def adaptive_learning_rate(
    current: float, *, kl: float, desired_kl: float, least: float = 1e-5, greatest: float = 1e-2
) -> float:
    """Slower by 1.5 where the policy moved beyond twice ``desired_kl``, faster below half of it.

    The rule of Schulman et al. 2017 (section 4) with the factor and bounds that rsl_rl uses. A
    ``kl`` that is not finite leaves the rate as it is.
    """
    if kl > 2.0 * desired_kl and kl < float("inf"):
        return max(least, current / 1.5)
    if 0.0 <= kl < 0.5 * desired_kl:
        return min(greatest, current * 1.5)
    return current
