"""The loop: what stops it, what it outlives, and how weights and rates move."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from helpers.small_run import QUIET, config, equal, image_file, run
from lnpu_torch.files import ConfigError
from lnpu_torch.recipes import diagnosis, distributed, schedule
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.interrupts import Interrupts, Stopped
from lnpu_torch.recipes.models import ModelConfig, build


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = run(out=str(tmp_path / "run"))
    begun.finish_epoch(*begun.train_epoch(Interrupts()))
    good = begun.batches.train

    def train(epoch: int, first: int = 0) -> Any:
        for pieces in good(epoch, first):
            yield ((pixels * torch.nan, labels) for pixels, labels in pieces)

    monkeypatch.setattr(begun.batches, "train", train)
    weights = begun.model.conv1.weight.clone()
    message = r"The loss is nan in epoch 2, step 1 of 2; .* output is not finite: conv1\. The last good checkpoint is"
    with pytest.raises(Stopped, match=message) as stopped:
        begun.train_epoch(Interrupts())
    assert stopped.value.exit_code == 2
    assert torch.equal(begun.model.conv1.weight, weights)
    assert begun.folder.checkpoints.newest(print)["epoch"] == 2  # type: ignore[index]


def test_the_first_parameter_that_is_not_finite_is_named() -> None:
    model = build(ModelConfig(name="resnet18_cifar", width=2), 3, (1, 8, 8))
    assert diagnosis.first_not_finite(model, torch.zeros(2, 1, 8, 8)) == ""
    with torch.no_grad():
        model.get_parameter("layer2.0.conv1.weight")[0] = torch.inf
    assert diagnosis.first_not_finite(model, torch.zeros(2, 1, 8, 8)).endswith("layer2.0.conv1.weight")


def test_a_gradient_that_overflows_is_left_out_and_training_goes_on(tmp_path: Path) -> None:
    begun = run(out=str(tmp_path / "run"), ema=0.5)
    scaler = begun.accelerator.scaler
    scaler._init_scale = 2.0**120
    before = [parameter.clone() for parameter in begun.model.parameters()]
    begun.step(next(begun.batches.train(1)), 0)
    assert all(map(torch.equal, before, begun.model.parameters()))
    assert scaler.get_scale() == 2.0**119
    assert begun.schedule.last_epoch == 0  # the learning rate waits with the weights
    assert begun.average is not None and begun.average.n_averaged == 0


FULL = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: not enough memory"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_full_memory_says_which_setting_to_lower(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(recipe.Run, "step", step)
    message = r"Out of memory on cpu, with 16 images at a time\. Lower batch_size \(32\), or raise accumulate \(2\)"
    with pytest.raises(Stopped, match=message) as stopped:
        recipe.train(config(accumulate=2, out=str(tmp_path / "run")), QUIET)
    assert stopped.value.exit_code == 2


def test_another_error_is_not_taken_for_full_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(recipe.Run, "step", step)
    with pytest.raises(RuntimeError, match="mat1"):
        recipe.train(config(out=str(tmp_path / "run")), QUIET)


def test_a_new_folder_is_made_in_runs_and_threads_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    begun = run(threads=1, momentum=0.0)
    assert torch.get_num_threads() == 1
    assert begun.folder.config.exists()
    assert begun.folder.path.parent == Path("runs")
    assert begun.folder.path.name.startswith("resnet18_cifar-fgmp-")
    assert begun.optimizer.param_groups[0]["nesterov"] is False


def test_a_step_without_gradient_shrinks_every_parameter_alike() -> None:
    """Weight decay reaches norms and biases too, and Nesterov's momentum counts the decay of a first step twice."""
    model = build(ModelConfig(name="resnet18_cifar", width=2), 3, (1, 8, 8))
    settings = config(lr=0.1, momentum=0.75, weight_decay=0.25)
    optimizer = schedule.make_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    left = torch.tensor(1 - 0.1 * 0.25 * (1 + 0.75))
    assert all(torch.allclose(parameter, left) for parameter in model.parameters())


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_a_steps_sums_are_those_of_the_smoothed_loss_by_hand(smoothing: float, tmp_path: Path) -> None:
    begun = run(precision="float32", label_smoothing=smoothing, accumulate=2, out=str(tmp_path / "run"))
    pieces = [pair for pieces in itertools.islice(begun.batches.train(1), 1) for pair in pieces]
    twin, loss, right = copy.deepcopy(begun.model).train(), 0.0, 0
    for images, labels in pieces:
        chances = twin(images).detach().double().log_softmax(1)
        wanted = torch.nn.functional.one_hot(labels, 10) * (1 - smoothing) + smoothing / 10
        loss -= (chances * wanted).sum().item()
        right += int((chances.argmax(1) == labels).sum())
    assert begun.step(iter(pieces), 0) == [pytest.approx(loss, rel=1e-5), right, 32, 0]
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in begun.model.parameters())


@pytest.mark.parametrize("name", ["cosine", "onecycle"])
def test_the_rate_follows_its_schedule_over_all_epochs(name: str, tmp_path: Path) -> None:
    begun = run(precision="float32", schedule=name, epochs=3, limit=2, out=str(tmp_path / "run"))
    step, rates = begun.step, []

    def noted(pieces: Any, asked: int) -> list[float]:
        rates.append(begun.optimizer.param_groups[0]["lr"])
        return step(pieces, asked)

    begun.step = noted  # type: ignore[method-assign]
    for _ in range(3):
        begun.finish_epoch(*begun.train_epoch(Interrupts()))
    share = schedule.cosine if name == "cosine" else schedule.one_cycle
    assert rates == pytest.approx([0.05 * share(done / 6) for done in range(6)])


def test_testing_leaves_the_model_as_it_was_and_sees_every_image_as_it_is(tmp_path: Path) -> None:
    """Batch norm by its statistics, no dropout; and the next epoch trains in training mode again."""
    model = {"name": "vgg16_cifar", "width": 2}
    begun = run(precision="float32", model=model, data={"kind": "digits", "size": 32}, out=str(tmp_path / "run"))
    before = copy.deepcopy(begun.model.state_dict())
    begun.model.train()
    twin, right = copy.deepcopy(begun.model).eval(), list[torch.Tensor]()
    begun.config = begun.config.model_copy(update={"limit": None})
    accuracy = begun.test_accuracy()
    for images, labels in begun.batches.test():
        right.append(twin(images).argmax(1) == labels)
    assert accuracy == torch.cat(right).double().mean().item() and len(torch.cat(right)) == 360
    assert equal(before, begun.model.state_dict())
    assert not begun.model.training
    begun.train_epoch(Interrupts())
    assert begun.model.training
    assert {int(value) for name, value in begun.model.state_dict().items() if "num_batches" in name} == {2}


@pytest.mark.parametrize(("name", "first", "last"), [("cosine", 1.0, 0.03), ("onecycle", 1 / 25, 0.06)])
def test_schedules_begin_and_end_where_they_should(name: str, first: float, last: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    settings, rates = config(lr=0.1, schedule=name), []
    steps = schedule.make_schedule(optimizer, settings, 10)
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert rates[0] == pytest.approx(0.1 * first)
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert rates[-1] < 0.1 * last
    schedule.make_schedule(optimizer, settings, 10, done=4)
    assert optimizer.param_groups[0]["lr"] == rates[4]


def test_one_cycle_is_torchs() -> None:
    """Torch counts 0.3 of a run less one step for the rise, and ends one step sooner."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=1001)
    for step in range(1000):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * schedule.one_cycle(step / 1000), abs=5e-4)
        optimizer.step()
        torchs.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * schedule.one_cycle(1.0), rel=1e-6)


def test_training_follows_the_data(tmp_path: Path) -> None:
    """Channels, size and classes are the file's, not the recipe's."""
    begun = run(data={"kind": "npz", "path": str(image_file(tmp_path / "x.npz"))}, out=str(tmp_path / "run"))
    assert begun.model.conv1.weight.shape == (2, 3, 3, 3)
    assert begun.model.fc.weight.shape == (3, 16)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU here; device=cpu or device=auto"):
        distributed.start(config(device="cuda"))


def test_the_loader_alone_can_be_timed(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), width=80)
    data = {"kind": "digits", "bench": True}
    assert recipe.train(config(data=data, limit=None, out=str(tmp_path / "run")), screen) == []
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "The loader alone:" in shown and "images/s (1,405 images; on cpu)" in " ".join(shown.split())
    assert not (tmp_path / "run").exists()
