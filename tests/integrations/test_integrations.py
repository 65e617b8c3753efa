"""The callbacks in the unchanged loops of Lightning and Transformers; each is skipped where its project is missing."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from helpers.paths import ROOT
from helpers.processes import on_ranks
from lnpu_torch.files import ConfigError
from lnpu_torch.integrations.cost_log import CostLog
from lnpu_torch.recipes.torchvision_compat import import_torchvision
from lnpu_torch.reporting.run_reader import read_run

EXAMPLES = ROOT / "examples"

# of the other projects: about the machine, their own future, and options that they would like to be set
pytestmark = pytest.mark.filterwarnings("ignore")


def needs(project: str) -> None:
    if importlib.util.find_spec(project) is None:
        pytest.skip(f"{project} is not installed: pip install 'lnpu-torch[integrations]'")
    import_torchvision()  # both import it; here its compiled part may not fit torch


def run_example(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    needs(name)
    monkeypatch.chdir(folder)
    return runpy.run_path(str(EXAMPLES / f"with_{name}.py"))


def check_folder(folder: Path, reports: list[lnpu.Report], macs: int) -> None:
    run = read_run(folder)
    assert [epoch.number for epoch in run.epochs] == [1, 2]
    whole = lnpu.Counts.merge(epoch.counts for epoch in run.epochs)
    assert lnpu.price(whole, "lnpu") == reports[0] and reports[0].total.macs == macs
    for epoch in run.epochs:
        total = lnpu.price(epoch.counts, "lnpu").total
        assert epoch.metrics["lnpu_energy_pj"] == total.energy_pj
        assert (epoch.metrics["zero_share"], epoch.metrics["fp8_share"]) == (total.zero_share, total.fp8_share)
    assert all(f"Energy on chip {chip}" in (folder / "report.txt").read_text() for chip in run.chips)


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run_example("lightning", tmp_path, monkeypatch)
    # BoringModel is Linear(32, 2) on 64 single samples; the 64 for validation are not counted
    check_folder(tmp_path / "lnpu_run", ran["cost"].reports, macs=2 * 64 * 3 * 64)
    logged = ran["trainer"].callback_metrics
    metrics = ran["cost"].costs.metrics[-1]
    assert {name: pytest.approx(value.item()) for name, value in logged.items() if name in metrics} == {
        name: value for name, value in metrics.items() if name != "epoch"
    }


@pytest.mark.parametrize("where", ["setup", "configure_model"])
@pytest.mark.parametrize("part", [False, True])
def test_lightning_converts_layers_wherever_the_module_makes_them(where: str, part: bool, tmp_path: Path) -> None:
    needs("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    from lnpu_torch.integrations.lightning import LnpuCallback

    class Late(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8) if part else nn.Identity()

        def make(self, stage: str = "") -> None:
            self.head = nn.Linear(8, 2)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.head(self.body(batch[0])).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    setattr(Late, where, Late.make)
    module, cost = Late(), LnpuCallback(folder=tmp_path / "run", overrides={"head": "fp8"})
    quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[cost], default_root_dir=tmp_path, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(4, 8))))
    assert not lnpu.coverage(module).in_float and cost.reports[0].float_share == 0
    assert {row.layer for row in cost.reports[0].rows if row.macs} == ({"body", "head"} if part else {"head"})


def test_lightning_resumes_with_its_thresholds(tmp_path: Path) -> None:
    needs("lightning")
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    from lnpu_torch.integrations.lightning import LnpuCallback

    def fit(epochs: int, **how: Any) -> tuple[Any, Any]:
        seed_everything(0)
        model, cost = BoringModel(), LnpuCallback(folder=tmp_path / "run")
        quiet = {"enable_progress_bar": False, "logger": False, "enable_model_summary": False}
        Trainer(max_epochs=epochs, callbacks=[cost], default_root_dir=tmp_path, limit_train_batches=3, **quiet).fit(
            model, BoringDataModule(), **how
        )
        return model, cost

    fit(1)
    with pytest.raises(ConfigError, match="holds a run already"):
        fit(1)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["callbacks"]["LnpuCallback"]["thresholds"]
    seen: list[torch.Tensor] = []
    watched = pytest.MonkeyPatch()
    watched.setattr(lnpu, "load_thresholds", lambda model, state: seen.extend(state.values()))
    with watched.context():
        _, cost = fit(2, ckpt_path=checkpoint)
    watched.undo()
    assert torch.equal(seen[0], saved["layer"])
    assert [row["epoch"] for row in cost.costs.metrics] == [1, 2] and len(read_run(tmp_path / "run").epochs) == 2


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run_example("transformers", tmp_path, monkeypatch)
    state, reports = ran["trainer"].state, ran["cost"].reports
    tokens, images = 5, 32  # 2 epochs of 16 images, of 4 patches and a class token
    block, attention = 4 * 32 * 32 + 2 * 32 * 64, 2 * tokens * 32
    macs = 3 * images * (4 * 32 * 3 * 16 * 16 + 2 * tokens * (block + attention) + 32 * 2)
    check_folder(tmp_path / "lnpu_run", reports, macs)
    rows = [row for row in state.log_history if "lnpu_energy_pj" in row]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1].items() >= ran["cost"].costs.metrics[1].items()
    saved = torch.load(tmp_path / "checkpoints" / f"checkpoint-{state.global_step}" / "lnpu_thresholds.pt")
    assert all(torch.equal(saved[name], now) for name, now in lnpu.thresholds(ran["trainer"].model).items())

    from transformers import Trainer, TrainingArguments, ViTForImageClassification

    from lnpu_torch.integrations.transformers import LnpuCallback

    cost, model = LnpuCallback("fgmp", folder="lnpu_run"), ViTForImageClassification(ran["config"])
    again = TrainingArguments("checkpoints", num_train_epochs=3, disable_tqdm=True, report_to="none", use_cpu=True)
    restored: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(lnpu, "load_thresholds", lambda model, state: restored.append(state))
    Trainer(model, again, train_dataset=ran["images"], callbacks=[cost]).train(resume_from_checkpoint=True)
    assert all(torch.equal(saved[name], value) for name, value in restored[0].items())
    assert [row["epoch"] for row in cost.costs.metrics] == [1, 2, 3] and len(read_run("lnpu_run").epochs) == 3


def texts() -> list[dict[str, Any]]:
    """Each repeats a few tokens."""
    draw = torch.Generator().manual_seed(1)
    periods = torch.randint(2, 6, (1600,), generator=draw).tolist()
    tokens = [torch.randint(0, 50, (period,), generator=draw).repeat(16)[:32] for period in periods]
    return [{"input_ids": each, "labels": each} for each in tokens]


def pictures() -> list[dict[str, Any]]:
    """Noise, brighter in one quarter, which is the label."""
    images = torch.randn(1600, 3, 32, 32, generator=torch.Generator().manual_seed(2)) / 2
    for i, image in enumerate(images):
        image.unflatten(1, (2, 16)).unflatten(3, (2, 16))[:, i % 4 // 2, :, i % 2] += 1
    return [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(images)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_transformers_learn_as_in_float(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean loss of the last 50 of 200 steps is within 0.05 of float32's; attention's products are in the run."""
    needs("transformers")
    import transformers

    from lnpu_torch.integrations.transformers import LnpuCallback

    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0, **small)
    else:
        config = transformers.ViTConfig(intermediate_size=128, image_size=32, patch_size=8, num_labels=4, **small)
    make = transformers.GPT2LMHeadModel if name == "gpt2" else transformers.ViTForImageClassification
    quiet: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = transformers.TrainingArguments(
        "checkpoints", num_train_epochs=1, learning_rate=1e-3, logging_steps=50, per_device_train_batch_size=8, **quiet
    )
    data, last = texts() if name == "gpt2" else pictures(), []
    for callbacks in ([], [cost := LnpuCallback("fgmp", folder="run")]):
        torch.manual_seed(0)
        trainer = transformers.Trainer(make(config), args, train_dataset=data, callbacks=callbacks)
        trainer.train()
        assert trainer.state.global_step == 200
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert losses[-1] < losses[0] - 0.1
        last.append(losses[-1])
    assert abs(last[0] - last[1]) < 0.05
    products = {row.layer.rpartition(":")[2] for row in cost.reports[0].rows if ":" in row.layer and row.energy_pj}
    assert {f"scaled_dot_product_attention.{part}" for part in ("scores", "values")} <= products
    assert cost.reports[0].float_share == 0


def test_a_missing_project_is_named() -> None:
    code = """
import importlib, sys
for name in ("lightning", "transformers"):
    sys.modules[name] = None
    try:
        importlib.import_module(f"lnpu_torch.integrations.{name}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for project, line in zip(("Lightning", "Transformers"), lines, strict=True):
        assert f"needs {project}: pip install 'lnpu-torch[integrations]'" in line


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def epoch_on_a_rank(folder: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    rank, net = torch.distributed.get_rank(), network()
    costs = CostLog(folder=folder)
    costs.convert(net)
    costs.start()
    costs.begin_epoch()
    net(torch.full((3, 8), 1.0 + 63 * rank)).sum().backward()
    costs.step_done()
    metrics = costs.end_epoch(1)
    costs.finish()
    return metrics, lnpu.thresholds(net)


def test_ranks_share_thresholds_and_sum_their_counts(tmp_path: Path) -> None:
    (first, ours), (second, theirs) = on_ranks(epoch_on_a_rank, str(tmp_path / "run"))
    assert first == second and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (epoch,) = read_run(tmp_path / "run").epochs
    forward = [entry for entry in epoch.counts.steps if entry.step == "forward"]
    assert [entry.macs for entry in forward] == [2 * 3 * 8 * 4, 2 * 3 * 4 * 2]
    assert epoch.metrics["lnpu_energy_pj"] == first["lnpu_energy_pj"]


@pytest.mark.parametrize("metrics", ["loss\n1\n", "epoch\none\n", "epoch,loss\n1,2,3\n", "epoch\n" + "1" * 2**18])
def test_a_log_goes_on_only_from_the_metrics_of_a_run(metrics: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(metrics)
    costs = CostLog(folder=tmp_path)
    costs.convert(network())
    with pytest.raises(ConfigError, match="not the metrics of a run"):
        costs.start(resumed=True)


def test_pauses_are_not_counted_and_wrong_settings_are_named(tmp_path: Path) -> None:
    net, costs = network(), CostLog("fp8", chips=["lnpu"], folder=tmp_path / "run", overrides={"2": None})
    costs.convert(net)
    costs.start()
    costs.begin_epoch()
    net(torch.ones(1, 8))
    costs.pause()
    net(torch.ones(5, 8))
    costs.go_on()
    net(torch.ones(1, 8))
    costs.end_epoch(1)
    assert [(row.layer, row.macs) for row in costs.finish()[0].rows if row.macs] == [("0", 2 * 8 * 4)]
    with pytest.raises(ConfigError, match="unknown chip"):
        CostLog(chips=["lpnu"])
    with pytest.raises(ConfigError, match="name at least one"):
        CostLog(chips=[])
    (tmp_path / "file").touch()
    nowhere = CostLog(folder=tmp_path / "file" / "run")
    nowhere.convert(network())
    with pytest.raises(ConfigError, match="cannot be"):
        nowhere.start()
