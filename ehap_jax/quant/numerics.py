"""Integers and the real numbers they stand for: ``x ≈ (q − zero_point) · scale``, rounded half to even."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

GridKind = Literal["asymmetric", "symmetric", "unsigned"]


class Grid(NamedTuple):
    """A set of representable numbers ``(q − zero_point) · scale`` for the integers ``low ≤ q ≤ high``.

    scale and zero_point broadcast against the array they quantise; zero_point is integral, held as a float.
    """

    scale: jax.Array
    zero_point: jax.Array
    low: int
    high: int


def symmetric_grid(w: jax.Array, *, bits: int = 8, axis: int | None = None, at_least: jax.Array | None = None) -> Grid:
    """The narrow symmetric grid of a weight, ``[-(2^(b-1) - 1), 2^(b-1) - 1]``, zero point 0.

    One scale per index of ``axis`` (kept as a broadcastable shape), or one for the tensor where ``axis`` is None, no
    smaller than ``at_least``. An all-zero channel gets scale ``at_least`` or 1: its integers are all 0 whatever the
    scale. The scale is a constant of the gradient.
    """
    high = 2 ** (bits - 1) - 1
    others = None if axis is None else tuple(i for i in range(w.ndim) if i != axis % w.ndim)
    scale = jnp.max(jnp.abs(w), axis=others, keepdims=True) / high
    scale = jax.lax.stop_gradient(_never_zero(scale if at_least is None else jnp.maximum(scale, at_least)))
    return Grid(scale, jnp.zeros_like(scale), -high, high)


def asymmetric_grid(low: jax.Array, high: jax.Array, *, bits: int = 8, learned: bool = False) -> Grid:
    """The unsigned grid ``[0, 2^b - 1]`` of activations in ``[low, high]``, with a true integer zero point.

    The range is widened to contain 0, so that 0.0 (zero padding, dead channels) is represented exactly. An empty range
    gets scale 1; :func:`ehap_jax.quant.check_calibrated` reports it. The grid is a constant of the gradient unless
    ``learned``: then gradients reach ``low`` and ``high``, straight through the rounding of the zero point.
    """
    levels = 2**bits - 1
    low, high = jnp.minimum(low, jnp.zeros_like(low)), jnp.maximum(high, jnp.zeros_like(high))
    scale = _never_zero((high - low) / levels)
    exact = -low / scale
    zero_point = exact + jax.lax.stop_gradient(jnp.clip(jnp.round(exact), 0, levels) - exact)
    return _constant(Grid(scale, zero_point, 0, levels), learned)


def activation_grid(kind: GridKind, low: jax.Array, high: jax.Array, *, bits: int = 8, learned: bool = False) -> Grid:
    """The grid of activations in ``[low, high]``.

    "asymmetric": :func:`asymmetric_grid`. "symmetric": narrow and signed, zero point 0. "unsigned": ``[0, 2^b - 1]``
    with zero point 0, which clips what is negative (HAWQ-V3, arXiv 2011.10680).
    """
    if kind == "asymmetric":
        return asymmetric_grid(low, high, bits=bits, learned=learned)
    if kind == "unsigned":
        bottom, top, largest = 0, 2**bits - 1, jnp.maximum(high, jnp.zeros_like(high))
    else:
        top = 2 ** (bits - 1) - 1
        bottom, largest = -top, jnp.maximum(jnp.abs(low), jnp.abs(high))
    scale = _never_zero(largest / top)
    return _constant(Grid(scale, jnp.zeros_like(scale), bottom, top), learned)


def quantise(x: jax.Array, grid: Grid) -> jax.Array:
    """The integers of ``x`` as floats (float32 at least): ``clip(rint(x / scale) + zero_point, low, high)``."""
    return _quantise(*_as_wide(x, grid.scale, grid.zero_point), grid.low, grid.high)


def dequantise(q: jax.Array, grid: Grid) -> jax.Array:
    """The real numbers of the integers ``q`` (of a floating dtype)."""
    return (q - grid.zero_point.astype(q.dtype)) * grid.scale.astype(q.dtype)


def fake_quantise(x: jax.Array, grid: Grid, *, learned: bool = False) -> jax.Array:
    """``x`` rounded to ``grid``, differentiated straight through: slope 1 where kept, exactly 0 where clipped.

    Bengio et al. 2013 (arXiv 1308.3432). The rounding itself counts as kept: a value is clipped only if its rounded
    integer lies outside the grid. Works under forward and reverse mode. 16-bit ``x`` is rounded in float32.

    ``learned`` also gives the gradient of the grid, as LSQ+ does (Bhalgat et al. 2020, arXiv 2004.09576): for the scale
    ``rint(x/s) − x/s`` where kept and ``q − zero_point`` where clipped, for the zero point 0 and ``−s``.

    >>> import jax, jax.numpy as jnp
    >>> grid = asymmetric_grid(jnp.array(-1.0), jnp.array(1.55))
    >>> jax.vmap(jax.grad(lambda x: fake_quantise(x, grid)))(jnp.array([-2.0, 0.3, 9.0])).tolist()
    [0.0, 1.0, 0.0]
    """
    wide, scale, zero_point = _as_wide(x, grid.scale, grid.zero_point)
    if learned:
        return _learned(wide, scale, zero_point, grid.low, grid.high).astype(x.dtype)
    scale, zero_point = jax.lax.stop_gradient((scale, zero_point))
    return _straight_through(wide, (scale, zero_point), grid.low, grid.high).astype(x.dtype)


def at_least_float32(dtype) -> jnp.dtype:
    """``dtype``, or float32 where it is a narrower floating type."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def _as_wide(x, scale, zero_point):
    dtype = at_least_float32(x.dtype)
    return x.astype(dtype), scale.astype(dtype), zero_point.astype(dtype)


def _never_zero(scale):
    """``scale``, or 1 where it is 0 or so small that dividing by it would overflow."""
    return jnp.where(scale < 2.0**-120, jnp.ones_like(scale), scale)


def _constant(grid: Grid, learned: bool) -> Grid:
    scale, zero_point = (grid.scale, grid.zero_point) if learned else jax.lax.stop_gradient(grid[:2])
    return Grid(scale, zero_point, grid.low, grid.high)


def _quantise(x, scale, zero_point, low, high):
    return jnp.clip(jnp.round(x / scale) + zero_point, low, high)


def _rounded(x, scale_and_zero, low, high):
    scale, zero_point = scale_and_zero
    return (_quantise(x, scale, zero_point, low, high) - zero_point) * scale


_straight_through = jax.custom_jvp(_rounded, nondiff_argnums=(2, 3))


@_straight_through.defjvp
def _straight_through_jvp(low, high, primals, tangents):
    x, (scale, zero_point) = primals
    q = jnp.round(x / scale) + zero_point
    kept = (q >= low) & (q <= high)
    return _rounded(x, (scale, zero_point), low, high), jnp.where(kept, tangents[0], jnp.zeros_like(x))


def _learned_forward(x, scale, zero_point, low, high):
    return _rounded(x, (scale, zero_point), low, high)


_learned = jax.custom_jvp(_learned_forward, nondiff_argnums=(3, 4))


@_learned.defjvp
def _learned_jvp(low, high, primals, tangents):
    x, scale, zero_point = primals
    dx, dscale, dzero = tangents
    steps = x / scale
    q = jnp.round(steps) + zero_point
    kept = (q >= low) & (q <= high)
    inside = dx + (jnp.round(steps) - steps) * dscale
    clipped = (jnp.clip(q, low, high) - zero_point) * dscale - scale * dzero
    return _rounded(x, (scale, zero_point), low, high), jnp.where(kept, inside, clipped)
