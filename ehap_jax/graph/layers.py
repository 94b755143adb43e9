"""The layers of a network: which convolution or product applies which kernel, and what each axis of the kernel is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

from ehap_jax import _compat
from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, SCAN, Body, Constant, Graph, Node, Operand, Value

LAYERS = frozenset({"conv_general_dilated", "dot_general", "ragged_dot_general"})
CASTS = frozenset({"convert_element_type", "copy", "copy_p", "name", "reduce_precision"})


class KernelAxes(NamedTuple):
    """What the axes of a kernel are to its layer.

    Attributes:
      outputs: of output channels, whose products are not summed.
      inputs: summed over, together with the same axes of the other operand.
      window: spatial axes of a convolution.
      batch: one kernel for each index: batch axes of a product, groups of rows.
    """

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    window: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or product of a kernel, which is made of variables, with a value that depends on the input.

    Attributes:
      node: the operation.
      kernel: which of its operands is the kernel.
      reads: the paths of the variables that the kernel is made of.
      path: the largest of them by rank and size, of equals the first in the alphabet.
      direct: whether the kernel is that variable itself, a cast at most in between.
      calls: the calls it is inside of, the outermost first.
    """

    node: Node
    kernel: int
    reads: frozenset[str]
    path: str
    direct: bool
    calls: tuple[Node, ...]

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.node.inputs[self.kernel].shape

    @cached_property
    def axes(self) -> KernelAxes:
        return kernel_axes(self.node, self.kernel)

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The axes of the other operand that are summed over with `axes.inputs`, in that order."""
        return kernel_axes(self.node, 1 - self.kernel).inputs

    def output_axis(self, axis: int) -> int:
        """Where an output or batch axis of the kernel lies in the output of a convolution or of `dot_general`."""
        if self.node.name == "conv_general_dilated":
            return self.node.params["dimension_numbers"].out_spec[1]
        if axis in self.axes.batch:
            return self.axes.batch.index(axis)
        before = len(kernel_axes(self.node, 0).outputs) if self.kernel == 1 else 0
        return len(self.axes.batch) + before + self.axes.outputs.index(axis)


def kernel_axes(node: Node, operand: int) -> KernelAxes:
    """What the axes of one operand of a layer's operation are; of a convolution's input, its channels are summed."""
    params = node.params
    if node.name == "conv_general_dilated":
        dims = params["dimension_numbers"]
        if operand == 1:
            return KernelAxes((dims.rhs_spec[0],), (dims.rhs_spec[1],), tuple(dims.rhs_spec[2:]))
        return KernelAxes((), (dims.lhs_spec[1],), tuple(dims.lhs_spec[2:]), (dims.lhs_spec[0],))
    numbers = params.get("ragged_dot_dimension_numbers")
    contract, batch = (params if numbers is None else {"dimension_numbers": numbers.dot_dimension_numbers})[
        "dimension_numbers"
    ]
    inputs, own = tuple(contract[operand]), tuple(batch[operand])
    if numbers is not None and operand == 1:
        own += tuple(numbers.rhs_group_dimensions)
    rank = len(node.inputs[operand].shape)
    return KernelAxes(tuple(a for a in range(rank) if a not in (*inputs, *own)), inputs, (), own)


@dataclass(frozen=True, eq=False)
class Layers:
    """What is known of the kernels of a network.

    Attributes:
      found: the layers in the order of the program, those inside calls in place of the call.
      sources: every value that does not depend on the input, and the paths of the variables that it is made of; but for
        those inside loops, where what comes in is not what goes round.
      readers: for every variable what reads it, casts and checkpoints in between: operations, and which operand it is.
      returned: variables that are returned.
    """

    found: tuple[Layer, ...]
    sources: Mapping[Value, frozenset[str]]
    readers: Mapping[str, tuple[tuple[Node, int], ...]]
    returned: frozenset[str]

    @cached_property
    def by_node(self) -> dict[Node, Layer]:
        return {layer.node: layer for layer in self.found}

    def made_of(self, operand: Operand) -> frozenset[str] | None:
        """The variables that a value is made of, None where it depends on the input."""
        return _made_of(self.sources, operand)

    def is_fixed(self, node: Node) -> bool:
        """Whether what goes into an operation does not depend on the input."""
        return all(self.made_of(operand) is not None for operand in node.inputs)


def network_layers(graph: Graph) -> Layers:
    """The layers of ``graph``; found once and kept with it.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> graph = trace_graph(lambda w, x: jax.nn.relu(x @ w["in"].T) @ w["out"])(
    ...     {"in": jnp.ones((4, 3)), "out": jnp.ones((4, 2))}, jnp.ones((1, 3))
    ... )
    >>> [(layer.path, layer.direct, layer.axes.outputs) for layer in network_layers(graph).found]
    [('in', False, (1,)), ('out', True, (1,))]
    """
    if "layers" not in graph.structures:
        graph.structures["layers"] = layers_in(graph.body, graph.leaves)
    return graph.structures["layers"]


def layers_in(body: Body, kernels: Mapping[str, Value], others: tuple[Value, ...] = ()) -> Layers:
    """The layers of ``body`` that apply one of ``kernels``; ``others`` do not depend on the input either."""
    walk = _Walk(kernels)
    sources = dict.fromkeys(others, frozenset()) | {value: frozenset({path}) for path, value in kernels.items()}
    held = {value: path for path, value in kernels.items()}
    walk.body(body, sources, held, ())
    readers = {path: tuple(found) for path, found in walk.readers.items()}
    return Layers(tuple(walk.found), sources, readers, frozenset(walk.returned))


@dataclass
class _Walk:
    """held: the values that are variables themselves, a cast at most in between."""

    kernels: Mapping[str, Value]
    found: list[Layer] = field(default_factory=list)
    readers: dict[str, list[tuple[Node, int]]] = field(init=False)
    returned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.readers = {path: [] for path in self.kernels}

    def body(self, body: Body, sources: dict, held: dict, calls: tuple[Node, ...]) -> None:
        sources.update(dict.fromkeys(body.constants, frozenset()))
        for node in body.nodes:
            made_of = [_made_of(sources, operand) for operand in node.inputs]
            self.read(node, held)
            if node.body is not None:
                self.call(node, node.body, made_of, sources, held, (*calls, node))
            elif node.name in LAYERS:
                self.layer(node, made_of, held, calls)
            together = _union(made_of)
            if together is not None:
                sources.update(dict.fromkeys(node.outputs, together))
        self.returned.update(held[operand] for operand in body.outputs if operand in held)

    def read(self, node: Node, held: dict) -> None:
        for position, operand in enumerate(node.inputs):
            path = held.get(operand)
            if path is None:
                continue
            if node.name in CASTS:
                held[node.outputs[0]] = path
            elif node.name in REMAT and node.body is not None:
                held[node.body.inputs[position]] = path
            else:
                self.readers[path].append((node, position))

    def call(self, node: Node, body: Body, made_of: list, sources: dict, held: dict, calls) -> None:
        if node.name in REMAT | CUSTOM_RULE:
            inner = zip(body.inputs, made_of, strict=True)
            sources.update({value: found for value, found in inner if found is not None})
            self.body(body, sources, held, calls)
        elif node.name == SCAN:
            self.scan(node, body, made_of, sources, held, calls)

    def scan(self, node: Node, body: Body, made_of: list, sources: dict, held: dict, calls) -> None:
        """What is carried does not depend on the input if it does not in any round."""
        first, last = _compat.scan_operands(node.params)
        known = list(made_of)
        while True:
            inside = sources | {v: m for v, m in zip(body.inputs, known, strict=True) if m is not None}
            before = len(self.found)
            self.body(body, inside, dict(held), calls)
            after = [_made_of(inside, operand) for operand in body.outputs[: last - first]]
            merged = [_union(pair) for pair in zip(known[first:last], after, strict=True)]
            if merged == known[first:last]:
                return
            known[first:last] = merged
            del self.found[before:]

    def layer(self, node: Node, made_of: list, held: dict, calls: tuple[Node, ...]) -> None:
        for kernel in (1, 0) if node.name == "dot_general" else (1,):
            reads = made_of[kernel]
            if reads and made_of[1 - kernel] is None:
                direct = node.inputs[kernel] in held
                self.found.append(Layer(node, kernel, reads, self.largest(reads), direct, calls))
                return

    def largest(self, paths: frozenset[str]) -> str:
        shapes = {path: self.kernels[path].shape for path in paths}
        return max(sorted(paths), key=lambda path: (len(shapes[path]), prod(shapes[path])))


def _made_of(sources: Mapping[Value, frozenset[str]], operand: Operand) -> frozenset[str] | None:
    return frozenset() if isinstance(operand, Constant) else sources.get(operand)


def _union(several: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    """What is made of all of them; None where one depends on the input."""
    union: frozenset[str] = frozenset()
    for found in several:
        if found is None:
            return None
        union |= found
    return union
