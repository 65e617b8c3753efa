"""The folder of a run that was never trained: small counts, and the files around them."""

from __future__ import annotations

from pathlib import Path

from helpers.handmade import lanes, network, with_lanes
from lnpu_torch.counts.schema import Counts
from lnpu_torch.counts.vector_ops import VectorOp, VectorOpCounts

NAME = "<b>layer</b> & 'one'"
RELU = VectorOp(kind="activation", phase="forward", op="relu", calls=1, read=40, written=40, operations=40, special=0)
SGD = VectorOp(
    kind="optimizer",
    phase="update",
    op="add",
    calls=1,
    read=9,
    written=6,
    operations=20,
    special=1,
    fetched=9,
    stored=6,
)


def epoch_counts(times: int) -> Counts:
    """Two layers, one of a name that HTML would take for its own; and a ReLU and an update."""
    counted = network().model_copy(update={"vector_ops": VectorOpCounts(entries=(RELU, SGD))})
    full = lanes(16, sum(counted.steps[0].first.elements[1:]), lambda config: 10 * config.lanes)
    first, *others = counted.steps
    steps = [with_lanes(first, first=full), *others]
    renamed = [step.model_copy(update={"layer": NAME if step.layer == "conv1" else step.layer}) for step in steps]
    return counted.model_copy(update={"steps": tuple(renamed)}) * times


def write_run(folder: Path, epochs: int = 3, settings: str = "chip: [lnpu, dense-fp16]\n") -> Path:
    (folder / "counts").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"model: {{name: tiny}}\nprecision: fgmp\nlr: 0.1\n{settings}")
    (folder / "versions.json").write_text('{"torch": "9.9"}')
    rows = [f"{number},{1 / number},{1 - 0.5**number},,warm" for number in range(1, epochs + 1)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,loss,test_accuracy,empty,word", *rows, ""]))
    for number in range(1, epochs + 1):
        epoch_counts(epochs + 1 - number).save(folder / "counts" / f"epoch{number}.json")
    return folder
