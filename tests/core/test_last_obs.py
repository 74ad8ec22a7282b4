"""Rollouts of images store each observation once, and lose none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_lightning.core.buffer import allocate_rollout, first_steps, rollout_bytes
from esper_lightning.core.last_obs import LastObsWriter, with_reached_obs, without_images
from esper_lightning.core.spaces import Box, Discrete, EnvSpaces
from esper_lightning.core.tensor_trees import leaves

CPU = torch.device("cpu")
IMAGE = Box((2, 2, 1), 0.0, 255.0, dtype="uint8")
SPACES = EnvSpaces(obs=IMAGE, action=Discrete(2))


def bytes_of(tree: object) -> int:
    return sum(leaf.nbytes for leaf in leaves(tree))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 20),
    num_envs=st.integers(1, 4),
    piece=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    shorter=st.integers(0, 5),
)
def test_every_reached_observation_is_read_back(
    seed: int, steps: int, num_envs: int, piece: int, share: float, shorter: int
) -> None:
    """Whatever ends, and however many steps are written at once."""
    generator = torch.Generator().manual_seed(seed)
    groups = EnvSpaces(obs={"image": IMAGE, "vector": Box((3,))}, action=Discrete(2))
    storage = allocate_rollout(groups, steps + shorter, num_envs, device=CPU)
    for length in (steps + shorter, steps, steps + shorter):  # storage is used again, and may grow
        rollout = first_steps(storage, length)
        ended = torch.rand(length, num_envs, generator=generator) < share
        shape = (length, num_envs, 2, 2, 1)
        obs, reached = (
            {
                "image": torch.randint(256, shape, generator=generator).byte(),
                "vector": torch.randn(length, num_envs, 3, generator=generator),
            }
            for _ in range(2)
        )
        for name, group in obs.items():
            rollout.obs[name].copy_(group)
            reached[name][:-1][~ended[:-1]] = group[1:][~ended[:-1]]
        writer = LastObsWriter(rollout)
        for t in range(0, length, piece):
            rows = slice(t, t + piece)
            writer.write(t, ended[rows], {name: group[rows] for name, group in reached.items()})
        rollout = rollout._replace(last_obs=writer.last_obs)
        storage = storage._replace(last_obs=writer.last_obs)
        dense = with_reached_obs(rollout)
        assert dense.last_obs is None
        for name, group in reached.items():
            assert torch.equal(dense.reached_obs[name], group)
            assert torch.equal(rollout.obs[name], obs[name])


def test_storage_grows_only_where_more_episodes_end_than_it_has_room_for() -> None:
    rollout = allocate_rollout(SPACES, 16, 4, device=CPU)
    rows = len(rollout.last_obs.sample)
    for share, same in ((1 / 16, True), (1.0, False)):
        writer = LastObsWriter(rollout)
        ended = torch.zeros(16, 4, dtype=torch.bool)
        ended[: int(16 * share)] = True
        for t in range(16):
            writer.write(t, ended[t : t + 1], torch.zeros(1, 4, 2, 2, 1, dtype=torch.uint8))
        assert (len(writer.last_obs.sample) == rows) == same


def test_a_rollout_of_breakout_takes_at_most_35_megabytes() -> None:
    """8 environments, 128 steps, four frames of 84 x 84; a second copy would take 58."""
    spaces = EnvSpaces(obs=Box((4, 84, 84), 0.0, 255.0, dtype="uint8"), action=Discrete(4))
    rollout = allocate_rollout(spaces, 128, 8, device=CPU)
    assert bytes_of(rollout) <= 35e6
    assert bytes_of(rollout) == rollout_bytes(spaces, 128, 8)
    once = bytes_of(rollout.obs)
    assert once == 128 * 8 * 4 * 84 * 84


@pytest.mark.parametrize("obs", [Box((4,)), {"a": Box((4,)), "b": Box((2, 2))}])
def test_other_rollouts_store_what_every_step_reached(obs: Box | dict[str, Box]) -> None:
    rollout = allocate_rollout(EnvSpaces(obs=obs, action=Discrete(2)), 3, 2, device=CPU)
    assert rollout.last_obs is None
    assert with_reached_obs(rollout) is rollout
    assert without_images(rollout) is rollout
    shapes = [leaf.shape for leaf in leaves(rollout.obs)]
    assert [leaf.shape for leaf in leaves(rollout.reached_obs)] == shapes


def test_a_rollout_without_images_has_its_other_groups() -> None:
    groups = EnvSpaces(obs={"image": IMAGE, "vector": Box((3,))}, action=Discrete(2))
    rollout = without_images(allocate_rollout(groups, 3, 2, device=CPU))
    assert list(rollout.obs) == list(rollout.last_obs.obs) == ["vector"]
    assert without_images(allocate_rollout(SPACES, 3, 2, device=CPU)).obs == {}
