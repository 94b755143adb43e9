"""Other libraries' integers for the same weights and ranges: PyTorch's and qwix's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.quant import activation_grid, quantise, symmetric_grid

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 5, 7)).astype(np.float32) * np.exp(RNG.normal(size=7)).astype(np.float32)
ACTIVATIONS = (RNG.normal(size=(4, 6, 6, 5)) + 0.7).astype(np.float32)


@pytest.mark.slow
def test_pytorch_with_explicit_observers_gives_the_same_integers():
    """Per-channel narrow symmetric weights, per-tensor asymmetric activations: scales, zero points and integers."""
    torch = pytest.importorskip("torch", reason="needs pip install 'ehap-jax[torch]'")
    from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

    weights = torch.from_numpy(np.ascontiguousarray(KERNEL.transpose(3, 2, 0, 1)))
    observer = PerChannelMinMaxObserver(
        ch_axis=0, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127, eps=0.0
    )
    observer(weights)
    scale, zero = observer.calculate_qparams()
    theirs = torch.quantize_per_channel(weights, scale, zero, 0, torch.qint8).int_repr().numpy()
    grid = symmetric_grid(jnp.asarray(KERNEL), axis=3)
    ours = np.asarray(quantise(jnp.asarray(KERNEL), grid)).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(grid.scale.reshape(-1), scale.numpy(), rtol=1e-6)
    assert_same_up_to_ties(ours, theirs, KERNEL.transpose(3, 2, 0, 1) / scale.numpy()[:, None, None, None])

    x = torch.from_numpy(ACTIVATIONS)
    activations = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine, eps=0.0)
    activations(x)
    scale, zero = activations.calculate_qparams()
    theirs = torch.quantize_per_tensor(x, float(scale), int(zero), torch.quint8).int_repr().numpy()
    grid = activation_grid("asymmetric", jnp.asarray(ACTIVATIONS.min()), jnp.asarray(ACTIVATIONS.max()))
    assert int(grid.zero_point) == int(zero) and 0 < int(zero) < 255
    np.testing.assert_allclose(float(grid.scale), float(scale), rtol=1e-6)
    assert_same_up_to_ties(np.asarray(quantise(jnp.asarray(ACTIVATIONS), grid)), theirs, ACTIVATIONS / float(scale))


def test_qwix_gives_the_same_integers_in_the_symmetric_case():
    """qwix scales by half a step more (its range is ±127.5), so it is given our scales."""
    pytest.importorskip("qwix", reason="needs pip install qwix")
    from qwix._src.core import qarray

    grid = symmetric_grid(jnp.asarray(KERNEL), axis=3)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = qarray.quantize_with_scale_zero_point(jnp.asarray(KERNEL), jnp.int8, grid.scale, None)
    ours = np.asarray(quantise(jnp.asarray(KERNEL), grid))
    assert_same_up_to_ties(ours, np.asarray(theirs.qvalue), KERNEL / np.asarray(grid.scale))
    assert np.abs(ours).max() == 127


def assert_same_up_to_ties(ours, theirs, steps):
    """Equal, except where the number lies within float32 rounding of halfway between two integers."""
    ours, theirs = ours.astype(np.int64), theirs.astype(np.int64)
    tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-4
    np.testing.assert_array_equal(np.where(tie, 0, ours), np.where(tie, 0, theirs))
    assert tie.mean() < 0.01 and len(np.unique(ours)) > 100
