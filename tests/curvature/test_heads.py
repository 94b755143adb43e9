"""Square roots of the Hessians of losses, against dense float64 Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    Policy,
    expected_agreement,
    gauss_newton_trace,
    second_derivative,
    softmax_cross_entropy,
    squared_error,
)
from ehap_jax.curvature.heads import root_times
from tests.curvature.dense_hessians import DOUBLE, close, cross_entropy, dense_traces, small


@pytest.mark.slow
@pytest.mark.parametrize("head", [softmax_cross_entropy, squared_error])
def test_combinations_of_columns_are_those_of_the_root(head):
    """The way without the root, against the root of the dense Hessian that it is tested for."""
    rng = np.random.default_rng(6)
    with enable_x64():
        z = jnp.asarray(3 * rng.normal(size=6))
        root = head(z)
        v = jnp.asarray(rng.choice([-1.0, 1.0], (4, root.shape[-1])))
        found, signs = root_times(head, z, (), v)
        np.testing.assert_allclose(found, v @ root.T, atol=1e-15)
        assert signs.tolist() == [1.0] * root.shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "loss", "outputs"),
    [
        (softmax_cross_entropy, cross_entropy, 2),
        (squared_error, lambda z, t: ((z - t.astype(z.dtype)) ** 2).sum(), 1),
    ],
)
def test_a_head_with_one_column_is_exact_too(two_layers, head, loss, outputs):
    """Two classes, or one number: one column, and yet nothing is random."""
    params, x, labels, _ = two_layers
    labels = labels % 2
    with enable_x64():
        params = {**params, "out": params["out"][:, :outputs]}
        trace = gauss_newton_trace(small, params, (x, labels), head=head, policy=DOUBLE)
        close(trace, dense_traces(small, params, x, labels, loss, {}))
    assert trace.total_sem() == 0 and set(trace.layer_sem().values()) == {0.0}
    assert all((np.asarray(trace.sem[path]) == 0).all() for path in ("w", "out"))
    assert expected_agreement(trace, params)[:2] == (1.0, 1.0)
    one = gauss_newton_trace(small, params, x[:1], head=head, policy=Policy(), microbatch=1)  # nothing to be coupled to
    assert one.total_sem() == 0


@pytest.mark.slow
def test_many_classes_go_in_several_passes():
    rng = np.random.default_rng(9)
    with enable_x64():
        params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "out": jnp.asarray(rng.normal(size=(2, 40)))}
        x, labels = jnp.asarray(rng.normal(size=(2, 3))), jnp.zeros(2, jnp.int32)

        def model(p, x):
            return jnp.abs(x @ p["w"]) @ p["out"]

        trace = gauss_newton_trace(model, params, (x, labels), policy=DOUBLE)
        close(trace, dense_traces(model, params, x, labels, cross_entropy, {}))


HEADS = {
    "squared error": (squared_error, lambda z, t: ((z - t.astype(z.dtype)) ** 2).sum()),
    "second derivative": (
        second_derivative(lambda z, t: (1 + t.astype(z.dtype)) * jax.nn.logsumexp(z) - 0.3 * z[0] * z[1]),
        lambda z, t: (1 + t.astype(z.dtype)) * jax.nn.logsumexp(z) - 0.3 * z[0] * z[1],
    ),
    "a user's own": (
        lambda z, t: jnp.sqrt(jnp.exp(z))[:, None] * jnp.eye(3, dtype=z.dtype),
        lambda z, t: jnp.exp(z).sum() + t.astype(z.dtype) * z[0],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_other_heads_equal_the_dense_hessian(two_layers, name):
    head, loss = HEADS[name]
    params, x, labels, _ = two_layers
    with enable_x64():
        truth = dense_traces(small, params, x, labels, loss, {})
        close(gauss_newton_trace(small, params, (x, labels), head=head, policy=DOUBLE), truth)


def test_the_root_of_the_softmax_hessian():
    """Exact also where probabilities vanish, and finite always."""
    with enable_x64():
        for logits in (
            [0.0, 0.0, 0.0],
            [1.0, -2.0, 0.5, 3.0],
            [0.0, 800.0, -800.0],
            [-40.0, 40.0, 39.0, -41.0],
            [1.0, 2.0],
        ):
            z = jnp.asarray(logits)
            S, p = (np.asarray(jax.jit(f)(z)) for f in (softmax_cross_entropy, jax.nn.softmax))
            assert S.shape == (len(logits), len(logits) - 1)
            np.testing.assert_allclose(S @ S.T, np.diag(p) - np.outer(p, p), atol=1e-16)
            # relative accuracy of every variance, even the smallest
            np.testing.assert_allclose((S**2).sum(1), p * (1 - p), rtol=1e-6 if max(logits) < 100 else 1, atol=1e-300)
