"""In which kernels a network is piecewise linear: read off its graph, never assumed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax.numpy as jnp

from ehap_jax.curvature.derivative_rules import is_own_derivative
from ehap_jax.graph import Graph, Node
from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, Body, Constant, Operand, Value

__all__ = ["piecewise_linear_kernels"]


def piecewise_linear_kernels(graph: Graph, paths: Iterable[str] | None = None) -> dict[str, Literal[True] | str]:
    """For every kernel whether the outputs are piecewise linear in it with all else fixed, or why that is not proven.

    Where they are, the second derivative of the outputs with respect to the kernel is zero, so that the kernel's
    block of the Hessian of any loss on the outputs is its block of the Gauss-Newton matrix
    (Botev, Ritter and Barber 2017, arXiv 1706.03662), which `gauss_newton_trace` has exactly.

    The graph is walked once. Each value carries the set of kernels it depends on and the set for which that
    dependence is not proven. Sums, convolutions and products with independent values keep it linear; maxima, ReLU,
    clipping, pooling, sorting and selection keep it piecewise linear; comparisons, rounding and indices cut it. A
    product of two values that depend on the same kernel, a division by a dependent value, whatever is done to complex
    values and every other operation are not proven, and neither is a primitive that is not known. A function with its
    own derivative must pass on three counts: its body, the derivative rule, and that the rule is the body's derivative,
    as far as automatic differentiation tells them apart (see `is_own_derivative`).

    Args:
      graph: of ``trace_graph(apply)(variables, x)``; the outputs are taken to be the logits.
      paths: which leaves to look at; by default the trained ones with two axes or more.

    Returns:
      ``{path: True}`` where proven, otherwise ``{path: reason}`` that names the primitive and the source line.

    Raises:
      KeyError: a path that the graph does not have.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> def apply(p, x):
    ...     return jnp.tanh(jax.nn.relu(x @ p["a"])) @ p["b"]
    >>> kernels = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 2))}
    >>> verdict = piecewise_linear_kernels(trace_graph(apply)(kernels, jnp.ones((1, 3))))
    >>> verdict["b"], verdict["a"].split(" at ")[0]
    (True, 'tanh is not known to be piecewise linear')
    """
    if paths is None:
        paths = [path for path in graph.parameters if len(graph.leaves[path].shape) >= 2]
    bits: dict[str, int] = {}
    for path in paths:
        if path not in graph.leaves:
            raise KeyError(f"the graph has no leaf {path!r}; its leaves are {', '.join(graph.leaves)}")
        bits[path] = 1 << len(bits)
    walk = _Walk({}, {})
    inputs = {graph.leaves[path]: _State(bit, ()) for path, bit in bits.items()}
    outputs = walk.body(graph.body, [inputs.get(value, _FREE) for value in graph.body.inputs])
    unproven = _merge(state.unproven for state in outputs)
    verdicts: dict[str, Literal[True] | str] = dict.fromkeys(bits, True)
    for path, bit in bits.items():
        for found, why in unproven:
            if found & bit:
                verdicts[path] = why
    return verdicts


class _State(NamedTuple):
    """What is known of a value: the kernels it depends on, and disjoint sets of unproven ones with their reason.

    Sets of kernels are the bits of an integer.
    """

    depends: int
    unproven: tuple[tuple[int, str], ...]

    @property
    def unproven_bits(self) -> int:
        return sum(bits for bits, _ in self.unproven)


_FREE = _State(0, ())

# Linear in all operands together, or a choice between them that changes at the kinks only.
_PIECEWISE = frozenset(
    [
        "abs",
        "add",
        "add_any",
        "all_gather",
        "broadcast_in_dim",
        "clamp",
        "concatenate",
        "copy",
        "copy_p",
        "cummax",
        "cummin",
        "cumsum",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "gather",
        "max",
        "min",
        "name",
        "neg",
        "pad",
        "pbroadcast",
        "psum",
        "pvary",
        "reduce_max",
        "reduce_min",
        "reduce_precision",
        "reduce_sum",
        "reduce_window_max",
        "reduce_window_min",
        "reduce_window_sum",
        "rem",
        "reshape",
        "rev",
        "scatter",
        "scatter-add",
        "scatter_add",
        "scatter-max",
        "scatter_max",
        "scatter-min",
        "scatter_min",
        "select_and_scatter_add",
        "select_n",
        "sharding_constraint",
        "slice",
        "squeeze",
        "sub",
        "top_k",
        "transpose",
    ]
)
# Each output depends on the operand in its place.
_ONE_TO_ONE = frozenset({"optimization_barrier", "sort"})
# Operands that choose and do not flow: where they vary with the kernel continuously, nothing is proven.
_CHOOSING = {"select_n": slice(0, 1), "gather": slice(1, 2), "dynamic_slice": slice(1, None)}
_CHOOSING |= {"dynamic_update_slice": slice(2, None)}
_CHOOSING |= {name: slice(1, 2) for name in _PIECEWISE if name.startswith("scatter")}
# Locally constant, and constant to automatic differentiation.
_STEPS = frozenset(
    [
        "argmax",
        "argmin",
        "ceil",
        "eq",
        "floor",
        "ge",
        "gt",
        "is_finite",
        "le",
        "lt",
        "ne",
        "round",
        "sign",
        "stop_gradient",
        "eq_to",
        "le_to",
        "lt_to",
    ]
)
_PRODUCTS = frozenset({"conv_general_dilated", "dot_general", "mul"})

DEEPEST_RULE = 3
"""Derivative rules within derivative rules are followed so far: a rule may call itself."""


@dataclass(frozen=True)
class _Walk:
    """One pass over a graph; the verdicts on derivative rules are kept, for networks repeat their activations."""

    rules: dict[tuple, bool]
    live: dict[Body, frozenset[Node]]
    depth: int = 0

    def body(self, body: Body, inputs: Sequence[_State], near: str = "an unknown line") -> list[_State]:
        """States of the outputs; ``near`` is a source line for operations that have none of their own."""
        states: dict[Value, _State] = dict(zip(body.inputs, inputs, strict=True))

        def of(operand) -> _State:
            return _FREE if isinstance(operand, Constant) else states.get(operand, _FREE)

        for node in self.needed(body):
            near = node.source or near
            operands = [of(operand) for operand in node.inputs]
            if any(state.depends or state.unproven for state in operands):
                states.update(zip(node.outputs, self.node(node, operands, near), strict=True))
        return [of(operand) for operand in body.outputs]

    def needed(self, body: Body) -> list[Node]:
        """The nodes that reach an output, so that no reason comes from dead code."""
        if body not in self.live:
            wanted, found = set(body.outputs), set()
            for node in reversed(body.nodes):
                if any(value in wanted for value in node.outputs):
                    found.add(node)
                    wanted.update(node.inputs)
            self.live[body] = frozenset(found)
        return [node for node in body.nodes if node in self.live[body]]

    def node(self, node: Node, operands: list[_State], near: str) -> list[_State]:
        name, count = node.name, len(node.outputs)
        where = f"at {node.source}" if node.source else f"inside a function of JAX used after {near}"
        every = _union(state.depends for state in operands)
        if any(state.depends and _is_complex(value) for state, value in zip(operands, node.inputs, strict=True)):
            # Absolute value and sign have no pieces in the plane; that other operations would do is not worth rules.
            why = f"{name} of complex values is not known to be piecewise linear {where}"
            return [_joined(operands, every, why)] * count
        if name in _STEPS or _rounds_to_integer(node):
            return [_FREE] * count
        if name in REMAT or name in CUSTOM_RULE:
            assert node.body is not None
            outputs = self.body(node.body, operands, near)
            return outputs if name in REMAT else self.custom(node, operands, outputs, where)
        if name in _ONE_TO_ONE:
            return operands
        if name == "top_k":  # the values, and the places where they were
            return [operands[0], _FREE]
        if name in _PRODUCTS:
            both = operands[0].depends & operands[1].depends
            return [_joined(operands, both, f"used twice in a product: {name} {where}")] * count
        if name == "div":
            why = f"div by a value that depends on it {where}"
            return [_joined(operands, operands[1].depends, why)]
        if name in ("integer_pow", "pow") and _is_one(node):
            return [operands[0]]
        if name in _PIECEWISE or name == "convert_element_type":
            choosing = operands[_CHOOSING.get(name, slice(0, 0))]
            bits = _union(state.depends for state in choosing)
            return [_joined(operands, bits, f"{name} chooses by a value that depends on it {where}")] * count
        return [_joined(operands, every, f"{name} is not known to be piecewise linear {where}")] * count

    def custom(self, node: Node, operands: list[_State], outputs: list[_State], where: str) -> list[_State]:
        """A call with its own derivative: proven if its body is, and the rule is its derivative and does not vary.

        The outputs depend on all that goes in, even where the body cuts it (straight-through rounding).
        """
        every = _union(state.depends for state in operands)
        varying = tuple(bool(state.depends) for state in operands)
        kind = (varying, *sorted((name, id(value)) for name, value in node.params.items()))
        if kind not in self.rules:
            self.rules[kind] = self.constant_rule(node, varying) and is_own_derivative(node)
        name = node.params.get("name", node.name)
        why = f"{name} has a derivative rule that is not piecewise constant, or not its derivative, {where}"
        joined = _joined([*outputs, *operands], 0 if self.rules[kind] else every, why)
        return [joined] * len(node.outputs)

    def constant_rule(self, node: Node, varying: tuple[bool, ...]) -> bool:
        """Whether a derivative rule does not vary, but in steps, with the inputs that do."""
        if self.depth == DEEPEST_RULE:
            return False
        derivative = node.derivative
        if node.name == "custom_jvp_call":  # outputs, then their tangents
            derivative = replace(derivative, outputs=derivative.outputs[len(node.outputs) :])
        primals = [_State(int(flag), ()) for flag in varying]
        extra = len(derivative.inputs) - len(primals)
        deeper = replace(self, rules={}, depth=self.depth + 1)
        results = deeper.body(derivative, [*primals, *[_FREE] * extra])
        return not any(state.depends or state.unproven for state in results)


def _joined(states: Iterable[_State], bits: int = 0, why: str = "") -> _State:
    """A value made of others, with ``bits`` newly unproven because of ``why``."""
    states = list(states)
    unproven = _merge(state.unproven for state in states)
    new = bits & ~sum(found for found, _ in unproven)
    return _State(_union(s.depends for s in states), (*unproven, (new, why)) if new else unproven)


def _merge(several: Iterable[tuple[tuple[int, str], ...]]) -> tuple[tuple[int, str], ...]:
    merged: tuple[tuple[int, str], ...] = ()
    seen = 0
    for unproven in several:
        if unproven is merged or not unproven:
            continue
        new = tuple((bits & ~seen, why) for bits, why in unproven if bits & ~seen)
        merged, seen = (*merged, *new), seen | _union(bits for bits, _ in new)
    return merged


def _union(sets: Iterable[int]) -> int:
    union = 0
    for bits in sets:
        union |= bits
    return union


def _rounds_to_integer(node: Node) -> bool:
    inexact = [jnp.issubdtype(value.dtype, jnp.inexact) for value in (*node.inputs, *node.outputs)]
    return node.name == "convert_element_type" and inexact == [True, False]


def _is_complex(value: Operand) -> bool:
    return jnp.issubdtype(value.dtype, jnp.complexfloating)


def _is_one(node: Node) -> bool:
    exponent = node.params["y"] if node.name == "integer_pow" else getattr(node.inputs[1], "value", None)
    return exponent is not None and bool(exponent == 1)
