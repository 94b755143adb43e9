"""Every way to compute a probe's channel products in PyTorch gives those of the reference."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop.reference import products, trace  # noqa: E402
from interop.torch_models import cifar_resnet  # noqa: E402
from tests.interop.conftest import lively  # noqa: E402

WAYS = (
    products.published_products,
    products.vectorised_products,
    products.affine_products,
    products.functional_products,
)


@pytest.fixture(scope="module")
def case(images):
    net = lively(cifar_resnet(8, widths=(3, 4, 4), shortcut="B", num_classes=3))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([0, 1, 2])
    probes = list(trace.rademacher_probes(net, 2, seed=0))
    return net, batch, probes, trace.fixed_trace(net, *batch, probes).products


@pytest.mark.parametrize("way", WAYS)
def test_products_are_those_of_the_reference(way, case):
    net, batch, probes, expected = case
    step = way(net, *batch)
    for i, probe in enumerate(probes):
        found = step(probe)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name][i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_has_no_scale_left_and_sums_in_float32(way, case):
    """float16 rounds to 2^-11; twenty times that is left for some thirty operations one after another."""
    net, batch, probes, expected = case
    found = way(net, *batch, half=torch.float16)(probes[0])
    assert {value.dtype for value in found.values()} == {torch.float32}
    ours = np.concatenate([found[name].numpy() for name in expected])
    theirs = np.concatenate([value[0].numpy() for value in expected.values()])
    assert 0 < np.linalg.norm(ours - theirs) < 20 * 2**-11 * np.linalg.norm(theirs)


@pytest.mark.parametrize("way", WAYS)
def test_a_probe_that_does_not_fit_is_named(way, case):
    net, batch, probes, _ = case
    step = way(net, *batch)
    with pytest.raises(ValueError, match=r"probe of conv1\.weight: expected shape"):
        step(probes[0] | {"conv1.weight": probes[0]["conv1.weight"][:2]})
