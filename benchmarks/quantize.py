"""The fused quantizer (select, round, count groups) over a copy of the same tensor. Ratios alternate in one run.

python benchmarks/quantize.py --json            # ours; --peers adds those of the peers that are installed
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lnpu_torch import cpu
from lnpu_torch.precision import Rule

SIZE = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--peers", action="store_true", help="measure installed peers too, E4M3 without counts")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for row in rows(options):
        print(
            json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    out, threshold = torch.empty_like(x), torch.tensor(1, dtype=torch.int32)
    fresh: dict[str, Callable[[], object]] = {"clone": x.clone}
    fresh["fgmp, fresh output"] = lambda: cpu.quantize_flat(x, Rule(), threshold, None, 0, False)
    if options.peers:
        fresh |= peers(x)
    reused = {"copy_": lambda: out.copy_(x)}
    reused["fgmp, reused output"] = lambda: cpu.quantize_flat(x, Rule(), threshold, None, 0, False, out)
    for base, calls in (("clone", fresh), ("copy_", reused)):
        times = alternate(calls, options.repeats)
        for name in calls:
            if name != base:
                yield row(name, times[name], base, times[base])


def row(name: str, mine: list[float], base: str, theirs: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles([a / b for a, b in zip(mine, theirs, strict=True)], n=4)
    return {
        "name": f"quantize {name}",
        "device": f"cpu, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "elements": SIZE,
        "ratio_to_memcpy": round(statistics.median(mine) / statistics.median(theirs), 3),
        "memcpy": base,
        "spread": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "ns_per_element": round(statistics.median(mine) / SIZE * 1e9, 3),
        "memcpy_ns_per_element": round(statistics.median(theirs) / SIZE * 1e9, 3),
    }


def alternate(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn, after two rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-2, repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - started
            del result
            if round_ >= 0:
                times[name].append(elapsed)
    return times


def peers(x: Tensor) -> dict[str, Callable[[], object]]:
    """Round to E4M3 with whichever of the peers can be imported."""
    found: dict[str, Callable[[], object]] = {}
    found["peer: torch casts"] = lambda: x.to(torch.float8_e4m3fn).to(torch.float32)
    for name, make in {"ml_dtypes": _ml_dtypes, "qtorch": _qtorch, "mptorch": _mptorch}.items():
        try:
            found[f"peer: {name}"] = make(importlib.import_module(name), x)
        except ImportError:
            print(f"# {name} is not installed")
    return found


def _ml_dtypes(module: Any, x: Tensor) -> Callable[[], object]:
    return lambda: x.numpy().astype(module.float8_e4m3fn).astype("float32")


def _qtorch(module: Any, x: Tensor) -> Callable[[], object]:
    quantize = importlib.import_module("qtorch.quant").float_quantize
    return lambda: quantize(x, exp=4, man=3, rounding="nearest")


def _mptorch(module: Any, x: Tensor) -> Callable[[], object]:
    quantize = importlib.import_module("mptorch.quant").float_quantize
    return lambda: quantize(x, exp=4, man=3, rounding="nearest")


if __name__ == "__main__":
    main()
