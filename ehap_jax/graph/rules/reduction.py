"""Reductions, pools and scans along an axis."""

from __future__ import annotations

from ehap_jax.graph.interpret import register
from ehap_jax.graph.structure import Axis, Labels, Structure
from ehap_jax.graph.trace import Node


def _reduce(structure: Structure, node: Node, inputs: list[Labels], *, harmless_zeros: bool) -> list[Labels]:
    value, gone = inputs[0], set(node.params["axes"])
    for axis in gone:
        if not (harmless_zeros and axis in value.zero):
            structure.freeze(value.axes[axis], f"{node.name} over the axis at {node.source}")
    rest = [i for i in range(len(value.axes)) if i not in gone]
    zero = frozenset(new for new, old in enumerate(rest) if old in value.zero)
    if -1 in value.zero:
        zero |= {-1}
    return [Labels(tuple(value.axes[i] for i in rest), zero, value.from_variables) for _ in node.outputs]


@register("reduce_sum", "reduce_or", "reduce_xor")
def reduce_sum(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Terms that masking makes zero may be left out."""
    return _reduce(structure, node, inputs, harmless_zeros=True)


@register("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "argmax", "argmin")
def reduce_other(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    found = _reduce(structure, node, inputs, harmless_zeros=False)
    keeps_zero = node.name in ("reduce_max", "reduce_min", "reduce_prod")
    return found if keeps_zero else [Labels(v.axes, frozenset(), v.from_variables) for v in found]


@register("reduce")
def reduce_by_function(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """One or several arrays, then as many initial values, reduced together by a function of the user's."""
    arrays, gone = inputs[: len(node.outputs)], set(node.params["dimensions"])
    why = f"reduced by a function over the axis at {node.source}"
    axes = list(arrays[0].axes)
    for other in arrays[1:]:
        axes = [structure.equal(a, b, why) for a, b in zip(axes, other.axes, strict=True)]
    for axis in gone:
        structure.freeze(axes[axis], why)
    rest = tuple(axis for i, axis in enumerate(axes) if i not in gone)
    return [Labels(rest, frozenset(), all(v.from_variables for v in inputs)) for _ in node.outputs]


def _pooled(structure: Structure, node: Node, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes with a window of one pass, the others are read through the window."""
    params, passed = node.params, []
    for i, axis in enumerate(axes):
        sizes = [params[name][i] for name in ("window_dimensions", "window_strides", "base_dilation") if name in params]
        through = set(sizes) == {1} and tuple(params["padding"][i]) == (0, 0)
        if not through:
            structure.freeze(axis, f"{node.name} along the axis at {node.source}")
        passed.append(axis if through else ())
    return tuple(passed)


@register("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def reduce_window(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Pooling."""
    (value,) = inputs
    return [Labels(_pooled(structure, node, value.axes), value.zero, value.from_variables)]


@register("reduce_window")
def reduce_window_by_function(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    arrays = inputs[: len(node.outputs)]
    axes = arrays[0].axes
    for other in arrays[1:]:
        why = f"pooled with a value that cannot shrink at {node.source}"
        axes = tuple(structure.equal(a, b, why) for a, b in zip(axes, other.axes, strict=True))
    passed = _pooled(structure, node, axes)
    return [Labels(passed, frozenset(), all(v.from_variables for v in inputs)) for _ in node.outputs]


@register("select_and_scatter_add")
def unpooled(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """The gradient of maximum pooling: what a window passes goes back to where its maximum stood."""
    source, operand = inputs
    why = f"maximum pooling of a value that cannot shrink at {node.source}"
    pairs = zip(_pooled(structure, node, source.axes), _pooled(structure, node, operand.axes), strict=True)
    axes = tuple(structure.equal(a, b, why) for a, b in pairs)
    return [Labels(axes, source.zero, all(v.from_variables for v in inputs))]


@register("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def cumulative(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    value, along = inputs[0], node.params["axis"]
    structure.freeze(value.axes[along], f"{node.name} along the axis at {node.source}")
    axes = tuple(() if i == along else axis for i, axis in enumerate(value.axes))
    zero = value.zero - {along} if node.name != "cumlogsumexp" else frozenset()
    return [Labels(axes, zero, value.from_variables)]


@register("top_k")
def top_k(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    (value,) = inputs
    along = node.params["axis"] % len(value.axes)
    structure.freeze(value.axes[along], f"{node.name} along the axis at {node.source}")
    axes = tuple(() if i == along else axis for i, axis in enumerate(value.axes))
    return [
        Labels(axes, value.zero - {along, -1}, value.from_variables),
        Labels(axes, frozenset(), value.from_variables),
    ]


@register("sort")
def sort(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    along = node.params["dimension"]
    for value in inputs:
        for i, axis in enumerate(value.axes):
            if i == along or len(inputs) > 1:
                structure.freeze(axis, f"sort at {node.source}")
    return [
        Labels(
            tuple(() if i == along or len(inputs) > 1 else a for i, a in enumerate(v.axes)),
            frozenset(),
            v.from_variables,
        )
        for v in inputs
    ]
