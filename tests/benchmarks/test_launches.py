"""What a layer's step launches on a GPU, how much Python it runs, how many kernels a network needs: may not grow.

Against a stand-in for the driver, in processes of their own.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="builds the stand-in with a C compiler"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"),
]


LIMITS = {  # of launches, torch's operations, Python calls
    "convolution": (5, 4, 480),
    "convolution with bias": (6, 6, 530),
    "depthwise": (5, 4, 480),
    "linear": (9, 5, 500),
    "large linear": (9, 4, 520),  # two of ours are products
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Where compiled kernels are kept for both tests."""
    return tmp_path_factory.mktemp("kernels")


def costs(kernels, *names):
    """What the program finds, by name."""
    command = [sys.executable, ROOT / "benchmarks" / "launches.py", "--json", "--repeats", "3", "--only", *names]
    paths = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(kernels)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert [*found] == [*names]
    return found


def test_layers(kernels):
    for name, found in costs(kernels, *LIMITS).items():
        launches, operations, calls = LIMITS[name]
        assert 0 < found["launches"] <= launches and found["torch_operations"] <= operations, found
        assert 0 < found["python_calls"] <= calls and found["microseconds"] > 0, found


def test_networks(kernels):
    for found in costs(kernels, "resnet18", "transformer blocks", "depthwise separable block").values():
        assert 0 < found["kernels"] <= 20 and found["stack_bytes"] <= 8, found
        assert found["kernels_at_another_batch_size"] == 0, found
