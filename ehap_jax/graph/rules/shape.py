"""Operations that move, merge, split or create axes."""

from __future__ import annotations

from math import prod

import numpy as np
from jax import lax

from ehap_jax._compat import bind
from ehap_jax.graph.interpret import register
from ehap_jax.graph.structure import Axis, Labels, Structure
from ehap_jax.graph.trace import Node


def sizes(node: Node, kept_outputs) -> tuple[int, ...]:
    """The result's shape once only ``kept_outputs`` remain."""
    return tuple(
        full if kept is None else len(kept) for full, kept in zip(node.outputs[0].shape, kept_outputs[0], strict=True)
    )


@register("transpose")
def transpose(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    value, order = inputs[0], node.params["permutation"]
    zero = {new for new, old in enumerate(order) if old in value.zero} | ({-1} & value.zero)
    return [Labels(tuple(value.axes[i] for i in order), frozenset(zero), value.from_variables)]


def resize_broadcast(node: Node, args, kept_inputs, kept_outputs):
    shape = sizes(node, kept_outputs)
    return [lax.broadcast_in_dim(args[0], shape, node.params["broadcast_dimensions"])]


@register("broadcast_in_dim", resize=resize_broadcast)
def broadcast_in_dim(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """New axes adopt whatever they meet; an axis of size one that is spread cannot go."""
    value, shape = inputs[0], node.outputs[0].shape
    source = {new: old for old, new in enumerate(node.params["broadcast_dimensions"])}
    axes: list[Axis] = []
    zero = set(range(-1, len(shape))) if -1 in value.zero else set()
    for new, size in enumerate(shape):
        old = source.get(new)
        if old is not None and node.inputs[0].shape[old] == size:
            axes.append(value.axes[old])
            if old in value.zero:
                zero.add(new)
            continue
        if old is not None:
            structure.freeze(value.axes[old], f"broadcast from size one at {node.source}")
        axes.append((structure.fresh(size, copies=True),))
    return [Labels(tuple(axes), frozenset(zero), value.from_variables)]


@register("tile")
def tile(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Every repetition carries the labels of what it repeats."""
    (value,) = inputs
    axes = tuple(
        tuple(np.tile(labels, times) for labels in axis) if times != 1 else axis
        for axis, times in zip(value.axes, node.params["reps"], strict=True)
    )
    return [Labels(axes, value.zero, value.from_variables)]


@register("squeeze")
def squeeze(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    value, gone = inputs[0], {d % len(inputs[0].axes) for d in node.params["dimensions"]}
    for axis in gone:
        structure.freeze(value.axes[axis], f"squeezed away at {node.source}")
    rest = [i for i in range(len(value.axes)) if i not in gone]
    zero = {new for new, old in enumerate(rest) if old in value.zero} | ({-1} & value.zero)
    return [Labels(tuple(value.axes[i] for i in rest), frozenset(zero), value.from_variables)]


@register("rev")
def rev(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    value, flipped = inputs[0], set(node.params["dimensions"])
    axes = tuple(tuple(labels[::-1] for labels in axis) if i in flipped else axis for i, axis in enumerate(value.axes))
    return [Labels(axes, value.zero, value.from_variables)]


def resize_reshape(node: Node, args, kept_inputs, kept_outputs):
    return [lax.reshape(args[0], sizes(node, kept_outputs))]


@register("reshape", resize=resize_reshape)
def reshape(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Axes are products of factors: merged ones carry the labels of both, split ones pass them to their factor.

    Labels that vary along several factors of a split stay with one of them (:meth:`Structure.split`).
    """
    value, old, new = inputs[0], node.inputs[0].shape, node.outputs[0].shape
    axes: list[Axis] = [()] * len(new)
    zero: set[int] = {-1} & value.zero
    for old_axes, new_axes in _matching_runs(old, new):
        old_run, new_run = tuple(old[i] for i in old_axes), tuple(new[i] for i in new_axes)
        for position, i in enumerate(old_axes):
            for labels in value.axes[i]:
                spread = [1] * len(old_run)
                spread[position] = old_run[position]
                grid = np.broadcast_to(labels.reshape(spread), old_run).reshape(new_run)
                why = f"split of an axis at {node.source}"
                if (grid == grid.ravel()[:1]).all():
                    structure.freeze((np.unique(grid),), why)
                    continue
                axis, own = structure.split((node.source, old, new, i), grid, why)
                axes[new_axes[axis]] = (*axes[new_axes[axis]], own)
        for i in new_axes:
            axes[i] = _without_copies(structure, axes[i], f"copies merged with an axis at {node.source}")
        # Any pruned factor makes the whole product index zero only if every labelled factor does.
        labelled = [i for i in old_axes if value.axes[i]]
        if labelled and all(i in value.zero for i in labelled):
            zero.update(new_axes)
    if -1 in zero:
        zero.update(range(len(new)))
    return [Labels(tuple(axes), frozenset(zero), value.from_variables)]


def _matching_runs(old: tuple[int, ...], new: tuple[int, ...]):
    """The shortest consecutive runs of old and new axes with equal products; size-one axes pair up or stand alone.

    New ones that stand alone are left out; of old ones nothing remains, so that they cannot go.
    """
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = [], []
        if i < len(old):
            a.append(i)
            i += 1
        if j < len(new):
            b.append(j)
            j += 1
        while (pa := prod(old[k] for k in a)) != (pb := prod(new[k] for k in b)):
            if (pa < pb and i < len(old)) or j >= len(new):
                a.append(i)
                i += 1
            else:
                b.append(j)
                j += 1
        runs.append((a, b))
    return [(a, b) for a, b in runs if a]


def _without_copies(structure: Structure, axis: Axis, why: str) -> Axis:
    """A labelled axis merged with its copies (``jnp.repeat``) keeps the labels of what was copied."""
    copies = [structure.is_copies(labels) for labels in axis]
    if all(copies) or not any(copies):
        return axis
    structure.freeze(tuple(labels for labels, copied in zip(axis, copies, strict=True) if copied), why)
    return tuple(labels for labels, copied in zip(axis, copies, strict=True) if not copied)


@register("concatenate")
def concatenate(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    along = node.params["dimension"]
    why = f"concatenation with a value that cannot shrink at {node.source}"
    axes = list(inputs[0].axes)
    for other in inputs[1:]:
        axes = [
            a if i == along else structure.equal(a, b, why)
            for i, (a, b) in enumerate(zip(axes, other.axes, strict=True))
        ]
    parts = []
    for operand, value in zip(node.inputs, inputs, strict=True):
        size = operand.shape[along]
        if len(value.axes[along]) > 1:
            structure.freeze(value.axes[along], why)
        parts.append(value.axes[along][0] if len(value.axes[along]) == 1 else np.zeros(size, int))
    labels = np.concatenate(parts)
    axes[along] = (labels,) if labels.any() else ()
    unlabelled = [not v.axes[along] for v in inputs]
    zero = set(frozenset.intersection(*(v.zero for v in inputs)))
    if all(free or along in v.zero for free, v in zip(unlabelled, inputs, strict=True)):
        zero.add(along)
    return [Labels(tuple(axes), frozenset(zero), all(v.from_variables for v in inputs))]


def resize_iota(node: Node, args, kept_inputs, kept_outputs):
    """Made in full, then the kept indices taken."""
    out = bind(node.primitive, args, node.params)
    return [take(x, kept) for x, kept in zip(out, kept_outputs, strict=True)]


def take(array, kept):
    """The kept indices along every axis (None: all of them)."""
    for axis, indices in enumerate(kept):
        if indices is not None:
            array = select(array, axis, indices)
    return array


def select(array, axis: int, positions: np.ndarray):
    """``array`` at ``positions`` along ``axis``: a slice where they are evenly spaced, a gather elsewhere."""
    positions = np.asarray(positions)
    if len(positions) == array.shape[axis] and np.array_equal(positions, np.arange(len(positions))):
        return array
    steps = np.diff(positions)
    if len(positions) and (steps > 0).all() and len(np.unique(steps)) <= 1:
        step = int(steps[0]) if len(steps) else 1
        return lax.slice_in_dim(array, int(positions[0]), int(positions[-1]) + 1, step, axis)
    return array.take(positions, axis=axis, mode="clip")


@register(
    "iota",
    "random_bits",
    "random_wrap",
    "random_unwrap",
    "random_seed",
    "random_fold_in",
    "threefry2x32",
    resize=resize_iota,
)
def created(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Values made of nothing but sizes and keys: their axes adopt what they meet."""
    for value in inputs:
        for axis in value.axes:
            structure.freeze(axis, f"{node.name} at {node.source}")
    from_variables = all(v.from_variables for v in inputs)
    return [Labels(tuple((structure.fresh(n),) for n in v.shape), frozenset(), from_variables) for v in node.outputs]
