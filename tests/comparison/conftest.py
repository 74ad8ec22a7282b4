"""Run directories like those of ``esper fit``, written by hand."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper_lightning.forensics.files import encode_rows
from esper_lightning.forensics.layout import RunLayout
from tests.reports import write_report

STEPS = 1000  # of an iteration


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """Writes a run, by default of ten iterations of 1000 env steps."""

    def make(
        place: str,
        *,
        seed: int = 0,
        returns: Sequence[float | None] | None = None,
        evaluations: Sequence[float] | None = None,  # after every second iteration
        settings: dict[str, Any] | None = None,
        env: dict[str, Any] | None = None,
        budget: int | None = 10 * STEPS,
        state: str = "finished",
        crash: dict[str, Any] | None = None,
    ) -> Path:
        layout = RunLayout(tmp_path / place)
        files = layout.rank(0)
        files.directory.mkdir(parents=True)
        init_args = {"num_envs": 10} | (env or {})
        model = {
            "env": {"class_path": "esper_lightning.envs.CartPole", "init_args": init_args},
            "ppo": {"learning_rate": 1e-3, "clip": 0.2} | (settings or {}),
            "seed": seed,
            "total_env_steps": budget,
        }
        trainer = {"max_epochs": -1, "logger": {"init_args": {"save_dir": str(layout.directory)}}}
        layout.config.write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
        returns = list(range(1, 11)) if returns is None else returns
        rows = [
            {"iteration": k, "env_steps": k * STEPS, "rollout/episode_return_mean": value}
            for k, value in enumerate(returns, 1)
        ]
        files.history.write_bytes(encode_rows(rows))
        if evaluations is not None:
            rows = [
                {"iteration": k, "env_steps": k * STEPS, "eval/episode_return_mean": value}
                for k, value in zip(range(2, 100, 2), evaluations, strict=False)
            ]
            files.evaluations.write_bytes(encode_rows(rows))
        process = {"rank": 0, "pid": 1, "host": "elsewhere", "state": state, "world_size": 1}
        write_report(files.process, process)
        if crash is not None:
            write_report(files.crash, {"rank": 0, "time_s": 1.8e9} | crash)
        return layout.directory

    return make


KILLED = {"cause": "vanished", "error": {"message": "the process is gone: SIGKILL"}}
