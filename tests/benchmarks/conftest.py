"""How benchmarks are tested: under the rules a user has them, on a network small enough to know everything about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    """Benchmarks run under JAX's own promotion rules; the strict ones of the tests are for the library."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="session")
def two_layers():
    """Two dense layers with 11 channels, and 12 examples: (apply, params, batch)."""
    rng = np.random.default_rng(4)
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in {"a": (5, 8), "b": (8, 3)}.items()
    }
    batch = jnp.asarray(rng.normal(size=(12, 5)), jnp.float32), jnp.asarray(rng.integers(0, 3, 12), jnp.int32)

    def apply(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    return apply, params, batch
