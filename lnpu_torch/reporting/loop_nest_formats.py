"""Loop nests in the input formats of Timeloop, AccelForge, ZigZag and SCALE-Sim: file names, and their texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any, Literal, get_args

import yaml

from lnpu_torch.counts.loop_nest import LoopNest, NestTensor, Place

Tool = Literal["timeloop", "accelforge", "zigzag", "scalesim"]
TOOLS: tuple[Tool, ...] = get_args(Tool)

BITS = 16
"""Of a value, as the operands of a dense chip in FP16; partial sums have 32."""
GRID, KERNEL, INPUT = ("P", "Q", "U"), ("R", "S", "T"), ("H", "W", "D")
"""Names of up to three dimensions of the output grid, the kernel, and the input grid."""
ORDER: tuple[Place, ...] = ("conv_input", "weight", "conv_output")
BLOCK = 16
"""Elements of which SCALE-Sim's sparsity, N of M, keeps some."""


def files(nests: Sequence[LoopNest], tool: Tool) -> dict[str, str]:
    """The files that a tool reads, by name."""
    formats: dict[Tool, Callable[[dict[str, LoopNest]], dict[str, str]]] = {
        "timeloop": _timeloop,
        "accelforge": _accelforge,
        "zigzag": _zigzag,
        "scalesim": _scalesim,
    }
    return formats[tool](_named(nests))


def _named(nests: Sequence[LoopNest]) -> dict[str, LoopNest]:
    """Each nest under a name of its own, of letters, digits and underscores."""
    names = [re.sub(r"\W", "_", f"{nest.layer}_{nest.step}", flags=re.ASCII) for nest in nests]
    often, named = Counter(names), Counter[str]()
    found = {}
    for name, nest in zip(names, nests, strict=True):
        named[name] += 1
        found[f"{name}_{named[name]}" if often[name] > 1 else name] = nest
    return found


def _told(nest: LoopNest) -> str:
    """What no tool has a field for, as one line."""
    densities = [f"{each.name} {each.density:.4g}" for each in _tensors(nest) if each.density is not None]
    calls = f"; runs {nest.calls} times" if nest.calls > 1 else ""
    return f"{nest.layer}, {nest.step}: density of {', '.join(densities)}{calls}"


def _tensors(nest: LoopNest) -> list[NestTensor]:
    return [nest.tensors[place] for place in ORDER]


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=1000)


TIMELOOP: dict[Place, str] = {"conv_input": "Inputs", "weight": "Weights", "conv_output": "Outputs"}
"""The data spaces that architectures of Timeloop know, whichever of them a step makes."""


def _timeloop(nests: dict[str, LoopNest]) -> dict[str, str]:
    """A problem of version 0.4 for each step, zeros anywhere: Timeloop's distribution "hypergeometric"."""
    return {f"{name}.yaml": f"# {_told(nest)}\n{_yaml(_problem(nest))}" for name, nest in nests.items()}


def _problem(nest: LoopNest) -> dict[str, Any]:
    dims = range(len(nest.grid))
    projections: dict[Place, list[Any]] = {
        "conv_input": [
            [["G"]], [["N"]], [["C"]],
            *([[GRID[d], f"stride{INPUT[d]}"], [KERNEL[d], f"dilation{INPUT[d]}"]] for d in dims),
        ],
        "weight": [[["G"]], [["M"]], [["C"]], *([[KERNEL[d]]] for d in dims)],
        "conv_output": [[["G"]], [["N"]], [["M"]], *([[GRID[d]]] for d in dims)],
    }  # fmt: skip
    coefficients = {f"stride{INPUT[d]}": nest.stride[d] for d in dims}
    coefficients |= {f"dilation{INPUT[d]}": nest.dilation[d] for d in dims}
    spaces = [
        {"name": TIMELOOP[place], "projection": projections[place]}
        | ({"read_write": True} if place == nest.result else {})
        for place in ORDER
    ]
    densities = {
        TIMELOOP[place]: {"distribution": "hypergeometric", "density": density}
        for place in ORDER
        if (density := nest.tensors[place].density) is not None
    }
    shape = {
        "name": "layer",
        "dimensions": list(_sizes(nest)),
        "coefficients": [{"name": name, "default": 1} for name in coefficients],
        "data_spaces": spaces,
    }
    instance = _sizes(nest) | coefficients | {"densities": densities}
    return {"problem": {"version": 0.4, "shape": shape, "instance": instance}}


def _sizes(nest: LoopNest) -> dict[str, int]:
    """The loops."""
    sizes = {"G": nest.groups, "N": nest.batch, "M": nest.filters, "C": nest.channels}
    sizes |= dict(zip(GRID, nest.grid, strict=False))
    return sizes | dict(zip(KERNEL, nest.kernel, strict=False))


def _accelforge(nests: dict[str, LoopNest]) -> dict[str, str]:
    """One workload, an einsum for each step; AccelForge has no densities, so they are comments."""
    texts = ["workload:", f"  bits_per_value: {{All: {BITS}}}", "  einsums:"]
    for place, (name, nest) in enumerate(nests.items()):
        texts += [f"  # {_told(nest)}", *("  " + line for line in _yaml([_einsum(name, nest, place)]).splitlines())]
    return {"workload.yaml": "\n".join(texts) + "\n"}


def _einsum(name: str, nest: LoopNest, number: int) -> dict[str, Any]:
    """Tensors and loops have names of their own in each einsum; input positions count from the border's first."""
    loops = {loop: f"{loop.lower()}{number}" for loop in _sizes(nest)}
    dims = range(len(nest.grid))
    projections: dict[Place, dict[str, str]] = {
        "conv_input": {"G": loops["G"], "N": loops["N"], "C": loops["C"]}
        | {INPUT[d]: f"{nest.stride[d]} * {loops[GRID[d]]} + {nest.dilation[d]} * {loops[KERNEL[d]]}" for d in dims},
        "weight": {"G": loops["G"], "M": loops["M"], "C": loops["C"]} | {KERNEL[d]: loops[KERNEL[d]] for d in dims},
        "conv_output": {"G": loops["G"], "N": loops["N"], "M": loops["M"]} | {GRID[d]: loops[GRID[d]] for d in dims},
    }
    accesses = [
        {"name": f"{name}_{nest.tensors[place].name}", "projection": projections[place]}
        | ({"output": True} if place == nest.result else {})
        for place in ORDER
    ]
    roles = ["output" if place == nest.result else "weight" if place == "weight" else "input" for place in ORDER]
    if nest.result == "weight":  # of two grids, the errors take the weight's role
        roles[2] = "weight"
    return {
        "name": name,
        "tensor_accesses": accesses,
        "iteration_space_shape": [f"0 <= {loops[loop]} < {size}" for loop, size in _sizes(nest).items()],
        "renames": {role: access["name"] for role, access in zip(roles, accesses, strict=True)},
    }


ZIGZAG_GRID, ZIGZAG_KERNEL, ZIGZAG_INPUT = ("OY", "OX", "OZ"), ("FY", "FX", "FZ"), ("IY", "IX", "IZ")


def _zigzag(nests: dict[str, LoopNest]) -> dict[str, str]:
    """One workload, a layer for each step; ZigZag has no densities, so they are comments."""
    layers = [(_told(nest), _layer(name, nest, number)) for number, (name, nest) in enumerate(nests.items())]
    return {"workload.yaml": "".join(f"# {told}\n{_yaml([layer])}" for told, layer in layers)}


def _layer(name: str, nest: LoopNest, number: int) -> dict[str, Any]:
    """The result is O; of two grids, I is the one on the input's side."""
    dims = len(nest.grid)
    outer = {"G": nest.groups, "B": nest.batch, "K": nest.filters, "C": nest.channels}
    inner = dict(zip(ZIGZAG_GRID, nest.grid, strict=False)) | dict(zip(ZIGZAG_KERNEL, nest.kernel, strict=False))
    indices: dict[Place, tuple[str, ...]] = {
        "conv_input": ("g", "b", "c", *(each.lower() for each in ZIGZAG_INPUT[:dims])),
        "weight": ("g", "k", "c", *(each.lower() for each in ZIGZAG_KERNEL[:dims])),
        "conv_output": ("g", "b", "k", *(each.lower() for each in ZIGZAG_GRID[:dims])),
    }
    first, second = [place for place in ("conv_input", "conv_output", "weight") if place != nest.result]
    letters = {nest.result: "O", first: "I", second: "W"}
    terms = {letters[place]: letters[place] + "".join(f"[{index}]" for index in indices[place]) for place in ORDER}
    layer: dict[str, Any] = {
        "id": number,
        "name": name,
        "operator_type": "Conv" if dims else "Gemm",
        "equation": f"{terms['O']}+={terms['I']}*{terms['W']}",
    }
    if dims:
        layer["dimension_relations"] = [
            f"{ZIGZAG_INPUT[d].lower()}={nest.stride[d]}*{ZIGZAG_GRID[d].lower()}"
            f"+{nest.dilation[d]}*{ZIGZAG_KERNEL[d].lower()}"
            for d in range(dims)
        ]
    layer |= {"loop_dims": [*outer, *inner], "loop_sizes": [*outer.values(), *inner.values()]}
    if dims:
        layer |= {"pr_loop_dims": list(ZIGZAG_INPUT[:dims]), "pr_loop_sizes": list(nest.input)}
        layer["padding"] = [[before, _after(nest, d)] for d, before in enumerate(nest.padding)]
    layer["operand_precision"] = {"I": BITS, "W": BITS, "O": 2 * BITS, "O_final": BITS}
    layer["operand_source"] = {"I": number, "W": number}  # none comes from another layer
    return layer


def _after(nest: LoopNest, dim: int) -> int:
    """Border positions behind the input's last one."""
    last = (nest.grid[dim] - 1) * nest.stride[dim] - nest.padding[dim] + (nest.kernel[dim] - 1) * nest.dilation[dim]
    return max(last + 1 - nest.input[dim], 0)


def _scalesim(nests: dict[str, LoopNest]) -> dict[str, str]:
    """A topology of matrix products, M, N, K, a line for each group, for `-i gemm`.

    Of the second operand, in SCALE-Sim's place for filters, it takes how many of 16 elements are kept.
    """
    lines = ["Layer name, M, N, K, Sparsity,"]
    for name, nest in nests.items():
        m, n, k, kept = _product(nest)
        groups = [f"_group{group}" for group in range(nest.groups)] if nest.groups > 1 else [""]
        lines += [f"{name}{group}, {m}, {n}, {k}, {kept}:{BLOCK}," for group in groups]
    return {"topology.csv": "\n".join(lines) + "\n"}


def _product(nest: LoopNest) -> tuple[int, int, int, int]:
    """Rows, columns and depth of a step as a matrix product, and how many of 16 elements are kept of the second one."""
    positions, taps = nest.batch * prod(nest.grid), nest.channels * prod(nest.kernel)
    sizes: dict[Place, tuple[int, int, int]] = {
        "conv_output": (positions, nest.filters, taps),
        "conv_input": (positions, taps, nest.filters),
        "weight": (taps, nest.filters, positions),
    }
    second = nest.tensors["conv_output" if nest.result == "weight" else "weight"].density
    kept = max(-(-Fraction(str(second)) * BLOCK // 1), 1)
    return (*sizes[nest.result], int(kept))
