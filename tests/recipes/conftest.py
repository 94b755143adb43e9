"""How recipes are tested: under the rules a user has them, and compiled quickly."""

import jax
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
