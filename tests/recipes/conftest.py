"""How recipes are tested: under the rules a user has them, and compiled quickly."""

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="module")
def as_a_user_has_it():
    """Recipes run under JAX's own promotion rules; the strict ones of the tests are for the library."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    """Tiny networks take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
