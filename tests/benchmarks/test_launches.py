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


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Where compiled kernels are kept for all tests of this file."""
    return tmp_path_factory.mktemp("kernels")


def costs(name, kernels):
    command = [sys.executable, ROOT / "benchmarks" / "launches.py", "--json", "--only", name, "--repeats", "3"]
    paths = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(kernels)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | paths)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "launches", "operations", "calls"),
    [("convolution", 5, 4, 480), ("convolution with bias", 6, 6, 530), ("depthwise", 5, 4, 480), ("linear", 9, 5, 500)],
)
def test_layers(kernels, name, launches, operations, calls):
    found = costs(name, kernels)
    assert found["launches"] <= launches and found["torch_operations"] <= operations, found
    assert found["python_calls"] <= calls and found["microseconds"] > 0


@pytest.mark.parametrize("name", ["resnet18", "transformer blocks", "depthwise separable block"])
def test_networks(kernels, name):
    found = costs(name, kernels)
    assert 0 < found["kernels"] <= 20, found
    assert found["kernels_at_another_batch_size"] == 0, found
