"""Reductions, pools and scans along an axis."""

from __future__ import annotations

from ehap_jax.graph.interpret import register
from ehap_jax.graph.structure import Labels, Structure
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


@register("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def reduce_window(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Pooling: axes with a window of one pass, the others are read through the window."""
    value, axes = inputs[0], []
    params = node.params
    for i, axis in enumerate(value.axes):
        through = params["window_dimensions"][i] == params["window_strides"][i] == params["base_dilation"][
            i
        ] == 1 and tuple(params["padding"][i]) == (0, 0)
        if not through:
            structure.freeze(axis, f"{node.name} along the axis at {node.source}")
        axes.append(axis if through else ())
    return [Labels(tuple(axes), value.zero, value.from_variables)]


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
