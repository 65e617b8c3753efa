"""The fused quantizer (select, round, count groups) over a copy of the same tensor. Ratios alternate in one run.

python benchmarks/quantize.py --json            # ours
python benchmarks/quantize.py --json --peers    # and those of the peers that are installed, to E4M3 without counts
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from peers import add_option, installed
from rows import Operation, Row, add_options, alternate, cpu_name, origin, ratio, write

from lnpu_torch.ops.quantize import cpu
from lnpu_torch.quant.precision import Rule

SIZE = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_option(parser)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for row in rows(options):
        write(row | {"device": cpu_name(), **origin()}, options)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    ours = partial(cpu.quantize, x, Rule().model_dump_json(), 1, False)
    fresh: dict[str, Operation] = {"clone": x.clone, "fgmp, fresh output": ours}
    fresh |= {f"peer: {name}": partial(cast, x) for name, cast in installed(options.peers).items()}
    reused: dict[str, Operation] = {"copy_": lambda: out.copy_(x), "fgmp, reused output": lambda: ours(out=out)}
    for base, operations in (("clone", fresh), ("copy_", reused)):
        times = alternate(operations, options.repeats, unmeasured=2)
        for name in operations:
            if name != base:
                value, spread = ratio(times, name, base)
                nanoseconds = [round(statistics.median(times[which]) / SIZE * 1e9, 3) for which in (name, base)]
                yield {
                    "name": f"quantize {name}",
                    "elements": SIZE,
                    "ratio_to_memcpy": value,
                    "memcpy": base,
                    "spread": spread,
                    "ns_per_element": nanoseconds[0],
                    "memcpy_ns_per_element": nanoseconds[1],
                    "best_ns_per_element": round(min(times[name]) / SIZE * 1e9, 3),
                    "best_ratio_to_memcpy": round(min(times[name]) / min(times[base]), 3),
                }


if __name__ == "__main__":
    main()
