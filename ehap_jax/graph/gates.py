"""A network with a gate on every channel group: 1 leaves it as it is, 0 removes the group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.graph.channels import ChannelStructure, channel_structure
from ehap_jax.graph.interpret import evaluate, evaluate_call
from ehap_jax.graph.structure import Axis, Coupling, Labels
from ehap_jax.graph.trace import CUSTOM_RULE, Body, Graph, Node, Value

ALWAYS = -1


@dataclass(frozen=True, eq=False)
class Numbering:
    """Gates by their number: one per group, then one per sum that keeps the union of its operands, then a 1.

    of_class: for every class of labels its number, or `ALWAYS`.
    groups: how many.
    sums: arrays of numbers (result, operand, operand), in an order in which operands come first.
    """

    of_class: np.ndarray
    groups: int
    sums: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, structure: ChannelStructure) -> Numbering:
        numbers = structure.group_numbers()
        count = int(numbers.max(initial=-1)) + 1
        unions = structure.solution.unions
        unions = unions[unions[:, 0] != structure.solution.frozen_class]
        numbers[unions[:, 0]] = count + np.arange(len(unions))
        waiting, sums = unions, []
        while len(waiting):
            later = np.isin(waiting[:, 1:], waiting[:, 0]).any(1)
            assert not later.all(), "a sum of itself"
            sums.append(numbers[waiting[~later]])
            waiting = waiting[later]
        return cls(numbers, count, tuple(sums))

    def extend(self, gates: jax.Array) -> jax.Array:
        """The gates of groups with those of sums behind them: of a sum of a and b, ``1 - (1 - a)(1 - b)``."""
        one = jnp.ones((), gates.dtype)
        found = jnp.concatenate([gates, jnp.ones(sum(map(len, self.sums)) + 1, gates.dtype)])
        for result, a, b in (level.T for level in self.sums):
            found = found.at[result].set(one - (one - found[a]) * (one - found[b]))
        return found


class Gate(NamedTuple):
    """Where one operand of a node is multiplied by gates: every index along ``axis`` by those of its ``numbers``.

    numbers: arrays of the axis' length: a position in ``channel_groups``, or of a sum that lives as long as one of its
        operands (after all groups), or `ALWAYS`. There are several where axes were merged (heads × features).
    """

    operand: int
    axis: int
    numbers: tuple[np.ndarray, ...]


def gated(graph: Graph, coupling: Coupling = "group") -> Callable[[jax.Array, Sequence[jax.Array]], list[jax.Array]]:
    """``graph`` with gates: ``run(gates, leaves) -> outputs``, ``gates`` one number per group of ``channel_groups``.

    A gate multiplies the activation of its group wherever it is read: every term of a convolution, a matrix product or
    a sum over the group's axis and, under union coupling, the operand of an addition whose result outlives it; what
    reads that result is multiplied by 1 until all of its operands are gone. The
    activation is what arrives there, after normalisation and activation function, so that the outputs are linear in
    one gate as long as nothing nonlinear follows, and ``gates`` of zeros for some groups gives what ``mask_variables``
    gives for a plan without them.

    Raises ValueError where a group is read inside a function with its own derivative rule, which has no derivative
    with respect to a gate inside.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
    >>> w, x = {"in": jnp.eye(2), "out": jnp.ones((2, 1))}, jnp.array([[3.0, 4.0]])
    >>> run = gated(trace_graph(apply)(w, x))
    >>> run(jnp.array([1.0, 0.0]), [w["in"], w["out"], x])
    [Array([[3.]], dtype=float32)]
    """
    structure = channel_structure(graph, coupling)
    numbering = Numbering.of(structure)
    gates_of = find_gates(structure, numbering)

    def run_body(body: Body, args: Sequence, gates) -> list:
        def handle(node: Node, inputs: list) -> list | None:
            for gate in gates_of.get(node, ()):
                inputs[gate.operand] = _multiply(inputs[gate.operand], gate, gates)
            if node.body is None or not any(inner in gates_of for inner in node.body.walk()):
                return None
            return evaluate_call(node, inputs, lambda body, args: run_body(body, args, gates), _no_derivative)

        return evaluate(body, args, handle)

    def run(gates: jax.Array, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        return run_body(graph.body, leaves, numbering.extend(gates))

    return run


def find_gates(structure: ChannelStructure, numbering: Numbering) -> dict[Node, tuple[Gate, ...]]:
    """Every operation that reads prunable groups, and where; raises what `gated` does."""
    found: dict[Node, tuple[Gate, ...]] = {}
    for node in structure.graph.body.walk():
        gates = tuple(gate for gate in _reads(structure, node, numbering) if (np.array(gate.numbers) != ALWAYS).any())
        if gates:
            found[node] = gates
    for node in structure.graph.body.walk():
        inner = [] if node.body is None else [n for n in node.body.walk() if n in found]
        if node.name in CUSTOM_RULE and inner:
            raise ValueError(
                f"channels are summed over at {inner[0].source}, inside a function with its own derivative rule "
                f"({node.name} at {node.source}): the effect of removing one has no derivative there. Take the rule "
                "off that function, or keep it out of the layers that lose channels."
            )
    return found


def _reads(structure: ChannelStructure, node: Node, numbering: Numbering):
    """The gates of one node, those that never close included."""
    labels, classes, numbers = structure.labels, structure.solution.classes, numbering.of_class

    def at(axis: Axis) -> tuple[np.ndarray, ...]:
        return tuple(numbers[classes[own]] for own in axis)

    def of(position: int) -> Labels | None:
        operand = node.inputs[position]
        return labels[operand] if isinstance(operand, Value) else None

    for position, axis in _summed_axes(node, of):
        found = of(position)
        if found is not None and found.axes[axis]:
            yield Gate(position, axis, at(found.axes[axis]))
    if node.name in ("add", "sub"):
        result = labels[node.outputs[0]]
        for position in range(2):
            found = of(position)
            for axis, own in enumerate(found.axes if found is not None else ()):
                sums = result.axes[axis]
                if len(own) == len(sums) == 1 and len(own[0]) == len(sums[0]):
                    (own,) = at(own)
                    outlived = (own < numbering.groups) & (own != numbers[classes[sums[0]]])
                    yield Gate(position, axis, (np.where(outlived, own, ALWAYS),))


def _summed_axes(node: Node, labels_of: Callable[[int], Labels | None]):
    """(operand, axis) of everything that a node sums over; of a product's two sides the one that varies."""
    if node.name == "conv_general_dilated" and node.params["feature_group_count"] == 1:
        yield 0, node.params["dimension_numbers"].lhs_spec[1]  # grouped: a group's outputs go with its inputs
    elif node.name in ("dot_general", "ragged_dot_general"):
        if node.name == "dot_general":
            (lhs, rhs), _ = node.params["dimension_numbers"]
        else:
            (lhs, rhs), _ = node.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        left = labels_of(0)
        right = labels_of(1)
        side = 1 if left is None or (left.from_variables and right is not None and not right.from_variables) else 0
        yield from ((side, axis) for axis in (lhs, rhs)[side])
    elif node.name == "reduce_sum":
        yield from ((0, axis) for axis in node.params["axes"])


def _multiply(x: jax.Array, gate: Gate, gates: jax.Array) -> jax.Array:
    """``gates`` end in a 1, where `ALWAYS` points."""
    factor = jnp.ones((), gates.dtype)
    for numbers in gate.numbers:
        factor = factor * gates[numbers]
    factor = jnp.expand_dims(factor, [a for a in range(x.ndim) if a != gate.axis])
    # In the gates' dtype: its derivative is a sum over positions, which 16 bits would lose.
    return (x.astype(factor.dtype) * factor).astype(x.dtype)


def _no_derivative(node: Node, args: Sequence) -> list:
    raise AssertionError(f"{node.name} at {node.source} holds a gate")  # find_gates refuses these
