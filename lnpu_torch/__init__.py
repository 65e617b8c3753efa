"""Emulates LNPU, a chip that trains with fine-grained FP8-FP16 precision and skips zeros, and prices the training."""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING

_SOURCE = _Path(__file__).parent.parent
if (_SOURCE / "kernels").is_dir() and (_SOURCE / "configs").is_dir():  # a checkout: they lie beside the package
    __path__.append(str(_SOURCE))

from lnpu_torch.versions import versions  # noqa: E402

# These are imported when they are first asked for: who only prices needs no torch, and --version nothing.
if TYPE_CHECKING:
    from lnpu_torch import nn
    from lnpu_torch.cost.cost_row import CostRow
    from lnpu_torch.cost.pricing import price
    from lnpu_torch.cost.report import Report
    from lnpu_torch.cost.sensitivity import Sensitivity, sensitivity
    from lnpu_torch.cost.sweep import Sweep, sweep
    from lnpu_torch.counts.densities import Densities
    from lnpu_torch.counts.schema import Counts
    from lnpu_torch.files import ConfigError
    from lnpu_torch.hardware.chip import Chip, chip
    from lnpu_torch.nn import functional
    from lnpu_torch.nn.convert import convert, coverage, load_thresholds, revert, thresholds
    from lnpu_torch.nn.observers import pause_op_tracing
    from lnpu_torch.nn.rounding import quantize
    from lnpu_torch.nn.threshold_sync import ThresholdSync
    from lnpu_torch.profiler.cost_counter import CostCounter
    from lnpu_torch.profiler.estimate import estimate
    from lnpu_torch.profiler.layer_counters import no_count
    from lnpu_torch.quant.precision import Precision, Rule
    from lnpu_torch.reporting.run_comparison import RunComparison, compare

_NAMES = {
    "cost.cost_row": ("CostRow",),
    "cost.pricing": ("price",),
    "cost.report": ("Report",),
    "cost.sensitivity": ("Sensitivity", "sensitivity"),
    "cost.sweep": ("Sweep", "sweep"),
    "counts.densities": ("Densities",),
    "counts.schema": ("Counts",),
    "files": ("ConfigError",),
    "hardware.chip": ("Chip", "chip"),
    "nn": ("functional",),
    "nn.convert": ("convert", "coverage", "load_thresholds", "revert", "thresholds"),
    "nn.observers": ("pause_op_tracing",),
    "nn.rounding": ("quantize",),
    "nn.threshold_sync": ("ThresholdSync",),
    "profiler.cost_counter": ("CostCounter",),
    "profiler.estimate": ("estimate",),
    "profiler.layer_counters": ("no_count",),
    "quant.precision": ("Precision", "Rule"),
    "reporting.run_comparison": ("RunComparison", "compare"),
}
_HOMES = {name: f"lnpu_torch.{module}" for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "nn":
        return _import_module("lnpu_torch.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'lnpu_torch' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"
__all__ = [
    "Chip",
    "ConfigError",
    "CostCounter",
    "CostRow",
    "Counts",
    "Densities",
    "Precision",
    "Report",
    "Rule",
    "RunComparison",
    "Sensitivity",
    "Sweep",
    "ThresholdSync",
    "chip",
    "compare",
    "convert",
    "coverage",
    "estimate",
    "functional",
    "load_thresholds",
    "nn",
    "no_count",
    "pause_op_tracing",
    "price",
    "quantize",
    "revert",
    "sensitivity",
    "sweep",
    "thresholds",
    "versions",
]
