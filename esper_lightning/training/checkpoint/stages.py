"""How the stages of a run are compiled, as a part of its state.

A stage that has given up native code runs eagerly for the rest of a run. Resumed or replayed from a
later checkpoint it would be compiled anew, and round otherwise. So it would where a value of the
user's changes right after the checkpoint: the state tells what native code had read. It holds for
the same program: after a change of a source file, a setting of the algorithm, a package or the
compiler, stages are compiled anew.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from typing import Any

from esper_lightning.compiling.native.library import compiler_digest
from esper_lightning.compiling.stages import StageState, restore_stages
from esper_lightning.forensics.fingerprint import loaded_versions
from esper_lightning.forensics.sources import digests_of_sources
from esper_lightning.ppo.learner import Learner
from esper_lightning.training.evaluation import Evaluation
from esper_lightning.training.settings import PPOSettings

__all__ = ["STAGES", "program_of_stages", "resume_stages", "stages_to_data"]

_log = logging.getLogger(__name__)
STAGES = "stages"
"""Name of the stages in the state of a rank in a checkpoint."""


def program_of_stages(learner: Learner, settings: PPOSettings) -> dict[str, str]:
    """What stages are compiled of and by, as digests and versions; empty if nothing is compiled.

    Args:
        learner: Learner of a run that begins: later, files may be other ones than those loaded.
        settings: Settings of the run; stages hold those of the algorithm as constants.
    """
    if not learner.stages:
        return {}
    loaded = loaded_versions()
    versions = {name: loaded[name] for name in ("esper_lightning", "torch") if name in loaded}
    data = settings.to_data()
    text = json.dumps({name: data[name] for name in ("ppo", "extensions")}, default=str)
    versions["a setting"] = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    versions |= {"Python": platform.python_version(), "the C++ compiler": compiler_digest()}
    return {**digests_of_sources(), **versions}


def stages_to_data(
    learner: Learner, evaluation: Evaluation, program: Mapping[str, str]
) -> dict[str, Any]:
    """The state of all stages as plain data.

    Args:
        learner: Learner of this rank.
        evaluation: Evaluations of the run.
        program: Result of ``program_of_stages``.
    """
    states = {name: stage.state() for name, stage in learner.stages.items()}
    return {"program": dict(program), "states": {**states, **evaluation.stage_states()}}


def resume_stages(
    data: Mapping[str, Any] | None,
    learner: Learner,
    evaluation: Evaluation,
    program: Mapping[str, str],
) -> None:
    """Let stages run as in a checkpoint, and say in a line which of them run a slower way.

    Args:
        data: Result of ``stages_to_data``; ``None`` for a new run, or an older checkpoint.
        learner: Learner of this rank, which has not started.
        evaluation: Evaluations of the run.
        program: Result of ``program_of_stages``.
    """
    former: Mapping[str, str] = {} if data is None else data["program"]
    states: dict[str, StageState] = {} if data is None else data["states"]
    slower = [name for name, state in states.items() if state["slower"]]
    changed = [name for name in former if name in program and former[name] != program[name]]
    if changed or not program:
        if slower and program:
            why = f"{changed[0]} has changed"
            _log.info("Compiled anew, because %s: %s.", why, ", ".join(slower))
        states = {}
    elif slower:
        _log.warning(
            "Slower ways are taken as before the checkpoint, by: %s. They are compiled anew where "
            "your sources change, and in a new run with warm_start.",
            ", ".join(slower),
        )
    restore_stages(learner.stages, states)
    evaluation.restore_stages(states)
