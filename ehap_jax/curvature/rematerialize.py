"""A loss that remembers less: its operations in segments, each computed again when the backward pass needs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from ehap_jax.graph import Graph, Value, evaluate, trace_graph
from ehap_jax.graph.trace import Body, Node

__all__ = ["rematerialized"]

PyTree = Any
HEAVY = frozenset({"conv_general_dilated", "dot_general"})


@lru_cache(maxsize=16)
def rematerialized(loss: Callable[[PyTree, PyTree], jax.Array]) -> Callable[[PyTree, PyTree], jax.Array]:
    """``loss`` with the same values and derivatives, differentiated in about sqrt(layers) segments.

    Only what passes from one segment to the next is kept for the backward pass, and a segment is run again when its
    turn comes (Chen et al., 2016, arXiv 1604.06174): less memory for one more forward pass. `jax.checkpoint` around the
    whole loss would save nothing, because everything would be computed again at once. For reverse mode and forward over
    reverse mode. The same function for the same loss.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w).sum()
    >>> w, x = jnp.eye(2) / 2, jnp.ones((1, 2))
    >>> bool(jnp.allclose(jax.grad(rematerialized(loss))(w, x), jax.grad(loss)(w, x)))
    True
    """

    def run(params: PyTree, batch: PyTree) -> jax.Array:
        graph = trace_graph(loss, on_unknown="freeze")(params, batch)
        env: dict[Any, jax.Array] = dict(zip(graph.body.inputs, jax.tree.leaves((params, batch)), strict=True))
        env |= graph.body.constants
        for part in _segments(graph):
            call = _forgetful(partial(_evaluate, part))
            env.update(zip(part.outputs, call(*(env[v] for v in part.inputs)), strict=True))
        last = replace(graph.body, inputs=tuple(env), constants={}, nodes=())
        return jax.tree.unflatten(graph.output_tree, _evaluate(last, *env.values()))

    return run


def _evaluate(body: Body, *args: jax.Array) -> list[jax.Array]:
    return evaluate(body, args, lambda node, inputs: None)


def _forgetful(run: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """``run`` that keeps nothing but its arguments for the backward pass.

    What is computed again must not be recognised as computed before. `jax.checkpoint` sees to it with an optimization
    barrier, which XLA:CPU drops. Here the arguments go through a choice that is always the same, but on a number
    known only at run time.
    """
    call = jax.custom_vjp(run)

    def backward(args, cotangents):
        number = cotangents[0].ravel()[0]
        always = (number >= 0) | (number < 0) | (number != number)
        again = [jax.lax.select(jnp.broadcast_to(always, x.shape), x, jnp.zeros_like(x)) for x in args]
        return jax.vjp(run, *again)[1](cotangents)

    call.defvjp(lambda *args: (run(*args), args), backward)
    return call


def _segments(graph: Graph) -> list[Body]:
    """The nodes cut where little is passed on, at about equal shares of what they write."""
    nodes = graph.body.nodes
    written = [sum(_bytes(v) for v in node.outputs) for node in nodes]
    count = max(1, round(math.sqrt(sum(node.name in HEAVY for node in nodes))))
    live = _live_bytes(graph.body)
    cuts, done, share = [0], 0.0, sum(written) / count
    best = None
    for place, size in enumerate(written):
        done += size
        past = done - share * len(cuts)  # the cut is made at the narrowest place around an equal share
        if abs(past) <= share / 3 and (best is None or live[place] < live[best]):
            best = place
        if past > share / 3 and best is not None and len(cuts) < count:
            cuts.append(best + 1)
            best = None
    return [_segment(graph.body, nodes[a:b], nodes[b:]) for a, b in pairwise([*cuts, len(nodes)]) if a < b]


def _segment(body: Body, nodes: tuple[Node, ...], later: tuple[Node, ...]) -> Body:
    made = {v: None for node in nodes for v in node.outputs}
    read = {v: None for node in nodes for v in node.inputs if isinstance(v, Value) and v not in made}
    wanted = {v for node in later for v in node.inputs} | set(body.outputs)
    return Body(tuple(read), {}, nodes, tuple(v for v in made if v in wanted))


def _live_bytes(body: Body) -> list[int]:
    """After every node, the bytes of what nodes have made and later ones read."""
    last: dict[Any, int] = {}
    for place, node in enumerate(body.nodes):
        last.update({v: place for v in node.inputs})
    last.update({v: len(body.nodes) for v in body.outputs})
    change = [0] * (len(body.nodes) + 1)
    for place, node in enumerate(body.nodes):
        for v in node.outputs:
            if last.get(v, place) > place:
                change[place] += _bytes(v)
                change[last[v]] -= _bytes(v)
    live, total = [], 0
    for delta in change[:-1]:
        total += delta
        live.append(total)
    return live


def _bytes(value: Value) -> int:
    return math.prod(value.shape) * value.dtype.itemsize
