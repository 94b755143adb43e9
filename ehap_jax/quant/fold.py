"""Quantised sites of a graph, and the affine tail of each: what can be folded into its kernel and bias.

The tail is found by what it computes: additions, subtractions, multiplications and divisions of a layer's output by
values that depend on the variables alone and vary along the channel axis at most, each result used once. BatchNorm with
frozen statistics is one in any spelling, and so are a scale and a bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, Body, Constant, Graph, Node, Operand, Value


@dataclass(frozen=True, eq=False)
class TailStep:
    """``z ∘ vector`` (or ``vector ∘ z`` where ``flipped``); ``vector`` is a scalar or has one number per channel."""

    name: str
    vector: Operand
    flipped: bool


@dataclass(frozen=True, eq=False)
class Site:
    """A conv or dense layer with a kernel made of variables.

    name: the kernel's path, with "#2", … at its second use. path: the kernel's path. kernel_axis, out_axis: the output
    channels in the kernel and in the result. tail: what is folded; ``result`` is the value it ends in.
    """

    node: Node
    name: str
    path: str
    kernel_axis: int
    out_axis: int
    tail: tuple[TailStep, ...]
    skipped: tuple[Node, ...]
    result: Value


@dataclass(frozen=True, eq=False)
class Sites:
    """by_node: the layers. variable_nodes: what depends on variables alone. folded_leaves: variables inside layers."""

    by_node: dict[Node, Site]
    variable_nodes: frozenset[Node]
    folded_leaves: frozenset[str]


def find_sites(graph: Graph) -> Sites:
    """Every conv and dense layer of ``graph`` whose kernel derives from variables, with its tail.

    Raises NotImplementedError for such a layer inside a custom derivative rule, which cannot be replaced in there.
    """
    sources: dict[Value, frozenset[str]] = {value: frozenset([path]) for path, value in graph.leaves.items()}
    made_by: dict[Value, Node] = {}
    variable_nodes: set[Node] = set()
    _follow(graph.body, sources, made_by, variable_nodes)
    users = Counter(v for node in graph.body.walk() for v in node.inputs if isinstance(v, Value))
    users.update(v for body in _bodies(graph.body) for v in body.outputs if isinstance(v, Value))
    consumers = {v: node for node in graph.body.walk() for v in node.inputs if isinstance(v, Value)}
    shapes = {path: value.shape for path, value in graph.leaves.items()}
    seen: Counter[str] = Counter()
    by_node: dict[Node, Site] = {}
    folded: set[str] = set()
    for node in _layers(graph.body, sources):
        path = max(sources[_kernel(node)], key=lambda p: (len(shapes[p]), shapes[p]))
        seen[path] += 1
        kernel_axis, out_axis = _channel_axes(node)
        steps, skipped, result = _tail(node, out_axis, users, consumers, sources, made_by)
        name = path if seen[path] == 1 else f"{path}#{seen[path]}"
        by_node[node] = Site(node, name, path, kernel_axis, out_axis, tuple(steps), tuple(skipped), result)
        folded |= sources[_kernel(node)]
        for step in steps:
            folded |= sources.get(step.vector, frozenset()) if isinstance(step.vector, Value) else frozenset()
    return Sites(by_node, frozenset(variable_nodes), frozenset(folded))


def fold(site: Site, read: Callable[[Operand], jax.Array], channels: int, dtype) -> tuple[jax.Array, jax.Array]:
    """(scale, offset) per channel of the tail: ``tail(z) = scale · z + offset``, each (channels,)."""
    scale, offset = jnp.ones(channels, dtype), jnp.zeros(channels, dtype)
    for step in site.tail:
        vector = jnp.broadcast_to(jnp.reshape(jnp.asarray(read(step.vector), dtype), (-1,)), (channels,))
        if step.name == "mul":
            scale, offset = scale * vector, offset * vector
        elif step.name == "div":
            scale, offset = scale / vector, offset / vector
        elif step.name == "add":
            offset = offset + vector
        elif step.flipped:
            scale, offset = -scale, vector - offset
        else:
            offset = offset - vector
    return scale, offset


def _bodies(body: Body) -> Iterable[Body]:
    yield body
    for node in body.nodes:
        if node.body is not None:
            yield from _bodies(node.body)


def _follow(body: Body, sources, made_by, variable_nodes) -> None:
    """Which variables every value that depends on nothing else derives from."""
    sources.update({value: frozenset() for value in body.constants})
    for node in body.nodes:
        known = [sources.get(v) if isinstance(v, Value) else frozenset() for v in node.inputs]
        if node.body is not None:
            inner = zip(node.body.inputs, known, strict=True)
            sources.update({v: k for v, k in inner if k is not None})
            _follow(node.body, sources, made_by, variable_nodes)
            made_by.update({out: node for out in node.outputs})
        if all(k is not None for k in known):
            variable_nodes.add(node)
            merged = frozenset().union(*(k for k in known if k is not None))
            sources.update({out: merged for out in node.outputs})
        made_by.update({out: node for out in node.outputs})


def _layers(body: Body, sources) -> Iterable[Node]:
    for node in body.nodes:
        if node.name in ("conv_general_dilated", "dot_general"):
            kernel, other = _kernel(node), _activation(node)
            if isinstance(kernel, Value) and sources.get(kernel) and not _from_variables(other, sources):
                yield node
        elif node.name in REMAT and node.body is not None:
            yield from _layers(node.body, sources)
        elif node.name in CUSTOM_RULE and node.body is not None:
            inside = next(iter(_layers(node.body, sources)), None)
            if inside is not None:
                raise NotImplementedError(
                    f"the {inside.name} at {inside.source} is inside a {node.name}, whose rule would not be that "
                    "of the quantised layer; move it out, or skip its kernel with QuantRule(pattern=..., skip=True)."
                )


def _from_variables(operand: Operand, sources) -> bool:
    return isinstance(operand, Constant) or operand in sources


def _kernel(node: Node) -> Operand:
    return node.inputs[1]


def _activation(node: Node) -> Operand:
    return node.inputs[0]


def _channel_axes(node: Node) -> tuple[int, int]:
    """The output channels' axis in the kernel and in the result."""
    numbers = node.params["dimension_numbers"]
    if node.name == "conv_general_dilated":
        return numbers.rhs_spec[0], numbers.out_spec[1]
    (_, contracted), (_, batch) = numbers
    free = [i for i in range(len(node.inputs[1].shape)) if i not in (*contracted, *batch)]
    return (free[-1] if free else 0), len(node.outputs[0].shape) - 1


def _tail(node: Node, axis: int, users, consumers, sources, made_by):
    steps: list[TailStep] = []
    skipped: list[Node] = []
    value = node.outputs[0]
    while users[value] == 1 and (user := consumers.get(value)) is not None:
        step = _step(user, value, axis, sources, made_by)
        if step is None:
            break
        steps.append(step)
        skipped.append(user)
        value = user.outputs[0]
    return steps, skipped, value


def _step(user: Node, value: Value, axis: int, sources, made_by) -> TailStep | None:
    if user.name not in ("add", "sub", "mul", "div") or user.outputs[0].shape != value.shape:
        return None
    flipped = user.inputs[0] is not value
    other = user.inputs[0] if flipped else user.inputs[1]
    if (user.name == "div" and flipped) or not _from_variables(other, sources):
        return None
    vector = _per_channel(other, value.shape, axis, made_by)
    return None if vector is None else TailStep(user.name, vector, flipped)


def _per_channel(other: Operand, shape: tuple[int, ...], axis: int, made_by) -> Operand | None:
    """The operand itself, or what it was broadcast from, if that varies along ``axis`` at most."""
    if all(n == 1 or (i == axis and len(other.shape) == len(shape)) for i, n in enumerate(other.shape)):
        return other
    node = made_by.get(other)
    if node is None or node.name != "broadcast_in_dim":
        return None
    source = node.inputs[0]
    along = node.params["broadcast_dimensions"]
    if all(n == 1 or along[i] == axis for i, n in enumerate(source.shape)):
        return source
    return None
