"""Whether the derivative rules in a network are the derivatives of their functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax import _compat
from ehap_jax.graph import Graph, Node

__all__ = ["false_rules", "is_own_derivative"]

SIZES = (1e-2, 1.0, 1e2)
"""Of the inputs that a rule is tried on."""


def false_rules(graph: Graph) -> list[str]:
    """Calls of functions whose derivative rule is not their derivative: name and source line of each."""
    return [
        f"{node.params.get('name', node.name)} has a derivative rule that is not its derivative at {node.source}"
        for node in graph.body.walk()
        if not is_own_derivative(node)
    ]


def is_own_derivative(node: Node) -> bool:
    """Whether a custom_vjp call goes backward by the transpose of its derivative forward; True of other operations.

    A Hessian is the derivative, forward, of the gradient, backward: of a function with a rule of its own it has the
    rule on one side and the function's derivative J on the other. (A custom_jvp rule is on both sides.) Gradient
    reversal, gradient scaling and straight-through rounding differ there. With random u and t, ``u . J t`` is tried
    against ``(rule u) . t``, at inputs of several sizes.
    """
    if node.name != "custom_vjp_call":
        return True
    rng = np.random.default_rng(0)
    tried = 0
    for size in SIZES:
        primals = [_drawn(rng, value, size) for value in node.inputs]
        places = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.floating)]

        def forward(*floating, primals=primals, places=places):
            inputs = list(primals)
            for place, x in zip(places, floating, strict=True):
                inputs[place] = x
            return _compat.bind(node.primitive, inputs, node.params)

        at = [primals[i] for i in places]
        t = [_drawn(rng, x, 1.0) for x in at]
        try:
            out, pull = jax.vjp(forward, *at)
            u = [_cotangent(rng, x) for x in out]
            _, along = jax.jvp(lambda *x, forward=forward: jax.vjp(forward, *x)[0], at, t)
            back = pull(u)
        except (TypeError, ValueError, NotImplementedError):
            return False
        ahead = _inner(u, along)
        if not np.isfinite(ahead):
            continue
        tried += 1
        scale = np.sqrt(_inner(along, along)) + np.sqrt(_inner(back, back))
        precision = max(float(jnp.finfo(x.dtype).eps) for x in at) if at else 0.0
        if not abs(ahead - _inner(back, t)) <= 1e3 * precision * scale:
            return False
    return tried > 0


def _drawn(rng: np.random.Generator, value, size: float) -> jax.Array:
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.asarray(size * rng.normal(size=value.shape), value.dtype)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), value.shape)
    return jnp.zeros(value.shape, value.dtype)


def _cotangent(rng: np.random.Generator, x):
    if jnp.issubdtype(x.dtype, jnp.floating):
        return _drawn(rng, x, 1.0)
    return np.zeros(x.shape, jax.dtypes.float0)


def _inner(a, b) -> float:
    """Of the floating-point leaves, in float64."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.dtype != jax.dtypes.float0]
    return float(sum(np.vdot(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs))
