"""Programs for a GPU in Triton's interpreter on a CPU, compared with the graphs they were made of.

``TRITON_INTERPRET=1 python -m tests.gpu_proof.interpreted FOLDER CASE ...`` runs the programs that
``lowering`` has written to ``FOLDER``, and prints the greatest relative difference of each over its
results and over the arguments that it writes. Functions of CUDA's library are those of numpy, sizes
of blocks are chosen here, and products run on the CPU. So index arithmetic, masks, reductions and
writes in place are tested; the accuracy of CUDA's functions, launch configurations and races are
not.
"""

import contextlib
import inspect
import json
import sys
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.runtime.triton_helpers as helpers
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from esper_lightning.compiling import loops
from esper_lightning.core import constants
from esper_lightning.core.running_stats import ObsNormalizer, RunningStats
from esper_lightning.ppo.agent import Agent
from esper_lightning.ppo.learner import Learner
from esper_lightning.ppo.optimizer import build_optimizer
from tests.gpu_proof.stages import CASES, STAGES, copy_of, stages_of, step_of_hosts

_FUNCTIONS: dict[str, Any] = {
    "tanh": np.tanh, "expm1": np.expm1, "pow": np.power, "exp": np.exp, "log": np.log,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "cos": np.cos, "sin": np.sin,
    "log1p": np.log1p, "nearbyint": np.rint, "floor": np.floor, "abs": np.abs, "isinf": np.isinf,
    "isnan": np.isnan,
}  # fmt: skip


def _of_numpy(function: Any) -> Any:
    """A function of CUDA's library for the interpreter."""

    def call(*values: Any) -> Any:
        tensors = [value for value in values if hasattr(value, "handle")]
        like = max(tensors, key=lambda tensor: tensor.handle.data.size)
        data = [v.handle.data if hasattr(v, "handle") else getattr(v, "value", v) for v in values]
        with np.errstate(all="ignore"):
            result = np.asarray(function(*data))
        if result.dtype == np.bool_:
            kind = tl.core.block_type(tl.int1, like.type.shape) if like.type.is_block() else tl.int1
            return tl.core.tensor(TensorHandle(result, tl.int1), kind)
        result = result.astype(like.handle.data.dtype)
        return tl.core.tensor(TensorHandle(result, like.handle.dtype), like.type)

    return call


class _Kernel:
    """A kernel that the interpreter runs, with sizes of blocks that divide the work."""

    def __init__(self, function: Any, kind: str) -> None:
        self._function, self._kind = function, kind

    def run(self, *args: Any, stream: object = None) -> None:
        names = list(inspect.signature(self._function.fn).parameters)
        given = dict(zip(names, args, strict=False))
        x, y, r = (int(given.get(name) or 1) for name in ("xnumel", "ynumel", "r0_numel"))
        widest = 1024 if self._kind == "pointwise" else 8
        sizes = {
            "XBLOCK": min(widest, triton.next_power_of_2(x)),
            "YBLOCK": min(64, triton.next_power_of_2(y)),
            "R0_BLOCK": min(128, triton.next_power_of_2(r)),
            **dict.fromkeys(("NUM_STAGES", "RSPLIT_SIZE", "RSPLIT"), 1),
        }
        chosen = {name: sizes[name] for name in names if name not in given}
        grid = [triton.cdiv(x, chosen.get("XBLOCK", 1))]
        if "ynumel" in given:
            grid.append(triton.cdiv(y, chosen["YBLOCK"]))
        self._function[tuple(grid)](*args, **chosen)


def _heuristics() -> types.SimpleNamespace:
    def decorator(kind: str) -> Any:
        return lambda *_, **__: lambda function: _Kernel(function, kind)

    kinds = ("pointwise", "reduction", "persistent_reduction", "foreach", "cooperative_reduction")
    return types.SimpleNamespace(**{kind: decorator(kind) for kind in (*kinds, "split_scan")})


class _Compiler:
    """``AsyncCompile`` of Inductor, whose kernels run in the interpreter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def triton(self, name: str, body: str, **_: Any) -> _Kernel:
        body = body.replace("import triton_helpers, triton_heuristics", "import triton_helpers")
        line = "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
        path = self._folder / f"interpreted{len(list(self._folder.glob('interpreted*')))}.py"
        path.write_text(body.replace(line, ""))  # the interpreter reads the source of its kernels
        library = types.SimpleNamespace(**{n: _of_numpy(f) for n, f in _FUNCTIONS.items()})
        space: dict[str, Any] = {"triton_heuristics": _heuristics(), "__file__": str(path)}
        space |= {"libdevice": library, "tl_math": library}
        exec(compile(path.read_text(), path, "exec"), space)
        return space[name]

    def wait(self, space: dict[str, Any]) -> None:
        pass


def program(path: Path) -> Callable[[list[torch.Tensor]], Any]:
    """The function of a program, for tensors on the CPU."""
    text = path.read_text()
    for old, new in {
        "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "",
        "torch.cuda._DeviceGuard(0)": "nullcontext()",
        "torch.cuda.set_device(0)": "pass",
        "torch._C._dynamo.guards._empty_strided_cuda": "empty_on_cpu",
        "async_compile = AsyncCompile()": "async_compile = Compiler",
        "device='cuda'": "device='cpu'",
        "device(type='cuda', index=0)": "device('cpu')",
    }.items():
        text = text.replace(old, new)
    space: dict[str, Any] = {
        "get_raw_stream": lambda _: 0,
        "empty_on_cpu": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        "nullcontext": contextlib.nullcontext,
        "Compiler": _Compiler(path.parent),
        "__name__": "program",
    }
    exec(compile(text, path, "exec"), space)
    return space["call"] if "call" in space else space["runner"].call


def iterate(name: str) -> None:
    """An iteration of a case on the CPU, compiled as on CUDA."""
    spec, policy_spec, config, _ = CASES[name]
    spaces, cpu = spec.spaces(), torch.device("cpu")
    policy = policy_spec.build(spaces, torch.Generator().manual_seed(0))
    acting, order = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    learner = Learner(
        spec,
        spec.build(cpu, 0),
        Agent(policy, ObsNormalizer(spaces.obs, clip=10.0)),
        config,
        RunningStats(()),
        exploration=acting,
        sample_order=order,
        mode="default",
        device=cpu,
    )
    learner.start(build_optimizer(policy, config), None)
    targets = learner.compute_targets(learner.rollout(config.rollout_steps))
    learner.update(targets, learning_rate=3e-4)


@torch.no_grad()
def difference(graph: Any, tensors: list[torch.Tensor], path: Path) -> float:
    """The greatest relative difference of results and arguments after a call."""
    expected_args, args = ([copy_of(tensor) for tensor in tensors] for _ in range(2))
    expected = [*(graph(*expected_args) or []), *expected_args]
    # Constants of the graph come first among the arguments of a program.
    lifted = [v.clone() for k, v in graph.named_buffers()]
    got = [*(program(path)([*lifted, *args]) or []), *args]
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        if one is None or one.numel() == 0:
            continue
        exact, near = one.double().nan_to_num(), other.double().nan_to_num()
        worst = max(worst, (exact - near).abs().max().item() / max(1.0, exact.abs().max().item()))
    return worst


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    helpers.set_driver_to_gpu = lambda: None
    loops._is_native = lambda mode, device: False
    loops._is_compiled = lambda mode, device: True
    found: dict[str, float] = {}
    for name in names:
        if name == "growth":  # its graph makes the cached tensors itself, as on the faked device
            constants._disable_current_modes = contextlib.nullcontext
            names_of, run = ("update",), lambda: step_of_hosts(torch.device("cpu"))
        else:
            names_of, run = STAGES, partial(iterate, name)
        for stage, (graph, tensors) in zip(names_of, stages_of(run), strict=True):
            path = folder / f"{name}-{stage}.py"
            found[path.stem] = difference(graph, tensors, path)
            print(path.stem, found[path.stem], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
