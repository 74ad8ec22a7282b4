"""The rollout storage returns what is written into it, for every kind of space."""

import pytest
import torch
from torch import Tensor

from esper_lightning.core.buffer import allocate_rollout, first_steps, write_step
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces, MultiDiscrete
from esper_lightning.core.tensor_trees import map_obs
from esper_lightning.core.types import Observation, Rollout

STEPS, ENVS = 3, 2
CPU = torch.device("cpu")
GROUPS = {"joints": Box((3,)), "image": Box((2, 2))}

SPACES = {
    "one box, one choice": EnvSpaces(obs=Box((4,)), action=Discrete(3)),
    "masked": EnvSpaces(obs=Box((4,)), action=Discrete(3), masked=True),
    "masked choices": EnvSpaces(obs=Box((4,)), action=MultiDiscrete((2, 3)), masked=True),
    "groups": EnvSpaces(obs=GROUPS, action=Box((2,))),
    "array of actions": EnvSpaces(obs=Box((2, 2)), action=Box((2, 3))),
    "no axes": EnvSpaces(obs=Box(()), action=Box(())),
}
each_space = pytest.mark.parametrize("spaces", SPACES.values(), ids=SPACES)


def random_obs(spaces: EnvSpaces, generator: torch.Generator) -> Observation:
    if isinstance(spaces.obs, Box):
        return torch.randn(ENVS, *spaces.obs.shape, generator=generator)
    return {
        name: torch.randn(ENVS, *box.shape, generator=generator) for name, box in spaces.obs.items()
    }


def random_step(spaces: EnvSpaces, generator: torch.Generator) -> Rollout:
    """A row for ``write_step``, with an action as a distribution samples it."""

    def flag(*shape: int) -> Tensor:
        return torch.rand(ENVS, *shape, generator=generator) < 0.5

    mask = None
    if isinstance(spaces.action, Box):
        action = torch.randn(ENVS, spaces.action.size, generator=generator)
    elif isinstance(spaces.action, MultiDiscrete):
        action = torch.stack(
            [torch.randint(n, (ENVS,), generator=generator) for n in spaces.action.nvec], -1
        )
        mask = flag(sum(spaces.action.nvec))
    else:
        action = torch.randint(spaces.action.n, (ENVS,), generator=generator)
        mask = flag(spaces.action.n)
    return Rollout(
        obs=random_obs(spaces, generator),
        action=action,
        log_prob=torch.randn(ENVS, generator=generator),
        action_mask=mask if spaces.masked else None,
        reward=torch.randn(ENVS, generator=generator),
        terminated=flag(),
        truncated=flag(),
        reached_obs=random_obs(spaces, generator),
        episode_return=torch.randn(ENVS, generator=generator),
        episode_length=torch.randint(99, (ENVS,), generator=generator),
    )


def storages(rollout: Rollout) -> set[int]:
    found: set[int] = set()
    for field in rollout:
        if field is not None:
            map_obs(lambda tensor: found.add(tensor.data_ptr()) or tensor, field)
    return found


@each_space
def test_a_written_step_is_read_back(spaces: EnvSpaces, generator: torch.Generator) -> None:
    rollout = allocate_rollout(spaces, STEPS, ENVS, device=CPU)
    before = storages(rollout)
    written = [random_step(spaces, generator) for _ in range(STEPS)]
    for t in (1, 0, 2, 1):  # a step may be overwritten
        write_step(rollout, t, written[t])
    for t, step in enumerate(written):
        for name, value in step._asdict().items():
            field = getattr(rollout, name)
            if value is None:
                assert field is None, name
            elif isinstance(value, dict):
                assert field.keys() == value.keys()
                for group in value:
                    assert torch.equal(field[group][t], value[group]), (name, group)
            else:
                assert field.dtype == value.dtype
                assert torch.equal(field[t], value), name
    assert storages(rollout) == before  # in place


def test_a_rollout_stores_copies(generator: torch.Generator) -> None:
    spaces = SPACES["groups"]
    rollout = allocate_rollout(spaces, STEPS, ENVS, device=CPU)
    step = random_step(spaces, generator)
    write_step(rollout, 0, step)
    kept = rollout.obs["joints"][0].clone()
    step.obs["joints"].zero_()
    assert torch.equal(rollout.obs["joints"][0], kept)


@each_space
def test_the_first_steps_are_views_of_the_same_storage(
    spaces: EnvSpaces, generator: torch.Generator
) -> None:
    rollout = allocate_rollout(spaces, STEPS, ENVS, device=CPU)
    part = first_steps(rollout, 2)
    assert part.reward.shape == (2, ENVS)
    assert storages(part) == storages(rollout)
    step = random_step(spaces, generator)
    write_step(part, 1, step)
    assert torch.equal(rollout.action[1], step.action)
    assert (part.action_mask is None) == (not spaces.masked)
    expected = map_obs(lambda tensor: tensor[:2], rollout.obs)
    torch.testing.assert_close(part.obs, expected, rtol=0, atol=0, equal_nan=True)
