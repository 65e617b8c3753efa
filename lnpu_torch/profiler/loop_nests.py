"""From a model's shapes and a run's counts to the loop nests of its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from lnpu_torch.counts.loop_nest import LoopNest, NestTensor, Place
from lnpu_torch.counts.schema import OPERANDS, Counts
from lnpu_torch.files import ConfigError, listed
from lnpu_torch.profiler.shape_counter import ShapeCounter, StepCall
from lnpu_torch.profiler.training_step import TrainingStep, infer

RESULTS = {"forward": "output", "grad_input": "grad_input", "grad_weight": "grad_weight"}


def loop_nests(model: nn.Module, counts: Counts, shape: Sequence[int]) -> list[LoopNest]:
    """The steps that were counted, with the shapes that they have for an input [N, ...], and densities as counted.

    Args:
        model: the model that was counted; it stays as it is.
        counts: what it did.
        shape: of a batch.

    Raises:
        ConfigError: the model cannot take such an input, or is not the one that was counted.
    """
    densities = counts.densities()
    known = {(entry.layer, entry.step): entry for entry in counts.steps if any(map(sum, entry.pairs))}
    seen = Counter((name, call) for name, call in _calls(model, shape, any(step != "forward" for _, step in known)))
    nests = []
    for (layer, call), times in seen.items():
        entry = known.get((layer, call.step))
        if entry is None:
            continue
        channels = [operand.lanes.channels for operand in (entry.first, entry.second) if operand.lanes]
        if any(each not in (call.shape.in_channels, call.shape.out_channels) for each in channels):
            raise ConfigError(f"{layer}: the model's layer has other channels than the one that was counted")
        of_operands = {name: densities.of(layer, call.step, name).nonzero for name in OPERANDS[call.step]}
        nests.append(_nest(layer, call, times, of_operands))
    missing = {layer for layer, _ in known} - {nest.layer for nest in nests}
    if missing:
        raise ConfigError(f"layers that were counted, and that the model does not run: {listed(sorted(missing)[:5])}")
    return nests


def _calls(model: nn.Module, shape: Sequence[int], training: bool) -> list[tuple[str, StepCall]]:
    counter = ShapeCounter(model)
    with counter.counting():
        batch = counter.batch(shape)
        if training:
            TrainingStep(counter.network, batch, None, "none").backward()
        else:
            infer(counter.network, batch)
    return counter.calls


def _nest(layer: str, call: StepCall, calls: int, densities: dict[str, float | None]) -> LoopNest:
    product, shape = call.product, call.shape
    places: dict[str, Place] = {
        "input": "conv_input" if product.input_side == "conv_input" else "conv_output",
        "weight": "weight",
        "output": "conv_output" if product.input_side == "conv_input" else "conv_input",
    }
    place_of = places | {"grad_output": places["output"], "grad_input": places["input"], "grad_weight": "weight"}
    tensors = {place_of[name]: NestTensor(name, density) for name, density in densities.items()}
    tensors[place_of[RESULTS[call.step]]] = NestTensor(RESULTS[call.step], None)
    return LoopNest(
        layer=layer,
        step=call.step,
        tensors=tensors,
        groups=shape.groups,
        batch=shape.batch,
        filters=shape.out_channels // shape.groups,
        channels=shape.in_channels // shape.groups,
        grid=shape.conv_output,
        kernel=shape.kernel,
        input=shape.conv_input,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        calls=calls,
    )
