"""Quantised sites of a graph, and the affine tail of each: what can be folded into its kernel and bias.

The tail is found by what it computes: additions, subtractions, multiplications, divisions and negations of a layer's
output by values that depend on the variables alone and vary along the channel axis at most, each result used once.
Transposes, reshapes that keep the channel axis whole and casts may stand between them. BatchNorm with frozen
statistics is such a tail in any spelling, and so are a scale and a bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp

from ehap_jax import _compat
from ehap_jax.graph.layers import Layer, network_layers
from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, Body, Constant, Graph, Node, Operand, Value

AFFINE = frozenset({"add", "sub", "mul", "div", "neg"})
MOVES = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy"})
ELEMENTWISE = AFFINE | {
    "abs", "convert_element_type", "copy", "exp", "integer_pow", "log", "max", "min", "pow", "rsqrt", "sign", "sqrt",
    "square", "tanh", "logistic", "log1p", "expm1", "clamp", "select_n", "stop_gradient",
}  # fmt: skip
LAYERS = frozenset({"conv_general_dilated", "dot_general"})
LOST = -1


@dataclass(frozen=True, eq=False)
class TailStep:
    """One folded operation on the layer's output z.

    ``vector`` is what z is combined with (``z ∘ vector``, or ``vector ∘ z`` where ``flipped``), None for a negation or
    a move. ``axis`` is the channel axis of the operation's result.
    """

    node: Node
    vector: Operand | None
    flipped: bool
    axis: int | None


@dataclass(frozen=True, eq=False)
class Site:
    """A conv or dense layer with a kernel made of variables.

    name: the kernel's path, with "#2", … at its second use. path: the kernel's path. kernel_operand: 0 or 1, which
    input of the node is the kernel; the other is the activation. kernel_axis: the output channels in the kernel,
    out_axis: in ``result``, both None for a layer with a single output. tail: what is folded; ``result`` is the value
    it ends in.
    """

    node: Node
    name: str
    path: str
    kernel_operand: int
    kernel_axis: int | None
    out_axis: int | None
    tail: tuple[TailStep, ...]
    result: Value

    @property
    def kernel(self) -> Operand:
        return self.node.inputs[self.kernel_operand]

    @property
    def activation(self) -> Operand:
        return self.node.inputs[1 - self.kernel_operand]

    @property
    def channels(self) -> int:
        """Output channels: weight scales and biases of the layer."""
        return 1 if self.kernel_axis is None else self.kernel.shape[self.kernel_axis]

    @property
    def has_offset(self) -> bool:
        """Whether the tail adds anything, so that the folded layer has a bias."""
        return any(step.node.name in ("add", "sub") for step in self.tail)


@dataclass(frozen=True, eq=False)
class Sites:
    """The layers of a graph.

    by_node: those that can be quantised. blocked: why the others cannot, by kernel path. variable_nodes: what depends
    on variables alone. sources: the variables that each of their values derives from.
    """

    by_node: dict[Node, Site]
    blocked: dict[str, str]
    variable_nodes: frozenset[Node]
    sources: Mapping[Value, frozenset[str]]

    @property
    def paths(self) -> tuple[str, ...]:
        """Kernel paths of every layer, each once, in order."""
        return tuple(dict.fromkeys([*(site.path for site in self.by_node.values()), *self.blocked]))


def find_sites(graph: Graph) -> Sites:
    """Every conv and dense layer of ``graph`` whose kernel derives from variables, with its tail."""
    index = network_layers(graph)
    sources = index.sources
    bodies = list(_bodies(graph.body))
    made_by = {out: node for body in bodies for node in body.nodes for out in node.outputs}
    users = Counter(v for node in graph.body.walk() for v in node.inputs if isinstance(v, Value))
    users.update(v for body in bodies for v in body.outputs if isinstance(v, Value))
    consumers = {v: node for node in graph.body.walk() for v in node.inputs if isinstance(v, Value)}
    seen: Counter[str] = Counter()
    by_node: dict[Node, Site] = {}
    blocked: dict[str, str] = {}
    for layer in index.found:
        node, path = layer.node, layer.path
        if not _is_roundable(layer):
            continue
        rules = [call for call in layer.calls if call.name in CUSTOM_RULE]
        if rules:
            blocked[path] = f"it is inside a {rules[-1].name} at {rules[-1].source}, whose derivative rule"
            continue
        seen[path] += 1
        kernel_axis = layer.axes.outputs[-1] if layer.axes.outputs else None
        out_axis = None if kernel_axis is None else layer.output_axis(kernel_axis)
        tail = _tail(node, out_axis, users, consumers, sources, made_by)
        by_node[node] = Site(
            node=node,
            name=path if seen[path] == 1 else f"{path}#{seen[path]}",
            path=path,
            kernel_operand=layer.kernel,
            kernel_axis=kernel_axis,
            out_axis=tail[-1].axis if tail else out_axis,
            tail=tuple(tail),
            result=tail[-1].node.outputs[0] if tail else node.outputs[0],
        )
    variable_nodes = frozenset(node for body in bodies for node in body.nodes if index.is_fixed(node))
    return Sites(by_node, blocked | _hidden(graph, sources), variable_nodes, sources)


def fold(site: Site, read: Callable[[Operand], jax.Array], dtype) -> tuple[jax.Array, jax.Array]:
    """(scale, offset) of the tail: ``tail(z) = scale · z + offset`` up to its moves, each (channels,) of ``dtype``."""
    return fold_steps(site.tail, site.channels, read, dtype)


def fold_steps(
    steps: Iterable[TailStep], channels: int, read: Callable[[Operand], jax.Array], dtype
) -> tuple[jax.Array, jax.Array]:
    """(scale, offset), each (channels,), of a chain of affine steps and moves."""
    scale, offset = jnp.ones(channels, dtype), jnp.zeros(channels, dtype)
    for step in steps:
        name = step.node.name
        if name == "neg":
            scale, offset = -scale, -offset
        if step.vector is None:
            continue
        vector = _per_channel(jnp.asarray(read(step.vector)).astype(dtype), step.axis, channels)
        if name == "mul":
            scale, offset = scale * vector, offset * vector
        elif name == "div":
            scale, offset = scale / vector, offset / vector
        elif name == "add":
            offset = offset + vector
        elif step.flipped:
            scale, offset = -scale, vector - offset
        else:
            offset = offset - vector
    return scale, offset


def affine_chain(nodes: Iterable[Node], value: Value, axis: int | None, sites: Sites, made_by) -> tuple[TailStep, ...]:
    """The steps by which ``nodes`` make an affine function of ``value`` along ``axis``; empty if they do not."""
    steps: list[TailStep] = []
    for node in nodes:
        step = _step(node, value, axis, sites.sources, made_by)
        if step is None:
            return ()
        steps.append(step)
        value = node.outputs[0]
    return tuple(steps)


def apply_moves(site: Site, z: jax.Array) -> jax.Array:
    """The moves of the tail (transposes, reshapes) on a layer's output, in its own dtype."""
    for step in site.tail:
        if step.node.name in MOVES and step.node.name != "convert_element_type":
            (z,) = _compat.bind(step.node.primitive, [z], step.node.params)
    return z


def _per_channel(vector: jax.Array, axis: int | None, channels: int) -> jax.Array:
    """(channels,): a value that varies along ``axis`` at most."""
    if vector.ndim:
        vector = vector[tuple(slice(None) if i == axis else 0 for i in range(vector.ndim))]
    return jnp.broadcast_to(vector.reshape(-1), (channels,))


def _bodies(body: Body) -> Iterator[Body]:
    yield body
    for node in body.nodes:
        if node.body is not None:
            yield from _bodies(node.body)


def _is_roundable(layer: Layer) -> bool:
    """A conv or dense layer in floating point, outside of loops."""
    floating = all(jnp.issubdtype(v.dtype, jnp.floating) for v in layer.node.inputs)
    inside_loop = any(call.name not in REMAT | CUSTOM_RULE for call in layer.calls)
    return layer.node.name in LAYERS and floating and not inside_loop


def _hidden(graph: Graph, sources) -> dict[str, str]:
    """Variables that reach a conv or dense layer inside a loop or branch, which cannot be looked into."""
    found: dict[str, str] = {}
    for node in graph.body.walk():
        if node.name not in REMAT | CUSTOM_RULE and any(_contains_layer(inner) for inner in _inner_jaxprs(node)):
            if all(v in sources for v in node.inputs if isinstance(v, Value)):
                continue  # computed from variables alone
            paths = frozenset().union(*(sources.get(v, frozenset()) for v in node.inputs if isinstance(v, Value)))
            for path in sorted(p for p in paths if len(graph.leaves[p].shape) >= 2):
                found[path] = f"it is used inside a {node.name} at {node.source}, which"
    return found


def _inner_jaxprs(holder: Node | _compat.JaxprEqn) -> Iterator[_compat.Jaxpr]:
    for param in holder.params.values():
        for item in param if isinstance(param, tuple | list) else (param,):
            if isinstance(item, _compat.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, _compat.Jaxpr):
                yield item


def _contains_layer(jaxpr: _compat.Jaxpr) -> bool:
    return any(e.primitive.name in LAYERS or any(map(_contains_layer, _inner_jaxprs(e))) for e in jaxpr.eqns)


def _tail(node: Node, axis: int | None, users, consumers, sources, made_by) -> list[TailStep]:
    steps: list[TailStep] = []
    value = node.outputs[0]
    while users[value] == 1 and (user := consumers.get(value)) is not None:
        step = _step(user, value, axis, sources, made_by)
        if step is None:
            break
        steps.append(step)
        value, axis = user.outputs[0], step.axis
    while steps and steps[-1].node.name in MOVES:  # a move that nothing follows stays where it is
        steps.pop()
    return steps


def _step(user: Node, value: Value, axis: int | None, sources, made_by) -> TailStep | None:
    if user.name in MOVES:
        moved = _moved_axis(user, value.shape, axis)
        return None if moved == LOST else TailStep(user, None, False, moved)
    if user.name not in AFFINE or user.outputs[0].shape != value.shape:
        return None
    if user.name == "neg":
        return TailStep(user, None, False, axis)
    flipped = user.inputs[0] is not value
    other = user.inputs[0] if flipped else user.inputs[1]
    if (user.name == "div" and flipped) or not (isinstance(other, Constant) or other in sources):
        return None
    if not _varying_axes(other, made_by, {}) <= ({axis} if len(other.shape) == len(value.shape) else set()):
        return None
    return TailStep(user, other, flipped, axis)


def _moved_axis(node: Node, shape: tuple[int, ...], axis: int | None) -> int | None:
    """Where ``axis`` is after a move, or LOST."""
    if node.name == "convert_element_type":
        return axis if jnp.issubdtype(node.outputs[0].dtype, jnp.floating) else LOST
    if node.name == "copy" or axis is None:
        return axis
    if node.name == "transpose":
        return tuple(node.params["permutation"]).index(axis)
    if len(node.inputs) > 1 or (node.name == "reshape" and node.params.get("dimensions") is not None):
        return LOST
    out = node.outputs[0].shape
    same = (j for j, n in enumerate(out) if n == shape[axis] and prod(out[:j]) == prod(shape[:axis]))
    return next(same, LOST)


def _varying_axes(operand: Operand, made_by, known: dict[Value, frozenset[int]]) -> frozenset[int]:
    """A superset of the axes along which a value varies."""
    if isinstance(operand, Constant):
        return frozenset(i for i, n in enumerate(operand.shape) if n > 1)
    if operand in known:
        return known[operand]
    every = frozenset(i for i, n in enumerate(operand.shape) if n > 1)
    node = made_by.get(operand)
    found: Iterable[int] = every
    if node is not None:
        of = [_varying_axes(v, made_by, known) for v in node.inputs]
        shapes = [v.shape for v in node.inputs]
        if node.name == "broadcast_in_dim":
            found = (node.params["broadcast_dimensions"][i] for i in of[0])
        elif node.name == "transpose":
            found = (tuple(node.params["permutation"]).index(i) for i in of[0])
        elif node.name in ("reshape", "squeeze", "expand_dims") and len(node.inputs) == 1:
            before = [i for i, n in enumerate(shapes[0]) if n > 1]
            after = [i for i, n in enumerate(operand.shape) if n > 1]
            if [shapes[0][i] for i in before] == [operand.shape[i] for i in after]:
                found = (after[before.index(i)] for i in of[0])
        elif node.name in ELEMENTWISE and all(not s or len(s) == len(operand.shape) for s in shapes):
            found = frozenset().union(*of)
    known[operand] = frozenset(found)
    return known[operand]
