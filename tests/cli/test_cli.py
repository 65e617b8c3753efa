"""The command: what it prints, and one clear message with exit code 2 for whatever a user can get wrong."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from helpers.command import lnpu_command, refused
from helpers.handmade import network
from lnpu_torch.cli import app as cli
from lnpu_torch.cli.importing import import_model
from lnpu_torch.cost.comparison import Comparison
from lnpu_torch.cost.report import Summary, csv_text, json_text
from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError
from lnpu_torch.profiler.training_step import TrainingStep
from lnpu_torch.text_tables import si


@pytest.fixture
def counts(tmp_path: Path) -> str:
    network().save(tmp_path / "counts.json")
    return str(tmp_path / "counts.json")


def test_help_and_version() -> None:
    help_text = lnpu_command("--help").stdout
    assert all(command in help_text for command in ("train", "price", "chips", "profile"))
    assert lnpu_command("--version").stdout == f"lnpu {lnpu.__version__}\n"


def test_price_prints_a_table_for_one_chip_and_a_comparison_for_several(counts: str) -> None:
    loaded = lnpu.Counts.load(counts)
    assert lnpu_command("price", counts, "--full").stdout == f"{lnpu.price(loaded, 'lnpu')}\n"
    assert lnpu_command("price", counts, "--by", "layer").stdout == f"{lnpu.price(loaded, 'lnpu').by('layer')}\n"
    several = lnpu_command("price", counts, "--chip", "lnpu", "--chip", "dense-fp16", "--full").stdout
    assert "lnpu" in several
    assert "dense-fp16" in several


def test_price_sums_up_in_a_dozen_lines(counts: str) -> None:
    """Energy without and with DRAM, time, and how many times the first chip's they are."""
    reports = [lnpu.price(lnpu.Counts.load(counts), name) for name in ("lnpu", "dense-fp16")]
    said = lnpu_command("price", counts, "--chip", "lnpu", "--chip", "dense-fp16").stdout
    assert said == f"{Summary(reports)}\n--full: every layer, what the figures rest on, and all notes\n"
    lines = said.splitlines()
    assert len(lines) <= 13 and max(map(len, lines)) <= 110
    first, dense = (report.total for report in reports)
    row = next(line for line in lines if line.startswith("  dense-fp16"))
    assert f"{dense.energy_pj / 1e3:.3f} nJ ({dense.energy_pj / first.energy_pj:.2f}x)" in row
    assert f"{si(dense.all_energy_pj, 'pJ')} ({dense.all_energy_pj / first.all_energy_pj:.2f}x)" in row
    assert "zeros 50.0%" in said and "by step: " in said


def test_price_takes_several_files(counts: str, tmp_path: Path) -> None:
    (network() * 2).save(tmp_path / "twice.json")
    twice = str(tmp_path / "twice.json")
    blocks = [f"{path}\n\n{lnpu_command('price', path).stdout}" for path in (counts, twice)]
    assert lnpu_command("price", counts, twice).stdout == "\n".join(blocks)
    assert "--format csv: of one file of counts, and these are 2" in refused("price", counts, twice, "--format", "csv")


def test_price_prints_json_and_csv(counts: str) -> None:
    one = json.loads(lnpu_command("price", counts, "--format", "json").stdout)
    assert one["total"]["energy_pj"] == lnpu.price(lnpu.Counts.load(counts), "lnpu").total.energy_pj
    chips = ("--chip", "lnpu", "--chip", "dense-fp16")
    both = json.loads(lnpu_command("price", counts, *chips, "--format", "json").stdout)
    assert [each["chip"] for each in both] == ["lnpu", "dense-fp16"]
    rows = list(csv.DictReader(io.StringIO(lnpu_command("price", counts, *chips, "--format", "csv").stdout)))
    assert {row["chip"] for row in rows} == {"lnpu", "dense-fp16"}


@pytest.mark.parametrize("by", [None, "layer", "step"])
@pytest.mark.parametrize("chips", [["lnpu"], ["sparse-inference", "lnpu"]], ids=len)
def test_price_prints_what_the_library_gives(chips: list[str], by: Any, counts: str) -> None:
    arguments = ["price", counts, "--voltage", "0.9", *(["--by", by] if by else ["--full"])]
    reports = [lnpu.price(lnpu.Counts.load(counts), lnpu.chip(name, 0.9)) for name in chips]
    reports = [report.by(by) for report in reports] if by else reports
    table = str(reports[0] if len(reports) == 1 else Comparison(reports))
    assert "0.9 V" in str(reports[0])
    texts = {"table": f"{table}\n", "json": json_text(reports), "csv": csv_text(reports)}
    texts |= {"json": json_text(reports[0]), "csv": csv_text(reports[0])} if len(reports) == 1 else {}
    for format, text in texts.items():
        named = itertools.chain.from_iterable(("--chip", name) for name in chips)
        assert lnpu_command(*arguments, *named, "--format", format).stdout == text


@pytest.mark.parametrize(("precision", "groups"), [("fp16", (False, True)), ("fp8", (True, False))])
def test_profile_takes_precision_and_voltage(precision: str, groups: tuple[bool, bool]) -> None:
    options = ("--precision", precision, "--voltage", "1.1", "--format", "json")
    result = json.loads(lnpu_command("profile", "test_cli:Classifier", "--input-shape", "2,3,6,6", *options).stdout)
    pairs = {name for row in result["rows"] for name in row["pairs"]}
    assert (any("fp8" in pair for pair in pairs), any("fp16" in pair for pair in pairs)) == groups
    assert result["clock_hz"] == lnpu.chip("lnpu", 1.1).clock_hz


def test_a_wrong_counts_file_or_option_is_refused(counts: str, tmp_path: Path) -> None:
    assert "no such counts file" in refused("price", f"{tmp_path}/nowhere.json")
    assert "unknown chip 'lnpo'" in refused("price", counts, "--chip", "lnpo")
    text = Path(counts).read_text()
    for damaged, message in (
        (text[:100], "not valid JSON"),
        ("{}", "not a counts file"),
        ('{"version": 9, "steps": []}', "9"),
    ):
        Path(counts).write_text(damaged)
        assert message in refused("price", counts)
    assert "colour" in refused("price", counts, "--by", "colour")
    assert "xml" in refused("price", counts, "--format", "xml")


def test_a_file_in_which_nothing_was_counted_is_refused(tmp_path: Path) -> None:
    Counts(steps=()).save(tmp_path / "empty.json")
    for arguments in (("price",), ("sweep", "--set", "sram_bytes=1000,2000")):
        assert "nothing was counted" in refused(arguments[0], str(tmp_path / "empty.json"), *arguments[1:])


@pytest.mark.parametrize("command", [["price"], ["sweep", "--set", "sram_bytes=1000"]])
def test_what_is_given_in_place_of_counts_is_recognised(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "counts").mkdir()
    assert f"such as {tmp_path / 'counts' / 'epoch1.json'}" in refused(*command, str(tmp_path))
    for chip in ("lnpu", "mine.yaml"):
        assert f"a chip is named by --chip {chip}" in refused(*command, chip)


def test_chips_lists_them_and_shows_one_with_its_sources() -> None:
    listed = lnpu_command("chips").stdout
    assert "published: the share of the values" in listed
    assert all(name in listed for name in ("dense-fp16", "lnpu", "lnpu-fp16", "sparse-inference"))
    shown = lnpu_command("chips", "lnpu").stdout
    assert "energy.fp8_mac_pj" in shown
    assert "derived" in shown
    assert "unknown chip 'lnpo' (nearest: lnpu" in refused("chips", "lnpo")


class Classifier(nn.Module):
    """Returns what models return: tensors in mappings, sequences, and things that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        features = self.conv(x)
        return {"logits": self.fc(features.mean((2, 3))), "more": [features, None, "text", torch.ones(1)]}


instance = Classifier()


class NoParameters(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


def detached() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), NoParameters())


def norm() -> nn.Module:
    return nn.BatchNorm1d(3)


def broken() -> nn.Module:
    raise LookupError("weights are missing")


@pytest.mark.parametrize("attribute", ["Classifier", "instance"])
def test_profile_prices_one_training_step(attribute: str) -> None:
    result = lnpu_command(
        *("profile", f"test_cli:{attribute}", "--input-shape", "2,3,6,6", "--format", "json", "--chip", "dense-fp16")
    )
    assert result.exit_code == 0, result.output
    rows = {(row["layer"], row["step"]): row for row in json.loads(result.stdout)["rows"]}
    assert rows["conv", "forward"]["macs"] == 2 * 4 * 4 * 4 * 3 * 9
    assert rows["conv", "grad_weight"]["executed"] == 2 * 4 * 4 * 4 * 3 * 9
    assert rows["conv", "grad_input"]["not_run"] == 2 * 4 * 4 * 4 * 3 * 9
    assert rows["fc", "grad_input"]["executed"] == 2 * 4 * 2


def test_profile_shows_what_stayed_in_float() -> None:
    result = lnpu_command("profile", "torchvision.models:resnet18", "--input-shape", "2,3,32,32", "--by", "step")
    assert result.exit_code == 0, result.output
    assert "21 of 41 layers emulated" in result.stdout
    assert "Energy on chip lnpu" in result.stdout


BAD_PROFILES = {
    "a model is written MODULE:ATTR": ["torchvision.models", "1,3,8,8"],
    "no_such_module:x: cannot be imported: ModuleNotFoundError": ["no_such_module:x", "1,3,8,8"],
    "test_cli:nothing: cannot be imported: AttributeError": ["test_cli:nothing", "1,3,8,8"],
    "test_cli:broken: cannot be called without arguments: LookupError: weights are missing": ["test_cli:broken", "1,3"],
    "torch.nn:Linear: cannot be called without arguments: TypeError": ["torch.nn:Linear", "1,3"],
    "an nn.Module is expected, or a function that returns one; got int": ["test_cli:int", "1,3"],
    "--input-shape: '1,x' is not a shape": ["test_cli:Classifier", "1,x"],
    "--input-shape: '1,0,3' is not a shape": ["test_cli:Classifier", "1,0,3"],
    "the model cannot take an input of shape (1, 2, 6, 6)": ["test_cli:Classifier", "1,2,6,6"],
}
int = int  # something to import that is no model


@pytest.mark.parametrize("message", BAD_PROFILES)
def test_a_model_that_cannot_be_profiled_is_refused(message: str) -> None:
    model, shape = BAD_PROFILES[message]
    assert message in refused("profile", model, "--input-shape", shape)


def test_profile_refuses_a_model_without_emulated_layers_and_an_unknown_precision() -> None:
    nothing = "nothing to price, as it has no layer that can be emulated"
    assert refused("profile", "test_cli:NoParameters", "--input-shape", "1,3").endswith(f"{nothing}\n")
    assert f"{nothing}: only BatchNorm1d" in refused("profile", "test_cli:norm", "--input-shape", "1,3")
    arguments = ("profile", "test_cli:Classifier", "--input-shape", "1,3,6,6")
    assert "unknown precision 'fp9'" in refused(*arguments, "--precision", "fp9")
    assert "unknown chip 'lnpo'" in refused(*arguments, "--chip", "lnpo")


def test_models_of_the_current_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model_in_this_folder.py").write_text("import torch\nmodel = torch.nn.Linear(3, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert isinstance(import_model("my_model_in_this_folder:model"), nn.Linear)


def test_outputs_that_do_not_depend_on_parameters_are_refused() -> None:
    class Constant(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    for model, said in ((NoParameters(), "no parameter to train"), (Constant(2, 2), "nothing to train")):
        with pytest.raises(ConfigError, match=said):
            TrainingStep(model, torch.zeros(1, 2), None, "sgd").run()


@pytest.mark.parametrize(("optimizer", "words"), [("none", 0), ("sgd", 10), ("adam", 14), ("adamw", 14)])
def test_profile_takes_the_optimizers_step(optimizer: str, words: int, tmp_path: Path) -> None:
    """Of every parameter: its gradient, 1; itself and each state, 2 and 2; its FP16 copy, 1."""
    (tmp_path / "small.yaml").write_text(
        "like: lnpu\ndescription: no room\nsram_bytes: {value: 16, tag: assumed, source: test}\n"
    )
    options = ("--optimizer", optimizer, "--format", "json", "--by", "step", "--chip", f"{tmp_path}/small.yaml")
    done = lnpu_command("profile", "test_cli:Classifier", "--input-shape", "2,3,6,6", *options)
    assert done.exit_code == 0, done.output
    moved = {row["step"]: row["dram_bits"] for row in json.loads(done.stdout)["rows"]}
    parameters = sum(parameter.numel() for parameter in Classifier().parameters())
    assert moved.get("update", 0) == 16 * words * parameters


class Wide(nn.Module):
    """Many outputs, so that the mean's error of each is small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4096))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("loss", ["mean", "mse", "cross-entropy"])
def test_profile_scales_the_loss_so_that_no_error_underflows(loss: str) -> None:
    options = ("--loss", loss, "--precision", "fp16", "--format", "json")
    done = lnpu_command("profile", "test_cli:Wide", "--input-shape", "512,8", *options)
    rows = {(row["layer"], row["step"]): row for row in json.loads(done.stdout)["rows"]}
    assert rows["layers.2", "grad_input"]["zero_share"] < 0.01


def test_profile_halves_the_scale_until_nothing_overflows() -> None:
    torch.manual_seed(0)
    model = lnpu.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with torch.no_grad():
        model[1].weight.mul_(1000)
    step = TrainingStep(model, torch.randn(2, 4), "mean", "sgd")
    step.warm_up()
    assert 0 < step.scale < 2**16
    assert step.run()
    with torch.no_grad():
        model[1].weight.fill_(torch.inf)
    with pytest.raises(ConfigError, match="overflow at any loss scale"):
        step.warm_up()


def zero_head() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    return model


def test_profile_says_where_all_errors_are_zero() -> None:
    arguments = ("profile", "test_cli:zero_head", "--input-shape", "2,3", "--optimizer")
    assert (
        "all errors of 1 layers are zero, and their products skipped; the first is 0"
        in lnpu_command(*arguments, "none").stderr
    )
    assert "all errors" not in lnpu_command(*arguments, "sgd").stderr  # the step before has changed the head


def test_profile_of_inference_has_forward_alone() -> None:
    arguments = ("profile", "test_cli:Classifier", "--input-shape", "2,3,6,6", "--inference")
    done = lnpu_command(*arguments, "--format", "json")
    assert {row["step"] for row in json.loads(done.stdout)["rows"]} == {"forward"}
    assert "one forward pass" in lnpu_command(*arguments).stdout
    assert "neither --loss nor --optimizer" in refused(*arguments, "--loss", "mean")
    assert "neither --loss nor --optimizer" in refused(*arguments, "--optimizer", "adam")


def test_profile_refuses_classes_where_there_are_none() -> None:
    arguments = ("profile", "test_cli:flat", "--input-shape", "2,3", "--loss", "cross-entropy")
    assert "--loss cross-entropy needs outputs [N, C, ...]" in refused(*arguments)


def flat() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


def test_the_installed_entry_point_ends_with_the_exit_code() -> None:
    code = "import sys; sys.argv = ['lnpu', 'chips', 'lnpo']; from lnpu_torch.cli.app import main; main()"
    root = str(Path(cli.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.returncode == 2
    assert done.stderr.startswith("unknown chip 'lnpo'")
