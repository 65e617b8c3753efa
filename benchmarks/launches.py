"""What a layer's step costs the host on a GPU, measured without one: launches, Python calls, kernels compiled.

    python benchmarks/launches.py [--json] [--only linear resnet18 ...]

Triton compiles for a GPU as ever, and its own launcher calls a stand-in for the CUDA driver (driver_stand_in.c), which
runs nothing. Torch's convolutions and matrix products return memory as it is. So no value means anything, and the time
is the host's alone; CUDA's own, a few microseconds a launch, comes on top. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import importlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

HERE = Path(__file__).parent
Step = Callable[[], Any]
CONVOLUTION = torch.ops.aten.convolution.default
VIEWS = ("view", "reshape", "expand", "slice", "select", "squeeze", "transpose", "permute", "t", "alias", "detach")
"""Operations of torch's that launch nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    parser.add_argument("--only", nargs="+", choices=[*LAYERS, *NETWORKS], default=[*LAYERS, *NETWORKS])
    parser.add_argument("--repeats", type=int, default=300, help="steps that are timed")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU that is compiled for: 75, 80, 90 ...")
    options = parser.parse_args()
    stand_in = begin(options.capability)
    fork = multiprocessing.get_context("fork")
    for name in options.only:  # each in a process of its own, so that none finds another's kernels
        process = fork.Process(target=measure, args=(name, stand_in, options.repeats, options.json))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name}: failed")


def measure(name: str, stand_in: ctypes.CDLL, repeats: int, as_json: bool) -> None:
    if name in LAYERS:
        make, shape = LAYERS[name]
        row = layer_costs(make(), shape, stand_in, repeats)
    else:
        row = network_costs(NETWORKS[name])
    print(json.dumps({"name": name} | row) if as_json else f"{name}: {row}", flush=True)


COMPILED: list[tuple[str, bytes]] = []
"""Names and binaries of the kernels that were compiled, in order."""


def begin(capability: int) -> ctypes.CDLL:
    """Put the stand-ins in place: of the driver, of what asks for a GPU, and of torch's products.

    The process begins anew, so that the dynamic linker finds the driver's.
    """
    folder = os.environ.get("STAND_IN")
    if folder is None:
        folder = tempfile.mkdtemp()
        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        target = Path(folder) / "libcuda.so.1"
        command = [
            "cc",
            "-shared",
            "-fPIC",
            "-O2",
            "-I",
            str(include),
            str(HERE / "driver_stand_in.c"),
            "-o",
            str(target),
        ]
        subprocess.run(command, check=True)
        paths = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
        own = {"STAND_IN": folder, "TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": paths}
        own |= {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", f"{folder}/triton")}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **own})
    stand_in = ctypes.CDLL(f"{folder}/libcuda.so.1")
    driver._active = _Driver(capability)
    compile_ = JITFunction._do_compile

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        kernel = compile_(self, *args, **options)
        COMPILED.append((self.__name__, kernel.asm["cubin"]))
        return kernel

    JITFunction._do_compile = noted
    from lnpu_torch.kernels import count, gemm, lanes, launch, operand, quantize, round_output, rounding, thresholds

    replaced: dict[str, Callable[..., Any]] = {
        "check_device": lambda **tensors: None,
        "check_runs": lambda device: None,
        "obstacle": lambda device: None,
        "processors": lambda device: 132,
    }
    for module in (count, gemm, lanes, launch, operand, quantize, round_output, rounding, thresholds):
        for name in replaced.keys() & vars(module).keys():
            setattr(module, name, replaced[name])
    importlib.import_module("lnpu_torch.nn")  # all that asks for torch's own operations
    from lnpu_torch.ops.gemm import half_precision

    torch.set_num_threads(1)
    half_precision.half_matmul = _half_matmul
    for name, function in (("convolution", _convolution), ("convolution_backward", _convolution_backward)):
        setattr(torch.ops.aten, name, _Replaced(getattr(torch.ops.aten, name), function))
    return stand_in


class _Driver(nvidia.CudaDriver):  # type: ignore[misc]
    """Triton's, but for the questions that it puts to torch."""

    def __init__(self, capability: int) -> None:
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.target = GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Replaced:
    """An operation of torch's that is called as another function, and else is itself."""

    def __init__(self, operation: Any, function: Callable[..., Any]) -> None:
        self.operation, self.function = operation, function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operation, name)


def _half_matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    sums = torch.empty(a.shape[0], b.shape[1])
    return sums if bias is None else sums.add_(bias)


def _convolution(x: Tensor, weight: Tensor, bias: Any, *others: Any) -> Tensor:
    with _disable_current_modes():
        shape = CONVOLUTION(x.to("meta"), weight.to("meta"), None, *others).shape
    form = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, memory_format=form)


def _convolution_backward(error: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    made = torch.empty_like(x), torch.empty_like(weight), error.new_empty(error.shape[1])
    return tuple(each if wanted else None for each, wanted in zip(made, others[-1], strict=True))


def activations(shape: Sequence[int], dtype: torch.dtype = torch.float16) -> Tensor:
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, memory_format=form)


def last(model: nn.Module) -> nn.Module:
    moved: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def step_of(model: nn.Module, x: Tensor) -> Step:
    """Forward and backward under autocast, as where a GPU trains."""
    from lnpu_torch.ops.dispatch import backend

    def step() -> None:
        with backend("triton"):
            with torch.autocast("cpu", torch.float16):
                output = model(x)
            output.backward(torch.empty_like(output))
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return step


class _Operations(TorchDispatchMode):
    """Counts those of torch's operations that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if not name.startswith(("empty", "new_empty", "as_strided", "_unsafe_view", "split", *VIEWS)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def layer_costs(layer: nn.Module, shape: Sequence[int], stand_in: ctypes.CDLL, repeats: int) -> dict[str, Any]:
    """Of one layer's step: launches of ours, operations of torch's but for products, calls, microseconds."""
    import lnpu_torch as lnpu

    model = last(lnpu.convert(nn.Sequential(layer)))
    step = step_of(model, activations(shape).requires_grad_())
    step()
    before = stand_in.stand_in_launches()
    step()
    launches = stand_in.stand_in_launches() - before
    with _Operations() as operations:
        step()
    calls: collections.Counter[str] = collections.Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    step()
    sys.setprofile(None)
    times = []
    for _ in range(repeats):
        start = time.thread_time_ns()
        step()
        times.append((time.thread_time_ns() - start) / 1e3)
    return {
        "launches": launches,
        "torch_operations": sum(operations.found.values()),
        "torch": dict(operations.found),
        "python_calls": calls["call"],
        "microseconds": round(statistics.median(times), 1),
    }


def network_costs(make: Callable[[], tuple[nn.Module, Sequence[int]]]) -> dict[str, Any]:
    """Kernels that a network's first step compiles, CPU seconds of that, and kernels at another batch size.

    `stack_bytes`: the most memory that a thread of one of them takes for itself.
    """
    import lnpu_torch as lnpu

    COMPILED.clear()
    network, (batch, *rest) = make()
    model = last(lnpu.convert(network))
    start = time.process_time()
    step_of(model, activations((batch, *rest)))()
    seconds, first = time.process_time() - start, [*COMPILED]
    COMPILED.clear()
    step_of(model, activations((batch - 3, *rest)))()
    return {
        "kernels": len(first),
        "by_name": dict(collections.Counter(name for name, _ in first)),
        "stack_bytes": max(stack_bytes(binary) for _, binary in first),
        "cpu_seconds": round(seconds, 1),
        "kernels_at_another_batch_size": len(COMPILED),
    }


def stack_bytes(binary: bytes) -> int:
    """Memory that each thread of a compiled kernel takes for itself, as where registers do not suffice."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


def _resnet18() -> tuple[nn.Module, Sequence[int]]:
    sys.path.insert(0, str(HERE.parent))
    from recipes.models import ResNet18

    return ResNet18(10, 3, 64), (8, 3, 32, 32)


class _Blocks(nn.Module):
    """Transformer's linear layers."""

    def __init__(self, width: int = 192, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            sizes = (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)
            self.layers.extend(nn.Linear(*size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x[..., : layer.in_features])
        return x


class _MobileNet(nn.Module):
    """A depthwise separable block."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(24, 144, 1, bias=False), nn.BatchNorm2d(144)
        self.depthwise = nn.Conv2d(144, 144, 3, padding=1, groups=144, bias=False)
        self.project = nn.Conv2d(144, 24, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(F.relu6(self.depthwise(F.relu6(self.norm(self.expand(x))))))
        return out


LAYERS: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "convolution": (lambda: nn.Conv2d(64, 64, 3, padding=1, bias=False), (8, 64, 8, 8)),
    "convolution with bias": (lambda: nn.Conv2d(64, 64, 3, padding=1), (8, 64, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), (8, 64, 8, 8)),
    "linear": (lambda: nn.Linear(512, 512), (64, 512)),
    "large linear": (lambda: nn.Linear(512, 512), (4096, 512)),
}
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Sequence[int]]]] = {
    "resnet18": _resnet18,
    "transformer blocks": lambda: (_Blocks(), (4, 50, 192)),
    "depthwise separable block": lambda: (_MobileNet(), (8, 24, 28, 28)),
}

if __name__ == "__main__":
    main()
