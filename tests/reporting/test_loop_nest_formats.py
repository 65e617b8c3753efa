"""Loop nests in other tools' formats: as written by hand, and each read by its tool where that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lnpu_torch.counts.loop_nest import LoopNest, NestTensor, Place
from lnpu_torch.reporting.loop_nest_formats import TOOLS, Tool, files

ROLES: dict[str, dict[Place, NestTensor]] = {
    "forward": {
        "conv_input": NestTensor("input", 0.4),
        "weight": NestTensor("weight", 1.0),
        "conv_output": NestTensor("output", None),
    },
    "grad_input": {
        "conv_input": NestTensor("grad_input", None),
        "weight": NestTensor("weight", 0.52),
        "conv_output": NestTensor("grad_output", 0.25),
    },
    "grad_weight": {
        "conv_input": NestTensor("input", 0.4),
        "weight": NestTensor("grad_weight", None),
        "conv_output": NestTensor("grad_output", 0.25),
    },
}


def conv(step: str, layer: str = "block.conv", calls: int = 1) -> LoopNest:
    """3 to 8 channels, 8 x 10 positions, stride 2, in two groups of which each has 3 and 4."""
    return LoopNest(
        layer, step, ROLES[step], groups=2, batch=2, filters=4, channels=3, grid=(4, 5), kernel=(3, 3), input=(8, 10),
        stride=(2, 2), padding=(1, 1), dilation=(1, 1), calls=calls,
    )  # fmt: skip


def linear(step: str) -> LoopNest:
    return LoopNest("fc", step, ROLES[step], 1, 2, 10, 16, (), (), (), (), (), ())


NESTS = [*(conv(step) for step in ROLES), *(linear(step) for step in ROLES)]

TIMELOOP = """\
# block.conv, grad_weight: density of input 0.4, grad_output 0.25
problem:
  version: 0.4
  shape:
    name: layer
    dimensions: [G, N, M, C, P, Q, R, S]
    coefficients:
    - {name: strideH, default: 1}
    - {name: strideW, default: 1}
    - {name: dilationH, default: 1}
    - {name: dilationW, default: 1}
    data_spaces:
    - name: Inputs
      projection:
      - - [G]
      - - [N]
      - - [C]
      - - [P, strideH]
        - [R, dilationH]
      - - [Q, strideW]
        - [S, dilationW]
    - name: Weights
      projection:
      - - [G]
      - - [M]
      - - [C]
      - - [R]
      - - [S]
      read_write: true
    - name: Outputs
      projection:
      - - [G]
      - - [N]
      - - [M]
      - - [P]
      - - [Q]
  instance:
    G: 2
    N: 2
    M: 4
    C: 3
    P: 4
    Q: 5
    R: 3
    S: 3
    strideH: 2
    strideW: 2
    dilationH: 1
    dilationW: 1
    densities:
      Inputs: {distribution: hypergeometric, density: 0.4}
      Outputs: {distribution: hypergeometric, density: 0.25}
"""

ACCELFORGE = """\
workload:
  bits_per_value: {All: 16}
  einsums:
  # block.conv, grad_input: density of weight 0.52, grad_output 0.25; runs 2 times
  - name: block_conv_grad_input
    tensor_accesses:
    - name: block_conv_grad_input_grad_input
      projection: {G: g0, N: n0, C: c0, H: 2 * p0 + 1 * r0, W: 2 * q0 + 1 * s0}
      output: true
    - name: block_conv_grad_input_weight
      projection: {G: g0, M: m0, C: c0, R: r0, S: s0}
    - name: block_conv_grad_input_grad_output
      projection: {G: g0, N: n0, M: m0, P: p0, Q: q0}
    iteration_space_shape: [0 <= g0 < 2, 0 <= n0 < 2, 0 <= m0 < 4, 0 <= c0 < 3, 0 <= p0 < 4, 0 <= q0 < 5, 0 <= r0 < 3, 0 <= s0 < 3]
    renames: {output: block_conv_grad_input_grad_input, weight: block_conv_grad_input_weight, input: block_conv_grad_input_grad_output}
"""  # noqa: E501

ZIGZAG = """\
# block.conv, forward: density of input 0.4, weight 1
- id: 0
  name: block_conv_forward
  operator_type: Conv
  equation: O[g][b][k][oy][ox]+=I[g][b][c][iy][ix]*W[g][k][c][fy][fx]
  dimension_relations: [iy=2*oy+1*fy, ix=2*ox+1*fx]
  loop_dims: [G, B, K, C, OY, OX, FY, FX]
  loop_sizes: [2, 2, 4, 3, 4, 5, 3, 3]
  pr_loop_dims: [IY, IX]
  pr_loop_sizes: [8, 10]
  padding:
  - [1, 0]
  - [1, 0]
  operand_precision: {I: 16, W: 16, O: 32, O_final: 16}
  operand_source: {I: 0, W: 0}
# fc, grad_input: density of weight 0.52, grad_output 0.25
- id: 1
  name: fc_grad_input
  operator_type: Gemm
  equation: O[g][b][c]+=I[g][b][k]*W[g][k][c]
  loop_dims: [G, B, K, C]
  loop_sizes: [1, 2, 10, 16]
  operand_precision: {I: 16, W: 16, O: 32, O_final: 16}
  operand_source: {I: 1, W: 1}
"""

SCALESIM = """\
Layer name, M, N, K, Sparsity,
block_conv_forward_group0, 40, 4, 27, 16:16,
block_conv_forward_group1, 40, 4, 27, 16:16,
block_conv_grad_input_group0, 40, 27, 4, 9:16,
block_conv_grad_input_group1, 40, 27, 4, 9:16,
block_conv_grad_weight_group0, 27, 4, 40, 4:16,
block_conv_grad_weight_group1, 27, 4, 40, 4:16,
fc_forward, 2, 10, 16, 16:16,
fc_grad_input, 2, 16, 10, 9:16,
fc_grad_weight, 16, 10, 2, 4:16,
"""


def test_files_are_as_written_by_hand() -> None:
    assert files([conv("grad_weight")], "timeloop") == {"block_conv_grad_weight.yaml": TIMELOOP}
    assert files([conv("grad_input", calls=2)], "accelforge") == {"workload.yaml": ACCELFORGE}
    assert files([conv("forward"), linear("grad_input")], "zigzag") == {"workload.yaml": ZIGZAG}
    assert files(NESTS, "scalesim") == {"topology.csv": SCALESIM}


def test_names_are_told_apart() -> None:
    found = files([conv("forward", "a.b"), conv("forward", "a_b"), conv("forward", "c")], "timeloop")
    assert list(found) == ["a_b_forward_1.yaml", "a_b_forward_2.yaml", "c_forward.yaml"]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_number_of_dimensions_is_written(tool: Tool) -> None:
    for dims in range(4):
        sizes = [(size,) * dims for size in (4, 3, 8, 2, 1, 1)]
        nest = LoopNest("x", "forward", ROLES["forward"], 1, 2, 4, 3, *sizes)
        assert nest.macs == 2 * 4 * 3 * 12**dims
        ((name, text),) = files([nest], tool).items()
        assert "x_forward" in name + text


def written(tmp_path: Path, tool: Tool) -> list[Path]:
    for name, text in files(NESTS, tool).items():
        (tmp_path / name).write_text(text)
    return sorted(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_timeloops_front_end_reads_them(tmp_path: Path) -> None:
    problem = pytest.importorskip("pytimeloop.timeloopfe.v4.problem")
    for path, nest in zip(
        written(tmp_path, "timeloop"), sorted(NESTS, key=lambda nest: (nest.layer, nest.step)), strict=True
    ):
        read = problem.Problem(**yaml.safe_load(path.read_text())["problem"])
        densities = {name: each["density"] for name, each in read.instance["densities"].items()}
        assert sorted(densities.values()) == sorted(
            each.density for each in nest.tensors.values() if each.density is not None
        )
        assert len([space for space in read.shape.data_spaces if space["read_write"]]) == 1


@pytest.mark.filterwarnings("ignore")
def test_accelforge_reads_them(tmp_path: Path) -> None:
    accelforge = pytest.importorskip("accelforge")
    (path,) = written(tmp_path, "accelforge")
    from accelforge.frontend._workload_isl._isl import get_operation_space_size

    workload = accelforge.Spec.from_yaml(path)._spec_eval_expressions().workload
    for einsum, nest in zip(workload.einsums, NESTS, strict=True):
        assert get_operation_space_size(workload, einsum.name) == nest.macs
        (result,) = (access for access in einsum.tensor_accesses if access.output)
        assert str(result.name).endswith(nest.tensors[nest.result].name)


@pytest.mark.filterwarnings("ignore")
def test_zigzag_reads_them(tmp_path: Path) -> None:
    factory = pytest.importorskip("zigzag.parser.workload_factory")
    from zigzag.parser.workload_validator import WorkloadValidator

    (path,) = written(tmp_path, "zigzag")
    validator = WorkloadValidator(yaml.safe_load(path.read_text()))
    assert validator.validate()
    mapping: list[dict[str, Any]] = [
        {
            "name": "default",
            "spatial_mapping": {"D1": ["K, 1"]},
            "memory_operand_links": {"O": "O", "W": "I2", "I": "I1"},
        }
    ]
    nodes = factory.WorkloadFactory(validator.normalized_data, mapping).create().node_list
    assert [node.total_mac_count for node in nodes] == [nest.macs for nest in NESTS]
    sizes = {"input": 2 * 2 * 3 * 80, "weight": 2 * 4 * 3 * 9, "output": 2 * 2 * 4 * 20}
    for node, of in zip(nodes[:3], ("output input weight", "input output weight", "weight input output"), strict=True):
        found = {str(name): size for name, size in node.operand_size_elem.items()}
        assert [found[letter] for letter in "OIW"] == [sizes[name] for name in of.split()]


@pytest.mark.filterwarnings("ignore")  # it leaves the file open
def test_scalesim_reads_them(tmp_path: Path) -> None:
    utils = pytest.importorskip("scalesim.topology_utils")
    (path,) = written(tmp_path, "scalesim")
    topology = utils.topologies()
    topology.load_arrays(str(path), mnk_inputs=True)
    macs = [topology.get_layer_mac_ops(layer) for layer in range(topology.num_layers)]
    assert macs == [nest.macs // nest.groups for nest in NESTS for _ in range(nest.groups)]
    assert [row[-2:] for row in topology.topo_arrays[2:6:2]] == [[9, 16], [4, 16]]
