"""Curvature products for SciPy: flat vectors in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy.sparse.linalg import LinearOperator

__all__ = ["as_linear_operator"]

PyTree = Any


def as_linear_operator(product: Callable[[PyTree], PyTree], like: PyTree) -> LinearOperator:
    """A symmetric product on pytrees as a `scipy.sparse.linalg.LinearOperator` on flat vectors.

    For ``eigsh``, ``cg``, ``minres`` and whatever else takes one. The product is compiled; vectors travel between host
    and device at every call, so for long iterations on an accelerator use a JAX library such as matfree or lineax:
    they take ``product`` as it is.

    Args:
      product: ``v -> A v`` on pytrees like ``like``, A symmetric: for example ``linearized_hvp(loss, params, batch)``.
      like: a pytree of floating-point arrays of one dtype, float32 or float64; the operator has that dtype.

    Raises:
      TypeError: a leaf of ``like`` is of another dtype.

    >>> from scipy.sparse.linalg import eigsh
    >>> operator = as_linear_operator(lambda v: {"w": 3 * v["w"]}, {"w": jnp.ones((2, 3))})
    >>> operator.shape, round(float(eigsh(operator, k=1, return_eigenvectors=False)[0]), 5)
    ((6, 6), 3.0)
    """
    dtypes = {jnp.asarray(leaf).dtype for leaf in jax.tree.leaves(like)}
    if len(dtypes) != 1 or not dtypes <= {jnp.dtype("float32"), jnp.dtype("float64")}:
        raise TypeError(f"the leaves must all be float32 or all float64 arrays; got {sorted(map(str, dtypes))}")
    (dtype,) = dtypes
    flat, unravel = ravel_pytree(like)
    apply = jax.jit(lambda v: ravel_pytree(product(unravel(v)))[0])

    def matvec(v: np.ndarray) -> np.ndarray:
        return np.asarray(apply(jnp.asarray(v.reshape(-1), dtype)))

    return LinearOperator((flat.size, flat.size), matvec=matvec, rmatvec=matvec, dtype=np.dtype(dtype))  # pyright: ignore[reportCallIssue]
