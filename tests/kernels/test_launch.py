"""What a kernel was compiled for is what it is launched with: wrappers run as they are, and no kernel is compiled."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from helpers.conv_shapes import make
from lnpu_torch.kernels import gemm, lanes, launch, round_output, rounding

GEOMETRY = make(32, 512, 512, 1, (2, 2), (3, 3), (1, 1), (1, 1), (1, 1))


def kinds(args):
    """The dtypes of a launch's tensors; other arguments as they are."""
    return [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args]


class Compiled:
    """A kernel compiled for some arguments."""

    def __init__(self, name, args, launches):
        self.name, self.kinds, self.launches = name, kinds(args), launches

    function = packed_metadata = None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        self.launch(*args)

    def launch(self, *args):
        assert kinds(args)[: len(self.kinds)] == self.kinds
        self.launches.append((self.name, *self.kinds))


@pytest.fixture
def launches(monkeypatch):
    """Every launch that takes place in the test: the kernel's name, and what it was compiled for."""
    found = []

    def run(self, *args, grid, warmup, **options):
        compiled = Compiled(self.__name__, args, found)
        compiled.launch(*args)
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device: 0))
    for module in (lanes, gemm, rounding):
        monkeypatch.setattr(module, "check_device", lambda **tensors: None)
    for module in (round_output,):
        monkeypatch.setattr(module, "check_runs", lambda device: None)
    for module in (lanes, gemm):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    for module in (lanes, gemm, round_output):
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()
    return found


def halves(*shape, last=False):
    return torch.empty(
        shape, dtype=torch.float16, memory_format=torch.channels_last if last else torch.contiguous_format
    )


def test_a_convolution_in_several_dtypes_with_and_without_bias(launches):
    shapes = (512, 128, 16, 16), (128, 128, 3, 3)  # enough programs for no part of the sums to be apart
    geometry = make(512, 128, 128, 1, (16, 16), (3, 3), (1, 1), (1, 1), (1, 1)).pack()
    x, weight, bias = halves(*shapes[0], last=True), halves(*shapes[1], last=True), halves(128)
    cases = 2 * [(torch.float16, bias), (torch.float32, None), (torch.float32, bias), (torch.float16, None)]
    for dtype, each in cases:
        assert gemm.conv_forward(x, weight, geometry, bias=each, dtype=dtype).dtype == dtype
    found = [tuple(kinds_[2:4]) for name, *kinds_ in launches if name == "_product_kernel"]
    assert found == [(dtype, None if each is None else torch.float16) for dtype, each in cases]


def test_runs_of_several_dtypes(launches):
    for dtype in 2 * [torch.float32, torch.float16]:
        lanes.runs_of(torch.empty(2, 8, 4, 4, dtype=dtype))
    assert [bits for _, bits, *_ in launches] == 2 * [torch.int32, torch.int16]


def test_a_kernel_is_looked_up_once_for_each_kind_and_anew_for_addresses_between_boundaries(monkeypatch):
    runs, launched = [], []

    class Kernel:
        arg_names = ("x", "y", "n", "ONE", "TWO")
        params = [SimpleNamespace(do_not_specialize_on_alignment=False)] * 2

        def __getitem__(self, grid):
            def run(*args, **options):
                runs.append((kinds(args), options))
                return SimpleNamespace(
                    function="f", packed_metadata="m", run=lambda *args: launched.append(kinds(args))
                )

            return run

    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device: 5))
    ready = launch.Launch(torch.device("cpu"), Kernel(), (3,), 7, TWO=2, ONE=1, num_warps=4)
    x = torch.zeros(8)
    for tensors in ((x, None), (x.half(), None), (x, None), (x, x), (x.half(), None), (x[1:], None), (x, None)):
        ready(*tensors)
    single, half = torch.float32, torch.float16
    options = {"TWO": 2, "ONE": 1, "num_warps": 4}
    expected = [[single, None, 7], [half, None, 7], [single, single, 7], [single, None, 7]]
    assert runs == [(each, options) for each in expected]
    front = [3, 1, 1, 5, "f", "m", None, None, None]
    assert launched == [[*front, *each, 7, 1, 2] for each in ([single, None], [half, None], [single, None])]


@pytest.mark.parametrize("bias", [None, halves(512)])
def test_a_result_summed_from_parts_lies_as_its_operands(launches, bias):
    x, weight = halves(32, 512, 2, 2, last=True), halves(512, 512, 3, 3, last=True)
    out = gemm.conv_forward(x, weight, GEOMETRY.pack(), bias=bias, dtype=torch.float16)
    (product,) = (kinds_ for name, *kinds_ in launches if name == "_product_kernel")
    assert product[2] == torch.float32  # in parts
    assert out.shape == x.shape and out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    plain = gemm.conv_forward(halves(32, 512, 2, 2), halves(512, 512, 3, 3), GEOMETRY.pack(), dtype=torch.float16)
    assert plain.is_contiguous()


def test_results_beyond_the_offsets_are_refused(launches):
    a, b = torch.empty(2**16, 1, dtype=torch.float16), torch.empty(1, 2**15, dtype=torch.float16)
    with pytest.raises(ValueError, match="larger than the kernel's 32-bit offsets"):
        gemm.matmul(a, b)
