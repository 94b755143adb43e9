"""What of a function's results has to be kept: no array twice, and none that is made again for nothing.

`jax.linearize` keeps whatever its linear part reads. For every ReLU that is where its input is positive, and the zeros
that tangents are replaced with elsewhere, both once for the way forward and once for the way back. Zeros need no room,
and where a ReLU's input is positive its output says, which the next layer keeps: of a ResNet's bytes less than half are
left.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.graph.interpret import evaluate
from ehap_jax.graph.trace import Body, Constant, Node, Operand, Value, body_of

__all__ = ["Kept", "keep_little"]

PyTree = Any


@partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("rest", "structure"))
@dataclass(frozen=True)
class Kept:
    """What the results of a function can be made of again; a pytree.

    Attributes:
      arrays: what is kept.
      rest: how the results are made of it.
      structure: their tree structure.
    """

    arrays: list[jax.Array]
    rest: Body
    structure: Any

    def results(self) -> PyTree:
        return jax.tree.unflatten(self.structure, evaluate(self.rest, self.arrays, lambda node, inputs: None))


def keep_little(function: Callable[..., PyTree], *arguments: PyTree) -> Kept:
    """Run ``function``, and keep what its results can be made of again.

    To be called inside a jitted function that returns what is kept, to another one that needs the results.

    Args:
      function: a pure function from pytrees of arrays to a pytree of arrays.
      arguments: of it.

    >>> kept = keep_little(lambda x: (jax.nn.relu(x), x > 0, jnp.zeros_like(x)), jnp.ones(3))
    >>> len(kept.arrays)
    1
    >>> [x.tolist() for x in kept.results()]
    [[1.0, 1.0, 1.0], [True, True, True], [0.0, 0.0, 0.0]]
    """
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=x.weak_type), arguments)
    closed, results = jax.make_jaxpr(function, return_shape=True)(*structs)
    first, rest = _split(body_of(closed))
    arrays = evaluate(first, jax.tree.leaves(arguments), lambda node, inputs: None)
    return Kept([jnp.asarray(x) for x in arrays], rest, jax.tree.structure(results))


def _split(body: Body) -> tuple[Body, Body]:
    """``body`` in two: its inputs to what is kept, and this to its outputs."""
    same, makers = _equal_values(body)
    outputs = [same.get(operand, operand) for operand in body.outputs]
    clipped: dict[tuple[Hashable, Hashable], Operand] = {}  # a and the number c of an output max(a, c): that output
    for node in body.nodes:
        if (operands := _maximum(node)) and (value := same.get(node.outputs[0])) in outputs:
            clipped.setdefault((_name(same, operands[0]), _name(same, operands[1])), value)
    remade: dict[Operand, Node] = {}
    for operand in outputs:
        node = makers.get(operand)
        if node is None:
            continue
        if node.name == "broadcast_in_dim" and isinstance(node.inputs[0], Constant):
            remade[operand] = node
        elif node.name == "gt":
            # max(a, c) > c exactly where a > c, and nowhere if a is NaN.
            clip = clipped.get((_name(same, node.inputs[0]), _name(same, node.inputs[1])))
            if clip is not None:
                remade[operand] = replace(node, inputs=(clip, node.inputs[1]))
    kept = list(dict.fromkeys(operand for operand in outputs if operand not in remade))
    read = [operand if isinstance(operand, Value) else Value(operand.shape, operand.dtype) for operand in kept]
    place = dict(zip(kept, read, strict=True))
    rest = Body(tuple(read), {}, tuple(remade.values()), tuple(place.get(operand, operand) for operand in outputs))
    return replace(body, outputs=tuple(kept)), rest


def _equal_values(body: Body) -> tuple[dict[Operand, Value], dict[Operand, Node]]:
    """Of every value the first one that is computed alike, and by what operation."""
    same: dict[Operand, Value] = {}
    makers: dict[Operand, Node] = {}
    found: dict[Hashable, Value] = {}
    for node in body.nodes:
        if len(node.outputs) != 1 or node.effects:
            continue
        (value,) = node.outputs
        names = tuple(_name(same, operand) for operand in node.inputs)
        key = (node.name, tuple(sorted(node.params.items())), names)
        try:
            same[value] = found.setdefault(key, value)
        except TypeError:  # parameters that cannot be compared
            same[value] = value
        makers.setdefault(same[value], node)
    return same, makers


def _name(same: dict[Operand, Value], operand: Operand) -> Hashable:
    """Equal for operands that are known to be equal."""
    if not isinstance(operand, Constant):
        return same.get(operand, operand)
    if jnp.issubdtype(operand.dtype, jax.dtypes.extended):  # a PRNG key
        return operand
    number = np.asarray(operand.value)
    return number.dtype, number.shape, number.tobytes()


def _maximum(node: Node) -> tuple[Operand, Constant] | None:
    """What the node takes the maximum of, if that is an array and a number, whatever its derivative is."""
    operands = node.inputs
    if node.name == "custom_jvp_call" and node.body is not None:
        body = node.body
        if [inner.name for inner in body.nodes] != ["max"] or body.nodes[0].outputs != body.outputs:
            return None
        given: dict[Operand, Operand] = dict(zip(body.inputs, node.inputs, strict=True))
        operands = tuple(given.get(operand, operand) for operand in body.nodes[0].inputs)
    elif node.name != "max":
        return None
    array, number = sorted(operands, key=lambda operand: isinstance(operand, Constant))
    return (array, number) if isinstance(number, Constant) else None
