"""Convolutions and matrix products: where channels are produced and consumed."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import jax.numpy as jnp
import numpy as np

from ehap_jax._compat import bind
from ehap_jax.graph.interpret import register
from ehap_jax.graph.rules.shape import sizes
from ehap_jax.graph.structure import Axis, Labels, Structure
from ehap_jax.graph.trace import Node


def contract(structure: Structure, node: Node, a: Labels, i: int, b: Labels, j: int) -> None:
    """Sum over axis ``i`` of ``a`` times axis ``j`` of ``b``: pruned terms must be zero on one side at least."""
    axis = structure.equal(a.axes[i], b.axes[j], f"contraction with an axis that cannot shrink at {node.source}")
    if axis and i not in a.zero and j not in b.zero:
        structure.freeze(axis, f"contraction over values that masking does not make zero at {node.source}")


def produce(structure: Structure, kernel: Labels, other: Labels, axis: Axis) -> None:
    if kernel.from_variables and not other.from_variables:
        structure.produce(axis)


def dot_macs(node: Node, inputs, outputs) -> int:
    (contracting, _), _ = node.params["dimension_numbers"]
    return prod(outputs[0]) * prod(inputs[0][i] for i in contracting)


@register("dot_general", macs=dot_macs)
def dot_general(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    lhs, rhs = inputs
    return [_product(structure, node, lhs, rhs, node.params["dimension_numbers"])]


def ragged_dot_macs(node: Node, inputs, outputs) -> int:
    (contracting, _), _ = node.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return prod(outputs[0]) * prod(inputs[0][i] for i in contracting)


@register("ragged_dot_general", macs=ragged_dot_macs)
def ragged_dot_general(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """One kernel per group of rows (experts); groups, their sizes and rows stay."""
    lhs, rhs, group_sizes = inputs
    numbers = node.params["ragged_dot_dimension_numbers"]
    why = f"rows of groups at {node.source}"
    for axis in (*(lhs.axes[i] for i in numbers.lhs_ragged_dimensions), *group_sizes.axes):
        structure.freeze(axis, why)
    if len(numbers.rhs_group_dimensions) == 1:
        (group,) = numbers.rhs_group_dimensions
        structure.freeze(rhs.axes[group], why)
        found = _product(structure, node, lhs, rhs, numbers.dot_dimension_numbers, (group,))
        return [replace(found, from_variables=found.from_variables and group_sizes.from_variables)]
    for axis in (*lhs.axes, *rhs.axes):  # its derivatives: rows are contracted
        structure.freeze(axis, why)
    return [Labels(((),) * len(node.outputs[0].shape), frozenset(), all(v.from_variables for v in inputs))]


def _product(structure: Structure, node: Node, lhs: Labels, rhs: Labels, dimensions, absent: tuple[int, ...] = ()):
    """The labels of a product; axes ``absent`` of the right operand are not in the result."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimensions
    for i, j in zip(lhs_contract, rhs_contract, strict=True):
        contract(structure, node, lhs, i, rhs, j)
    axes: list[Axis] = []
    zero: set[int] = set()
    for i, j in zip(lhs_batch, rhs_batch, strict=True):
        if i in lhs.zero or j in rhs.zero:
            zero.add(len(axes))
        why = f"batch axis of a product with one that cannot shrink at {node.source}"
        axes.append(structure.equal(lhs.axes[i], rhs.axes[j], why))
    for operand, other, used in (
        (lhs, rhs, {*lhs_contract, *lhs_batch}),
        (rhs, lhs, {*rhs_contract, *rhs_batch, *absent}),
    ):
        for i, axis in enumerate(operand.axes):
            if i in used:
                continue
            if i in operand.zero:
                zero.add(len(axes))
            produce(structure, operand, other, axis)
            axes.append(axis)
    return Labels(tuple(axes), frozenset(zero), lhs.from_variables and rhs.from_variables)


def conv_macs(node: Node, inputs, outputs) -> int:
    kernel = inputs[1]
    return prod(outputs[0]) * prod(kernel) // max(kernel[node.params["dimension_numbers"].rhs_spec[0]], 1)


def resize_conv(node: Node, args, kept_inputs, kept_outputs):
    """Grouped convolutions lose whole groups, so the group count follows from the shapes. No channels give zero."""
    lhs, rhs = args
    dims = node.params["dimension_numbers"]
    if lhs.shape[dims.lhs_spec[1]] == 0:
        return [jnp.zeros(sizes(node, kept_outputs), node.outputs[0].dtype)]
    groups = lhs.shape[dims.lhs_spec[1]] // max(rhs.shape[dims.rhs_spec[1]], 1)
    return bind(node.primitive, args, {**node.params, "feature_group_count": groups})


@register("conv_general_dilated", resize=resize_conv, macs=conv_macs)
def conv_general_dilated(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    lhs, rhs = inputs
    dims = node.params["dimension_numbers"]
    groups = node.params["feature_group_count"]
    lhs_in, rhs_out, rhs_in = dims.lhs_spec[1], dims.rhs_spec[0], dims.rhs_spec[1]
    where = f"at {node.source}"
    for operand, spec in ((lhs, dims.lhs_spec), (rhs, dims.rhs_spec)):
        for axis in spec[2:]:
            structure.freeze(operand.axes[axis], f"spatial axis of a convolution {where}")
    batch = lhs.axes[dims.lhs_spec[0]]
    if node.params["batch_group_count"] != 1:
        for axis in (batch, rhs.axes[rhs_out], lhs.axes[lhs_in], rhs.axes[rhs_in]):
            structure.freeze(axis, f"convolution with batch groups {where}")
    out = rhs.axes[rhs_out]
    if groups == 1:
        contract(structure, node, lhs, lhs_in, rhs, rhs_in)
    else:
        structure.freeze(rhs.axes[rhs_in], f"input axis within the groups of a grouped convolution {where}")
        out = _grouped(structure, lhs.axes[lhs_in], out, groups, where)
    produce(structure, rhs, lhs, out)
    rank = len(node.outputs[0].shape)
    axes: list[Axis] = [()] * rank
    axes[dims.out_spec[0]], axes[dims.out_spec[1]] = batch, out
    zero = set()
    if rhs_out in rhs.zero:
        zero.add(dims.out_spec[1])
    if dims.lhs_spec[0] in lhs.zero:
        zero.add(dims.out_spec[0])
    return [Labels(tuple(axes), frozenset(zero), lhs.from_variables and rhs.from_variables)]


def _grouped(structure: Structure, lhs: Axis, out: Axis, groups: int, where: str) -> Axis:
    """A group goes as a whole: its inputs and its outputs together (depthwise: one of each)."""
    why = f"grouped convolution over channels that cannot shrink {where}"
    if len(lhs) != 1 or len(out) != 1:
        structure.freeze(lhs, why)
        structure.freeze(out, why)
        return out
    for labels in (lhs[0], out[0]):
        blocks = labels.reshape(groups, -1)
        structure.equal((blocks.ravel(),), (np.repeat(blocks[:, 0], blocks.shape[1]),), why)
    structure.equal((lhs[0].reshape(groups, -1)[:, 0],), (out[0].reshape(groups, -1)[:, 0],), why)
    return out
