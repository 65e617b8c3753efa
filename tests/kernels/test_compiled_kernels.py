"""Every kernel and its main variants compiled to machine code for GPUs of several generations. No GPU is needed.

The wrappers run as they are, on tensors in ordinary memory: their launches are only compiled, as what they are.
"""

import os
import re
import sys
import time

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from helpers.conv_shapes import make  # noqa: E402
from helpers.paths import ROOT  # noqa: E402
from lnpu_torch.kernels import (  # noqa: E402
    count,
    gemm,
    lanes,
    launch,
    operand,
    quantize,
    round_output,
    rounding,
    thresholds,
)
from lnpu_torch.ops.quantize.gpu import choice  # noqa: E402
from lnpu_torch.quant.precision import Rule  # noqa: E402

sys.path.insert(0, str(ROOT / "benchmarks"))
from launches import stack_bytes  # noqa: E402

ARCHITECTURES = [75, 90, *(pytest.param(each, marks=pytest.mark.slow) for each in (80, 86, 100, 120))]
LONGEST_S = 20.0
"""CPU seconds that a kernel may take to compile: several times what it does, on a slow machine."""


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
def compiled(request, monkeypatch):
    """The kernels that the test's calls would have launched, by name: of each the last one, but all are tested."""
    kernels, every, run = {}, [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        start = time.process_time()
        kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)
        assert time.process_time() - start < LONGEST_S
        every.append(kernels[self.__name__])

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in (count, gemm, lanes, operand, quantize, round_output, rounding, thresholds):
        for name, value in (
            ("check_device", lambda **tensors: None),
            ("check_runs", lambda device: None),
            ("processors", lambda device: 132),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(driver, "_active", Driver(request.param))  # reset_active() looks for a GPU
    yield kernels
    for kernel in every:
        assert len(kernel.asm["cubin"]) > 1000
        assert f".target sm_{request.param}" in kernel.asm["ptx"]
        assert stack_bytes(kernel.asm["cubin"]) <= 16  # bytes; in one stochastic kernel for sm_100, else at most 8


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
    rule, wanted = Rule(low=low, high=high), operand.Wanted(dtype == torch.float32, high != "e6m9")
    operand.read(x, choice(rule), low, high, (64, 1), wanted, threshold=t(), seed=seed)
    assert compiled.keys() == {"_flat_kernel", "_operand_kernel"}


def laid(*shape, last=True, dtype=torch.float16):
    """A grid in channels_last, or contiguous."""
    form = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=form)


RUNS = operand.Wanted(runs=True)
OPERANDS = {  # an operand, samples that share a count, channel groups, what is wanted, random bits
    "contiguous": (laid(512, 64, 32, 32, last=False), 512, 1, RUNS, None),
    "channels_last": (laid(512, 64, 32, 32), 512, 1, RUNS, None),
    "many channels": (laid(64, 512, 4, 4), 64, 1, RUNS, None),
    "images": (laid(64, 3, 32, 32, dtype=torch.float32), 64, 1, RUNS, None),
    "groups": (laid(64, 64, 16, 16), 64, 16, RUNS, None),
    "depthwise": (laid(64, 96, 16, 16), 64, 96, RUNS, None),
    "depthwise, contiguous": (laid(64, 96, 14, 14, last=False), 64, 96, RUNS, None),
    "weight": (laid(256, 256, 3, 3, last=False, dtype=torch.float32), 256, 1, operand.Wanted(), None),
    "weight in channels_last": (laid(256, 256, 3, 3, dtype=torch.float32), 256, 1, operand.Wanted(), None),
    "linear": (laid(4096, 512), 4096, 1, RUNS, None),
    "linear, bfloat16 and float32 values": (
        laid(4096, 510, dtype=torch.bfloat16),
        4096,
        1,
        operand.Wanted(single=True, half=False, runs=True),
        None,
    ),
    "stochastic": (laid(64, 64, 16, 16), 64, 1, RUNS, torch.tensor(1)),
    "stochastic, contiguous": (laid(64, 64, 16, 16, last=False), 64, 1, RUNS, torch.tensor(1)),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_operands(compiled, name):
    x, share, groups, wanted, seed = OPERANDS[name]
    states = torch.zeros(6, 2, dtype=torch.int32)
    for training in (True, False) if name == "channels_last" else (True,):
        operand.read(
            x, choice(Rule()), "e4m3", "fp16", (share, groups), wanted, states=states, training=training, seed=seed
        )
        kernel = compiled["_operand_kernel"]
        ptx = kernel.asm["ptx"]
        if x.shape[-1] % 8 == 0 and x.dtype == torch.float16:
            assert {("ld", 128), ("st", 128)} <= accesses(kernel)
        if training:
            # What a program found is in memory before its ticket says so: all threads' writes, the barrier, the ticket.
            before = ptx[: ptx.index("atom.global.gpu.acq_rel.add")]
            assert before.rindex("bar.sync") > before.rindex("st.global")
        assert "atom.global.gpu.relaxed" in ptx and "global.gpu.acquire" in ptx
        assert "atom.global.gpu.release.exch" in ptx


def test_another_batch_size_compiles_nothing(compiled):
    """Nor do other sizes that lie in memory alike: sizes are run-time arguments."""
    states, found = torch.zeros(6, 2, dtype=torch.int32), set()
    for batch, channels, edge in ((64, 64, 32), (50, 64, 32), (1, 64, 32), (64, 64, 30), (33, 48, 25)):
        x = laid(batch, channels, edge, edge)
        operand.read(x, choice(Rule()), "e4m3", "fp16", (batch, 1), RUNS, states=states, training=True)
        geometry = make(batch, channels, 96, 1, (edge, edge), (3, 3), (2, 2), (1, 1), (1, 1))
        count_a_pass(geometry)
        found |= {(name, kernel.hash) for name, kernel in compiled.items()}
    assert sorted(name for name, _ in found) == ["_count_kernel", "_operand_kernel"]


def count_a_pass(geometry):
    """All that a backward counts."""
    grids, counters = [], torch.zeros(3, 10, count.WIDTH, dtype=torch.int64)
    for channels, grid in (
        (geometry.in_channels, geometry.conv_input),
        (geometry.out_channels, geometry.conv_output),
    ):
        shapes = (2, channels, *grid), (2, geometry.batch, geometry.groups, *grid)
        grids.append([torch.empty(shape, dtype=torch.int32) for shape in shapes])
    weight = torch.empty(2, geometry.out_channels, *geometry.kernel, dtype=torch.int32)
    lanes_, runs = torch.zeros(3, 2, 81, dtype=torch.int64), torch.empty(geometry.batch, 96, 5, dtype=torch.uint8)
    count.count(
        counters,
        lanes_,
        geometry.pack(),
        count.WeightStep(190, grids[1][0], weight, "conv_output"),
        count.GridStep(380, *grids, "conv_input"),
        count.Profile(runs, 162, lanes_, 405),
        count.Known(lanes_[0, 0], 324),
        torch.zeros(6, 2, dtype=torch.int32),
    )


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


@pytest.mark.parametrize("edges", [(), (4, 4), (9, 9), (40, 40)], ids=str)
def test_count(compiled, edges):
    dims = len(edges)
    count_a_pass(make(32, 64, 96, 2, edges, *((value,) * dims for value in (3, 2, 1, 1))))
    assert compiled.keys() == {"_count_kernel"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_result(compiled, dtype):
    x = torch.empty(64, 64, 14, 14).to(memory_format=torch.channels_last)
    for source, form in ((x, "fp16"), (x, "e6m9"), (x.bfloat16(), "fp16")):
        round_output.round_result(source, form, dtype)
        assert {("ld", 128), ("st", 128)} <= accesses(compiled["_result_kernel"])


def uses_tensor_cores(kernel):
    return any(word in kernel.asm["ptx"] for word in ("wgmma.mma_async", "mma.sync.aligned", "tcgen05.mma"))


@pytest.fixture
def products(compiled, request):
    """`compiled`, for GPUs on which the kernels multiply."""
    if driver._active.architecture < 80:
        pytest.skip("Triton has no tensor cores there, and torch multiplies")
    return compiled


@pytest.mark.parametrize("chunk", [None, 16, 64, 100])
def test_matmul(products, chunk):
    a = torch.empty(512, 1024, dtype=torch.float16)
    gemm.matmul(a, a.T, chunk=chunk)
    kernel = products["_product_kernel"]
    assert uses_tensor_cores(kernel)
    assert ".f32.f16.f16" in kernel.asm["ptx"] or "kind::f16" in kernel.asm["ptx"]  # sums in FP32
    assert "cp.async" in kernel.asm["ptx"]
    # A chunk's sum must be added, and rounded, outside the tensor core.
    added, rounded = (kernel.asm["ttgir"].count(f"arith.{name}") for name in ("addf", "truncf"))
    assert added == rounded and (added > 0) == (chunk is not None)


@pytest.mark.parametrize(("layout", "chunk"), [("last", None), ("last", 64), ("first", 64)])
def test_convolution(products, layout, chunk):
    geometry = make(16, 64, 128, 1, (32, 32), (3, 3), (2, 2), (1, 1), (1, 1))
    format_ = torch.channels_last if layout == "last" else torch.contiguous_format
    conv_input, conv_output, weight = (
        torch.empty(shape, dtype=torch.float16).to(memory_format=format_)
        for shape in ((16, 64, 32, 32), (16, 128, 16, 16), (128, 64, 3, 3))
    )
    steps = (gemm.conv_forward, conv_input, weight), (gemm.conv_grad_input, conv_output, weight)
    for step, *operands in (*steps, (gemm.conv_grad_weight, conv_input, conv_output)):
        products.clear()
        step(*operands, geometry.pack(), chunk=chunk)
        kernel = products["_product_kernel"]
        assert uses_tensor_cores(kernel)
        if layout == "last" and chunk is None:
            assert "cp.async" in kernel.asm["ptx"] and ("ld", 16) not in accesses(kernel)


def test_convolution_with_bias(products):
    geometry = make(16, 64, 128, 1, (32, 32), (3, 3), (1, 1), (1, 1), (1, 1))
    x, weight = (
        torch.empty(shape, dtype=torch.float16).to(memory_format=torch.channels_last)
        for shape in ((16, 64, 32, 32), (128, 64, 3, 3))
    )
    bias = torch.empty(128)
    gemm.conv_forward(x, weight, geometry.pack(), bias=bias, dtype=torch.float16)
    kernel = products["_product_kernel"]
    assert uses_tensor_cores(kernel) and "cp.async" in kernel.asm["ptx"] and ("ld", 16) not in accesses(kernel)


def test_a_linear_layers_products(products):
    """Forward and grad_input, in wide pieces; another batch size compiles nothing."""
    weight, bias, found = torch.empty(2304, 768, dtype=torch.float16), torch.empty(2304), set()
    for rows in (12608, 12411, 1):
        x, error = (torch.empty(rows, width, dtype=torch.float16) for width in (768, 2304))
        for operands, added in (((x, weight.T), bias), ((error, weight), None)):
            gemm.matmul(*operands, bias=added, dtype=torch.float16)
            kernel = products["_product_kernel"]
            found.add(kernel.hash)
            if rows > 1:
                assert uses_tensor_cores(kernel) and "cp.async" in kernel.asm["ptx"]
                assert ("st", 128) in accesses(kernel) and ("ld", 16) not in accesses(kernel)
        assert len(found) <= 4  # a single row's tile is another one


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
