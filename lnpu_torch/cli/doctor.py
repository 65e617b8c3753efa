"""The command that looks at the machine: lnpu doctor. It says what would compute, and what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from lnpu_torch.cli.errors import Console
from lnpu_torch.versions import versions

EXTRAS = {
    "torchvision": ("ImageNet's networks, photographs, CIFAR by download", "recipes"),
    "sklearn": ("the digits of the first recipe", "recipes"),
    "matplotlib": ("plots of sweeps and of lnpu reproduce", "plot"),
    "lightning": ("the callback for Lightning", "integrations"),
    "transformers": ("the callback for Hugging Face's Trainer", "integrations"),
}
"""What a project of others is for here, and the extra that installs it."""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say what would compute here: versions, threads, GPUs, caches; what is missing, and how to get it."""
    found = {
        "versions": versions(),
        "CPU": cpu(),
        "GPU": gpu(),
        "cache of compiled loops": cache(),
        "extras": {name: extra(name) for name in EXTRAS},
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for topic, facts in found.items():
        for i, (name, fact) in enumerate(facts.items()):
            table.add_row("" if i else topic, name, Text(fact))
    Console().print(table)


def cpu() -> dict[str, str]:
    """Which loops run on a CPU, on how many threads."""
    import torch

    numba = (
        "Numba's loops" if importlib.util.find_spec("numba") else "plain torch, many times slower: pip install numba"
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return {"backend": numba, "threads": f"{torch.get_num_threads()} of {os.cpu_count()}", "instructions": capability}


def gpu() -> dict[str, str]:
    """Which GPUs torch sees, and whether our kernels run on them."""
    import torch

    from lnpu_torch.ops.dispatch import found

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return {"device": "none that torch sees" if built else "none: this torch is built for CPUs"}
    devices = {}
    for index in range(torch.cuda.device_count()):
        reason = found("gpu").obstacle(torch.device("cuda", index))
        if importlib.util.find_spec("triton") is None:
            reason = "Triton is not installed"
        kernels = "Triton's kernels" if reason is None else f"plain torch, many times slower: {reason}"
        devices[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {kernels}"
    return devices


def cache() -> dict[str, str]:
    """Where compiled loops are kept."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(chosen) if chosen else Path(__file__).parent.parent
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK) and not chosen:
        folder = Path.home() / ".cache" / "numba"
    files = list(folder.rglob("*.nbc")) if folder.is_dir() else []
    kept = f"{len(files)} loops, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"
    if not files:
        kept = "nothing yet: the first training steps take up to a minute longer"
    writable = os.access(folder if folder.exists() else folder.parent, os.W_OK)
    advice = "" if writable else "; cannot be written, so each process compiles anew: set NUMBA_CACHE_DIR"
    return {"folder": f"{folder}{advice}", "kept": kept}


def extra(name: str) -> str:
    """Whether another project is installed, what it is for, and how to get it."""
    purpose, group = EXTRAS[name]
    here = importlib.util.find_spec(name) is not None
    return f"installed; {purpose}" if here else f"missing: pip install 'lnpu-torch[{group}]'; {purpose}"
