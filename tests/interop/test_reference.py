"""The PyTorch reference: right where it claims to be right, and wrong exactly as the released code is."""

import numpy as np
import pytest

from interop.parity import pair, trace_pair

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop.reference import trace  # noqa: E402
from interop.torch_models import cifar_resnet  # noqa: E402


@pytest.fixture(scope="module")
def net():
    from tests.interop.conftest import lively

    return lively(cifar_resnet(8, widths=(3, 4, 4), shortcut="B", num_classes=3))


@pytest.fixture(scope="module")
def batch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([0, 1, 2])


@pytest.mark.slow
def test_fixed_trace_agrees_with_channel_products_in_jax(net, images):
    nets = pair(net.state_dict())
    ours, theirs = trace_pair(nets, images, np.array([0, 1, 2]), [0, 1])
    assert ours.keys() == theirs.keys() == trace.kernels(net).keys()
    for name, expected in theirs.items():
        assert np.linalg.norm(ours[name] - expected) <= 1e-3 * np.linalg.norm(expected), name


def test_fixed_trace_of_basis_probes_is_the_diagonal_block_trace():
    """Against torch.autograd.functional.hessian in float64: one probe per weight of a channel gives its trace."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 2, bias=False), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8, 3, bias=False)
    ).double()
    x, labels = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    params = trace.kernels(model)
    probes = []
    for name, parameter in params.items():
        for position in range(parameter.numel()):
            probe = {other: torch.zeros_like(p) for other, p in params.items()}
            probe[name].view(-1)[position] = 1.0
            probes.append(probe)
    found = trace.fixed_trace(model, x, labels, probes, probes_per_step=5)
    first, last = params.values()

    def loss(w, u):
        hidden = torch.nn.functional.conv2d(x, w).tanh().flatten(1)
        return torch.nn.functional.cross_entropy(hidden @ u.T, labels)

    blocks = torch.autograd.functional.hessian(loss, (first.detach(), last.detach()))
    for name, parameter, block in zip(params, (first, last), (blocks[0][0], blocks[1][1]), strict=True):
        diagonal = torch.diagonal(block.reshape(parameter.numel(), -1)).reshape(len(parameter), -1)
        torch.testing.assert_close(found.mean[name] * len(probes), diagonal.sum(dim=1), rtol=1e-10, atol=1e-12)


def test_batched_and_single_products_agree(net, batch):
    probes = list(trace.rademacher_probes(net, 5, seed=1))
    one = trace.fixed_trace(net, *batch, probes)
    two = trace.fixed_trace(net, *batch, probes, probes_per_step=2)
    for name in one.products:
        assert one.products[name].shape == (5, len(trace.kernels(net)[name]))
        torch.testing.assert_close(two.products[name], one.products[name], rtol=1e-3, atol=1e-4)


def test_published_weights_decay_and_vanish(net, batch):
    """Probe i carries 2^(16 - 8 i): the first has 99.6 % of the sum, and all but 20 of 300 are exactly zero."""
    probes = list(trace.rademacher_probes(net, 24, seed=2))
    fixed = trace.fixed_trace(net, *batch, probes)
    published = trace.published_trace(net, *batch, probes)
    expected = torch.tensor([2.0 ** (16 - 8 * i) for i in range(1, 25)], dtype=torch.float64)
    assert torch.equal(published.weights[:20].double(), expected[:20])
    assert torch.count_nonzero(published.weights) == 20
    assert published.weights[0] / published.weights.sum() > 0.996
    for name, products in published.products.items():
        first = products[:3] / published.weights[:3, None]
        torch.testing.assert_close(first, fixed.products[name][:3], rtol=1e-3, atol=1e-4)
        assert not products[20:].any()
        one_probe = products[0] / len(probes)
        torch.testing.assert_close(published.mean[name], one_probe, rtol=0.1, atol=0.02 * float(one_probe.abs().max()))


def test_the_batch_that_is_left(batch):
    images, labels = torch.arange(50_000)[:, None], torch.arange(50_000)
    kept_images, kept_labels = trace.last_batch(images, labels, 512)
    assert len(kept_labels) == 336 and kept_labels[0] == 50_000 - 336 and torch.equal(kept_images[:, 0], kept_labels)
    assert len(trace.last_batch(images[:1024], labels[:1024], 512)[1]) == 512


def test_sensitivity_is_haps_score(net, batch):
    found = trace.fixed_trace(net, *batch, trace.rademacher_probes(net, 2, seed=0))
    weight = net.conv1.weight.detach()
    by_hand = [found.mean["conv1.weight"][c] / 27 * (weight[c] ** 2).sum() for c in range(3)]
    torch.testing.assert_close(found.sensitivity(net)["conv1.weight"], torch.stack(by_hand))


def test_probes_are_seeded_signs_over_kernels_only(net):
    (a,), (b,) = (list(trace.rademacher_probes(net, 1, seed=5)) for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a.keys() == {name for name, p in net.named_parameters() if p.ndim > 1}
    values = torch.cat([v.flatten() for v in a.values()])
    assert set(values.unique().tolist()) == {-1.0, 1.0}
    assert abs(values.mean()) < 5 / len(values) ** 0.5


def test_mode_is_restored_and_bad_probes_are_named(net, batch):
    net.train()
    try:
        trace.fixed_trace(net, *batch, trace.rademacher_probes(net, 1, seed=0))
        assert net.training
    finally:
        net.eval()
    probe = next(trace.rademacher_probes(net, 1, seed=0))
    with pytest.raises(ValueError, match=r"'linear\.weight' is in only one"):
        trace.fixed_trace(net, *batch, [{k: v for k, v in probe.items() if k != "linear.weight"}])
    with pytest.raises(
        ValueError, match=r"probe of conv1\.weight: expected shape \(3, 3, 3, 3\), found \(2, 3, 3, 3\)"
    ):
        trace.published_trace(net, *batch, [probe | {"conv1.weight": probe["conv1.weight"][:2]}])
    for estimate in (trace.fixed_trace, trace.published_trace):
        with pytest.raises(ValueError, match="no probes"):
            estimate(net, *batch, [])
