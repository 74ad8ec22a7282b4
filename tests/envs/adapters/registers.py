"""A package whose import registers an environment with Gymnasium."""

import gymnasium

from tests.envs.adapters.simulators import Counter

gymnasium.register("EsperLate-v0", Counter)
