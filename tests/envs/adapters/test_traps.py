"""What goes wrong around simulators without a word: each trap has tests, marked by its number.

 1. An evaluation steps the simulator of training.
 2. ``num_envs`` is no field of the spec.
 3. Metrics are empty at first, and their names come later.
 4. Processes outlive a run.
 5. Images are bytes.
 6. The option of a reset is popped, and only rows that were reset return.
 7. A reset of single rows resets all of them.
 8. A partial reset leaves the flag that the next step resets again.
 9. The last observations are an array of objects, absent where nothing ended.
10. Results are overwritten by the next step.
11. gymnax truncates in another function than it steps in.
12. JAX takes no int64, and resets are computed in every step.
13. mjlab installs a torchvision that no Lightning can import.
14. Discrete spaces start elsewhere, and have many dtypes.
15. Columns of an observation are constant.
16. Deprecated environments raise.
17. Environments exist only once their package is imported.
18. Workers import torch again.
19. A simulator that was made for its spaces has no rank's seed.
20. Agents of a world are environments, and end together.
21. Time-outs of rsl_rl overlap with failures, and resets return a tuple.
22. A time limit within a simulator that calls it termination cannot be seen.
23. Rollouts of simulators are not compiled.

The tests of 11 and 12 need JAX, and ``make worlds`` runs them. All others have one among the fast
tests.
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
from tests.conftest import FAST_TRAPS
from tests.envs.adapters import simulators

CPU = torch.device("cpu")
TRAPS = [int(number) for number in re.findall(r"^ ?(\d+)\. ", __doc__, re.MULTILINE)]
ELSEWHERE = "tests/envs/adapters/test_jax.py"  # which is not collected where JAX is missing


def test_every_trap_has_tests_that_run(request):
    root = Path(__file__).parents[2]
    if not any(
        (Path.cwd() / each.partition("::")[0]).samefile(root) for each in request.config.args
    ):
        pytest.skip("asks for a run of all tests")
    marks = request.config.stash[FAST_TRAPS]
    text = (root.parent / ELSEWHERE).read_text()
    elsewhere = {int(number) for number in re.findall(r"mark.trap\((\d+)\)", text)}
    assert len(TRAPS) == len(set(TRAPS)) == max(TRAPS) == 23
    assert elsewhere == {11, 12}
    assert ELSEWHERE in (root.parent / "benchmarks" / "worlds.py").read_text()
    assert marks | elsewhere == set(TRAPS)


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
@pytest.mark.trap(6)
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


@pytest.mark.trap(15)
def test_a_constant_column_has_no_bounds():
    low, high = np.array([0, -1], np.float32), np.array([0, 1], np.float32)
    assert not read_spaces(Box(low, high), Discrete(2)).obs.bounded


def test_bounds_that_a_simulator_does_not_keep_are_dropped_but_for_images():
    low, high = np.zeros(2, np.float32), np.ones(2, np.float32)
    assert read_spaces(Box(low, high), Discrete(2)).obs.bounded
    assert not read_spaces(Box(low, high), Discrete(2), keeps_bounds=False).obs.bounded
    image = Box(0, 255, (3, 8, 8), np.uint8)
    assert read_spaces(image, Discrete(2), keeps_bounds=False).obs.dtype == "uint8"


@pytest.mark.trap(17)
def test_a_package_in_the_name_is_imported():
    with pytest.raises(ValueError, match="must name a registered environment"):
        Gymnasium(id="EsperLate-v0").spaces()
    assert Gymnasium(id="tests.envs.adapters.registers:EsperLate-v0").spaces().obs.shape == (2,)


@pytest.mark.trap(18)
def test_workers_are_forked():
    env = Gymnasium(id="EsperCounter-v0", num_envs=2, workers=2).build(CPU, 0)
    try:
        assert [process._start_method for process in env._env._processes] == ["fork", "fork"]
    finally:
        env.close()
