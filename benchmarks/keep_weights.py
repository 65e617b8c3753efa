"""Keep what a run has learnt in a small file, as configs/reproduction has three: weights in binary16, nothing else.

python benchmarks/keep_weights.py RUNS/resnet18-fgmp-0 configs/reproduction/resnet18.pt

The weights' error, 2^-11 of each at most, is that of an operand in FP16. Batch norm's running sums stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from lnpu_torch.recipes.checkpoints import Checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of `lnpu train`")
    parser.add_argument("file", type=Path, help="what is written")
    options = parser.parse_args()
    state = Checkpoints(options.run / "checkpoints", keep=1).newest(print)
    if state is None:
        sys.exit(f"{options.run}: there is no checkpoint")
    weights = {name: value if "running_" in name else _narrow(value) for name, value in state["model"].items()}
    torch.save({"model": weights}, options.file)
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.2f} MB")


def _narrow(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


if __name__ == "__main__":
    main()
