"""What a step fetches, held against the optimum of AccelForge's mapper, where that is installed (Python 3.12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lnpu_torch.cost.memory_traffic import FP16_BITS, fetches
from lnpu_torch.hardware.chip import chip


class Product(NamedTuple):
    """A step as loops, the indices of its two operands and its result, and the elements of these that are used."""

    loops: dict[str, int]
    indices: tuple[str, str, str]
    used: tuple[int, int, int]


def matrices(m: int, k: int, n: int) -> Product:
    return Product({"m": m, "k": k, "n": n}, ("[m, k]", "[k, n]", "[m, n]"), (m * k, k * n, m * n))


PRODUCTS = {
    "ViT's 768 > 3072, forward": matrices(16 * 197, 768, 3072),
    "ViT's 768 > 3072, grad_weight": matrices(768, 16 * 197, 3072),
    "4096 x 4096 x 4096": matrices(4096, 4096, 4096),
    "64 > 128, 1x1, stride 2, forward": Product(
        {"k": 128, "c": 64, "p": 28, "q": 28},
        ("{C: c, H: 2 * p, W: 2 * q}", "[c, k]", "[k, p, q]"),
        (64 * 28 * 28, 64 * 128, 128 * 28 * 28),
    ),
}

SPEC = """\
arch:
  nodes:
  - !Memory
    name: DRAM
    size: inf
    leak_power: 0
    area: 0
    tensors: {{keep: All}}
    actions: [{{name: read, energy: 1, throughput: inf}}, {{name: write, energy: 1, throughput: inf}}]
  - !Memory
    name: SRAM
    size: {room}
    leak_power: 0
    area: 0
    tensors: {{keep: All}}
    bits_per_value: {{result: {partial_sum_bits}}}
    actions: [{{name: read, energy: 0, throughput: inf}}, {{name: write, energy: 0, throughput: inf}}]
  - !Compute
    name: MAC
    leak_power: 0
    area: 0
    actions: [{{name: compute, energy: 0, throughput: 1}}]
workload:
  bits_per_value: {{All: {bits}}}
  einsums:
  - name: product
    tensor_accesses:
    - {{name: first, projection: {indices[0]}}}
    - {{name: second, projection: {indices[1]}}}
    - {{name: result, projection: {indices[2]}, output: true}}
    iteration_space_shape: [{loops}]
    renames: {{input: first, weight: second, output: result}}
"""


def optimum(accelforge: Any, product: Product, folder: Path) -> float:
    """Bits to and from DRAM in the mapping that moves fewest."""
    lnpu = chip("lnpu")
    text = SPEC.format(
        room=8 * lnpu.sram_bytes.value,
        partial_sum_bits=lnpu.storage.partial_sum_bits.value,
        bits=FP16_BITS,
        indices=product.indices,
        loops=", ".join(f"0 <= {name} < {size}" for name, size in product.loops.items()),
    )
    path = folder / "spec.yaml"
    path.write_text(text)
    spec = accelforge.Spec.from_yaml(path)
    spec.mapper.metrics = accelforge.Metrics.ENERGY
    accelforge.set_n_parallel_jobs(1)
    found = accelforge.mapper.FFM.map_workload_to_arch(spec, print_progress=False, eval_in_detail=False)
    return float(found.data["Total<SEP>energy"].iloc[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_plan_moves_about_as_much_as_the_best_mapping(name: str, tmp_path: Path) -> None:
    """A little less: tiles need not divide the product, and the tensors that pass by take no room."""
    accelforge, product = pytest.importorskip("accelforge"), PRODUCTS[name]
    first, second, result = product.used
    often = fetches(product.used, chip("lnpu"))
    ours = FP16_BITS * (often[0] * first + often[1] * second + result)
    assert 0.85 <= ours / optimum(accelforge, product, tmp_path) <= 1.001
