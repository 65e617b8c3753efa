"""Emulates LNPU, a chip that trains with fine-grained FP8-FP16 precision and skips zeros, and prices the training."""

from pathlib import Path as _Path

_SOURCE = _Path(__file__).parent.parent
if (_SOURCE / "kernels").is_dir() and (_SOURCE / "configs").is_dir():  # a checkout: they lie beside the package
    __path__.append(str(_SOURCE))

from lnpu_torch import nn  # noqa: E402
from lnpu_torch.cost.cost_row import CostRow  # noqa: E402
from lnpu_torch.cost.pricing import price  # noqa: E402
from lnpu_torch.cost.report import Report  # noqa: E402
from lnpu_torch.cost.sensitivity import Sensitivity, sensitivity  # noqa: E402
from lnpu_torch.cost.sweep import Sweep, sweep  # noqa: E402
from lnpu_torch.counts.densities import Densities  # noqa: E402
from lnpu_torch.counts.schema import Counts  # noqa: E402
from lnpu_torch.files import ConfigError  # noqa: E402
from lnpu_torch.hardware.chip import Chip, chip  # noqa: E402
from lnpu_torch.nn import functional  # noqa: E402
from lnpu_torch.nn.convert import convert, coverage, load_thresholds, revert, thresholds  # noqa: E402
from lnpu_torch.nn.observers import pause_op_tracing  # noqa: E402
from lnpu_torch.nn.rounding import quantize  # noqa: E402
from lnpu_torch.nn.threshold_sync import ThresholdSync  # noqa: E402
from lnpu_torch.profiler.cost_counter import CostCounter  # noqa: E402
from lnpu_torch.profiler.estimate import estimate  # noqa: E402
from lnpu_torch.profiler.layer_counters import no_count  # noqa: E402
from lnpu_torch.quant.precision import Precision, Rule  # noqa: E402
from lnpu_torch.reporting.run_comparison import RunComparison, compare  # noqa: E402
from lnpu_torch.versions import versions  # noqa: E402

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
