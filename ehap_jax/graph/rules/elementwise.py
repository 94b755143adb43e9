"""Operations that act index by index: operands of full size live and die together."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ehap_jax._compat import bind
from ehap_jax.graph.interpret import register
from ehap_jax.graph.structure import Axis, Labels, Structure
from ehap_jax.graph.trace import Node

# f(0) = 0, so that a pruned and masked channel stays exactly zero.
ZERO_KEEPING = [
    "abs",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "cbrt",
    "ceil",
    "convert_element_type",
    "copy",
    "copy_p",
    "erf",
    "erf_inv",
    "expm1",
    "floor",
    "imag",
    "is_finite",
    "log1p",
    "neg",
    "real",
    "reduce_precision",
    "round",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "stop_gradient",
    "tan",
    "tanh",
    "conj",
    "name",
    "optimization_barrier",
]
NOT_ZERO_KEEPING = [
    "acos",
    "acosh",
    "cos",
    "cosh",
    "digamma",
    "erfc",
    "exp",
    "exp2",
    "lgamma",
    "logistic",
    "not",
    "population_count",
]
# Infinite or undefined at 0: a masked channel would be infinite, and 0 · ∞ is not 0.
SINGULAR_AT_ZERO = ("log", "rsqrt")
ZERO_IF_BOTH = ["max", "min", "or", "xor", "add_any", "nextafter"]
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]


def joined(structure: Structure, node: Node, inputs: list[Labels]) -> list[Axis]:
    """Axes of an elementwise result: those of the operands of full rank, made equal."""
    rank = len(node.outputs[0].shape)
    full = [v.axes for v in inputs if len(v.axes) == rank]
    axes = list(full[0]) if full else [()] * rank
    for other in full[1:]:
        why = f"{node.name} with a value that cannot shrink at {node.source}"
        axes = [structure.equal(a, b, why) for a, b in zip(axes, other, strict=True)]
    return axes


def zeros(value: Labels, rank: int) -> frozenset[int]:
    """The axes along which an operand is zero when pruned; a zero scalar is zero along all."""
    return frozenset(range(-1, rank)) if -1 in value.zero else value.zero


def from_variables(inputs: list[Labels]) -> bool:
    return all(v.from_variables for v in inputs)


def _result(structure, node, inputs, zero: frozenset[int]) -> list[Labels]:
    axes = tuple(joined(structure, node, inputs))
    return [Labels(axes, zero, from_variables(inputs)) for _ in node.outputs]


@register(*ZERO_KEEPING)
def keeps_zero(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return [Labels(v.axes, v.zero, v.from_variables) for v in inputs[: len(node.outputs)]]


@register(*NOT_ZERO_KEEPING)
def loses_zero(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return _result(structure, node, inputs, frozenset())


@register(*SINGULAR_AT_ZERO)
def singular_at_zero(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    _freeze_zero(structure, node, inputs[0])
    return _result(structure, node, inputs, frozenset())


@register(*ZERO_IF_BOTH)
def zero_if_both(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    rank = len(node.outputs[0].shape)
    return _result(structure, node, inputs, frozenset.intersection(*(zeros(v, rank) for v in inputs)))


@register("mul", "and")
def zero_if_any(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    rank = len(node.outputs[0].shape)
    return _result(structure, node, inputs, frozenset.union(*(zeros(v, rank) for v in inputs)))


@register("div", "rem", "atan2")
def zero_if_numerator(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    _freeze_zero(structure, node, inputs[1])
    return _result(structure, node, inputs, zeros(inputs[0], len(node.outputs[0].shape)))


@register("pow", "integer_pow")
def power(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    if node.params.get("y", 1) < 0:
        _freeze_zero(structure, node, inputs[0])
    keeps = node.name == "integer_pow" and node.params["y"] > 0
    zero = zeros(inputs[0], len(node.outputs[0].shape)) if keeps else frozenset()
    return _result(structure, node, inputs, zero)


@register(*COMPARISONS)
def comparison(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return _result(structure, node, inputs, frozenset())


@register("select_n")
def select(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    rank = len(node.outputs[0].shape)
    return _result(structure, node, inputs, frozenset.intersection(*(zeros(v, rank) for v in inputs[1:])))


@register("clamp")
def clamp(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    low, value, high = (getattr(operand, "value", None) for operand in node.inputs)
    del value
    known = low is not None and high is not None and np.ndim(low) == 0 and np.ndim(high) == 0
    keeps = known and low <= 0 <= high
    rank = len(node.outputs[0].shape)
    return _result(structure, node, inputs, zeros(inputs[1], rank) if keeps else frozenset())


def resize_sum(node: Node, args, kept_inputs, kept_outputs):
    """A sum whose operands may keep less than the result: absent channels contribute zero."""
    rank = len(node.outputs[0].shape)
    args = list(args)
    for i, kept in enumerate(kept_inputs):
        if len(kept) != rank:
            continue
        for axis, (have, want) in enumerate(zip(kept, kept_outputs[0], strict=True)):
            if have is not None and (want is None or not np.array_equal(have, want)):
                args[i] = expand(args[i], axis, have, want, node.outputs[0].shape[axis])
    return bind(node.primitive, args, node.params)


@register("add", "sub", resize=resize_sum)
def addition(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    rank = len(node.outputs[0].shape)
    zero = frozenset.intersection(*(zeros(v, rank) for v in inputs))
    a, b = inputs
    if a.from_variables or b.from_variables or len(a.axes) != rank or len(b.axes) != rank:
        return _result(structure, node, inputs, zero)
    axes = []
    for i, (x, y) in enumerate(zip(a.axes, b.axes, strict=True)):
        both_zero = (not x or i in a.zero) and (not y or i in b.zero)
        axes.append(structure.add(x, y, both_zero, f"sum with a value that cannot shrink at {node.source}"))
    return [Labels(tuple(axes), zero, False)]


def expand(array, axis: int, have: np.ndarray, want: np.ndarray | None, size: int):
    """Spread the kept channels ``have`` over the positions of ``want`` (None: all ``size``), zero elsewhere."""
    want = np.arange(size) if want is None else want
    source = np.full(size, len(have))
    source[have] = np.arange(len(have))
    return jnp.take(array, source[want], axis=axis, mode="fill", fill_value=0)


def _freeze_zero(structure: Structure, node: Node, value: Labels) -> None:
    for axis in value.zero:
        if axis >= 0:
            structure.freeze(value.axes[axis], f"{node.name} of a value that masking makes zero at {node.source}")
