"""The one check of random keys, called first by whatever takes one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_key(key: Any) -> jax.Array:
    """A key of `jax.random.key`, made of one of either style.

    Raises:
        TypeError: it is no single key; a seed is not one either.

    Example:
        >>> random_key(jax.random.PRNGKey(3)) == jax.random.key(3)
        Array(True, dtype=bool)
    """
    if isinstance(key, jax.Array) and jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    found = f"{key.dtype}{list(key.shape)}" if isinstance(key, jax.Array | np.ndarray) else repr(key)[:80]
    hint = f"jax.random.key({key})" if isinstance(key, int) else "jax.random.key(0)"
    raise TypeError(f"key must be one random key, such as {hint}, not {found}")
