"""Integer operations, rounded as ONNX Runtime's CPU kernels round, bit for bit.

Integers are stored as ``Stored``: int8 (uint8 less 128) where they fit, int32 elsewhere. No product here is followed by
a sum unless the product is exact, so it does not matter whether a compiler contracts the two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ehap_jax import _compat
from ehap_jax.graph.trace import Node
from ehap_jax.quant.fold import Site
from ehap_jax.quant.program import IntegerGrid, Target

float32 = np.float32


def store(integers: jax.Array, grid: IntegerGrid) -> jax.Array:
    """int32 integers of ``grid`` as they are kept."""
    return (integers - grid.stored_offset).astype(jnp.int8 if grid.dtype.itemsize == 1 else jnp.int32)


def integers_of(stored: jax.Array, grid: IntegerGrid) -> jax.Array:
    """The integers as int32."""
    return stored.astype(jnp.int32) + grid.stored_offset


def quantise_to(x: jax.Array, target: Target) -> jax.Array:
    """``clip(rint(x / scale) + zero)``, ONNX's QuantizeLinear."""
    # Without the barrier XLA divides by a constant by multiplying with its rounded reciprocal.
    scale = lax.optimization_barrier(jnp.asarray(target.out.grid.scale, jnp.float32))
    return _round_to(x.astype(jnp.float32) / scale, target)


def dequantise_from(stored: jax.Array, grid: IntegerGrid) -> jax.Array:
    """``(q − zero) · scale`` in float32."""
    return (integers_of(stored, grid) - grid.zero).astype(jnp.float32) * float32(grid.scale)


def requantise(accumulator: jax.Array, multiplier: jax.Array, target: Target) -> jax.Array:
    """``rint(float32(acc) · multiplier) + zero`` of int32 sums, half to even."""
    return _round_to(accumulator.astype(jnp.float32) * multiplier, target)


def _round_to(steps: jax.Array, target: Target) -> jax.Array:
    zero = target.out.grid.zero
    clipped = jnp.clip(jnp.rint(steps), float32(target.low - zero), float32(target.high - zero))
    return store(clipped.astype(jnp.int32) + zero, target.out.grid)


def clip(stored: jax.Array, target: Target) -> jax.Array:
    """Integers that stay on their grid, clipped."""
    offset = target.out.grid.stored_offset
    return jnp.clip(
        stored, jnp.asarray(target.low - offset, stored.dtype), jnp.asarray(target.high - offset, stored.dtype)
    )


class AddNumbers(NamedTuple):
    """ONNX Runtime's QLinearAdd is ``rint(fma(a, a_ratio, fma(b, b_ratio, fixed)))`` in float32, on raw integers."""

    a_ratio: np.float32
    b_ratio: np.float32
    fixed: np.float32


def add_numbers(a: IntegerGrid, b: IntegerGrid, out: IntegerGrid) -> AddNumbers:
    """The constants of a sum: the ratios of scales, and what the zero points come to."""
    a_ratio, b_ratio = float32(a.scale) / float32(out.scale), float32(b.scale) / float32(out.scale)
    zeros = float32(float(a_ratio) * a.zero + float(float32(b_ratio * float32(b.zero))))  # a fused multiply-add
    return AddNumbers(a_ratio, b_ratio, float32(out.zero) - zeros)


def negated(grid: IntegerGrid) -> IntegerGrid:
    """The grid of ``~q`` (bitwise not) for the integers ``q`` of ``grid``: minus the same numbers."""
    flip = np.iinfo(grid.dtype).min + np.iinfo(grid.dtype).max
    return IntegerGrid(grid.scale, flip - grid.zero, flip - grid.high, flip - grid.low)


def add(a: jax.Array, a_grid: IntegerGrid, b: jax.Array, b_grid: IntegerGrid, target: Target) -> jax.Array:
    """The sum of two quantised arrays on a third grid."""
    numbers = add_numbers(a_grid, b_grid, target.out.grid)
    inner = _fused_multiply_add(integers_of(b, b_grid), numbers.b_ratio, jnp.asarray(numbers.fixed))
    steps = _fused_multiply_add(integers_of(a, a_grid), numbers.a_ratio, inner)
    low, high = float32(target.low), float32(target.high)
    return store(jnp.clip(jnp.rint(steps), low, high).astype(jnp.int32), target.out.grid)


def _fused_multiply_add(q: jax.Array, factor: np.float32, addend: jax.Array) -> jax.Array:
    """``q · factor + addend`` rounded once, for integers of up to 12 bits.

    The factor is split into two halves whose products with q are exact, and the error of the sum is added back.
    """
    upper = float32(float32(factor * float32(4097)) - float32(float32(factor * float32(4097)) - factor))
    lower = factor - upper
    x = q.astype(jnp.float32)
    product, rest = x * upper, x * lower
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    return total + (error + rest)


def pool_multiplier(source: IntegerGrid, target: IntegerGrid, count: int) -> np.float32:
    """Of the sum of ``count`` centred integers, for their mean."""
    return float32(source.scale) / (float32(target.scale) * float32(count))


def pool(node: Node, stored: jax.Array, source: IntegerGrid, count: int, target: Target) -> jax.Array:
    """The mean over the axes or windows that ``node`` sums over, ONNX Runtime's QLinearGlobalAveragePool."""
    centred = stored.astype(jnp.int32) - (source.zero - source.stored_offset)
    (total,) = _compat.bind(node.primitive, [centred], node.params)
    return requantise(total, jnp.asarray(pool_multiplier(source, target.out.grid, count)), target).reshape(
        target.out.shape
    )


def accumulate(
    node: Node, kernel_operand: int, stored: jax.Array, grid: IntegerGrid, kernel: jax.Array, *, exact_in_float32: bool
) -> jax.Array:
    """Σ (x_q − zero) · w_q of a conv or dense layer, int32.

    ``exact_in_float32`` computes it in float32, which gives the same integers where every partial sum is below 2²⁴.
    """
    zero = grid.zero - grid.stored_offset
    if exact_in_float32:
        operands = [(stored.astype(jnp.int32) - zero).astype(jnp.float32)]
        operands.insert(kernel_operand, kernel.astype(jnp.float32))
        params = {**node.params, "preferred_element_type": jnp.float32, "precision": (lax.Precision.HIGHEST,) * 2}
        (total,) = _compat.bind(node.primitive, operands, params)
        return total.astype(jnp.int32)
    params = {**node.params, "preferred_element_type": jnp.dtype(jnp.int32), "precision": None}
    if stored.dtype != kernel.dtype:  # more than 8 bits
        stored, kernel = stored.astype(jnp.int32), kernel.astype(jnp.int32)
    if node.name == "conv_general_dilated":
        numbers = node.params["dimension_numbers"]
        padding = [(0, 0, 0)] * stored.ndim
        spatial = zip(numbers.lhs_spec[2:], node.params["padding"], node.params["lhs_dilation"], strict=True)
        for axis, (before, after), dilation in spatial:
            padding[axis] = (int(before), int(after), dilation - 1)
        stored = lax.pad(stored, jnp.asarray(zero, stored.dtype), padding)
        axes = len(numbers.lhs_spec) - 2
        params |= {"padding": ((0, 0),) * axes, "lhs_dilation": (1,) * axes}
        (total,) = _compat.bind(node.primitive, [stored, kernel], params)
        others = tuple(axis for axis in range(kernel.ndim) if axis != numbers.rhs_spec[0])
        sums = jnp.sum(kernel.astype(jnp.int32), axis=others)
        return total - zero * sums.reshape([-1 if axis == numbers.out_spec[1] else 1 for axis in range(total.ndim)])
    operands = [stored]
    operands.insert(kernel_operand, kernel)
    (total,) = _compat.bind(node.primitive, operands, params)
    contracting, batch = (axes[1 - kernel_operand] for axes in node.params["dimension_numbers"])
    kept = (*contracting, *batch)
    ones = jnp.ones([n if axis in kept else 1 for axis, n in enumerate(stored.shape)], stored.dtype)
    operands[1 - kernel_operand] = ones
    (sums,) = _compat.bind(node.primitive, operands, params)
    return total - zero * sums


def accumulator_bounds(site: Site, grid: IntegerGrid, kernel: np.ndarray, bias: np.ndarray | None) -> tuple[int, int]:
    """(Σ|w_q| · max|x_q − zero|, the same plus |bias|), the largest over output channels."""
    others = tuple(axis for axis in range(kernel.ndim) if axis != site.kernel_axis)
    weights = np.abs(kernel.astype(np.int64)).sum(axis=others)
    sums = weights * max(grid.high - grid.zero, grid.zero - grid.low)
    offset = np.zeros((), np.int64) if bias is None else np.abs(bias.astype(np.int64))
    return int(sums.max()), int((sums + offset).max())
