"""The channel products ``v_c . (H v)_c`` of one probe on one chunk of a batch, by either of two methods.

``jvp``: the derivative of the gradient, anew for every probe. ``linearize``: the gradient is linearised once, its
residuals are kept, and a probe runs the linear part alone, about a quarter less work for more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ehap_jax.curvature.problem import Layout

__all__ = ["Linearization", "Products", "add_linear_products", "add_products", "linearize", "no_products"]

PyTree = Any


class Products(NamedTuple):
    """The channel products of one probe, summed over chunks, and what in them was not finite.

    Attributes:
      channels: ``{path: (channels,)}``.
      gradient_bad: the gradient of the scaled loss is not finite; it does not depend on the probe.
      tangent_bad: the slope of the loss along the probe is not finite; it does not depend on the loss scale.
      leaf_bad: ``(leaves,)``: the gradient or the product of this leaf is not finite.
      stale: the linearisation was made at another loss scale than the state's; nothing here may be used.
    """

    channels: dict[str, jax.Array]
    gradient_bad: jax.Array
    tangent_bad: jax.Array
    leaf_bad: jax.Array
    stale: jax.Array

    @property
    def any_bad(self) -> jax.Array:
        return self.gradient_bad | self.tangent_bad | self.leaf_bad.any()


class Linearization(NamedTuple):
    """The gradient linearised at one loss scale; a pytree, its residuals are the arrays in ``pushforward``."""

    pushforward: Callable[[PyTree], PyTree]
    gradient_bad: jax.Array
    loss_scale: jax.Array


def no_products(layout: Layout, leaves: list[jax.Array]) -> Products:
    """The sum over no chunks."""
    channels = {
        path: jnp.zeros(leaves[place].shape[axis], layout.policy.sums)
        for path, place, axis in zip(layout.paths, layout.places, layout.axes, strict=True)
    }
    return Products(channels, jnp.array(False), jnp.array(False), jnp.zeros(len(layout.paths), bool), jnp.array(False))


@partial(jax.jit, static_argnames=("loss", "layout"))
def add_products(loss, layout: Layout, leaves, v, examples, weight, scales, found: Products) -> Products:
    """Add ``weight * v_c . (H v)_c`` of one chunk to ``found``, by jvp of grad."""
    scaled_loss, probed = _scaled_loss(loss, layout, leaves, examples, scales[0])
    direction = _direction(layout, v, scales[1])
    (_, gradient), (slope, Hv) = jax.jvp(jax.value_and_grad(scaled_loss), (probed,), (direction,))
    return _collect(layout, v, _not_finite(layout, gradient), slope, Hv, weight, scales, found)


@partial(jax.jit, static_argnames=("loss", "layout"))
def linearize(loss, layout: Layout, leaves, examples, loss_scale) -> Linearization:
    """Linearise the gradient of ``loss_scale * loss`` on one chunk."""
    scaled_loss, probed = _scaled_loss(loss, layout, leaves, examples, loss_scale)
    (_, gradient), pushforward = jax.linearize(jax.value_and_grad(scaled_loss), probed)
    return Linearization(pushforward, _not_finite(layout, gradient), loss_scale)


@partial(jax.jit, static_argnames="layout")
def add_linear_products(layout: Layout, linear: Linearization, v, weight, scales, found: Products) -> Products:
    """Add ``weight * v_c . (H v)_c`` of one chunk to ``found``, from its linearisation."""
    slope, Hv = linear.pushforward(_direction(layout, v, scales[1]))
    found = found._replace(stale=found.stale | (linear.loss_scale != scales[0]))
    return _collect(layout, v, linear.gradient_bad, slope, Hv, weight, scales, found)


def _scaled_loss(loss, layout: Layout, leaves, examples, loss_scale):
    probed, rest = layout.split(leaves)

    def scaled_loss(p):
        return jnp.asarray(loss(layout.join(p, rest), examples)).astype(layout.policy.sums) * loss_scale

    return scaled_loss, probed


def _direction(layout: Layout, v, probe_scale):
    return {path: v[path] * probe_scale.astype(v[path].dtype) for path in layout.paths}


def _not_finite(layout: Layout, tree) -> jax.Array:
    return ~jnp.stack([jnp.isfinite(tree[path]).all() for path in layout.paths])


def _collect(layout: Layout, v, gradient_bad, slope, Hv, weight, scales, found: Products) -> Products:
    sums = layout.policy.sums
    # Each scale is divided out on its own: their product could leave the range of float32.
    unscaled = {path: Hv[path].astype(sums) / scales[0] / scales[1] for path in layout.paths}
    products = layout.channel_sums({path: v[path].astype(sums) * unscaled[path] for path in layout.paths})
    return Products(
        {path: found.channels[path] + weight * products[path] for path in layout.paths},
        found.gradient_bad | gradient_bad.any(),
        found.tangent_bad | ~jnp.isfinite(slope),
        found.leaf_bad | gradient_bad | _not_finite(layout, products),
        found.stale,
    )
