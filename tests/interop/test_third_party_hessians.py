"""PyHessian's and curvlinops' Hessian traces of the same network, where those packages are installed.

    pip install pyhessian curvlinops-for-pytorch

Both estimate the trace over all parameters of a module; ours is the exact trace of the same parameters, from the
dense Hessian by `jax.hessian` in float64, so each must lie within its own standard error of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import Policy, channel_trace
from interop import from_torch
from tests.interop.conftest import lively

torch = pytest.importorskip("torch", reason="PyTorch is an optional extra: pip install 'ehap-jax[torch]'")
from interop import torch_models  # noqa: E402

pytestmark = pytest.mark.slow

LABELS = np.array([0, 1, 2], np.int32)
PROBES = 400


@pytest.fixture(scope="module")
def module():
    return lively(torch_models.cifar_resnet(4, widths=(3,), num_classes=3))


@pytest.fixture(scope="module")
def traces(module, images):
    """(exact trace over all parameters, over each kernel, (our 64-probe estimate over kernels, its error))."""
    with enable_x64():
        apply, variables, _ = from_torch(module.state_dict(), dtype=np.float64)
        flat, unflatten = jax.flatten_util.ravel_pytree(variables["params"])

        def loss(params, batch):
            logits = apply({**variables, "params": params}, batch[0])
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch[1][:, None], axis=1).mean()

        batch = (jnp.asarray(images, jnp.float64), jnp.asarray(LABELS))
        diagonal = unflatten(jnp.diagonal(jax.hessian(lambda w: loss(unflatten(w), batch))(flat)))
        whole = float(sum(leaf.sum() for leaf in jax.tree.leaves(diagonal)))
        kernels = float(sum(leaf.sum() for leaf in jax.tree.leaves(diagonal) if leaf.ndim > 1))
        estimate = channel_trace(
            loss, variables["params"], batch, key=jax.random.key(0), num_probes=64, policy=Policy("float64")
        )
    assert abs(estimate.total() - kernels) < 5 * estimate.total_sem()
    return whole, kernels


def torch_batch(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(LABELS.astype(np.int64))


def within_its_own_error(products, exact):
    """At most five standard errors away, and those errors small enough to tell."""
    mean, sem = products.mean(), products.std(ddof=1) / len(products) ** 0.5
    assert abs(mean - exact) < 5 * sem, (mean, exact, sem)
    assert sem < 0.2 * abs(exact)


@pytest.fixture(scope="module")
def pyhessian():
    return pytest.importorskip("pyhessian", reason="compares with PyHessian: pip install pyhessian")


@pytest.fixture(scope="module")
def curvlinops():
    return pytest.importorskip("curvlinops", reason="compares with it: pip install curvlinops-for-pytorch")


def test_pyhessian(pyhessian, module, images, traces):
    torch.manual_seed(0)
    found = pyhessian.hessian(module, torch.nn.CrossEntropyLoss(), data=torch_batch(images), cuda=False)
    # Its stopping rule divides by the running mean, not its size: a negative mean ends it at any positive tolerance.
    products = np.array(found.trace(maxIter=PROBES, tol=-np.inf))
    module.zero_grad()
    assert len(products) == PROBES
    within_its_own_error(products, traces[0])


def test_curvlinops(curvlinops, module, images, traces):
    """Its dense Hessian over the kernels has our trace, and its estimate lies within the error of that Hessian."""
    torch.manual_seed(0)
    kernels = [p for p in module.parameters() if p.ndim > 1]
    operator = curvlinops.HessianLinearOperator(
        module, torch.nn.CrossEntropyLoss(), kernels, [torch_batch(images)], check_deterministic=False
    )
    dense = (operator @ torch.eye(operator.shape[1])).double()
    np.testing.assert_allclose(float(dense.trace()), traces[1], rtol=1e-4)
    probes = 40
    variance = 2 * float(dense.square().sum() - dense.diagonal().square().sum())
    found = float(curvlinops.hutchinson_trace(operator, probes))
    assert abs(found - traces[1]) < 5 * (variance / probes) ** 0.5
