"""Empirical Fisher vector products as a function transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ehap_jax.curvature.hvp import require_same_shapes
from ehap_jax.curvature.problem import batch_size

__all__ = ["fisher_vp"]

PyTree = Any


def fisher_vp(loss: Callable[[PyTree, PyTree], jax.Array]) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """``fisher_vp(loss)(params, v, batch)`` is ``F v``, F the empirical Fisher matrix.

    ``F = mean over examples of g g^T``, g the gradient of one example's loss with its given label. It is not the Fisher
    matrix, whose labels are the model's own (Kunstner, Balles and Hennig, 2019, arXiv 1905.12558): that one is
    `gnvp` for softmax cross-entropy. One pass forward, one backward; no gradient of an example is formed.
    Composes with `jax.jit`, `jax.vmap`, `jax.grad` and `jax.shard_map`.

    Args:
      loss: ``loss(params, batch)``, the mean over the examples on the first axis of every leaf of ``batch``; it is
        applied to batches of one.

    Returns:
      A function of ``(params, v, batch)``; ``v`` and the result are like ``params``.

    Raises:
      ValueError: (from the returned function) ``v`` does not fit ``params``; leaves of ``batch`` differ in length.

    >>> import jax.numpy as jnp
    >>> product = fisher_vp(lambda w, x: (x @ w).mean())
    >>> product(jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([[1.0, 3.0], [2.0, 0.0]])).tolist()
    [2.5, 1.5]
    """

    def product(params: PyTree, v: PyTree, batch: PyTree) -> PyTree:
        require_same_shapes(params, v)
        size = batch_size(batch)

        def losses(p):
            return jax.vmap(lambda example: loss(p, jax.tree.map(lambda x: x[None], example)))(batch)

        _, pushforward = jax.linearize(losses, params)
        (found,) = jax.linear_transpose(pushforward, params)(pushforward(v) / size)
        return found

    return product
