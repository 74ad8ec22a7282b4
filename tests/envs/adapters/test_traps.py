"""What goes wrong around simulators without a word, each with the test that notices it.

Each line names a trap, and the file and name of its test; files without a folder are beside this.

 1. An evaluation steps the simulator of training: ../../training/test_environments.py
    test_training_acts_on_what_the_simulator_shows_after_an_evaluation
 2. ``num_envs`` is no field of the spec: ../../training/test_worlds.py
    test_a_spec_whose_number_of_environments_is_derived_is_refused_in_a_line
 3. Metrics are empty at first, and their names come later: ../../training/test_worlds.py
    test_a_simulator_without_any_is_no_error
 4. Processes outlive a run: ../../training/test_world_ends.py
    test_no_worker_outlives_a_run
 5. Images are bytes: test_gymnasium.py
    test_images_stay_bytes
 6. The option of a reset is popped, and only rows that were reset return: test_traps.py
    test_a_reset_of_rows_may_pop_its_option_and_return_those_rows_only
 7. A reset of single rows resets all of them: test_gymnasium.py
    test_an_environment_that_resets_all_rows_at_once_is_refused_by_name
 8. A partial reset leaves the flag that the next step resets again: test_gymnasium.py
    test_processes_of_gymnasium_reset_rows_once_or_are_refused
 9. The last observations are an array of objects, absent where nothing ended: test_gymnasium.py
    test_every_autoreset_mode_resets_within_the_step_and_says_what_was_reached
10. Results are overwritten by the next step: test_simulated.py
    test_what_was_returned_is_not_written_to_again
11. gymnax truncates in another function than it steps in: test_jax.py
    test_gymnax_truncates_at_its_time_limit
12. JAX takes no int64, and resets are computed in every step: test_jax.py
    test_resets_are_computed_where_an_episode_ended
13. mjlab installs a torchvision that no Lightning can import: ../../benchmarks/test_worlds.py
    test_torchvision_is_removed_from_the_world_of_mjlab
14. Discrete spaces start elsewhere, and have many dtypes: test_gymnasium.py
    test_every_kind_of_space_keeps_the_contract
15. Columns of an observation are constant: test_traps.py
    test_a_constant_column_has_no_bounds
16. Deprecated environments raise: test_gymnasium.py
    test_what_cannot_be_made_is_one_line
17. Environments exist only once their package is imported: test_traps.py
    test_a_package_in_the_name_is_imported
18. Workers import torch again: test_traps.py
    test_workers_are_forked
19. A simulator that was made for its spaces has no rank's seed: test_simulated.py
    test_a_shared_simulator_is_made_once_and_reseeded
20. Agents of a world are environments, and end together: test_simulated.py
    test_agents_that_share_a_policy_are_environments
21. Time-outs of rsl_rl overlap with failures, and resets return a tuple: test_simulated.py
    test_a_time_out_that_overlaps_a_failure_is_a_time_out_as_in_rsl_rl
22. A time limit within a simulator that calls it termination cannot be seen: test_simulated.py
    test_a_missing_time_out_is_a_failure
23. Rollouts of simulators are not compiled: ../../training/test_compiled.py
    test_an_environment_behind_an_adapter_is_stepped_and_the_rest_compiled
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from esper_lightning.envs import Gymnasium
from esper_lightning.envs.adapters.host import HostEnv
from esper_lightning.envs.adapters.spaces import read_spaces
from tests.envs.adapters import simulators

CPU = torch.device("cpu")
TABLE = re.findall(r"^ ?(\d+)\. [^:]*: (\S+\.py)\n +(test_\w+)$", __doc__, re.MULTILINE)


def test_every_trap_has_its_test():
    assert [int(number) for number, *_ in TABLE] == list(range(1, 24))
    for _, file, name in TABLE:
        text = (Path(__file__).parent / file).resolve().read_text()
        assert re.search(rf"def {name}\(", text), (file, name)


class Popping(SyncVectorEnv):
    """EnvPool's way: a reset returns only the rows that were reset; the option is popped."""

    def reset(self, *, seed=None, options=None):
        if options is None:
            return super().reset(seed=seed)
        rows = options["reset_mask"].copy()
        obs, _ = super().reset(seed=seed, options=options)
        options.clear()
        return obs[rows], {"env_id": np.flatnonzero(rows)}


@pytest.mark.parametrize("kind", ["box", "discrete"])
def test_a_reset_of_rows_may_pop_its_option_and_return_those_rows_only(kind):
    lengths = (2, 3, 4)
    makers = [lambda n=n: simulators.Counter(length=n, kind=kind) for n in lengths]
    env = HostEnv(Popping(makers, autoreset_mode=AutoresetMode.NEXT_STEP), CPU, 0, name="pool")
    env.reset()
    for t in range(1, 13):
        result = env.step(torch.zeros(3, 1) if kind == "box" else torch.zeros(3).long())
        if kind == "box":
            assert result.obs[:, 1].tolist() == [t % n for n in lengths]
        assert result.truncated.tolist() == [t % n == 0 for n in lengths]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_environment_of_ours_resets_itself_in_the_next_step(workers):
    spec = Gymnasium(id="EsperCounter-v0", num_envs=2, workers=workers, kwargs={"length": 2})
    env = spec.build(CPU, 0)
    try:
        assert env._env.metadata["autoreset_mode"] == "Disabled"
        env.reset()
        steps = [env.step(torch.zeros(2, 1)).reached_obs[:, 1].tolist() for _ in range(4)]
        assert steps == [[1, 1], [2, 2], [1, 1], [2, 2]]
    finally:
        env.close()


def test_a_constant_column_has_no_bounds():
    low, high = np.array([0, -1], np.float32), np.array([0, 1], np.float32)
    assert not read_spaces(Box(low, high), Discrete(2)).obs.bounded


def test_bounds_that_a_simulator_does_not_keep_are_dropped_but_for_images():
    low, high = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert read_spaces(Box(low, high), Discrete(2)).obs.bounded
    assert not read_spaces(Box(low, high), Discrete(2), keeps_bounds=False).obs.bounded
    image = Box(0, 255, (3, 8, 8), np.uint8)
    assert read_spaces(image, Discrete(2), keeps_bounds=False).obs.dtype == "uint8"


def test_a_package_in_the_name_is_imported():
    with pytest.raises(ValueError, match="must name a registered environment"):
        Gymnasium(id="EsperLate-v0").spaces()
    assert Gymnasium(id="tests.envs.adapters.registers:EsperLate-v0").spaces().obs.shape == (2,)


def test_workers_are_forked():
    env = Gymnasium(id="EsperCounter-v0", num_envs=2, workers=2).build(CPU, 0)
    try:
        assert [process._start_method for process in env._env._processes] == ["fork", "fork"]
    finally:
        env.close()
