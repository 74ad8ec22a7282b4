"""The stages of an iteration lowered to Triton and compiled for an H100, where there is no GPU.

``python -m tests.gpu_proof.with_fake_cuda LIBRARIES tests.gpu_proof.lowering FOLDER CASE ...``
writes for each stage of the cases ``FOLDER/<case>-<stage>.py``, the program that Inductor would
load on a GPU, and prints how many kernels it has and how many of their configurations compile to
machine code. It needs the package ``triton``, which has the assembler.

Inductor is stopped when it would load the program; what it asks of the device is answered here. So
this depends on the insides of one version of torch and of triton.
"""

import importlib.util
import json
import os
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
import torch._dynamo.device_interface as interface
import torch._inductor.config as inductor
import torch._inductor.graph as graphs
import torch._inductor.runtime.triton_helpers as helpers
import torch.utils._triton as triton_utils
import triton
from torch._inductor import compile_fx
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.runtime import hints
from triton.backends.compiler import GPUTarget

from esper_lightning.compiling import loops
from esper_lightning.core import distributions
from tests.gpu_proof.fake_cuda import FakeCuda
from tests.gpu_proof.on_cuda import OnCuda
from tests.gpu_proof.stages import CASES, STAGES, stages_of, step_of_hosts

H100 = {
    "name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "warp_size": 32,
    "max_threads_per_block": 1024, "total_memory": 80 << 30, "gcnArchName": "",
    "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472, "L2_cache_size": 50 << 20,
}  # fmt: skip


class _Lowered(Exception):  # noqa: N818 - the source of a program, on its way out of Inductor
    pass


class _Driver:
    """Triton's driver of an H100 that is not there."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return 9, 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def pretend() -> None:
    """Have torch and triton find an H100."""
    properties = types.SimpleNamespace(**H100)
    answers: dict[str, Any] = {
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "current_device": 0,
        "device_count": 1,
        "is_available": True,
        "_lazy_init": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "synchronize": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    worker = interface.CudaInterface.Worker
    worker.get_device_properties = staticmethod(lambda *_: properties)
    worker.current_device = staticmethod(lambda: 0)
    interface.CudaInterface.is_available = staticmethod(lambda: True)
    interface.CudaInterface.get_compute_capability = staticmethod(lambda *_: 90)
    kept = {name: H100[name] for name in H100 if name in hints.DeviceProperties._fields}
    device = hints.DeviceProperties(type="cuda", index=0, cc=90, **kept)
    hints.DeviceProperties.create = classmethod(lambda *_: device)
    for name in ("has_triton", "has_triton_package"):
        setattr(triton_utils, name, lambda: True)
    helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(_Driver())
    # These make real tensors on the device.
    inductor.joint_graph_constant_folding = False
    for passes in (joint_graph, post_grad):
        passes.lazy_init = lambda *_, **__: None
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(inductor, name):
            setattr(inductor, name, False)

    def stop(self: graphs.GraphLowering) -> None:
        source = self.codegen()[0]
        raise _Lowered(getattr(source, "value", source))

    graphs.GraphLowering._compile_to_module = stop
    graphs.GraphLowering.compile_to_module = stop


def lower(graph: Any, tensors: list[torch.Tensor]) -> str:
    """The program that Inductor makes of a graph."""
    try:
        compile_fx.compile_fx(graph, tensors)
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _Lowered):
            inner = getattr(cause, "inner_exception", None)
            cause = inner or cause.__cause__ or cause.__context__
        if cause is None:
            raise
        return str(cause)
    raise AssertionError("Inductor was not stopped")


def compile_kernels(source: str, folder: Path) -> dict[str, int]:
    """How many kernels a program has and launches, and how many compile to machine code."""
    kernels = re.findall(
        r"^(\w+) = async_compile\.triton\('\w+', r?'''\n(.*?)^''', device_str=", source, re.S | re.M
    )
    called = r"^\s+[^#\n]*(\.run|extern_kernels\.\w+|torch\.ops\.aten\.[\w.]+)\("
    counts = {
        "kernels": len(kernels),
        "launches": len(re.findall(called, source[source.index("args.clear()") :], re.MULTILINE)),
        "configurations": 0,
        "compiled": 0,
    }
    for number, (name, body) in enumerate(kernels):
        path = folder / f"kernel{number}.py"
        path.write_text(body)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        for configuration in kernel.configs:
            compiled = kernel._precompile_config(configuration)
            counts["configurations"] += 1
            counts["compiled"] += "cubin" in compiled.kernel.asm
    return counts


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    loops.CapturedFunction = lambda function: function  # the graph of an environment
    stages: dict[str, tuple[Any, list[torch.Tensor]]] = {}
    for name in names:
        case = None if name == "growth" else OnCuda(CASES[name], "default")
        with FakeCuda() as device:
            nodes = torch.empty(32, device="cuda:0")  # the package makes real ones
            distributions._HERMITE[nodes.device] = nodes, torch.empty_like(nodes)

            def iterate(case: OnCuda | None = case, device: FakeCuda = device) -> None:
                if case is None:
                    step_of_hosts(torch.device("cuda", 0))
                else:
                    case.build()
                    case.iterate(device)

            both = zip(("update",) if case is None else STAGES, stages_of(iterate), strict=True)
            stages |= {f"{name}-{stage}": called for stage, called in both}
    pretend()
    found: dict[str, dict[str, int]] = {}
    for name, (graph, tensors) in stages.items():
        source = lower(graph, tensors)
        (folder / f"{name}.py").write_text(source)
        found[name] = compile_kernels(source, folder)
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
