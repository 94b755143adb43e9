"""Integer operations, rounded as ONNX Runtime's CPU kernels round, bit for bit.

Integers are stored as ``Stored``: int8 (uint8 less 128) where they fit, int32 elsewhere. No product here is followed by
a sum unless the product is exact, so it does not matter whether a compiler contracts the two.
"""

from __future__ import annotations

from collections.abc import Sequence
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

EXACT_IN_FLOAT32 = 2**24
"""float32 holds every integer up to here, so that sums which stay below are exact in any order."""


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
    node: Node, kernel_operand: int, stored: jax.Array, grid: IntegerGrid, kernel: jax.Array, parts: Sequence[int] = ()
) -> jax.Array:
    """Σ (x_q − zero) · w_q of a conv or dense layer, int32.

    ``parts`` sums in float32 instead, so many indices of :func:`cut_axis` at a time, and adds the parts in int32. That
    gives the same integers where every part is below 2²⁴.
    """
    zero = grid.zero - grid.stored_offset
    if parts:
        centred = (stored.astype(jnp.int32) - zero).astype(jnp.float32)
        return _accumulate_in_float32(node, kernel_operand, centred, kernel.astype(jnp.float32), parts)
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


def _accumulate_in_float32(
    node: Node, kernel_operand: int, x: jax.Array, kernel: jax.Array, parts: Sequence[int]
) -> jax.Array:
    # With a lower precision an accelerator may keep fewer than 24 bits.
    params = {**node.params, "preferred_element_type": jnp.float32, "precision": (lax.Precision.HIGHEST,) * 2}

    def total(x: jax.Array, kernel: jax.Array) -> jax.Array:
        operands = [x]
        operands.insert(kernel_operand, kernel)
        (total,) = _compat.bind(node.primitive, operands, params)
        # Winograd's and Fourier's algorithms sum numbers that are not integers, and may end just below one.
        return jnp.rint(total).astype(jnp.int32)

    if len(parts) == 1:
        return total(x, kernel)
    x_axis, axis = cut_axis(node, 1 - kernel_operand), cut_axis(node, kernel_operand)
    assert x_axis is not None and axis is not None, "what sums over nothing is not cut"
    groups = node.params.get("feature_group_count", 1)
    totals, start = [], 0
    for size in parts:
        part = lax.slice_in_dim(kernel, start, start + size, axis=axis)
        totals.append(total(_cut(x, x_axis, groups, start, size), part))
        start += size
    return sum(totals[1:], totals[0])


def _cut(x: jax.Array, axis: int, groups: int, start: int, size: int) -> jax.Array:
    """``size`` indices from ``start`` of each of the groups along an axis."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    grouped = x.reshape(*before, groups, x.shape[axis] // groups, *after)
    return lax.slice_in_dim(grouped, start, start + size, axis=axis + 1).reshape(*before, groups * size, *after)


def cut_axis(node: Node, operand: int) -> int | None:
    """The axis of an operand that a layer's sums are cut along: input channels, or the longest contracted axis."""
    numbers = node.params["dimension_numbers"]
    if node.name == "conv_general_dilated":
        return (numbers.lhs_spec, numbers.rhs_spec)[operand][1]
    return max(numbers[0][operand], key=lambda axis: node.inputs[operand].shape[axis], default=None)


def reach(site: Site, grid: IntegerGrid, kernel: np.ndarray) -> np.ndarray:
    """How far up and down any input can move what one input channel adds to a sum: int64, none negative.

    (input channels, 2, *kernel axes); the kernel's contracted axes have length 1.
    """
    numbers, cut = site.node.params["dimension_numbers"], cut_axis(site.node, site.kernel_operand)
    contracted = numbers.rhs_spec[1:] if site.node.name == "conv_general_dilated" else numbers[0][site.kernel_operand]
    others = tuple(axis for axis in contracted if axis != cut)
    positive, negative = (np.maximum(sign * kernel.astype(np.int64), 0).sum(others, keepdims=True) for sign in (1, -1))
    above, below = grid.high - grid.zero, grid.zero - grid.low
    found = np.stack([above * positive + below * negative, above * negative + below * positive])[None]
    return found if cut is None else np.swapaxes(found, 0, cut + 2)


def float32_parts(reaches: np.ndarray) -> tuple[int, ...]:
    """The fewest runs of input channels that float32 sums exactly; () where a single channel goes too far."""
    parts, total = [0], np.zeros_like(reaches[0])
    for channel in reaches:
        if channel.max() >= EXACT_IN_FLOAT32:
            return ()
        total = total + channel
        if total.max() >= EXACT_IN_FLOAT32:
            parts.append(0)
            total = channel
        parts[-1] += 1
    return tuple(parts)


def largest_sums(site: Site, reaches: np.ndarray, bias: np.ndarray) -> tuple[int, int]:
    """The largest magnitude that any input can give a sum, and the same with the bias (channels,) added."""
    sums = reaches.sum(0)
    offset = bias.astype(np.int64).reshape([-1 if axis == site.kernel_axis else 1 for axis in range(sums.ndim - 1)])
    return int(sums.max()), int((sums + np.stack([offset, -offset])).max())
