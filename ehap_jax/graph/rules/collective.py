"""Collectives over named axes, of devices or of `jax.vmap`: every participant has the same channels."""

from __future__ import annotations

from ehap_jax.graph.interpret import register
from ehap_jax.graph.structure import Axis, Labels, Structure
from ehap_jax.graph.trace import Node


@register("psum", "psum_invariant", "pmax", "pmin", "ppermute", "pvary", "pbroadcast")
def elementwise(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Sums, extremes and exchanges, element by element: zero where all participants have a zero."""
    found = []
    for value, before, after in zip(inputs, node.inputs, node.outputs, strict=True):
        if before.shape == after.shape:
            found.append(value)
            continue
        for axis in value.axes:  # summed over axes of its own as well
            structure.freeze(axis, f"{node.name} over positional axes at {node.source}")
        found.append(Labels(((),) * len(after.shape), frozenset(), value.from_variables))
    return found


@register("all_gather", "all_gather_invariant")
def all_gather(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """A new axis of participants; or, tiled, a longer one that stays whole."""
    place, tiled = node.params["all_gather_dimension"], node.params["tiled"]
    found = []
    for value in inputs:
        axes: list[Axis] = list(value.axes)
        zero = value.zero
        if tiled:
            structure.freeze(axes[place], f"gathered from all participants at {node.source}")
            axes[place], zero = (), zero - {place}
        else:
            axes.insert(place, ())
            zero = frozenset(i + (i >= place) for i in zero)
        found.append(Labels(tuple(axes), zero, value.from_variables))
    return found
