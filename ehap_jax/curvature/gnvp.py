"""Gauss-Newton vector products as a function transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ehap_jax.curvature.heads import Head, inputs_and_targets, root_of, softmax_cross_entropy
from ehap_jax.curvature.hvp import require_same_shapes

__all__ = ["gnvp"]

PyTree = Any


def gnvp(
    model: Callable[[PyTree, PyTree], jax.Array], *, head: Head = softmax_cross_entropy
) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """``gnvp(model)(params, v, batch)`` is ``G v``, G the Gauss-Newton matrix of the mean loss.

    ``G = mean over examples of J^T H_out J``, J the Jacobian of the logits and ``H_out = S S^T`` the Hessian of one
    example's loss with respect to them (Schraudolph, 2002). One pass forward, one backward; neither J nor G is formed.
    Composes with `jax.jit`, `jax.vmap`, `jax.grad` and `jax.shard_map`.

    Args:
      model: ``model(params, x) -> logits``, with the examples on the first axis of both.
      head: as for `gauss_newton_trace`: ``head(logits, *targets) -> S`` of one example, or ``(S, signs)``.

    Returns:
      A function of ``(params, v, batch)``, ``batch`` as for `gauss_newton_trace`, ``v`` and the result like ``params``.

    Raises:
      ValueError: (from the returned function) ``v`` does not fit ``params``; the head does not fit the logits.

    >>> product = gnvp(lambda w, x: x @ w)
    >>> w, x = jnp.zeros((1, 2)), jnp.array([[2.0]])
    >>> product(w, jnp.array([[1.0, 0.0]]), x).tolist()
    [[1.0, -1.0]]
    """

    def product(params: PyTree, v: PyTree, batch: PyTree) -> PyTree:
        require_same_shapes(params, v)
        x, targets = inputs_and_targets(batch)
        logits, pushforward = jax.linearize(lambda p: model(p, x), params)

        def curved(logits: jax.Array, tangent: jax.Array, *targets: Any) -> jax.Array:
            root, signs = root_of(head, logits, targets)
            along = jnp.tensordot(root, tangent, tangent.ndim) * signs
            return jnp.tensordot(along, root, 1)

        cotangents = jax.vmap(curved)(logits, pushforward(v), *targets) / logits.shape[0]
        (found,) = jax.linear_transpose(pushforward, params)(cotangents.astype(logits.dtype))
        return found

    return product
