"""Latency by layer and width: a table of measurements, and the time of a pruned network by it.

The table is data; ``measure_latency`` makes one on the present device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ehap_jax.graph.cost import Shape, node_macs
from ehap_jax.graph.interpret import RULES
from ehap_jax.graph.layers import Layer, kernel_axes, network_layers
from ehap_jax.graph.trace import Graph, Node


class WidthGrid(NamedTuple):
    """seconds[i][j]: the time of a layer of ``inputs[i]`` input and ``outputs[j]`` output channels, both ascending."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def at(self, inputs: int, outputs: int) -> float:
        """Linear between the widths of the grid, constant beyond; a wider layer never takes less.

        >>> WidthGrid((8, 16), (8, 16), ((1.0, 2.0), (3.0, 4.0))).at(12, 8)
        2.0
        """
        rising = np.maximum.accumulate(np.maximum.accumulate(np.array(self.seconds), 0), 1)
        return float(np.interp(inputs, self.inputs, [np.interp(outputs, self.outputs, row) for row in rising]))


@dataclass(frozen=True)
class LatencyTable:
    """device: what was measured on, with the versions that matter. layers: signature of a layer -> its grid."""

    device: str
    layers: Mapping[str, WidthGrid]

    def seconds(self, graph: Graph, shape: Shape) -> float:
        """The sum over the layers of ``graph`` with values of the shapes given, in seconds per call.

        Raises KeyError for a layer that the table does not have.
        """
        return sum(layer.rounds * self.grid(layer).at(*layer.widths(shape)) for layer in layers_of(graph))

    def grid(self, layer: TimedLayer) -> WidthGrid:
        """The measurements of one layer; raises KeyError where there are none."""
        if layer.signature not in self.layers:
            raise KeyError(
                f"the latency table of {self.device} has no entry for the layer at {layer.node.source}; measure it "
                "with measure_latency(graph)."
            )
        return self.layers[layer.signature]


@dataclass(frozen=True, eq=False)
class TimedLayer:
    """A conv or product: ``rounds`` times per call. ``kernel`` is the position of its kernel among the inputs.

    Where ``axes`` is given, ((input, axis), …) of the contracted and of the output channels, its time is a function of
    both widths; elsewhere (grouped convolutions, attention) it is proportional to its multiply-accumulates.
    """

    node: Node
    rounds: int
    axes: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] | None

    @property
    def signature(self) -> str:
        """What its time depends on: the operation, its parameters, and the shapes and dtypes of its operands."""
        skipped = {"sharding", "out_sharding", "preferred_element_type", "precision", "jaxpr"}
        options = ", ".join(f"{k}={v}" for k, v in sorted(self.node.params.items()) if k not in skipped)
        operands = ", ".join(f"{np.dtype(v.dtype).name}{list(v.shape)}" for v in self.node.inputs)
        return f"{self.node.name}({operands}; {options})"

    def widths(self, shape: Shape) -> tuple[int, int]:
        """(input, output) channels, or (1, multiply-accumulates)."""
        shapes = [shape(operand) for operand in self.node.inputs]
        if self.axes is None:
            macs = RULES[self.node.name].macs
            assert macs is not None
            return 1, macs(self.node, shapes, [shape(value) for value in self.node.outputs])
        (inputs, *_), (outputs, *_) = self.axes
        return shapes[inputs[0]][inputs[1]], shapes[outputs[0]][outputs[1]]

    def shapes(self, inputs: int, outputs: int) -> list[tuple[int, ...]]:
        """Operand shapes at other widths."""
        shapes = [list(operand.shape) for operand in self.node.inputs]
        for size, places in zip((inputs, outputs), self.axes or (), strict=True):
            for operand, axis in places:
                shapes[operand][axis] = size
        return [tuple(s) for s in shapes]


def layers_of(graph: Graph) -> Iterator[TimedLayer]:
    """The layers whose time is counted, in the order of the program."""
    kernels = network_layers(graph).by_node
    for node, count in node_macs(graph.body, lambda operand: operand.shape):
        macs = RULES[node.name].macs
        assert macs is not None
        once = macs(node, [v.shape for v in node.inputs], [v.shape for v in node.outputs])
        yield TimedLayer(node, count // max(once, 1), _width_axes(node, kernels.get(node)))


def _width_axes(node: Node, layer: Layer | None):
    if node.name == "conv_general_dilated":
        if node.params["feature_group_count"] != 1 or node.params["batch_group_count"] != 1:
            return None
        kernel, (outputs, inputs, *_), (other, *_) = 1, kernel_axes(node, 1), kernel_axes(node, 0).inputs
    elif node.name == "dot_general" and layer is not None:
        kernel, (outputs, inputs, _, batch), others = layer.kernel, layer.axes, layer.input_axes
        if batch or len(inputs) != 1 or len(outputs) != 1:
            return None
        (other,) = others
    else:
        return None
    return tuple(sorted(((kernel, inputs[0]), (1 - kernel, other)))), ((kernel, outputs[0]),)


def grid_widths(layer: TimedLayer, fractions: tuple[float, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The widths of a layer's grid: fractions of its full ones, rounded."""
    full = layer.widths(lambda operand: operand.shape)
    if layer.axes is None:
        return (1,), (0, full[1])
    both = [tuple(sorted({max(1, round(f * width)) for f in fractions} | {width})) for width in full]
    return both[0], both[1]
