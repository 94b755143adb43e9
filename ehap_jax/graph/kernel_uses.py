"""Which convolutions apply a kernel, and whether its centre tap alone could stand for some of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from ehap_jax.graph.layers import network_layers
from ehap_jax.graph.trace import Graph, Node


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
        layers = network_layers(graph)
        graph.structures["centre_taps"] = {
            path: _use(readers, graph.leaves[path].shape, path in layers.returned)
            for path, readers in layers.readers.items()
        }
    return graph.structures["centre_taps"]


def _use(readers: tuple[tuple[Node, int], ...], shape: tuple[int, ...], returned: bool) -> KernelUse | str:
    nodes = [node for node, position in readers if node.name == "conv_general_dilated" and position == 1]
    others = [node for node, position in readers if node.name != "conv_general_dilated" or position != 1]
    blocked = "the function returns it" if returned else None
    if others:
        blocked = f"{others[0].name} reads it at {others[0].source}"
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
