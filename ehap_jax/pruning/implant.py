"""Neural implants: moderately sensitive channels keep a 1×1 kernel instead of going (HAP, arXiv 2101.08940).

In the masked network the kernel of such a channel is zero but for its centre tap. In the shrunk one the variable
``kernel`` is replaced by ``{"spatial": ..., "pointwise": ...}``, the channels with all their taps and the implants,
which two convolutions read ("spatial" is missing where every channel is an implant).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._compat import bind
from ehap_jax._paths import path_name
from ehap_jax.graph.channels import channel_structure
from ehap_jax.graph.kernel_uses import centre_taps
from ehap_jax.graph.layers import CASTS
from ehap_jax.graph.rules.elementwise import expand
from ehap_jax.graph.rules.shape import select
from ehap_jax.graph.trace import Graph, Node

SPATIAL, POINTWISE = "spatial", "pointwise"


@dataclass(frozen=True, eq=False)
class Implant:
    """channels: output channels of a kernel that keep one tap, sorted. centre: that tap, spatial axis -> index."""

    channels: np.ndarray
    centre: Mapping[int, int]


def find_implants(
    graph: Graph, implants: Mapping[str, np.ndarray], kept: Callable[[str], np.ndarray]
) -> dict[str, Implant]:
    """Implants at the channels given by kernel path, checked.

    Raises ValueError for a kernel that cannot hold one, saying why, and for channels that ``kept(path)`` lacks.
    """
    uses, kernel_axes = centre_taps(graph), channel_structure(graph).kernel_axes
    found = {}
    for path, given in implants.items():
        use = uses.get(path, "it is no variable of this network")
        if not isinstance(use, str) and kernel_axes.get(path) != use.axis:
            use = "its output channels are not what its convolution produces"
        if isinstance(use, str):
            raise ValueError(f"{path} cannot hold 1×1 implants: {use}.")
        channels = np.unique(given)
        absent = np.setdiff1d(channels, kept(path))
        if len(absent):
            raise ValueError(f"{path}: implants must be among the channels that are kept, but {absent[0]} is not.")
        if len(channels):
            found[path] = Implant(channels, use.centre)
    return found


class Split(NamedTuple):
    """A shrunk kernel with implants while it is on its way to its convolution."""

    spatial: Any
    pointwise: Any


def as_split(parts: Mapping[str, Any]) -> Split:
    return Split(parts.get(SPATIAL), parts[POINTWISE])


@dataclass(frozen=True)
class Layout:
    """Where implants lie in a kernel: its output axis, the channels it keeps, and those of them that are implants."""

    axis: int
    kept: np.ndarray
    implant: Implant

    @property
    def implants(self) -> np.ndarray:
        return np.searchsorted(self.kept, self.implant.channels)

    @property
    def others(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.kept)), self.implants)

    @property
    def order(self) -> np.ndarray:
        """Position in [others, implants] of every kept channel."""
        return np.argsort(np.concatenate([self.others, self.implants]))

    def shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Of the two parts of a kernel whose pruned slices are gone already."""
        sizes = {SPATIAL: list(shape), POINTWISE: list(shape)}
        sizes[SPATIAL][self.axis], sizes[POINTWISE][self.axis] = len(self.others), len(self.implants)
        for axis in self.implant.centre:
            sizes[POINTWISE][axis] = 1
        return {name: tuple(size) for name, size in sizes.items() if size[self.axis]}

    def split(self, kernel) -> dict[str, Any]:
        """A kernel whose pruned slices are gone already, as its two parts."""
        parts = {POINTWISE: select(kernel, self.axis, self.implants)}
        for axis, index in self.implant.centre.items():
            parts[POINTWISE] = select(parts[POINTWISE], axis, np.array([index]))
        if len(self.others):
            parts[SPATIAL] = select(kernel, self.axis, self.others)
        return parts

    def join(self, parts: Mapping[str, Any], shape: Sequence[int]):
        """The inverse of ``split``: one kernel, zero where implants have no tap."""
        kernel = expand(parts[POINTWISE], self.axis, self.implants, None, len(self.kept))
        for axis, index in self.implant.centre.items():
            kernel = expand(kernel, axis, np.array([index]), None, shape[axis])
        if SPATIAL in parts:
            kernel = kernel + expand(parts[SPATIAL], self.axis, self.others, None, len(self.kept))
        return kernel


def implant_layouts(graph: Graph, plan) -> dict[Node, Layout]:
    """The convolutions of ``graph`` that apply a kernel with implants, and how these lie in it.

    Raises ValueError where a kernel cannot hold the plan's implants in this function.
    """
    channels = {path: implant.channels for path, implant in plan.implants.items()}
    find_implants(graph, channels, lambda path: plan.layout(path).kept)
    uses = centre_taps(graph) if channels else {}
    return {
        node: plan.layout(path)
        for path, use in uses.items()
        if path in channels and not isinstance(use, str)
        for node in use.nodes
    }


def tap_mask(shape: Sequence[int], axis: int, implant: Implant) -> np.ndarray:
    """True where a full-size kernel keeps its weights: everywhere but around the centre of the implants."""
    stays = np.isin(np.arange(shape[axis]), implant.channels, invert=True)
    stays = stays.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    centre = np.ones([1] * len(shape), bool)
    for i, index in implant.centre.items():
        centre = centre & (np.arange(shape[i]) == index).reshape([-1 if j == i else 1 for j in range(len(shape))])
    return np.broadcast_to(stays | centre, shape)


def map_shrunk(function: Callable[[str, Any], Any], variables, implants: Mapping[str, Any]):
    """``tree_map`` over shrunk variables by path, the two parts of a kernel with implants passed as one dictionary."""

    def visit(path, node):
        name = path_name(path)
        if not isinstance(node, Mapping) or name in implants:
            return function(name, node)
        return jax.tree_util.tree_map_with_path(lambda sub, leaf: function(path_name((*path, *sub)), leaf), node)

    return jax.tree_util.tree_map_with_path(visit, variables, is_leaf=_looks_split)


def _looks_split(node) -> bool:
    return (
        isinstance(node, Mapping)
        and POINTWISE in node
        and set(node) <= {SPATIAL, POINTWISE}
        and not any(isinstance(part, Mapping) for part in node.values())
    )


def run_split(node: Node, inputs: Sequence, layouts: Mapping[Node, Layout]) -> list | None:
    """The outputs of a node that reads a split kernel; None for all other nodes."""
    split = next((value for value in inputs if isinstance(value, Split)), None)
    if split is None:
        return None
    if node.name in CASTS:
        return [jax.tree.map(lambda part: bind(node.primitive, [part], node.params)[0], split)]
    layout, x = layouts[node], inputs[0]
    parts = [] if split.spatial is None else bind(node.primitive, [x, split.spatial], node.params)
    parts += bind(node.primitive, [x, split.pointwise], _pointwise_params(node))
    axis = node.params["dimension_numbers"].out_spec[1]
    joined = jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]
    return [select(joined, axis, layout.order)]


def _pointwise_params(node: Node) -> dict[str, Any]:
    """The convolution by the centre tap alone: as much less padding as there are taps beside the centre."""
    spatial = node.params["dimension_numbers"].rhs_spec[2:]
    beside = [
        dilation * (node.inputs[1].shape[axis] // 2)
        for axis, dilation in zip(spatial, node.params["rhs_dilation"], strict=True)
    ]
    padding = tuple((low - n, high - n) for (low, high), n in zip(node.params["padding"], beside, strict=True))
    return {**node.params, "padding": padding, "rhs_dilation": (1,) * len(spatial)}


def zero_implants(variables, plan):
    """Full-size ``variables`` with the implants' centre taps at zero, where HAP starts their training.

    Without this an implant starts at the trained centre tap: ``shrink_variables(zero_implants(v, plan), plan)`` and
    ``shrink_variables(v, plan)`` are the two initialisations.
    """

    def zero(path, leaf):
        implant = plan.implants.get(path_name(path))
        if implant is None:
            return leaf
        axis = plan.axes[path_name(path)]
        stays = np.isin(np.arange(leaf.shape[axis]), implant.channels, invert=True)
        stays = stays.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])
        return jnp.where(stays, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(zero, variables)
