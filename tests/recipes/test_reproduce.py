"""Claims beside runs: each has its row, each figure of ours comes from the run and from nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lnpu_torch as lnpu
from lnpu_torch.cli.app import app
from lnpu_torch.files import ConfigError, find, parse_yaml, validate
from lnpu_torch.recipes import reproduce as recipe
from lnpu_torch.recipes import reproduction_text
from lnpu_torch.recipes.claims import Claim, read_claims
from lnpu_torch.recipes.measurements import Evidence
from lnpu_torch.recipes.models import ModelConfig, build
from lnpu_torch.recipes.reproduce import ANSWERS, Row, reproduce, rows
from lnpu_torch.recipes.short_training import CurveConfig, Settings, load_weights, open_images, probe_all
from lnpu_torch.recipes.sparsity_curve import ZEROS, curves, masked, point, run

TINY: dict[str, Any] = {
    "networks": {
        name: {"model": {"name": f"{name}_cifar", "width": 2}, "steps": 3, "lr": 0.01}
        for name in ("vgg16", "alexnet", "resnet18")
    },
    "data": {"kind": "digits"},
    **{"size": 32, "batch_size": 8, "counted": 1, "tested": 10, "threads": 1},
    "readings": {"FP8 without subnormals": {"window": 15}, "4 binades": {"window": 4}},
    "curve": {"channels": 24, "size": 8, "batch": 2},
}
PUBLISHED = {"25.3 TFLOPS/W", "37 ... 61 %", "4x", "1.76x", "4.4 ... 4.9x", "2.4 ... 3.47x", "-38.9 %", "2.08x"}
"""Every figure that the abstracts of the papers give."""


def tiny(**changes: Any) -> Settings:
    return validate(Settings, {**TINY, **changes}, "tiny")


@pytest.fixture(scope="module")
def made() -> tuple[tuple[Row, ...], Evidence]:
    threads = torch.get_num_threads()
    result = reproduce(tiny(), lambda _: None)
    torch.set_num_threads(threads)
    return result


def ours(evidence: Evidence) -> dict[str, float | None]:
    return {row.key: row.ours for row in rows(read_claims(), evidence)}


def test_every_claim_has_a_row_and_every_published_figure_a_claim(made: tuple[tuple[Row, ...], Evidence]) -> None:
    claims = read_claims().claims
    assert [row.key for row in made[0]] == list(claims)
    assert set(ANSWERS) == set(claims)
    assert {row.published for row in made[0] if row.tag == "published"} >= PUBLISHED
    for row in made[0]:
        assert row.why and row.ours_text and row.source
        assert (row.ours is None) == (row.difference == "-")


def test_the_calibration_points_are_met_and_said_to_be_circular(made: tuple[tuple[Row, ...], Evidence]) -> None:
    found = {row.key: row for row in made[0]}
    assert found["dense_efficiency"].ours == pytest.approx(3.48, rel=1e-3)
    nine_in_ten = run(CurveConfig(channels=64, size=16, batch=4), 0.9, "fp8")
    assert point(lnpu.price(nine_in_ten, "lnpu"), 0.9).macs == pytest.approx(25.3, rel=3e-3)
    assert found["peak_efficiency"].ours == pytest.approx(25.3, rel=5e-2)  # few elements: zeros fall unevenly
    circular = {row.key for row in made[0] if row.basis == "circular"}
    assert circular == {"peak_efficiency", "dense_efficiency", "dense_power"}


def test_no_published_figure_goes_into_ours(made: tuple[tuple[Row, ...], Evidence]) -> None:
    claims = read_claims()
    moved = {
        key: claim.model_copy(update={"low": 3 * claim.low + 1, "high": 3 * claim.high + 1})
        for key, claim in claims.claims.items()
        if claim.low is not None and claim.high is not None
    }
    others = rows(claims.model_copy(update={"claims": {**claims.claims, **moved}}), made[1])
    assert [(row.ours, row.ours_text, row.why) for row in others] == [
        (row.ours, row.ours_text, row.why) for row in made[0]
    ]
    assert all(a.difference != b.difference for a, b in zip(others, made[0], strict=True) if a.ours is not None)


def test_rows_are_read_from_the_run(made: tuple[tuple[Row, ...], Evidence]) -> None:
    resnet = made[1].probes["resnet18"]
    report, found = lnpu.price(resnet.fgmp, "lnpu").of_layers(), {row.key: row.ours for row in made[0]}
    forward = [entry.first.elements for entry in resnet.fgmp.steps if entry.step == "forward"]
    assert found["zeros_resnet18"] == pytest.approx(100 * sum(e[0] for e in forward) / sum(map(sum, forward)))
    total, dense = report.total, lnpu.price(resnet.fp16, "dense-fp16").of_layers().total
    assert total.dram_bits and total.dense_dram_bits and total.energy_pj and dense.energy_pj
    assert found["memory_access"] == pytest.approx(100 * (total.dram_bits / total.dense_dram_bits - 1))
    assert found["resnet18_efficiency"] == pytest.approx(dense.energy_pj / total.energy_pj)


CHANGES: dict[str, Callable[[Evidence], Evidence]] = {
    "its layers": lambda runs: replace(
        runs, probes={name: replace(probe, fgmp=_first_half(probe.fgmp)) for name, probe in runs.probes.items()}
    ),
    "its accuracy": lambda runs: replace(
        runs,
        probes={
            name: replace(probe, trained=replace(probe.trained, accuracy=probe.trained.accuracy + 0.125))
            for name, probe in runs.probes.items()
        },
    ),
    "its curves": lambda runs: replace(
        runs,
        curves={
            name: tuple(replace(point, macs=point.macs * factor, power_mw=point.power_mw * factor) for point in curve)
            for factor, (name, curve) in enumerate(runs.curves.items(), start=2)
        },
    ),
}
BY_LAYERS = {"zeros_vgg16", "zeros_alexnet", "zeros_resnet18", "fgmp_over_sparse_fp16", "memory_access"}
BY_LAYERS |= {"resnet18_efficiency", "fp8_share"}
MOVED = {
    "its layers": BY_LAYERS,
    "its accuracy": {"accuracy"},
    "its curves": {"peak_efficiency", "dense_efficiency", "dense_power", "fp8_energy", "over_v100"},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_has_other_figures(what: str, made: tuple[tuple[Row, ...], Evidence]) -> None:
    before, after = {row.key: row.ours for row in made[0]}, ours(CHANGES[what](made[1]))
    assert {key for key in before if before[key] != after[key]} == MOVED[what]


def _first_half(counts: lnpu.Counts) -> lnpu.Counts:
    return counts.model_copy(update={"steps": counts.steps[: len(counts.steps) // 2]})


def test_the_same_settings_give_the_same_run(made: tuple[tuple[Row, ...], Evidence]) -> None:
    assert probe_all(tiny(), open_images(tiny()), lambda _: None) == made[1].probes


def test_synthetic_operands_have_exactly_so_many_zeros() -> None:
    values = masked((3, 5, 7), 0.4, torch.Generator().manual_seed(1))
    assert int((values == 0).sum()) == 42
    assert set((values[values != 0].abs() >= 1).tolist()) == {True}
    counts = run(CurveConfig(channels=10, size=3, batch=2), 0.3, "fp8")
    by_step = {entry.step: entry.first.elements for entry in counts.steps}
    assert by_step == {"forward": (150, 350, 0), "grad_input": (54, 126, 0), "grad_weight": (150, 350, 0)}


def test_efficiency_rises_with_zeros_wherever_they_are_skipped() -> None:
    drawn = curves(CurveConfig(channels=24, size=8, batch=2))
    for name, curve in drawn.items():
        assert tuple(point.zeros for point in curve) == ZEROS
        values = [point.macs for point in curve]
        assert values == sorted(values)
        assert (values[0] < values[-1]) == (name != "dense-fp16")
        assert all(point.chip < point.macs for point in curve)


@pytest.mark.parametrize(
    ("low", "high", "unit", "value", "difference"),
    [
        (37.0, 61.0, "%", 50.0, "inside"),
        (37.0, 61.0, "%", 35.5, "-1.5 points"),
        (37.0, 61.0, "%", 69.3, "+8.3 points"),
        (-38.9, -38.9, "%", -41.0, "-2.1 points"),
        (2.0, 2.0, "x", 2.0, "+0.0 %"),
        (4.4, 4.9, "x", 9.8, "+100.0 %"),
        (None, None, "", 1.0, "-"),
    ],
)
def test_differences(low: float | None, high: float | None, unit: str, value: float, difference: str) -> None:
    claim = Claim(what="w", low=low, high=high, unit=unit, tag="published", source="s")
    assert claim.difference(value) == difference


def test_the_markdown_is_whole(made: tuple[tuple[Row, ...], Evidence]) -> None:
    told = {
        "date": "2026-11-22",
        "device": "a | machine",
        "seconds": 90.0,
        "cpu_seconds": 60.0,
        "versions": {"torch": "2"},
    }
    images = {"zeros": "images/z.svg", "efficiency": "images/e.svg"}
    text = reproduction_text.markdown(*made, tiny(), told, images)
    for words in (
        "date: 2026-11-22",
        "1.5 min, 1.0 min of CPU",
        "torch 2",
        "scikit-learn's digits: 1,437 images of 10 classes to train on, 10 of 360 to test",
        "AdamW at 0.01",
        "](images/z.svg)",
        f"accuracy at which zeros are counted: vgg16 {made[1].probes['vgg16'].trained.accuracy:.1%}",
    ):
        assert words in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for lines in tables:
        assert {line.replace(r"\|", "").count("|") for line in lines} == {lines[0].count("|")}
        assert set(lines[1]) == set("| -")
    assert [line.split(" | ")[1] for line in tables[0][2:]] == [row.published for row in made[0]]
    layers = [line.split(" | ")[0].strip("| ") for line in tables[1][2:]]
    assert layers == list(dict.fromkeys(entry.layer for entry in made[1].probes["vgg16"].fgmp.steps))


def test_rules_that_make_zeros_are_held_against_the_same_claims(made: tuple[tuple[Row, ...], Evidence]) -> None:
    lines = reproduction_text.readings_table(made[0], made[1].probes["resnet18"]).splitlines()
    head, _, published, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert [row[0] for row in rows] == ["FGMP", *TINY["readings"]]
    found = {row.key: row.ours_text for row in made[0]}
    ours = dict(zip(head, rows[0], strict=True))
    assert published[4:7] == ["-38.9 %", "2.08x", "1.76x"]
    assert [ours["external access"], ours["over dense FP16"]] == [
        found["memory_access"],
        found["resnet18_efficiency"],
    ]
    errors, access, over = (
        [float(row[head.index(name)].strip("%x ")) for row in rows]
        for name in ("zeros, EP", "external access", "over sparse FP16")
    )
    assert errors[0] <= errors[1] < errors[2] and access[1] > access[2] and over[1] < over[2]


def test_training_begins_from_weights_that_are_kept(made: tuple[tuple[Row, ...], Evidence], tmp_path: Path) -> None:
    model = build(ModelConfig(name="alexnet_cifar", width=2), 10, (3, 32, 32))
    torch.save({"model": {name: value + 1 for name, value in model.state_dict().items()}}, tmp_path / "kept.pt")
    alexnet = TINY["networks"]["alexnet"] | {"weights": str(tmp_path / "kept.pt")}
    given = {**TINY, "networks": {**TINY["networks"], "alexnet": alexnet}, "readings": {}}
    found = probe_all(validate(Settings, given, "tiny"), open_images(tiny()), lambda _: None)
    assert found["alexnet"].prior and not found["vgg16"].prior and not found["resnet18"].readings
    other, before = found["alexnet"], made[1].probes["alexnet"]
    assert other.first == before.first and other.fgmp != before.fgmp
    assert other.in_float32.loss != before.in_float32.loss and found["vgg16"] == made[1].probes["vgg16"]


def test_weights_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    model = build(ModelConfig(name="alexnet_cifar", width=2), 10, (3, 32, 32))
    with pytest.raises(ConfigError, match=r"weights: nowhere\.pt is no file"):
        load_weights(model, "nowhere.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ConfigError, match=r"text\.pt"):
        load_weights(model, str(tmp_path / "text.pt"))
    for state in ({}, {"model": {}}, {"model": {name: torch.ones(1) for name in model.state_dict()}}):
        torch.save(state, tmp_path / "other.pt")
        with pytest.raises(ConfigError, match=r"other\.pt does not hold this model's"):
            load_weights(model, str(tmp_path / "other.pt"))


def arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def test_the_command_prints_and_writes(
    made: tuple[tuple[Row, ...], Evidence], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(recipe, "reproduce", lambda settings, _: made if settings == tiny() else None)
    files = ["--json", f"{tmp_path}/out.json", "--markdown", f"{tmp_path}/out.md"]
    done = CliRunner().invoke(app, ["reproduce", *arguments(TINY), *files])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["settings"]["counted"] == 1
    for row in written["rows"]:
        assert row["published"] in done.stdout and row["ours_text"] in done.stdout
    assert {row["network"] for row in written["layers"]} == set(TINY["networks"])
    page = (tmp_path / "out.md").read_text()
    for name in ("zeros", "efficiency"):
        assert f"](images/reproduction_{name}.svg)" in page
        assert (tmp_path / "images" / f"reproduction_{name}.svg").read_text().startswith("<?xml")


REFUSED = {
    "no such data file": ["--data", "nowhere.npz"],
    "unknown key 'stepz'": ["stepz=1"],
    "counted: 100 of vgg16's 100 steps": ["counted=100"],
    "missing: alexnet, resnet18": ["networks={vgg16: {model: {name: vgg16_cifar}, steps: 2, lr: 0.1}}", "counted=1"],
    "unknown model 'vgg61'": ["networks.vgg16.model.name=vgg61"],
    "device: Input should be 'auto', 'cpu' or 'cuda', got 'tpu9'": ["device=tpu9"],
    "nowhere is no folder": ["--markdown", "nowhere/page.md"],
    "--full and --trained are two settings": ["--full", "--trained"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mistake_is_one_message(message: str) -> None:
    done = CliRunner().invoke(app, ["reproduce", *REFUSED[message]])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["small", "trained", "full"])
def test_the_settings_that_ship_are_valid(name: str) -> None:
    settings = validate(Settings, parse_yaml(find("reproduction", name, "settings").read_text(), name), name)
    assert set(settings.networks) == set(TINY["networks"])
    for network in settings.networks.values():
        assert (network.weights is not None) == (name == "trained")
        if network.weights:
            load_weights(build(network.model, 10, (3, settings.size, settings.size)), network.weights)
            assert find("reproduction", name, "settings").with_name(network.weights).stat().st_size < 3e6


def test_a_claim_with_an_unknown_tag_is_refused() -> None:
    with pytest.raises(ConfigError, match="tag"):
        validate(Claim, {"what": "w", "low": 1.0, "high": 1.0, "unit": "x", "tag": "heard", "source": "s"}, "claims")
