"""PyTorch is optional: nothing imports it unasked, and who needs it is told how to get it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_does_not_import_torch(tmp_path):
    run(
        "import sys, pkgutil, importlib, ehap_jax, interop, interop.parity, interop.compare\n"
        "for room in pkgutil.walk_packages(ehap_jax.__path__, 'ehap_jax.'): importlib.import_module(room.name)\n"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules",
        tmp_path,
    )


WITHOUT_TORCH = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import interop, numpy as np
from interop.forms import LEAVES, RESNET, Part

def norm(role, stage):
    return {RESNET.names.key(Part(role, stage, 0, leaf)): np.ones(2, "f4") for leaf in LEAVES["norm"]}

def conv(role, stage, inputs):
    return {RESNET.names.key(Part(role, stage, 0, "weight")): np.ones((2, inputs, 3, 3), "f4")}

weights = {**conv("stem_conv", 0, 3), **norm("stem_bn", 0), **conv("conv1", 1, 2), **norm("bn1", 1)}
weights |= {**conv("conv2", 1, 2), **norm("bn2", 1)}
weights |= {"linear.weight": np.ones((4, 2), "f4"), "linear.bias": np.ones(4, "f4")}
apply, variables, info = interop.from_torch(weights)
assert apply(variables, np.zeros((1, 4, 4, 3), "f4")).shape == (1, 4)
for name in ("net.pth", "net.safetensors"):
    with open(name, "wb") as file:
        file.write(b"x")
for attempt in (
    "import interop.torch_models",
    "import interop.reference.trace",
    "interop.from_torch('net.pth')",
    "interop.from_torch('net.safetensors')",
    "interop.to_torch(variables)",
):
    try:
        exec(attempt)
    except ImportError as error:
        assert "pip install 'ehap-jax[torch]'" in str(error), (attempt, error)
    else:
        raise AssertionError(f"{attempt} did without PyTorch")
"""


def test_without_torch_the_extra_is_named(tmp_path):
    """State dicts of arrays still load; whatever needs PyTorch or safetensors says which extra has it."""
    run(WITHOUT_TORCH, tmp_path)
