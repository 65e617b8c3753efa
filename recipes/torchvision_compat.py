"""Imports torchvision beside a torch that its compiled part does not fit. It knows nothing of models or data.

A CPU-only torch beside torchvision's CUDA wheel cannot load torchvision's compiled operators, and then
`import torchvision` fails with "operator torchvision::nms does not exist": it describes that operator to torch's
tracer without asking whether it is there. Models, datasets and transforms need none of these operators, so
declaring their names is enough. Calling one still fails, with torchvision's own message.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from lnpu_torch.files import ConfigError

OPERATORS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # a declaration lasts as long as its Library object


def import_torchvision() -> ModuleType:
    """Import torchvision, with its missing operators declared if its compiled part cannot be loaded.

    Raises:
        ConfigError: torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("torchvision is not installed: pip install 'lnpu-torch[recipes]'")
    if not _declared and not compiled_part_loads(Path(spec.submodule_search_locations[0])):
        declare_operators()
    return importlib.import_module("torchvision")


def compiled_part_loads(folder: Path) -> bool:
    """Whether torchvision's compiled operators (`_C*.so`, `_C*.pyd`) are in `folder` and fit this torch."""
    for library in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


def declare_operators() -> None:
    """Declare, without an implementation, those of `OPERATORS` that torch does not know yet."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
