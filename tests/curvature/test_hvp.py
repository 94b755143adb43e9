"""hvp against the dense Hessian, and under jit, vmap and grad."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import hvp


def quartic(p, x):
    return (jnp.tanh(x @ p["w"]) ** 2).sum() * jnp.cos(p["b"]).sum()


@pytest.mark.slow
def test_equals_the_dense_hessian_in_float64():
    with enable_x64():
        rng = np.random.default_rng(0)
        p = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
        v = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
        x = jnp.asarray(rng.normal(size=(4, 3)))
        flat, unravel = jax.flatten_util.ravel_pytree(p)
        H = jax.jit(jax.hessian(lambda w: quartic(unravel(w), x)))(flat)
        expected = H @ jax.flatten_util.ravel_pytree(v)[0]
        actual = jax.flatten_util.ravel_pytree(hvp(quartic)(p, v, x))[0]
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_composes_with_jit_vmap_and_grad():
    cubic = hvp(lambda w: (w**3).sum())
    w = jnp.arange(1.0, 4.0)
    np.testing.assert_allclose(jax.jit(cubic)(w, jnp.ones(3)), 6 * w)
    np.testing.assert_allclose(jax.vmap(lambda v: cubic(w, v))(jnp.eye(3)), jnp.diag(6 * w))
    np.testing.assert_allclose(jax.grad(lambda w: cubic(w, jnp.ones(3)).sum())(w), jnp.full(3, 6.0))


@pytest.mark.parametrize("v", [{"w": jnp.zeros((2, 3)), "b": jnp.zeros(2)}, {"w": jnp.zeros((3, 2))}])
def test_a_direction_that_does_not_fit_is_an_error(v):
    p = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"'w' is \(3, 2\)|structure"):
        hvp(quartic)(p, v, jnp.zeros((1, 3)))
