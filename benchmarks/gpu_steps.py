"""Training steps on a GPU, emulated over torch's own, eager and compiled: time, memory, and the slowest kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from place import Place
from rows import REPEATS, Row, alternate, ratio
from sizes import Model, sizes
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.recipes.models import ModelConfig, build

Rows = Iterator[Row]
PRECISION = "fgmp"


def eager(place: Place, name: str) -> Rows:
    """The emulated step under fp16 autocast, counting on, over autocast alone and over float32; the slowest kernels."""
    model = sizes(place).models[name]
    steps = {
        "autocast": stepper(model, place, None, autocast=True),
        "float32": stepper(model, place, None, autocast=False),
        "emulated": stepper(model, place, PRECISION, autocast=True),
        "emulated, float32": stepper(model, place, PRECISION, autocast=False),
    }
    times = alternate({which: place.finished(step) for which, step in steps.items()}, REPEATS)
    peaks = {which: place.peak(step) for which, step in steps.items()}
    yield {
        "name": f"step {name} {PRECISION}",
        "batch": model.batch,
        **against("emulated", "float32", times),
        **against("emulated", "autocast", times),
        "ratio_to_float32_without_autocast": ratio(times, "emulated, float32", "float32")[0],
        "peak_memory_ratio": round(peaks["emulated"] / peaks["float32"], 3),
        "peak_memory_ratio_to_autocast": round(peaks["emulated"] / peaks["autocast"], 3),
        "peak_mb": {which: round(peak / 2**20) for which, peak in peaks.items()},
        "seconds": medians(times),
    }
    for which in ("emulated", "autocast"):
        host = round(1e3 * place.host_seconds(steps[which]), 3)
        yield {"name": f"profile {name} {which}", "host_ms": host, **place.kernels_of(steps[which])}


def graphs(place: Place, name: str) -> Rows:
    """A step replayed as a CUDA graph, over the same step run by Python; and how many steps a replay counts."""
    model = sizes(place).models[name]
    found: dict[str, Callable[[], Any]] = {}
    for which, precision in (("autocast", None), ("emulated", PRECISION)):
        step, module = model_and_step(model, place, precision, autocast=True)
        place.finished(step)()
        replay = place.replayed(step)
        found |= {which: step, f"{which}, replayed": replay}
    before = counted(module)
    place.finished(replay)()
    steps_counted = sorted({int(calls) for calls in (counted(module) - before).flatten()})
    times = alternate({which: place.finished(each) for which, each in found.items()}, REPEATS)
    yield {
        "name": f"graph {name} {PRECISION}",
        "ratio_to_autocast": ratio(times, "emulated, replayed", "autocast, replayed")[0],
        "steps_counted_by_one_replay": steps_counted,
        "seconds": medians(times),
    }


def counted(model: nn.Module) -> Tensor:
    """Calls that the counters of all layers have seen, by layer and step."""
    emulations: list[Any] = [layer.emulation for layer in model.modules() if hasattr(layer, "emulation")]
    return torch.stack([emulation.counters[..., 0].sum(1) for emulation in emulations])


def compiled(place: Place, name: str) -> Rows:
    """The emulated step over torch's own, both under fp16 autocast and compiled into one graph."""
    model, started = sizes(place).models[name], time.perf_counter()
    steps = {
        "autocast": stepper(model, place, None, autocast=True, compile=True),
        "emulated": stepper(model, place, PRECISION, autocast=True, compile=True),
    }
    for step in steps.values():
        place.finished(step)()
    seconds = time.perf_counter() - started
    times = alternate({which: place.finished(step) for which, step in steps.items()}, REPEATS)
    row = against("emulated", "autocast", times)
    yield {
        "name": f"compiled step {name} {PRECISION}",
        "batch": model.batch,
        "ratio_to_compiled": row.pop("ratio_to_autocast"),
        **row,
        "seconds": medians(times),
        "seconds_to_compile": round(seconds, 1),
    }


def build_kernels(place: Place, name: str, part: int, parts: int) -> Rows:
    """One emulated step of every `parts`-th kind of layer alone: Triton keeps on disk what it compiles for it."""
    torch.backends.cudnn.benchmark = False  # its search would take memory from all the others' at once
    started, model = time.perf_counter(), sizes(place).models[name]
    kinds = list(layers_of(model, place).values())[part::parts]
    for module, x in kinds:
        layer = lnpu.convert(module, PRECISION)
        x = x.detach().requires_grad_(x.shape[1] > 3)  # nobody asks for the images' gradient
        with torch.autocast(place.device, torch.float16):
            output = layer(x)
        output.backward(torch.randn_like(output))
        place.synchronize()
    yield {"name": f"build {name} {part}", "layers": len(kinds), "seconds": round(time.perf_counter() - started, 1)}


def layers_of(model: Model, place: Place) -> dict[Any, tuple[nn.Module, Tensor]]:
    """A model's linear layers and convolutions, each kind once, and what comes into it in a step under autocast."""
    found: dict[Any, tuple[nn.Module, Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        key = (str(module), inputs[0].shape, inputs[0].dtype, inputs[0].stride())
        found.setdefault(key, (module, inputs[0]))

    plain, images, _ = parts_of(model, place)
    for module in plain.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad(), torch.autocast(place.device, torch.float16):
        plain(images)
    return found


def parts_of(model: Model, place: Place) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in channels_last, the same weights each time, and a batch of images and labels."""
    torch.manual_seed(0)
    shape = (3, model.edge, model.edge)
    module = build(ModelConfig(name=model.name, width=model.width), model.classes, shape).to(place.device)
    images = torch.randn(model.batch, *shape, device=place.device).to(memory_format=torch.channels_last)
    labels = torch.randint(model.classes, (model.batch,), device=place.device)
    return module.to(memory_format=torch.channels_last), images, labels


def stepper(
    model: Model, place: Place, precision: str | None, autocast: bool, compile: bool = False
) -> Callable[[], None]:
    """A function that runs forward and backward once, and drops the gradients; it does not wait for the device."""
    return model_and_step(model, place, precision, autocast, compile)[0]


def model_and_step(
    model: Model, place: Place, precision: str | None, autocast: bool, compile: bool = False
) -> tuple[Callable[[], None], nn.Module]:
    """A `stepper`, and the model that it trains."""
    module, images, labels = parts_of(model, place)
    if precision is not None:
        module = lnpu.convert(module, precision)
    if compile:  # what the rehearsal leaves out is the C++ or CUDA that Inductor writes
        module = torch.compile(module, fullgraph=True, backend="aot_eager" if place.rehearses else "inductor")  # type: ignore[assignment]

    def step() -> None:
        with torch.autocast(place.device, torch.float16, enabled=autocast):
            loss: Tensor = nn.functional.cross_entropy(module(images).float(), labels)
        loss.backward()
        module.zero_grad(set_to_none=True)

    return step, module


def against(mine: str, base: str, times: dict[str, list[float]]) -> Row:
    value, spread = ratio(times, mine, base)
    return {f"ratio_to_{base}": value, f"spread_to_{base}": spread}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 5) for name, values in times.items()}
