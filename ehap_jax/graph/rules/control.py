"""Branches and loops whose inside is not followed: what enters them cannot shrink. (``scan`` is followed.)"""

from __future__ import annotations

from ehap_jax.graph.interpret import register
from ehap_jax.graph.structure import Labels, Structure
from ehap_jax.graph.trace import Node


@register("while", "cond")
def opaque(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Channel axes that enter are kept whole; ``frozen_axes`` reports them."""
    for value in inputs:
        for axis in value.axes:
            structure.freeze(axis, f"{node.name} at {node.source}")
    from_variables = all(v.from_variables for v in inputs)
    return [Labels(((),) * len(v.shape), frozenset(), from_variables) for v in node.outputs]


@register("debug_callback", "debug_print")
def shown(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """What is printed is not used; the shrunk network prints its smaller values."""
    return []
