"""The benchmarks of a GPU, rehearsed: every section with tiny tensors, on a CPU, in Triton's interpreter.

Only what Triton and CUDA themselves do is left out; no figure that comes out means anything.
"""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

from helpers.paths import ROOT

triton = pytest.importorskip("triton")
BENCHMARKS = ROOT / "benchmarks"


sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def gpu():
    import gpu

    return gpu


def section_names():
    import gpu
    from place import Place

    place = Place("cpu")
    return [*gpu.side_by_side(place), *gpu.in_turn(place)]


@pytest.mark.triton_interpreter
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("compiled")) for name in section_names()],
)
def test_section(gpu, name, monkeypatch):
    from place import Place

    place = Place("cpu")
    place.prepare()
    for module in (gpu.kernels, gpu.gpu_steps):
        monkeypatch.setattr(module, "REPEATS", 2)
    every_kind = gpu.checks.layer_kinds
    kinds = ("convolution", "linear")  # the others have tests of their own
    monkeypatch.setattr(gpu.checks, "layer_kinds", lambda sizes: {kind: every_kind(sizes)[kind] for kind in kinds})
    rows = list((gpu.side_by_side(place) | gpu.in_turn(place))[name](place))
    assert rows and all(row["name"] for row in rows)
    assert all(row.get("equal", True) for row in rows), [row for row in rows if not row.get("equal", True)]
    json.dumps(rows)


def test_the_zoo_measures_a_network(monkeypatch, capsys):
    import zoo

    # in this process, where earlier tests have left their mark on the peak: it is measured, and not looked at
    monkeypatch.setattr(zoo, "peak_in_a_process", lambda _, *flags: 2**20 + 0 * zoo.peak_of(flags[3], flags[1], False))
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--json", "--only", "lenet", "--rounds", "2"])
    zoo.main()
    network, mean, *layers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert network["name"] == "lenet" and all(network["ms"][name] > 0 for name in zoo.VARIANTS)
    assert all(network[name] == mean[name] > 0 for name in zoo.RATIOS), "one network is its own geometric mean"
    assert [row["name"] for row in layers] == ["tiny Conv2d", "tiny Linear"]
    assert all(row["python_calls"] > 0 for row in layers)


def test_the_peer_casts_each_operand_once(monkeypatch):
    import float8_peer

    cast, seen = float8_peer.cast, []
    monkeypatch.setattr(float8_peer, "cast", lambda x: seen.append(tuple(x.shape)) or cast(x))
    layers = torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(3, 4)
    model = float8_peer.with_float8_casts(torch.nn.Sequential(*layers))
    model(torch.randn(1, 2, 2, 2)).sum().backward()
    of_conv, of_linear = [(1, 2, 2, 2), (3, 2, 2, 2), (1, 3, 1, 1)], [(1, 3), (4, 3), (1, 4)]
    assert sorted(seen) == sorted(of_conv + of_linear)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def every(gpu, run, limit_s=100.0):
    return list(gpu.every(["check a", "check b"], ["step c", "time d"], run, limit_s))


def test_what_one_section_breaks_the_others_survive(gpu):
    def run(section, limit_s):
        if section in ("check a", "step c"):
            raise RuntimeError("illegal memory access")
        return [{"name": section, "equal": True}]

    rows = {row["name"]: row for row in every(gpu, run)}
    assert rows["check a"]["error"] == rows["step c"]["error"] == "RuntimeError: illegal memory access"
    assert rows["check b"]["equal"] and rows["time d"]["equal"]


def test_nothing_begins_after_the_time_is_over(gpu):
    rows = {row["name"]: row for row in every(gpu, lambda *_: [], limit_s=0.5)}
    assert all("no time was left" in rows[name]["error"] for name in ("check a", "check b", "step c", "time d"))


def test_goals_are_judged_by_the_worst_row(gpu):
    def run(section, limit_s):
        if section == "step c":
            return [{"name": "step resnet18_cifar fgmp", "ratio_to_autocast": 1.2, "ratio_to_float32": 0.7}]
        return [{"name": f"operand {i}", "bandwidth_share": share} for i, share in enumerate((0.9, 0.8))]

    goals = {row["name"]: (row["worst"], row["met"]) for row in every(gpu, run) if row["name"].startswith("goal")}
    assert len(goals) == len(gpu.GOALS)
    assert goals["goal step resnet18_cifar: ratio_to_autocast <= 1.25"] == (1.2, True)
    assert goals["goal step resnet18_cifar: ratio_to_float32 <= 0.6"] == (0.7, False)
    assert goals["goal operand: bandwidth_share >= 0.85"] == (0.8, False)
    assert goals["goal matmul 4096^3 chunk 64: ratio_to_torch <= 3.0"] == (None, False)


def test_every_goal_is_about_a_row_that_a_section_makes(gpu):
    from place import Place
    from sizes import REAL

    assert {goal.row for goal in gpu.GOALS if goal.row.startswith("step ")} == {f"step {name} " for name in REAL.models}
    assert f"matmul {REAL.square}^3 chunk 64" in {goal.row for goal in gpu.GOALS}
    assert gpu.in_turn(Place()).keys() >= {f"step {name}" for name in REAL.models}


def test_a_process_that_fails_or_hangs_leaves_its_rows_and_its_error(gpu, monkeypatch):
    scripts = {
        "fails": "print('{\"name\": \"first\"}'); raise ValueError('broken')",
        "hangs": 'import time; print(\'{"name": "first"}\', flush=True); time.sleep(60)',
    }
    start = subprocess.Popen
    for name, script in scripts.items():
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(subprocess, "Popen", lambda _, command=command, **options: start(command, **options))
        first, error = gpu.in_a_process(name, 3.0, rehearse=True)
        assert first == {"name": "first"} and error["name"] == name
        assert ("ValueError: broken" if name == "fails" else "stopped after 3 s") in error["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step.py", "--device", "cuda", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / "step.py"), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 2 and "no CUDA GPU" in said.err and not said.out


def test_one_section_as_the_command_runs_it():
    step = ["step.py", "--device", "cuda", "--rehearse", "--section", "check count"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *step], cwd=BENCHMARKS, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(json.loads(line)["equal"] for line in done.stdout.splitlines())
