"""Which convolutions apply a kernel, and whether its centre tap alone could stand for some of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ehap_jax.graph.trace import REMAT, Body, Graph, Node, Operand

CASTS = frozenset({"convert_element_type", "copy", "copy_p", "name", "reduce_precision"})


@dataclass(frozen=True, eq=False)
class KernelUse:
    """A convolution kernel with a centre tap: nodes that apply it, its output axis, spatial axis -> centre index.

    ``taps`` is the number of its spatial positions: a channel that is reduced to one tap costs one in ``taps``.
    """

    nodes: tuple[Node, ...]
    axis: int
    centre: Mapping[int, int]
    taps: int


def centre_taps(graph: Graph) -> dict[str, KernelUse | str]:
    """{path: how it is used, or why a 1×1 kernel cannot stand for some of its output channels}, for every variable.

    That is possible for the kernel of ungrouped convolutions of odd size that nothing else reads (apart from a change
    of dtype): a kernel that is zero but for its centre is a 1×1 convolution, whatever the strides and dilations.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> apply = lambda w, x: jax.lax.conv(jax.lax.conv(x, w["odd"], (2, 2), "SAME"), w["even"], (1, 1), "SAME")
    >>> w = {"odd": jnp.ones((4, 1, 3, 3)), "even": jnp.ones((4, 4, 2, 2))}
    >>> found = centre_taps(trace_graph(apply)(w, jnp.ones((1, 1, 8, 8))))
    >>> found["odd"].centre, found["even"]
    ({2: 1, 3: 1}, 'its size 2 along axis 2 is even, so that it has no centre')
    """
    if "centre_taps" not in graph.structures:
        nodes: dict[str, list[Node]] = {path: [] for path in graph.leaves}
        blocked: dict[str, str] = {}
        _walk(graph.body, {value: path for path, value in graph.leaves.items()}, nodes, blocked)
        graph.structures["centre_taps"] = {
            path: _use(found, graph.leaves[path].shape, blocked.get(path)) for path, found in nodes.items()
        }
    return graph.structures["centre_taps"]


def _walk(body: Body, held: dict[Operand, str], nodes: dict[str, list[Node]], blocked: dict[str, str]) -> None:
    """Follow the variables ``held`` through ``body``: the convolutions that apply them, and what else reads them."""
    for node in body.nodes:
        inner: dict[Operand, str] = {}
        for position, operand in enumerate(node.inputs):
            path = held.get(operand)
            if path is None:
                continue
            if node.name in CASTS:
                held[node.outputs[0]] = path
            elif node.name in REMAT and node.body is not None:
                inner[node.body.inputs[position]] = path
            elif node.name == "conv_general_dilated" and position == 1:
                nodes[path].append(node)
            else:
                blocked.setdefault(path, f"{node.name} reads it at {node.source}")
        if node.body is not None and inner:
            _walk(node.body, inner, nodes, blocked)
    for operand in body.outputs:
        if operand in held:
            blocked.setdefault(held[operand], "the function returns it")


def _use(nodes: list[Node], shape: tuple[int, ...], blocked: str | None) -> KernelUse | str:
    if not nodes:
        return "no convolution applies it as it is" + (f", {blocked}" if blocked else "")
    if blocked is not None:
        return blocked
    if any(node.params["feature_group_count"] != 1 or node.params["batch_group_count"] != 1 for node in nodes):
        return f"its convolution at {nodes[0].source} is grouped"
    specs = {node.params["dimension_numbers"].rhs_spec for node in nodes}
    if len(specs) > 1:
        return "its convolutions read its axes in different ways"
    (spec,) = specs
    even = [axis for axis in spec[2:] if shape[axis] % 2 == 0]
    if even:
        return f"its size {shape[even[0]]} along axis {even[0]} is even, so that it has no centre"
    taps = prod(shape[axis] for axis in spec[2:])
    if taps == 1:
        return "it is a 1×1 kernel already"
    return KernelUse(tuple(nodes), spec[0], {axis: shape[axis] // 2 for axis in spec[2:]}, taps)
