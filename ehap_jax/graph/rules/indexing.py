"""Slices, padding and gathers: the kept indices of operand and result tell which positions to read."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from ehap_jax._compat import bind
from ehap_jax.graph.interpret import register
from ehap_jax.graph.rules.elementwise import expand
from ehap_jax.graph.rules.shape import select, sizes
from ehap_jax.graph.structure import Axis, Labels, Structure
from ehap_jax.graph.trace import Constant, Node


def _positions(have: np.ndarray | None, wanted: np.ndarray) -> np.ndarray:
    """Where the full-size indices ``wanted`` stand in an axis that keeps only ``have``."""
    return wanted if have is None else np.searchsorted(have, wanted)


def _window(structure: Structure, node: Node, value: Labels, indices: list[np.ndarray | None]) -> Labels:
    axes: list[Axis] = []
    for axis, index in zip(value.axes, indices, strict=True):
        axes.append(axis if index is None else tuple(labels[index] for labels in axis))
    return Labels(tuple(axes), value.zero, value.from_variables)


def _slice_indices(node: Node) -> list[np.ndarray | None]:
    strides = node.params["strides"] or (1,) * len(node.params["start_indices"])
    spans = zip(node.params["start_indices"], node.params["limit_indices"], strides, node.inputs[0].shape, strict=True)
    return [None if (a, b, s) == (0, n, 1) else np.arange(a, b, s) for a, b, s, n in spans]


def resize_slice(node: Node, args, kept_inputs, kept_outputs):
    return [_resize_window(args[0], _slice_indices(node), kept_inputs[0], kept_outputs[0])]


def _resize_window(array, indices, kept_in, kept_out):
    for axis, index in enumerate(indices):
        if index is not None:
            wanted = index if kept_out[axis] is None else index[kept_out[axis]]
            array = select(array, axis, _positions(kept_in[axis], wanted))
    return array


@register("slice", resize=resize_slice)
def slice_(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return [_window(structure, node, inputs[0], _slice_indices(node))]


def _split_indices(node: Node):
    axis, start = node.params["axis"], 0
    for size in node.params["sizes"]:
        indices: list[np.ndarray | None] = [None] * len(node.inputs[0].shape)
        indices[axis] = np.arange(start, start + size)
        start += size
        yield indices


def resize_split(node: Node, args, kept_inputs, kept_outputs):
    return [
        _resize_window(args[0], indices, kept_inputs[0], kept_out)
        for indices, kept_out in zip(_split_indices(node), kept_outputs, strict=True)
    ]


@register("split", resize=resize_split)
def split(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return [_window(structure, node, inputs[0], indices) for indices in _split_indices(node)]


@register("stack")
def stack(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Values side by side along a new axis, which stays whole."""
    why = f"stacked with a value that cannot shrink at {node.source}"
    axes = list(inputs[0].axes)
    for other in inputs[1:]:
        axes = [structure.equal(a, b, why) for a, b in zip(axes, other.axes, strict=True)]
    new = node.params["axis"] % (len(axes) + 1)
    zero = {i + (i >= new) for i in frozenset.intersection(*(v.zero for v in inputs)) if i >= 0}
    return [Labels((*axes[:new], (), *axes[new:]), frozenset(zero), all(v.from_variables for v in inputs))]


@register("unstack")
def unstack(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """One value per index of an axis, which stays whole."""
    (value,) = inputs
    gone = node.params["axis"] % len(value.axes)
    structure.freeze(value.axes[gone], f"unstacked at {node.source}")
    axes = value.axes[:gone] + value.axes[gone + 1 :]
    zero = frozenset(i - (i > gone) for i in value.zero if i not in (gone, -1)) | (value.zero & {-1})
    return [Labels(axes, zero, value.from_variables) for _ in node.outputs]


def _pad_source(size: int, low: int, high: int, interior: int) -> np.ndarray:
    """For every index of a padded axis the operand's index, or -1 where it is padding."""
    length = size + max(size - 1, 0) * interior + low + high
    source = np.full(length, -1)
    at = low + np.arange(size) * (interior + 1)
    inside = (at >= 0) & (at < length)
    source[at[inside]] = np.flatnonzero(inside)
    return source


def _placed(structure: Structure, axis: Axis, source: np.ndarray) -> Axis:
    """The labels of an axis whose indices come from ``source`` of another one, or (-1) are zero whatever is pruned."""
    if (source >= 0).all():
        return tuple(labels[source] for labels in axis)
    labels = structure.fresh(len(source))
    labels[source >= 0] = axis[0][source[source >= 0]]
    return (labels,)


def resize_pad(node: Node, args, kept_inputs, kept_outputs):
    array, value = args
    config = list(node.params["padding_config"])
    for axis, (low, high, interior) in enumerate(config):
        have, want = kept_inputs[0][axis], kept_outputs[0][axis]
        if have is None and want is None:
            continue
        source = _pad_source(node.inputs[0].shape[axis], low, high, interior)
        source = source if want is None else source[want]
        array = _place(array, axis, source, have, node.inputs[0].shape[axis])
        config[axis] = (0, 0, 0)
    return [lax.pad(array, value, config)]


def _place(array, axis: int, source: np.ndarray, have: np.ndarray | None, size: int):
    """Operand channels at their places along ``axis``, zero elsewhere (only zero padding keeps labels)."""
    inside = source >= 0
    read = select(array, axis, _positions(have, source[inside]))
    return expand(read, axis, np.flatnonzero(inside), None, len(source)) if not inside.all() else read


@register("pad", resize=resize_pad)
def pad(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Zero padding creates channels that are zero whatever is pruned; other padding cannot shrink."""
    value, shape = inputs[0], node.inputs[0].shape
    filler = node.inputs[1]
    zero_fill = -1 in inputs[1].zero or (isinstance(filler, Constant) and not np.any(filler.value))
    axes: list[Axis] = []
    zero: set[int] = set()
    for i, (axis, config) in enumerate(zip(value.axes, node.params["padding_config"], strict=True)):
        if config == (0, 0, 0):
            axes.append(axis)
            if zero_fill and i in value.zero:
                zero.add(i)
        elif not zero_fill or len(axis) != 1:
            structure.freeze(axis, f"padding along the axis at {node.source}")
            axes.append(())
        else:
            axes.append(_placed(structure, axis, _pad_source(shape[i], *config)))
            if i in value.zero:
                zero.add(i)
    return [Labels(tuple(axes), frozenset(zero), value.from_variables)]


def _take(structure: Structure, value: Labels, axis: int, out: int, source: np.ndarray) -> Labels:
    axes = [a for i, a in enumerate(value.axes) if i != axis]
    axes.insert(out, _placed(structure, value.axes[axis], source))
    rest = [i for i in range(len(axes)) if i != axis]
    rest.insert(out, axis)
    zero = frozenset(new for new, old in enumerate(rest) if old in value.zero)
    return Labels(tuple(axes), zero | (value.zero & {-1}), value.from_variables)


def _whole(structure: Structure, node: Node, value: Labels, whole: list[bool]) -> None:
    for axis, stays in zip(value.axes, whole, strict=True):
        if not stays:
            structure.freeze(axis, f"{node.name} along the axis at {node.source}")


def resize_dynamic_slice(node: Node, args, kept_inputs, kept_outputs):
    return bind(node.primitive, args, {**node.params, "slice_sizes": sizes(node, kept_outputs)})


@register("dynamic_slice", resize=resize_dynamic_slice)
def dynamic_slice(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    value = inputs[0]
    whole = [n == m for n, m in zip(node.params["slice_sizes"], node.inputs[0].shape, strict=True)]
    _whole(structure, node, value, whole)
    axes = tuple(a if stays else () for a, stays in zip(value.axes, whole, strict=True))
    return [Labels(axes, value.zero, all(v.from_variables for v in inputs))]


def _taken(node: Node, indices) -> tuple[int, int, np.ndarray] | None:
    """(operand axis, output axis, operand index or -1 per output index) where known indices of one axis are taken.

    -1 stands for zero, which indices out of bounds may be filled with. None for any other gather.
    """
    dims, size = node.params["dimension_numbers"], node.inputs[0].shape
    if not isinstance(indices, np.ndarray) or indices.shape[1:] != (1,) or len(dims.start_index_map) != 1:
        return None
    if getattr(dims, "operand_batching_dims", ()):
        return None
    (axis,) = dims.start_index_map
    whole = (*size[:axis], 1, *size[axis + 1 :])
    if dims.collapsed_slice_dims != (axis,) or tuple(node.params["slice_sizes"]) != whole:
        return None
    (out,) = set(range(len(size))) - set(dims.offset_dims)
    source, mode = indices[:, 0].astype(int), node.params["mode"]
    inside = (source >= 0) & (source < size[axis])
    if mode == lax.GatherScatterMode.CLIP:
        return axis, out, source.clip(0, size[axis] - 1)
    filled_with_zero = mode == lax.GatherScatterMode.FILL_OR_DROP and node.params["fill_value"] == 0
    return (axis, out, np.where(inside, source, -1)) if inside.all() or filled_with_zero else None


def resize_gather(node: Node, args, kept_inputs, kept_outputs):
    taken = _taken(node, args[1])
    if taken is not None:
        axis, out, source = taken
        source = source if kept_outputs[0][out] is None else source[kept_outputs[0][out]]
        read = _place(args[0], axis, source, kept_inputs[0][axis], node.inputs[0].shape[axis])
        return [jnp.moveaxis(read, axis, out)]
    slice_sizes = list(node.params["slice_sizes"])
    for axis, kept in enumerate(kept_inputs[0]):
        if kept is not None:
            slice_sizes[axis] = len(kept)
    return bind(node.primitive, args, {**node.params, "slice_sizes": tuple(slice_sizes)})


@register("gather", resize=resize_gather)
def gather(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Operand axes that are read whole pass, and one of which known indices are taken; others cannot shrink."""
    value, indices = inputs
    taken = _taken(node, structure.constants.get(node.inputs[1]))
    if taken is not None and (len(value.axes[taken[0]]) == 1 or (taken[2] >= 0).all()):
        return [_take(structure, value, *taken)]
    dims, shape = node.params["dimension_numbers"], node.inputs[0].shape
    batching = getattr(dims, "operand_batching_dims", ())
    gone = {*dims.collapsed_slice_dims, *batching}
    whole = [
        i not in gone and i not in dims.start_index_map and node.params["slice_sizes"][i] == n
        for i, n in enumerate(shape)
    ]
    _whole(structure, node, value, whole)
    for axis in indices.axes:
        structure.freeze(axis, f"indices of a gather at {node.source}")
    axes: list[Axis] = [()] * len(node.outputs[0].shape)
    zero: set[int] = set()
    for out, operand in zip(dims.offset_dims, (i for i in range(len(shape)) if i not in gone), strict=True):
        if whole[operand]:
            axes[out] = value.axes[operand]
            if operand in value.zero:
                zero.add(out)
    return [Labels(tuple(axes), frozenset(zero), value.from_variables and indices.from_variables)]


def _written(node: Node, indices) -> tuple[int, int, np.ndarray] | None:
    """(operand axis, update axis, operand index per update index) where known indices of one axis are written.

    None for any other scatter, and where indices are out of bounds.
    """
    dims, size = node.params["dimension_numbers"], node.inputs[0].shape
    if not isinstance(indices, np.ndarray) or indices.shape[1:] != (1,) or getattr(dims, "operand_batching_dims", ()):
        return None
    if len(dims.inserted_window_dims) != 1 or dims.inserted_window_dims != dims.scatter_dims_to_operand_dims:
        return None
    (axis,), source = dims.inserted_window_dims, indices[:, 0].astype(int)
    (update,) = set(range(len(node.inputs[2].shape))) - set(dims.update_window_dims)
    return (axis, update, source) if ((source >= 0) & (source < size[axis])).all() else None


def resize_scatter(node: Node, args, kept_inputs, kept_outputs):
    written = _written(node, args[1])
    if written is not None:
        axis, update, source = written
        source = source if kept_inputs[2][update] is None else source[kept_inputs[2][update]]
        places = _positions(kept_inputs[0][axis], source)[:, None].astype(args[1].dtype)
        args = [args[0], places, args[2]]
    return bind(node.primitive, args, node.params)


@register("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", resize=resize_scatter)
def scatter(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Operand axes written whole, or at known indices, pass, tied to those of the update; the others cannot shrink."""
    operand, indices, updates = inputs
    dims, shape = node.params["dimension_numbers"], node.inputs[0].shape
    gone = {*dims.inserted_window_dims, *getattr(dims, "operand_batching_dims", ())}
    window = dict(zip((i for i in range(len(shape)) if i not in gone), dims.update_window_dims, strict=True))
    why = f"{node.name} at {node.source}"
    written = _written(node, structure.constants.get(node.inputs[1]))
    if written is not None and not len(operand.axes[written[0]]) == len(updates.axes[written[1]]) == 1:
        written = None
    for axis in indices.axes:
        structure.freeze(axis, why)
    for i, axis in enumerate(updates.axes):
        if i not in dims.update_window_dims and written is None:
            structure.freeze(axis, why)
    axes: list[Axis] = []
    zero: set[int] = set()
    for i, axis in enumerate(operand.axes):
        if written is not None and i == written[0]:
            _, j, source = written
            (labels,) = axis
            (own,) = structure.equal((labels[source],), updates.axes[j], why)
            labels = labels.copy()
            labels[source] = own
            axes.append((labels,))
            if i in operand.zero and j in updates.zero:
                zero.add(i)
            continue
        j = window.get(i)
        if j is None:
            structure.freeze(axis, why)
            axes.append(())
            continue
        whole = i not in dims.scatter_dims_to_operand_dims and node.inputs[2].shape[j] == shape[i]
        if whole:
            axes.append(structure.equal(axis, updates.axes[j], why))
            if i in operand.zero and j in updates.zero:
                zero.add(i)
        else:
            structure.freeze(axis, why)
            structure.freeze(updates.axes[j], why)
            axes.append(())
    return [Labels(tuple(axes), frozenset(zero), all(v.from_variables for v in inputs))]


@register("dynamic_update_slice")
def dynamic_update_slice(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    operand, update = inputs[:2]
    why = f"{node.name} at {node.source}"
    axes: list[Axis] = []
    for a, b, n, m in zip(operand.axes, update.axes, node.inputs[0].shape, node.inputs[1].shape, strict=True):
        if n == m:
            axes.append(structure.equal(a, b, why))
        else:
            structure.freeze(a, why)
            structure.freeze(b, why)
            axes.append(())
    return [Labels(tuple(axes), operand.zero & update.zero, all(v.from_variables for v in inputs))]
