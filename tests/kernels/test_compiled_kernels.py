"""Every kernel and its main variants compiled to machine code for sm_80 and sm_90. No GPU is needed.

The wrappers run as they are, on tensors in ordinary memory: their launches are only compiled, as what they are.
"""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from helpers.conv_shapes import make  # noqa: E402
from lnpu_torch.kernels import gemm, lanes, launch, pair_counts, quantize, round_output, rounding, thresholds  # noqa: E402

ARCHITECTURES = [80, 90]


class Driver:
    """A GPU that can be compiled for, and nothing else."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture  # its own cache of compiled kernels

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=ARCHITECTURES)
def compiled(request, monkeypatch, tmp_path):
    """The kernels that the test's calls would have launched, by name: of each the last one, but all are tested."""
    kernels, every, run = {}, [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)
        every.append((self.__name__, kernels[self.__name__]))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in (pair_counts, quantize, lanes, gemm, rounding, thresholds):
        monkeypatch.setattr(module, "check_device", lambda **tensors: None)
    for module in (quantize, round_output):
        monkeypatch.setattr(module, "check_runs", lambda device: None)
    for module in (quantize, lanes, gemm, thresholds):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    monkeypatch.setattr(driver, "_active", Driver(request.param))  # reset_active() looks for a GPU
    yield kernels
    for name, kernel in every:
        assert len(kernel.asm["cubin"]) > 1000
        assert f".target sm_{request.param}" in kernel.asm["ptx"]
        if name != "_profile_kernel":  # which reads a sixteenth of what the others do, and does spill registers
            assert stack(kernel, tmp_path) <= 8  # bytes; Triton 3.6 needs them in one kernel for sm_80, 3.7 none


def stack(kernel, folder):
    """Bytes of memory that each thread takes for itself."""
    (folder / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"STACK:(\d+)", usage)))


def accesses(kernel):
    """Widths of the kernel's global loads and stores, as (vector, bits)."""
    pattern = r"\b(ld|st)\.global(?:\.v(\d))?\.[bf](\d+)"
    return {(kind, int(vector or 1) * int(bits)) for kind, vector, bits in re.findall(pattern, kernel.asm["ptx"])}


def t(value=0):
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize(compiled, dtype):
    quantize.quantize(torch.empty(2**20, dtype=dtype), t(), "e4m3", "fp16", totals=True)
    assert compiled.keys() == {"_flat_kernel", "_totals_kernel"}
    assert {("ld", 128), ("st", 128)} <= accesses(compiled["_flat_kernel"])
    assert "e4m3" not in compiled["_flat_kernel"].asm["ptx"]  # there is no FP8 cast before sm_89


@pytest.mark.parametrize(
    ("low", "high", "seed", "dtype"),
    [
        ("e5m2", None, None, torch.float16),
        (None, "fp16", None, torch.float32),
        ("e4m3", "e6m9", 1, torch.float32),
        ("e4m3", "fp16", 1, torch.float16),
    ],
)
def test_quantize_by_other_rules(compiled, low, high, seed, dtype):
    x = torch.empty(64, 32, 16, 16).to(memory_format=torch.channels_last)
    seed = None if seed is None else torch.tensor(seed)
    quantize.quantize(x, t(), low, high, seed=seed, dtype=dtype)
    quantize.quantize_grid(x, t(), low, high, 64, 1, half=high != "e6m9", single=dtype == torch.float32, seed=seed)
    assert compiled.keys() == {"_flat_kernel", "_grid_kernel"}


GRIDS = {
    "contiguous": (torch.empty(512, 64, 32, 32), 1),
    "channels_last": (torch.empty(512, 64, 32, 32).to(memory_format=torch.channels_last), 1),
    "groups": (torch.empty(64, 64, 16, 16).to(memory_format=torch.channels_last), 16),
    "linear": (torch.empty(4096, 512, dtype=torch.float16), 1),
}


@pytest.mark.parametrize("layout", GRIDS)
def test_quantize_grid(compiled, layout):
    x, groups = GRIDS[layout]
    quantize.quantize_grid(x, t(), "e4m3", "fp16", len(x), groups)
    kernel = compiled["_grid_kernel"]
    if layout != "linear":
        assert {("ld", 128), ("st", 128)} <= accesses(kernel)
    assert "atom.global.gpu.relaxed" in kernel.asm["ptx"]


def test_grid_sums(compiled):
    quantize.grid_sums(torch.empty(64, 64, 14, 14, dtype=torch.uint8), 1, 1)
    assert compiled.keys() == {"_grid_kernel"}


@pytest.mark.parametrize("options", [{"max_error": 0.01}, {"fp16_share": 0.2}, {"threshold": 3}, {"high": None}])
def test_threshold(compiled, options):
    choice = thresholds.Choice.of("e4m3", **{"high": "fp16"} | options)
    states, counts = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(300, dtype=torch.int32)
    x, w = torch.empty(64, 64, 14, 14, dtype=torch.bfloat16), torch.empty(64, 64, 14, 14).transpose(0, 3)
    thresholds.choose(x, choice, states, 0, True)
    thresholds.choose(w, choice, states, 1, False, counts)
    ptx = compiled["_threshold_kernel"].asm["ptx"]
    # What a program found is in memory before its ticket says so: all threads' writes, the barrier, then the ticket.
    before = ptx[: ptx.index("atom.global.gpu.acq_rel.add")]
    assert (
        before.rindex("bar.sync") > before.rindex("st.global") if "st.global" in before else options == {"threshold": 3}
    )


@pytest.mark.parametrize("dims", [0, 2])
def test_count(compiled, dims):
    geometry = make(32, 64, 96, 2, *((value,) * dims for value in (14, 3, 2, 1, 1)))
    shapes = {"conv_input": geometry.conv_input, "conv_output": geometry.conv_output}
    channels = {"conv_input": 64, "conv_output": 96}
    counts = {
        side: [torch.empty(2, channels[side], *grid).int(), torch.empty(2, 32, 2, *grid).int()]
        for side, grid in shapes.items()
    }
    counter = torch.zeros(pair_counts.WIDTH, dtype=torch.int64)
    for side in shapes:
        weight = torch.empty(2, channels[side], *geometry.kernel).int()
        pair_counts.add_weight_step(counter, counts[side][0], weight, geometry.pack(), side)
        pair_counts.add_grid_step(counter, counts["conv_input"], counts["conv_output"], geometry.pack(), side)
    assert compiled.keys() == {"_weight_kernel", "_grid_kernel"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result(compiled, dtype):
    x = torch.empty(64, 64, 14, 14).to(memory_format=torch.channels_last)
    for source, form in ((x, "fp16"), (x, "e6m9"), (x.bfloat16(), "fp16")):
        round_output.round_result(source, form, dtype)
        assert {("ld", 128), ("st", 128)} <= accesses(compiled["_result_kernel"])


def uses_tensor_cores(kernel):
    return any(word in kernel.asm["ptx"] for word in ("wgmma.mma_async", "mma.sync.aligned"))


@pytest.mark.parametrize("chunk", [None, 16, 64, 100])
def test_matmul(compiled, chunk):
    a = torch.empty(512, 1024, dtype=torch.float16)
    gemm.matmul(a, a.T, chunk=chunk)
    kernel = compiled["_product_kernel"]
    assert uses_tensor_cores(kernel)
    assert ".f32.f16.f16" in kernel.asm["ptx"]  # sums in FP32
    assert "cp.async" in kernel.asm["ptx"]
    # A chunk's sum must be added, and rounded, outside the tensor core.
    assert kernel.asm["ttgir"].count("arith.addf") == kernel.asm["ttgir"].count("arith.truncf") == (chunk is not None)


@pytest.mark.parametrize(("layout", "chunk"), [("last", None), ("last", 64), ("first", 64)])
def test_convolution(compiled, layout, chunk):
    geometry = make(16, 64, 128, 1, (32, 32), (3, 3), (2, 2), (1, 1), (1, 1))
    format_ = torch.channels_last if layout == "last" else torch.contiguous_format
    conv_input, conv_output, weight = (
        torch.empty(shape, dtype=torch.float16).to(memory_format=format_)
        for shape in ((16, 64, 32, 32), (16, 128, 16, 16), (128, 64, 3, 3))
    )
    steps = (gemm.conv_forward, conv_input, weight), (gemm.conv_grad_input, conv_output, weight)
    for step, *operands in (*steps, (gemm.conv_grad_weight, conv_input, conv_output)):
        compiled.clear()
        step(*operands, geometry.pack(), chunk=chunk)
        kernel = compiled["_product_kernel"]
        assert uses_tensor_cores(kernel)
        if layout == "last" and chunk is None:
            assert "cp.async" in kernel.asm["ptx"] and ("ld", 16) not in accesses(kernel)


def test_convolution_with_bias(compiled):
    geometry = make(16, 64, 128, 1, (32, 32), (3, 3), (1, 1), (1, 1), (1, 1))
    x, weight = (
        torch.empty(shape, dtype=torch.float16).to(memory_format=torch.channels_last)
        for shape in ((16, 64, 32, 32), (128, 64, 3, 3))
    )
    bias = torch.empty(128)
    gemm.conv_forward(x, weight, geometry.pack(), bias=bias, dtype=torch.float16)
    kernel = compiled["_product_kernel"]
    assert uses_tensor_cores(kernel) and "cp.async" in kernel.asm["ptx"] and ("ld", 16) not in accesses(kernel)


def test_without_a_gpu_the_wrappers_say_so():
    x = torch.ones(4, 4)
    assert not launch.INTERPRETED
    with pytest.raises(RuntimeError, match="run on GPUs, but the tensors are on cpu"):
        quantize.quantize(x, t(), "e4m3", "fp16")
    with pytest.raises(RuntimeError, match="run on GPUs"):
        gemm.matmul(x.half(), x.half())


@pytest.mark.parametrize("shape", [(8, 3, 32, 32), (2, 512, 4, 4), (64, 512)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_lanes(compiled, shape, last):
    x = torch.empty(shape, dtype=torch.float16)
    lanes.profile(lanes.runs_of(x.to(memory_format=torch.channels_last) if last and x.dim() == 4 else x))
    assert compiled.keys() == {"_runs_kernel", "_profile_kernel"}
    assert {("ld", 128)} & accesses(compiled["_runs_kernel"]) or shape[1] == 3


def test_runs_while_rounding(compiled):
    x, _ = GRIDS["channels_last"]
    quantize.quantize_grid(x, t(), "e4m3", "fp16", len(x), 1, runs=True)
    assert {("ld", 128), ("st", 128)} <= accesses(compiled["_grid_kernel"])
