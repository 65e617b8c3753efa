"""What a user may lack (Numba, Triton, a new GPU) or get wrong (devices, dtypes, layout): same bits, or an error."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.ops import dispatch as backends

TRAIN = """
import sys, torch, lnpu_torch as lnpu
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, groups=2), nn.Flatten()]
model = lnpu.convert(nn.Sequential(*layers, nn.Linear(36, 5)), "fgmp")
found = []
with lnpu.CostCounter(model) as cost:
    for step in range(2):
        output = model(torch.randn(6, 3, 8, 8))
        output.square().sum().backward()
        found.append(output.detach())
found += [p.grad for p in model.parameters()] + list(lnpu.thresholds(model).values())
torch.save([found, [step.model_dump_json() for step in cost.counts.steps]], sys.argv[1])
print(bool(sys.modules.get("numba")))
"""


def test_without_numba_and_triton_it_is_the_same_but_slower(tmp_path, monkeypatch, capsys):
    """What two steps of training compute and count here, and in a process that has neither."""
    here, without = tmp_path / "here", tmp_path / "without"
    monkeypatch.setattr(sys, "argv", ["-c", str(here)])
    assert backends.backend_of(torch.ones(1)) is not backends.REFERENCE
    exec(TRAIN, {})
    missing = "import sys; sys.modules |= dict.fromkeys(('numba', 'llvmlite', 'triton'))"
    command = [sys.executable, "-W", "error", "-c", missing + TRAIN, str(without)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (values, counts), (ours, our_counts) = torch.load(here), torch.load(without)
    assert (capsys.readouterr().out.strip(), done.stdout.strip()) == ("True", "False")
    assert our_counts == counts and len(counts) == 9
    assert all(torch.equal(a, b) for a, b in zip(ours, values, strict=True))


def test_a_gpu_that_the_kernels_do_not_run_on_is_left_to_plain_torch(monkeypatch, caplog):
    launch = pytest.importorskip("lnpu_torch.kernels.launch")
    gpu = torch.device("cuda", 0)
    tensor = SimpleNamespace(is_cpu=False, is_cuda=True, device=gpu)
    for found, hip, reason in (
        ((7, 0), None, "the kernels need compute capability 7.5, but cuda:0 has 7.0"),
        ((7, 5), None, None),
        ((9, 0), None, None),
        ((9, 4), "6.4", "the kernels are made for NVIDIA's GPUs, and untried on AMD's"),
    ):
        monkeypatch.setattr(launch, "capability", lambda device, found=found: found)
        monkeypatch.setattr(torch.version, "hip", hip)
        backends.on_device.cache_clear()
        caplog.clear()
        for _ in range(2):
            assert (backends.backend_of(tensor) is backends.REFERENCE) == (reason is not None)
        expected = [] if reason is None else [f"{reason}: plain torch computes on cuda:0, many times slower"]
        assert [record.getMessage() for record in caplog.records] == expected  # said once
        if reason is not None:
            with pytest.raises(RuntimeError, match=reason[:20]):
                launch.check_runs(gpu)
        assert launch.multiplies_on(gpu) == (found >= (8, 0))
    backends.on_device.cache_clear()


def test_a_gpu_without_triton_is_left_to_plain_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith(("lnpu_torch.kernels", "lnpu_torch.ops.gpu"))]:
        monkeypatch.delitem(sys.modules, name)
    backends.found.cache_clear()
    backends.on_device.cache_clear()
    tensor = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda", 0))
    assert backends.backend_of(tensor) is backends.REFERENCE and backends.on_gpu(tensor)
    backends.found.cache_clear()
    backends.on_device.cache_clear()


CASES = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (3, 4, 6, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2), (3, 4, 4, 6)),
    "linear": (lambda: nn.Linear(8, 5), (3, 2, 8)),
}
LAYOUTS = {
    "every other": lambda x: torch.stack((x, x + 1), -1).flatten(-2)[..., ::2],
    "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "from the middle": lambda x: torch.cat((x, x, x))[len(x) : 2 * len(x)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gaps_and_orders_in_memory_change_nothing(case, layout):
    make, shape = CASES[case]
    x, outcomes = LAYOUTS[layout](torch.randn(shape)), []
    for given in (x, x.clone(memory_format=torch.contiguous_format)):
        torch.manual_seed(0)
        layer = lnpu.convert(make(), "fgmp")
        given = given.detach().requires_grad_()
        with lnpu.CostCounter(layer) as cost:
            layer(given).square().sum().backward()
        outcomes.append(([given.grad, *(p.grad for p in layer.parameters())], cost.counts.steps))
    (ours, counts), (expected, expected_counts) = outcomes
    assert counts == expected_counts
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-10, atol=2**-12)  # torch may sum in another order


@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch(case):
    make, shape = CASES[case]
    layer, x = make(), torch.randn(0, *shape[1:], requires_grad=True)
    expected = layer(x)
    lnpu.convert(layer, "fgmp")
    with lnpu.CostCounter(layer) as cost:
        output = layer(x)
        output.sum().backward()
    assert output.shape == expected.shape and x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.parameters())
    assert [step.macs for step in cost.counts.steps] == [0, 0, 0]


def test_tensors_on_different_devices():
    layer = lnpu.convert(nn.Conv2d(3, 4, 3), "fgmp")
    with pytest.raises(RuntimeError, match="its input is on meta and its weight on cpu"):
        layer(torch.randn(1, 3, 6, 6, device="meta"))
    layer.bias = nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(RuntimeError, match="its input is on cpu and its bias on meta"):
        layer(torch.randn(1, 3, 6, 6))


@pytest.mark.parametrize("case", CASES)
def test_dtypes_that_do_not_fit(case):
    make, shape = CASES[case]
    layer = lnpu.convert(make(), "fgmp")
    with pytest.raises(TypeError, match=r"input is torch\.float16 and weight torch\.float32: convert one"):
        layer(torch.randn(shape).half())
    with pytest.raises(TypeError, match=r"takes floating-point tensors, but its input is torch\.int64"):
        layer(torch.ones(shape, dtype=torch.int64))
