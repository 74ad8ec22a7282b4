"""Golden histories: what twenty iterations of each config come to, for a version of torch.

    python -m tests.training.golden --device cpu

writes the file of the installed torch and of a kind of device into ``tests/fixtures/golden``. Run
it after a change that is meant to change results, or with a new torch once ``test_golden.py`` has
said what differs. The configs are trained eagerly, in one thread, by ``esper fit``; sizes are small
and all else is theirs.
"""

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch

from esper_lightning.cli.shipped import FOLDER
from esper_lightning.forensics.files import read_json_lines
from tests import forked

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
ITERATIONS = 20
SIZES = {"env.num_envs": 4, "ppo.rollout_steps": 16, "ppo.epochs": 2, "ppo.minibatches": 2}
SMALLER = {"morphogenesis": {"env.num_envs": 2, "ppo.rollout_steps": 4}}
# Packages whose simulations decide the results, for each config of the development environment.
CONFIGS = {
    "acrobot": (),
    "cartpole": (),
    "doorkey": ("gymnasium", "minigrid"),
    "halfcheetah": ("gymnasium", "mujoco"),
    "hopper": ("gymnasium", "mujoco"),
    "lunarlander": ("gymnasium", "Box2D"),
    "morphogenesis": ("scikit-learn",),
    "mountain_car": (),
    "navigation": ("vmas",),
    "pendulum": (),
    "swimmer": ("gymnasium", "mujoco"),
    "walker2d": ("gymnasium", "mujoco"),
}
METRICS = (
    "env_steps",
    "rollout/episode_return_mean",
    "loss/policy",
    "loss/value",
    "loss/entropy",
    "policy/approx_kl",
    "policy/explained_variance",
    "optim/grad_norm",
)


def train(config: str, device: str, folder: Path) -> list[list[float | None]]:
    """The metrics of each iteration of a config, in the order of ``METRICS``."""
    sizes = SIZES | SMALLER.get(config, {})
    env_steps = ITERATIONS * sizes["env.num_envs"] * sizes["ppo.rollout_steps"]
    settings = {f"model.{name}": value for name, value in sizes.items()}
    settings |= {"model.total_env_steps": env_steps, "model.compile": "off"}
    settings |= {"trainer.limit_val_batches": 0, "trainer.logger": "false"}
    settings |= {"trainer.enable_progress_bar": "false", "trainer.enable_checkpointing": "false"}
    settings |= {"trainer.accelerator": device, "run_dir": folder / "run"}
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = ["-m", "esper_lightning.cli.main", "fit", "--config", FOLDER / f"{config}.yaml"]
    done = forked.run([*command, *words], cwd=folder, timeout=900.0)
    assert done.returncode == 0, done.stderr
    rows = read_json_lines(folder / "run" / "rank0" / "history.jsonl")
    assert len(rows) == ITERATIONS
    return [[row[name] for name in METRICS] for row in rows]


def conditions(device: str) -> dict[str, str]:
    """What else decides the last bits of a result: the version of torch, and the processor."""
    if device == "cuda":
        return {"torch": torch.__version__, "processor": torch.cuda.get_device_name()}
    known: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        known.setdefault(name, value)
    names = ("model name", "cpu family", "model")  # the product's name may be of several models
    processor = ", ".join(known[name] for name in names if name in known)
    level = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "processor": f"{processor}, {level}"}


def versions(config: str) -> dict[str, str]:
    """Versions of the packages that simulate the environments of a config."""
    return {name: importlib.metadata.version(name) for name in CONFIGS[config]}


def path_of(device: str, version: str = torch.__version__) -> Path:
    """The file of a version of torch, without its build, and a kind of device."""
    return GOLDEN / f"{device}-torch-{version.partition('+')[0]}.json"


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--configs", nargs="+", default=[*CONFIGS], help="to write anew (all)")
    parser.add_argument("--output", type=Path, help="a file to compare with")
    return parser


def main() -> None:
    """Train every config, and write the file."""
    options = parser().parse_args()
    device, path = options.device, options.output or path_of(options.device)
    before = json.loads(path.read_text()) if path.exists() else {}
    same = before.get("conditions") == conditions(device)
    histories = before["histories"] if same else {}
    for config in options.configs:
        with tempfile.TemporaryDirectory() as folder:
            rows = train(config, device, Path(folder))
        histories[config] = {"versions": versions(config), "rows": rows}
        print(config, rows[-1], flush=True)
        write(path, device, histories)


def write(path: Path, device: str, histories: dict[str, object]) -> None:
    """Write a file of histories, a line for each iteration."""
    content = {"conditions": conditions(device), "metrics": METRICS, "histories": histories}
    text = json.dumps(content, indent=0).replace("\n", " ")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")  # so that no moment has half a file
    new.write_text(text.replace("], [", "],\n[").replace("] }, ", "] },\n") + "\n")
    new.replace(path)


if __name__ == "__main__":
    main()
