"""Operations that act index by index: operands of full size live and die together."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from ehap_jax._compat import bind
from ehap_jax.graph.interpret import register
from ehap_jax.graph.structure import Axis, Labels, Structure
from ehap_jax.graph.trace import Constant, Node

# f(0) = 0, so that a pruned and masked channel stays exactly zero.
ZERO_KEEPING = [
    "abs",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "ceil",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "erf",
    "erf_inv",
    "expm1",
    "floor",
    "imag",
    "log1p",
    "neg",
    "real",
    "reduce_precision",
    "round",
    "sharding_constraint",
    "sign",
    "sin",
    "sinh",
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
    "atan2",
    "cos",
    "cosh",
    "erfc",
    "exp",
    "exp2",
    "is_finite",
    "logistic",
    "not",
    "nextafter",
    "population_count",
]
# Infinite or undefined at 0: a masked channel would be infinite, and 0 · ∞ is not 0.
SINGULAR_AT_ZERO = ("acosh", "digamma", "lgamma", "log", "rsqrt")
# Zero at 0, but with an infinite derivative there: the gradient of a masked channel would be 0 · ∞, which is NaN.
SLOPE_SINGULAR_AT_ZERO = ("cbrt", "sqrt")
ZERO_IF_BOTH = ["or", "xor", "add_any", "complex"]
SHIFTS = ["shift_left", "shift_right_arithmetic", "shift_right_logical"]
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]


def elementwise(*names: str, resize: Callable | None = None):
    """``register`` for rules whose operands are full size, scalars, or of size one where they are spread."""

    def decorate(propagate):
        def aligned(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
            return propagate(structure, node, [_spread(structure, node, i, v) for i, v in enumerate(inputs)])

        register(*names, resize=resize)(aligned)
        return propagate

    return decorate


def _spread(structure: Structure, node: Node, position: int, value: Labels) -> Labels:
    """An operand as if broadcast: an axis of size one that is spread cannot go, its copies adopt what they meet."""
    have, want = node.inputs[position].shape, node.outputs[0].shape
    if len(have) != len(want) or have == want:
        return value
    axes, zero = list(value.axes), set(value.zero)
    for i, (a, b) in enumerate(zip(have, want, strict=True)):
        if a != b:
            structure.freeze(axes[i], f"broadcast from size one at {node.source}")
            axes[i] = (structure.fresh(b, copies=True),)
            if -1 not in zero:
                zero.discard(i)
    return Labels(tuple(axes), frozenset(zero), value.from_variables)


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


@elementwise(*NOT_ZERO_KEEPING)
def loses_zero(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return _result(structure, node, inputs, frozenset())


@elementwise(*SINGULAR_AT_ZERO)
def singular_at_zero(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    _freeze_zero(structure, node, inputs[0])
    return _result(structure, node, inputs, frozenset())


@elementwise(*SLOPE_SINGULAR_AT_ZERO)
def slope_singular_at_zero(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    _freeze_zero(structure, node, inputs[0])
    return _result(structure, node, inputs, zeros(inputs[0], len(node.outputs[0].shape)))


@elementwise(*ZERO_IF_BOTH)
def zero_if_both(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    rank = len(node.outputs[0].shape)
    return _result(structure, node, inputs, frozenset.intersection(*(zeros(v, rank) for v in inputs)))


@elementwise("mul", "and")
def zero_if_any(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    rank = len(node.outputs[0].shape)
    return _result(structure, node, inputs, frozenset.union(*(zeros(v, rank) for v in inputs)))


@elementwise("max", "min")
def extremum(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """Zero if both operands are, or if the other is a bound that zero satisfies (``min(x, 6)``)."""
    rank = len(node.outputs[0].shape)
    kept = [zeros(v, rank) for v in inputs]
    for i, operand in enumerate(node.inputs):
        bound = operand.value if isinstance(operand, Constant) else None
        if bound is not None and (bound >= 0 if node.name == "min" else bound <= 0):
            kept[i] = kept[1 - i]
    return _result(structure, node, inputs, frozenset.intersection(*kept))


@elementwise(*SHIFTS)
def shift(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return _result(structure, node, inputs, zeros(inputs[0], len(node.outputs[0].shape)))


@register("bitcast_convert_type")
def bitcast(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    """The bits of zero are zero; a change of width adds or removes the last axis."""
    value, rank = inputs[0], len(node.outputs[0].shape)
    for axis in value.axes[rank:]:
        structure.freeze(axis, f"bitcast to a wider type at {node.source}")
    axes = (*value.axes[:rank], *((),) * (rank - len(value.axes)))
    return [Labels(axes, frozenset(i for i in value.zero if i < rank), value.from_variables)]


@elementwise("div", "rem")
def zero_if_numerator(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    _freeze_zero(structure, node, inputs[1])
    return _result(structure, node, inputs, zeros(inputs[0], len(node.outputs[0].shape)))


@elementwise("pow", "integer_pow")
def power(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    exponent = node.params["y"] if node.name == "integer_pow" else getattr(node.inputs[1], "value", None)
    keeps = exponent is not None and bool(exponent > 0)
    flat = exponent is not None and bool((exponent == 0) | (exponent >= 1))
    if not flat:  # infinite at 0, or its derivative is
        _freeze_zero(structure, node, inputs[0])
    zero = zeros(inputs[0], len(node.outputs[0].shape)) if keeps else frozenset()
    return _result(structure, node, inputs, zero)


@elementwise(*COMPARISONS)
def comparison(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    return _result(structure, node, inputs, frozenset())


@elementwise("select_n")
def select(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    rank = len(node.outputs[0].shape)
    return _result(structure, node, inputs, frozenset.intersection(*(zeros(v, rank) for v in inputs[1:])))


@elementwise("clamp")
def clamp(structure: Structure, node: Node, inputs: list[Labels]) -> list[Labels]:
    low, high = (getattr(node.inputs[i], "value", None) for i in (0, 2))
    keeps = low is not None and high is not None and bool(np.all(low <= 0) and np.all(high >= 0))
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


@elementwise("add", "sub", resize=resize_sum)
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
