"""How recipes are tested: under the rules a user has them, on runs of seconds."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.recipes.tiny import MODEL, phase

RUNS = {"pruned", "swept", "stopped", "finished", "quantized"}
"""Fixtures that are whole runs of a recipe."""


def pytest_collection_modifyitems(items):
    """What looks at a whole run is slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and RUNS & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@contextlib.contextmanager
def as_users_do():
    """Under JAX's own promotion rules; the strict ones of the tests are for the library."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def recipes_run_as_users_run_them():
    with as_users_do():
        yield


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A run of recipes.pretrain."""
    from recipes import pretrain

    output = tmp_path_factory.mktemp("pretrain") / "run"
    with as_users_do():
        assert pretrain.command(["digits", *MODEL, *phase("phase", 2), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def pruned(dense, tmp_path_factory):
    """A run of recipes.prune."""
    from recipes import prune

    output = tmp_path_factory.mktemp("prune") / "run"
    given = ["short", str(dense), "--data", "digits", "--train-images", "1000", "--prune.scores.examples", "16"]
    with as_users_do():
        assert prune.command([*given, *phase("finetune"), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def swept(dense, tmp_path_factory):
    """A run of recipes.sweep."""
    from recipes import sweep

    output = tmp_path_factory.mktemp("sweep") / "run"
    given = ["short", str(dense), "--data", "digits", "--cells.criteria", "magnitude", "--cells.keeps", "0.5"]
    with as_users_do():
        assert sweep.command([*given, *phase("cells.finetune"), "--train-images", "256", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def torch_inputs(tmp_path_factory):
    """A tiny PyTorch checkpoint and images for it: (checkpoint, npz)."""
    import torch

    from interop.torch_models import cifar_resnet
    from tests.interop.conftest import lively

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("inputs")
    torch.save(lively(cifar_resnet(4, widths=(12,), num_classes=3)).state_dict(), folder / "tiny.pt")
    generator = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": generator.integers(0, high, (30, *shape)).astype(np.uint8)
        for split in ("train", "test")
        for kind, high, shape in (("x", 256, (8, 8, 3)), ("y", 3, ()))
    }
    np.savez(folder / "tiny.npz", **arrays)
    return folder / "tiny.pt", folder / "tiny.npz"
