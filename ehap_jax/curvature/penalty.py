"""The terms of a loss that do not depend on the batch, such as weight decay: found in its graph, their traces exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax import _compat
from ehap_jax._traced_once import traced_once
from ehap_jax.curvature.problem import Layout
from ehap_jax.graph import Graph, Node, Value, evaluate, trace_graph
from ehap_jax.graph.layers import Layers, layers_in
from ehap_jax.graph.trace import Body, Operand

__all__ = ["Penalty", "diagonal_traces", "penalty_of"]

PyTree = Any

MOVES = frozenset({"convert_element_type", "copy", "reshape", "squeeze", "reduce_sum", "broadcast_in_dim"})
"""Linear operations of one operand that may lie between a term and the loss."""

DIAGONAL = 1e-4
"""Relative error up to which a Hessian is taken for diagonal, in float32."""


@dataclass(frozen=True, eq=False)
class Term:
    """A value made of parameters alone, and the operations that lead to the loss, with its place among their inputs."""

    value: Value
    steps: tuple[tuple[Node, int], ...]


@dataclass(frozen=True, eq=False)
class Penalty:
    """The sum of the terms of a loss that depend on the parameters alone, as a function of them."""

    body: Body
    terms: tuple[Term, ...]

    def __call__(self, params: PyTree) -> jax.Array:
        leaves = jax.tree.leaves(params)
        known = evaluate(
            self.body, [*leaves, *[None] * (len(self.body.inputs) - len(leaves))], lambda node, inputs: None
        )
        values: dict[Operand, Any] = dict(zip(self.body.outputs, known, strict=True))
        total = jnp.zeros(())
        for term in self.terms:
            found = values[term.value]
            for node, place in term.steps:
                found = _step(node, place, found, values)
            total = total.astype(found.dtype) + found
        return total


def penalty_of(loss: Callable, params: PyTree, examples: PyTree) -> Penalty | None:
    """The terms of ``loss`` that depend on ``params`` alone; None without any. The same object for one loss."""
    leaves, structure = jax.tree.flatten((params, examples))
    return _penalty(loss, structure, tuple((jnp.shape(leaf), jnp.asarray(leaf).dtype) for leaf in leaves))


@traced_once
def _penalty(loss, structure, described) -> Penalty | None:
    structs = [jax.ShapeDtypeStruct(*leaf) for leaf in described]
    params, examples = jax.tree.unflatten(structure, structs)
    graph = trace_graph(loss, on_unknown="freeze")(params, examples)
    layers = layers_in(graph.body, graph.leaves)
    makers: dict[Operand, Node] = {out: node for node in graph.body.nodes for out in node.outputs}
    terms = tuple(_terms(graph.body.outputs[0], (), layers, makers))
    if not terms:
        return None
    wanted: set[Operand] = {term.value for term in terms}
    for term in terms:
        wanted |= {
            v for node, place in term.steps for i, v in enumerate(node.inputs) if i != place and _fixed(layers, v)
        }
    return Penalty(_only(graph, wanted), terms)


def _terms(operand: Operand, steps, layers: Layers, makers: Mapping[Operand, Node]) -> list[Term]:
    """Terms of ``operand``; ``steps`` lead from it to the loss."""
    if isinstance(operand, Value) and _fixed(layers, operand):
        return [Term(operand, steps)] if layers.made_of(operand) else []
    node = makers.get(operand)
    if node is None:
        return []
    fixed = [_fixed(layers, v) for v in node.inputs]
    if node.name in ("add", "add_any", "sub"):
        places = [0, 1]
    elif node.name == "neg" or node.name in MOVES:
        places = [0]
    elif node.name == "mul" and any(fixed):
        places = [fixed.index(False)]
    elif node.name == "div" and fixed[1]:
        places = [0]
    else:
        return []
    return [t for place in places for t in _terms(node.inputs[place], ((node, place), *steps), layers, makers)]


def _step(node: Node, place: int, value, values: Mapping[Operand, Any]):
    if node.name in ("add", "add_any"):
        return value
    if node.name == "sub":
        return -value if place == 1 else value
    inputs = [
        value if i == place else values[v] if isinstance(v, Value) else v.value for i, v in enumerate(node.inputs)
    ]
    return _compat.bind(node.primitive, inputs, node.params)[0]


def _fixed(layers: Layers, operand: Operand) -> bool:
    return layers.made_of(operand) is not None


def _only(graph: Graph, wanted: set[Operand]) -> Body:
    """The part of the graph's body that computes ``wanted``."""
    outputs = tuple(v for v in wanted if isinstance(v, Value))
    needed, nodes = set(outputs), []
    for node in reversed(graph.body.nodes):
        if any(out in needed for out in node.outputs):
            nodes.append(node)
            needed.update(v for v in node.inputs if isinstance(v, Value))
    return replace(graph.body, nodes=tuple(reversed(nodes)), outputs=outputs)


def diagonal_traces(penalty: Penalty, layout: Layout, params: PyTree) -> dict[str, jax.Array] | None:
    """``{path: (channels,)}``, the traces of a penalty with a diagonal Hessian, exact; None of another.

    Of a diagonal matrix, ``H 1`` is the diagonal and ``H v`` is ``v`` times that, for every v: it is tried with one of
    independent normal numbers, which no other matrix survives.
    """
    probed, rest = layout.split([jnp.asarray(leaf) for leaf in jax.tree.leaves(params)])
    rng = np.random.default_rng(0)
    v = {path: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for path, leaf in probed.items()}
    diagonal, Hv = _products(penalty, layout, probed, rest, v)
    for path, along in Hv.items():
        error, scale = jnp.abs(along - diagonal[path] * v[path]).max(), jnp.abs(along).max()
        if not bool(error <= DIAGONAL * scale):
            return None
    return {path: x.astype(layout.policy.sums) for path, x in layout.channel_sums(diagonal).items()}


@partial(jax.jit, static_argnums=(0, 1))
def _products(penalty: Penalty, layout: Layout, probed, rest, v):
    """H 1 and H v."""
    gradient = jax.grad(lambda p: penalty(layout.join(p, rest)))
    ones = jax.tree.map(jnp.ones_like, probed)
    return [jax.jvp(gradient, (probed,), (along,))[1] for along in (ones, v)]
