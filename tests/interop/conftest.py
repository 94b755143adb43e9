"""Small PyTorch networks with lively statistics, and the real data where it is at hand."""

import os
from pathlib import Path

import numpy as np
import pytest


def data_folder() -> Path | None:
    """EHAP_JAX_DATA, or shared/data beside the checkout; None where neither is there."""
    named = os.environ.get("EHAP_JAX_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def checkpoints() -> dict[str, Path]:
    folder = data_folder()
    files = sorted((folder / "akamaster").glob("*.th")) if folder else []
    if not files:
        pytest.skip("akamaster's checkpoints are not here (set EHAP_JAX_DATA to a folder with akamaster/*.th)")
    return {file.name.split("-")[0]: file for file in files}


@pytest.fixture(scope="session")
def cifar() -> dict[str, np.ndarray]:
    folder = data_folder()
    file = folder / "cifar10_lossless_subset.npz" if folder else None
    if file is None or not file.exists():
        pytest.skip("the exact CIFAR-10 images are not here (set EHAP_JAX_DATA)")
    with np.load(file) as archive:
        return {key: archive[key] for key in archive}


def nchw(images):
    """JAX's images as PyTorch's, in memory too: gradients of channels-last images are wrong with AVX2 alone."""
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def lively(module, seed: int = 0):
    """Give norms non-trivial statistics and affine parameters, so that a mix-up of any two shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            elif tensor.is_floating_point():
                fan_in = tensor[0].numel()
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
    return module.eval()


@pytest.fixture(scope="session", params=["A", "B"])
def network(request):
    """A ResNet-8 of widths 4, 8, 16 with shortcut A or B."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from interop.torch_models import cifar_resnet

    return lively(cifar_resnet(8, widths=(4, 8, 16), shortcut=request.param, num_classes=5))


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)


def torch_logits(module, images: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return module(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
