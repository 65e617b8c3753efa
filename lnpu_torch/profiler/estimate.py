"""Estimates what a step of a model, or of a table of layers, does: from shapes and densities, without running it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lnpu_torch.counts.densities import Densities
from lnpu_torch.counts.schema import OPERANDS, Counts
from lnpu_torch.counts.vector_ops import NotCounted
from lnpu_torch.files import ConfigError, Frozen, validate
from lnpu_torch.nn.modules import EMULATED_CLASSES
from lnpu_torch.profiler.shape_counter import ShapeCounter
from lnpu_torch.profiler.step_choices import Loss, OptimizerName
from lnpu_torch.profiler.training_step import TrainingStep, infer

CLASSES = {cls.__name__: cls for cls in EMULATED_CLASSES}
FROM_SHAPES = "from shapes alone, nothing was run, and no lane waits for another"
NO_MODEL = (
    "a table of layers has none, and no order, so that each layer's operands come from DRAM and nothing stays in SRAM "
    "from layer to layer"
)

Size = Annotated[int, Field(ge=1, lt=2**31)]
NotNegative = Annotated[int, Field(ge=0, lt=2**31)]


class LayerShape(Frozen):
    """One layer of a table, with torch's names. `input` is the grid of its input, or of a linear layer its rows.

    A linear layer has channels, and neither kernel nor stride.
    """

    kind: Literal["Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]
    in_channels: Size
    out_channels: Size
    input: tuple[Size, ...] = ()
    kernel_size: Size | tuple[Size, ...] | None = None
    stride: Size | tuple[Size, ...] = 1
    padding: NotNegative | tuple[NotNegative, ...] = 0
    dilation: Size | tuple[Size, ...] = 1
    groups: Size = 1
    output_padding: NotNegative | tuple[NotNegative, ...] = 0

    def module(self) -> nn.Module:
        """The layer, without bias. Raises ConfigError for what its kind does not have; torch's ValueError otherwise."""
        given = {name: value for name, value in self if name in self.model_fields_set and name not in _HEAD}
        if self.kind == "Linear":
            if given:
                raise ConfigError(f"{', '.join(given)}: a linear layer has none")
            return nn.Linear(self.in_channels, self.out_channels, bias=False)
        if self.kernel_size is None:
            raise ConfigError("kernel_size: a convolution needs one")
        if "output_padding" in given and "Transpose" not in self.kind:
            raise ConfigError("output_padding: for a transposed convolution alone")
        if len(self.input) != int(self.kind[-2]):
            raise ConfigError(f"input: {self.kind} has a grid of {self.kind[-2]} sizes, got {list(self.input)}")
        layer: nn.Module = CLASSES[self.kind](self.in_channels, self.out_channels, bias=False, **given)
        return layer

    def shape(self, batch: int) -> tuple[int, ...]:
        """Of the input."""
        linear = self.kind == "Linear"
        return (batch, *self.input, self.in_channels) if linear else (batch, self.in_channels, *self.input)


class EstimateFile(Frozen):
    """What to estimate: a recipe's `model` with the `input` of one sample, or `layers`; and densities."""

    model: dict[str, Any] | None = None
    input: tuple[Size, ...] | None = None
    layers: dict[str, LayerShape] | None = None
    batch: Size = 1
    training: bool = True
    optimizer: OptimizerName = "sgd"
    loss: Loss | None = None
    densities: Densities = Densities()


_HEAD = ("kind", "in_channels", "out_channels", "input")


def estimate(
    model: nn.Module | Mapping[str, Any],
    batch: int,
    densities: Densities | Mapping[str, Any] | None = None,
    *,
    input_shape: Sequence[int] | None = None,
    training: bool = True,
    optimizer: OptimizerName = "sgd",
    loss: Loss | None = None,
) -> Counts:
    """What one step does, from shapes and densities: nothing is computed, and no memory is needed for a batch.

    Multiplications of two operands are those of independent ones: their densities' product. Elements that no density is
    given for are non-zero FP16. Lanes are all as busy. Of a model, vector operations and their order are those of its
    ops; a table has none.

    Args:
        model: a model, which stays as it is; or layers by name, in their order, as `LayerShape` has them.
        batch: samples.
        densities: shares by layer, step and operand, as `Counts.with_sparsity` takes them.
        input_shape: of one sample, such as (3, 224, 224); for a model alone.
        training: forward, backward and update; else a forward pass in evaluation mode.
        optimizer: "sgd" (with momentum), "adam", "adamw" or "none"; for a model alone.
        loss: "cross-entropy", "mse" or "mean"; None is cross-entropy where there are classes.

    Returns:
        Counts that are marked as an estimate.

    Raises:
        ConfigError: a batch below 1, a wrong table or density, a layer that is not there, a model without layers that
            can be emulated or that cannot take such an input.
    """
    if batch < 1:
        raise ConfigError(f"batch: {batch} samples; a batch has 1 or more")
    if isinstance(model, nn.Module):
        if input_shape is None:
            raise ConfigError("input_shape: a model needs that of one sample, such as (3, 224, 224)")
        counts = _model(model, (batch, *input_shape), training, optimizer, loss)
    else:
        counts = _table(model, batch, training)
    asked = densities if isinstance(densities, Densities) else validate(Densities, densities or {}, "densities")
    marked = counts.model_copy(update={"estimate": FROM_SHAPES + _left_dense(counts, asked)})
    return marked.with_sparsity(asked)


def _left_dense(counts: Counts, densities: Densities) -> str:
    """How many operands there is no density of, as the end of a clause."""
    operands = [
        densities.of(entry.layer, entry.step, operand).nonzero
        for entry in counts.steps
        if entry.by_size
        for operand in OPERANDS[entry.step]
    ]
    dense = sum(each is None for each in operands)
    return f", {dense} of {len(operands)} operands dense for want of a density" if dense else ""


def _model(
    model: nn.Module, shape: Sequence[int], training: bool, optimizer: OptimizerName, loss: Loss | None
) -> Counts:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that nothing is emulated is an error here
        counter = ShapeCounter(model)
    try:
        with counter.shapes():
            batch = counter.batch(shape)
            step = TrainingStep(counter.network, batch, loss, optimizer) if training else None
            if step:  # a step before makes the optimizer's states
                step.backward()
                step.update()
        with counter.counting():
            if step:
                step.backward()
                step.update()
            else:
                infer(counter.network, batch)
    except ConfigError as error:
        if isinstance(error.__cause__, DataDependentOutputException | DynamicOutputShapeException):
            told = f"what the model does depends on values, which an estimate does not have: {error.__cause__}"
            raise ConfigError(told) from None
        raise
    return counter.counts


def _table(layers: Mapping[str, Any], batch: int, training: bool) -> Counts:
    """Each layer for itself; the first one's errors are not propagated."""
    table = {name: validate(LayerShape, layer, f"layers.{name}") for name, layer in layers.items()}
    if not table:
        raise ConfigError("layers: none is given")
    modules = nn.ModuleList()
    with torch.device("meta"):
        for name, layer in table.items():
            with _named(name):
                modules.append(layer.module())
    counter = ShapeCounter(modules)
    with counter.counting():
        for place, (name, layer) in enumerate(table.items()):
            with _named(name), torch.set_grad_enabled(training):
                x = torch.zeros(layer.shape(batch), device="cpu", requires_grad=training and place > 0)
                output = counter.network.get_submodule(str(place))(x)
                if training:
                    output.backward(torch.ones_like(output))
    names = dict(zip(map(str, range(len(table))), table, strict=True))
    steps = [
        entry.model_copy(
            update={
                "layer": names[entry.layer],
                "by_size": tuple(calls.model_copy(update={"passed": None}) for calls in entry.by_size),
            }
        )
        for entry in counter.counts.steps
    ]
    return Counts(steps=tuple(steps), vector_ops=NotCounted(reason=NO_MODEL))


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Within the block, what is wrong with a layer is a ConfigError that names it."""
    try:
        yield
    except (ConfigError, ValueError, RuntimeError) as error:
        raise ConfigError(f"layers.{layer}: {error}") from None
