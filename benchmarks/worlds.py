"""Simulators that are too large for the tests, each in an environment of its own.

Environments for Python are made under ``build/worlds``, with what ``INSTALLS`` names. In each of
them every task goes through ``check_env``, a short run, and the run again from its checkpoint.
Writes ``results/worlds.md``. A world that cannot be installed, or fails, is a row that says so.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from conditions import ROOT, benchmark_parser, results

from esper_lightning import CNN, MLP, PPO, PPOConfig, check_env
from esper_lightning.envs import Brax, Custom, EnvPool, EnvSpec, Gymnasium, Gymnax

PLACE = ROOT / "build" / "worlds"
HERE = "here"
TRIES_S = 3000
# What pip gets for each world. gymnax wants an older gymnasium than constraints.txt has, and mjlab
# an rsl-rl-lib; for both only the trainer's own packages are pinned.
PINNED = ("torch==2.13.0", "lightning==2.6.6", "torchmetrics==1.9.0")
INSTALLS = {
    "minigrid": ("-c", "constraints.txt", "-e", ".[minigrid]"),
    "atari": ("-c", "constraints.txt", "-e", ".[atari]"),
    "envpool": ("-c", "constraints.txt", "-e", ".[envpool]"),
    "jax": (*PINNED, "-e", ".[jax]", "seaborn", "six", "beartype", "hypothesis", "pytest-timeout"),
    "mjlab": (*PINNED, "-e", ".", "mjlab"),
}
TESTS = {"jax": "tests/envs/adapters/test_jax.py"}  # make test skips them
PACKAGES = {
    HERE: ("gymnasium",),
    "minigrid": ("gymnasium", "minigrid"),
    "atari": ("gymnasium", "ale-py"),
    "envpool": ("envpool",),
    "jax": ("jax", "gymnax", "brax"),
    "mjlab": ("mjlab", "mujoco"),
}


def make_ale(*, num_envs: int, device: str, seed: int, game: str) -> Any:
    """Games of ALE's own vector environment, four frames of 84 x 84 each."""
    from ale_py.vector_env import AtariVectorEnv  # noqa: PLC0415
    from gymnasium.vector import AutoresetMode  # noqa: PLC0415

    del device, seed
    return AtariVectorEnv(game=game, num_envs=num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


TASKS: Mapping[str, Mapping[str, Callable[[], EnvSpec]]] = {
    HERE: {"CartPole-v1": lambda: Gymnasium(id="CartPole-v1", num_envs=4)},
    "minigrid": {
        "Empty-5x5, symbols": lambda: Gymnasium(
            id="minigrid:MiniGrid-Empty-5x5-v0",
            num_envs=4,
            wrappers=("minigrid.wrappers.ImgObsWrapper",),
            kwargs={"max_steps": 20},
        ),
        "DoorKey-5x5, flat": lambda: Gymnasium(
            id="minigrid:MiniGrid-DoorKey-5x5-v0",
            num_envs=4,
            wrappers=("minigrid.wrappers.FlatObsWrapper",),
            workers=2,
            kwargs={"max_steps": 20},
        ),
    },
    "atari": {
        "Pong, memory of the console": lambda: Gymnasium(
            id="ale_py:ALE/Pong-v5", num_envs=4, kwargs={"obs_type": "ram", "max_episode_steps": 30}
        ),
        "Breakout, native": lambda: Gymnasium(
            id="ale_py:ALE/Breakout-v5",
            num_envs=4,
            native=True,
            kwargs={"max_num_frames_per_episode": 40},
        ),
        "Breakout, images": lambda: Custom(
            make="worlds:make_ale", num_envs=4, kwargs={"game": "breakout"}, shared=False
        ),
    },
    "envpool": {
        "CartPole-v1": lambda: EnvPool(id="CartPole-v1", num_envs=8),
        "LunarLander-v3": lambda: EnvPool(id="LunarLander-v3", num_envs=8),
        "HalfCheetah-v5": lambda: EnvPool(
            id="HalfCheetah-v5", num_envs=8, kwargs={"max_episode_steps": 25}
        ),
    },
    "jax": {
        "gymnax CartPole-v1": lambda: Gymnax(id="CartPole-v1", num_envs=8),
        "gymnax Pendulum-v1": lambda: Gymnax(id="Pendulum-v1", num_envs=8),
        "gymnax Breakout-MinAtar": lambda: Gymnax(id="Breakout-MinAtar", num_envs=8),
        "Brax fast": lambda: Brax(id="fast", num_envs=8, time_limit=20),
    },
    "mjlab": {
        "cartpole": lambda: Custom(
            make="esper_lightning.envs.adapters.mjlab:make",
            num_envs=8,
            kwargs={"task": "Mjlab-Cartpole-Balance"},
            lost="previous",
        ),
    },
}


def trial(spec: EnvSpec, folder: Path, steps: int) -> dict[str, Any]:
    """Check an environment, train in it, and resume the run."""
    from lightning.pytorch import Callback, Trainer  # noqa: PLC0415

    started = time.perf_counter()
    check_env(spec, steps=steps)
    checked = time.perf_counter()
    obs = spec.spaces().obs
    image = not isinstance(obs, dict) and len(obs.shape) == 3 and min(obs.shape[1:]) > 30
    ppo = PPOConfig(rollout_steps=16, minibatches=2, epochs=2, normalize_obs=not image)
    policy = CNN() if image else MLP(hidden_sizes=(32,))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    rows: list[dict[str, Any]] = []

    class Rows(Callback):
        def on_train_batch_end(self, *given: Any) -> None:
            rows.append(given[2]["row"])

    for limit, path in ((3, None), (5, folder / "run.ckpt")):
        model = PPO(env=spec, policy=policy, ppo=ppo, eval_episodes=4)
        trainer = Trainer(max_steps=limit, limit_val_batches=0, callbacks=[Rows()], **quiet)
        trainer.fit(model, ckpt_path=path)
        trainer.save_checkpoint(folder / "run.ckpt")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("resumed_with_new_episodes") for row in rows] == [None, None, None, 1, None]
    trained = time.perf_counter()
    return {"check_s": checked - started, "fit_s": trained - checked}


def in_world(world: str, steps: int) -> list[dict[str, Any]]:
    """Results of every task of a world, in the environment of this process."""
    sys.path.insert(0, str(Path(__file__).parent))
    rows: list[dict[str, Any]] = []
    packages = versions(world)
    for task, spec in TASKS[world].items():
        row: dict[str, Any] = {"world": world, "task": task, "packages": packages}
        with tempfile.TemporaryDirectory() as folder:
            try:
                row |= trial(spec(), Path(folder), steps)
            except Exception as error:  # a simulator may raise anything, and the row says what
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        rows.append(row)
    if world in TESTS:
        rows.append({"world": world, "task": TESTS[world], "packages": packages} | tests(world))
    return rows


def versions(world: str) -> str:
    """Versions of the packages of a world, in the environment of this process."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES[world])


def tests(world: str) -> dict[str, Any]:
    """Run the tests that need a world's packages."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS[world]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"check_s": time.perf_counter() - started}
    if done.returncode != 0:
        row["error"] = (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return row


def interpreter(world: str) -> Path:
    """Python with the packages of a world, which are installed the first time.

    Raises:
        CalledProcessError: If they cannot be installed.
    """
    if world == HERE:
        return Path(sys.executable)
    python, done = PLACE / world / "bin" / "python", PLACE / world / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", PLACE / world], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", *INSTALLS[world]]
        subprocess.run(pip, check=True, cwd=ROOT, capture_output=True, text=True)
        if world == "mjlab":  # its torchvision is of another build, and lightning cannot import it
            gone = [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"]
            subprocess.run(gone, check=True)
        done.touch()
    return python


def row_of(row: Mapping[str, Any]) -> str:
    seconds = [f"{row[name]:.1f}" if name in row else "" for name in ("check_s", "fit_s")]
    said = row.get("error", "as expected")
    cells = (row["world"], row["task"], row.get("packages", ""), *seconds, said)
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def measure(worlds: list[str], steps: int) -> list[str]:
    """Rows of the table, for all worlds."""
    rows: list[dict[str, Any]] = []
    for world in worlds:
        try:
            python = interpreter(world)
            command = [python, __file__, "--world", world, "--steps", str(steps)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=TRIES_S, cwd=ROOT
            )
            rows += json.loads(done.stdout.splitlines()[-1])
        except subprocess.CalledProcessError as error:
            last = (error.stderr or "").strip().splitlines()[-1:] or [str(error)]
            rows.append({"world": world, "task": "", "error": f"not installed: {last[0]}"})
    return [row_of(row) for row in rows]


def parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, {"worlds": [HERE], "steps": 10})
    parser.add_argument(
        "--worlds", nargs="+", choices=[HERE, *INSTALLS], default=[*INSTALLS], metavar="WORLD",
        help="(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=60, help="of check_env (default: %(default)s)")
    parser.add_argument("--world", choices=[HERE, *INSTALLS], help="print its results as JSON")
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.world is not None:
        print(json.dumps(in_world(options.world, options.steps)))
        return
    with results(__file__, options, threads="all threads") as files:
        head = ("world", "task", "packages", "check_env, s", "fit and resume, s", "")
        lines = ["Each task keeps the contract (`check_env`), trains, and is resumed.", ""]
        lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        files.write("Worlds of other simulators", [*lines, *measure(options.worlds, options.steps)])


if __name__ == "__main__":
    main()
