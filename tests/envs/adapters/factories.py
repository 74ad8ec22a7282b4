"""Functions that make simulators of others, as a user would write them."""

from typing import Any


def make_vmas(*, num_envs: int, device: str, seed: int, scenario: str, agents: int = 1) -> Any:
    """Worlds of VMAS with ``num_envs`` agents in all, which share a policy."""
    from vmas import make_env  # noqa: PLC0415

    several = {"n_agents": agents} if agents > 1 else {}
    return make_env(
        scenario,
        num_envs=num_envs // agents,
        device=device,
        seed=seed,
        continuous_actions=True,
        max_steps=9,
        terminated_truncated=True,
        **several,
    )
