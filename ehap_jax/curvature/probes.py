"""Which leaves are probed, and the random directions they are probed with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

__all__ = ["is_kernel", "rademacher"]


def is_kernel(path: str, leaf: jax.Array) -> bool:
    """Whether ``leaf`` is a conv or dense kernel: it has two axes or more.

    Biases, the affine parameters of a normalisation and its running statistics have one axis and are not
    probed (DESIGN: HAP eq. 8 scores the output channels of kernels).

    >>> is_kernel("params/conv1/kernel", jnp.zeros((3, 3, 16, 16)))
    True
    >>> is_kernel("params/bn1/scale", jnp.zeros((16,)))
    False
    """
    return jnp.ndim(leaf) >= 2


def rademacher(key: jax.Array, leaves: Mapping[str, jax.Array], dtype=None) -> dict[str, jax.Array]:
    """Independent ±1 for every element of every leaf, each sign with probability one half.

    The signs depend on the key, the leaf's path and its shape alone: not on the dtype, on whether 64-bit
    types are switched on, or on which other leaves are probed. So two policies see the same probes.

    Args:
      key: a `jax.random` key.
      leaves: ``{path: array}``; only the shapes (and, without ``dtype``, the dtypes) are read.
      dtype: the dtype of the result; by default that of each leaf.

    Returns:
      ``{path: array}`` with the shapes of ``leaves``.

    >>> v = rademacher(jax.random.key(0), {"w": jnp.zeros((2, 2))})["w"]
    >>> bool((jnp.abs(v) == 1).all())
    True
    """
    return {
        path: _signs(jax.random.fold_in(key, zlib.crc32(path.encode())), leaf.shape, dtype or leaf.dtype)
        for path, leaf in leaves.items()
    }


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _signs(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    bit = jax.random.bits(key, shape, jnp.uint8) & jnp.uint8(1)
    return jnp.where(bit == jnp.uint8(1), jnp.ones((), dtype), -jnp.ones((), dtype))
