"""Integers and the real numbers they stand for: ``x ≈ (q − zero_point) · scale``, rounded half to even."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Grid(NamedTuple):
    """A set of representable numbers ``(q − zero_point) · scale`` for the integers ``low ≤ q ≤ high``.

    scale and zero_point broadcast against the array they quantise; zero_point is integral, held as a float.
    """

    scale: jax.Array
    zero_point: jax.Array
    low: int
    high: int


def symmetric_grid(w: jax.Array, *, bits: int = 8, axis: int | None = None) -> Grid:
    """The narrow symmetric grid of a weight, ``[-(2^(b-1) - 1), 2^(b-1) - 1]``, zero point 0.

    One scale per index of ``axis`` (kept as a broadcastable shape), or one for the tensor where ``axis`` is None. An
    all-zero channel gets scale 1: its integers are all 0 whatever the scale. The scale is a constant of the gradient.
    """
    high = 2 ** (bits - 1) - 1
    others = None if axis is None else tuple(i for i in range(w.ndim) if i != axis % w.ndim)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(w), axis=others, keepdims=True))
    scale = jnp.where(largest > 0, largest / high, jnp.ones_like(largest))
    return Grid(scale, jnp.zeros_like(scale), -high, high)


def asymmetric_grid(low: jax.Array, high: jax.Array, *, bits: int = 8) -> Grid:
    """The unsigned grid ``[0, 2^b - 1]`` of activations in ``[low, high]``, with a true integer zero point.

    The range is widened to contain 0, so that 0.0 (zero padding, dead channels) is represented exactly. An empty range
    gets scale 1; :func:`ehap_jax.quant.check_calibrated` reports it.
    """
    levels = 2**bits - 1
    low, high = jnp.minimum(low, jnp.zeros_like(low)), jnp.maximum(high, jnp.zeros_like(high))
    width = high - low
    scale = jnp.where(width > 0, width / levels, jnp.ones_like(width))
    zero_point = jnp.clip(jnp.round(-low / scale), 0, levels)
    return Grid(*jax.lax.stop_gradient((scale, zero_point)), 0, levels)


def signed_grid(low: jax.Array, high: jax.Array, *, bits: int = 8) -> Grid:
    """The symmetric grid of activations in ``[low, high]``: narrow, zero point 0."""
    top = 2 ** (bits - 1) - 1
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    scale = jax.lax.stop_gradient(jnp.where(largest > 0, largest / top, jnp.ones_like(largest)))
    return Grid(scale, jnp.zeros_like(scale), -top, top)


def quantise(x: jax.Array, grid: Grid) -> jax.Array:
    """The integers of ``x`` on ``grid``, as floats: ``clip(rint(x / scale) + zero_point, low, high)``."""
    scale, zero_point = grid.scale.astype(x.dtype), grid.zero_point.astype(x.dtype)
    return jnp.clip(jnp.round(x / scale) + zero_point, grid.low, grid.high)


def dequantise(q: jax.Array, grid: Grid) -> jax.Array:
    """The real numbers of the integers ``q``."""
    return (q - grid.zero_point.astype(q.dtype)) * grid.scale.astype(q.dtype)


def fake_quantise(x: jax.Array, grid: Grid) -> jax.Array:
    """``x`` rounded to ``grid``, differentiated straight through: slope 1 where kept, exactly 0 where clipped.

    Bengio et al. 2013 (arXiv 1308.3432). The rounding itself counts as kept: a value is clipped only if its rounded
    integer lies outside the grid. Works under forward and reverse mode.

    >>> import jax, jax.numpy as jnp
    >>> grid = asymmetric_grid(jnp.array(-1.0), jnp.array(1.55))
    >>> jax.vmap(jax.grad(lambda x: fake_quantise(x, grid)))(jnp.array([-2.0, 0.3, 9.0])).tolist()
    [0.0, 1.0, 0.0]
    """
    return _straight_through(x, jax.lax.stop_gradient((grid.scale, grid.zero_point)), grid.low, grid.high)


def _rounded(x, scale_and_zero, low, high):
    grid = Grid(*scale_and_zero, low, high)
    return dequantise(quantise(x, grid), grid)


_straight_through = jax.custom_jvp(_rounded, nondiff_argnums=(2, 3))


@_straight_through.defjvp
def _straight_through_jvp(low, high, primals, tangents):
    x, (scale, zero_point) = primals
    q = jnp.round(x / scale.astype(x.dtype)) + zero_point.astype(x.dtype)
    kept = (q >= low) & (q <= high)
    return _straight_through(x, (scale, zero_point), low, high), jnp.where(kept, tangents[0], jnp.zeros_like(x))
