"""`lnpu estimate`: a file of shapes and densities, priced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lnpu_torch as lnpu
from helpers.command import lnpu_command, refused

TABLE = """
batch: 4
layers:
  conv1: {kind: Conv2d, in_channels: 3, out_channels: 8, kernel_size: 3, padding: 1, input: [8, 8]}
  fc: {kind: Linear, in_channels: 512, out_channels: 10}
densities:
  default: {input: {nonzero: 0.5, fp8: 0.9}, weight: {nonzero: 1, fp8: 0.8}, grad_output: 0.7}
  layers:
    conv1: {input: 1, grad_weight: {grad_output: 0.2}}
"""
MODEL = "input: [3, 8, 8]\nmodel: {name: resnet18_cifar, width: 2, classes: 10}\n"


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "paper.yaml").write_text(text)
    return str(tmp_path / "paper.yaml")


def test_a_table_is_priced_and_its_counts_are_written(tmp_path: Path) -> None:
    out = tmp_path / "counts.json"
    result = lnpu_command("estimate", written(tmp_path, TABLE), "--chip", "dense-fp16", "--full", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "ESTIMATE: from shapes alone" in result.output
    found = lnpu.Counts.load(out)
    assert found.steps[2].second.elements == (1638, 0, 410)
    assert str(lnpu.price(found, "dense-fp16")) in result.output
    data = json.loads(lnpu_command("estimate", written(tmp_path, TABLE), "--format", "json").output)
    assert data["total"]["estimate"] is True


def test_a_recipes_model_at_another_batch_and_in_inference(tmp_path: Path) -> None:
    path = written(tmp_path, MODEL)
    result = lnpu_command("estimate", path, "--batch", "3", "--inference", "--format", "csv")
    assert result.exit_code == 0, result.output
    rows = result.output.splitlines()
    assert rows[0].endswith(",estimate") and all(row.endswith(",True") for row in rows[1:])
    whole = " ".join(lnpu_command("estimate", path, "--batch", "2", "--by", "step").output.split())
    assert "grad_weight (WG)" in whole and "update" in whole and "dense for want of a density" in whole


def test_anyones_model(tmp_path: Path) -> None:
    result = lnpu_command("estimate", written(tmp_path, "input: [3]"), "--model", "test_cli_estimate:small")
    assert result.exit_code == 0, result.output


def small() -> object:
    from torch import nn

    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TABLE + "model: {name: alexnet_cifar}", "either a model (a key, or --model) or layers are to be estimated"),
        ("batch: 2", "either a model (a key, or --model) or layers are to be estimated"),
        (TABLE + "input: [3]", "input: each of the layers has its own"),
        (
            TABLE.replace("0.5", "1.5"),
            "densities.default.input.nonzero: Input should be less than",
        ),
        (TABLE.replace("batch: 4", "batch: 0"), "batch: Input should be greater than or equal to 1, got 0"),
        (TABLE.replace("    conv1:", "    conv9:"), "densities.layers.conv9: no such layer was counted"),
        (TABLE.replace("kind: Linear", "kind: Lstm"), "layers.fc.kind: Input should be 'Linear'"),
        (MODEL.replace("input: [3, 8, 8]\n", ""), "input: a model needs the shape of one sample"),
        (MODEL.replace("[3, 8, 8]", "[8, 8]"), "input is [channels, height, width], got [8, 8]"),
        (MODEL.replace(", classes: 10", ""), "model.classes: how many outputs it has"),
        (MODEL.replace("resnet18_cifar", "resnet18_cifer"), "model.name: unknown model 'resnet18_cifer'"),
        (MODEL.replace("width: 2", "widht: 2"), "unknown key 'widht' (nearest: width)"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, told: str) -> None:
    assert told in refused("estimate", written(tmp_path, text)).replace("\n", "")


def test_a_batch_below_one_is_refused(tmp_path: Path) -> None:
    assert "batch: -1 samples" in refused("estimate", written(tmp_path, TABLE), "--batch", "-1")
    assert "batch: 0 samples" in refused("estimate", written(tmp_path, TABLE), "--batch", "0")
