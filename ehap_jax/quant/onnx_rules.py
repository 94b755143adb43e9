"""One rule per primitive: how it is written in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax import lax

from ehap_jax.graph.trace import Node
from ehap_jax.quant.onnx_graph import Tensor, Writer
from ehap_jax.quant.rules import skipping

Input = Tensor | np.ndarray
Rule = Callable[[Writer, Node, list[Input]], Tensor]
RULES: dict[str, Rule] = {}

UNARY = {
    "abs": "Abs", "ceil": "Ceil", "erf": "Erf", "exp": "Exp", "floor": "Floor", "log": "Log", "logistic": "Sigmoid",
    "neg": "Neg", "not": "Not", "round": "Round", "sign": "Sign", "sin": "Sin", "cos": "Cos", "sqrt": "Sqrt",
    "tanh": "Tanh",
}  # fmt: skip
BINARY = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
    "eq": "Equal", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "and": "And", "or": "Or",
}  # fmt: skip


def write_node(writer: Writer, node: Node, inputs: Sequence[Input]) -> Tensor:
    """Append what ``node`` computes; NotImplementedError names a primitive without a rule."""
    rule = RULES.get(node.name)
    if rule is None or len(node.outputs) != 1:
        raise NotImplementedError(
            f"{node.name} at {node.source} has no ONNX rule; to_onnx knows: {', '.join(sorted(RULES))}."
        )
    return rule(writer, node, list(inputs))


def rule(*names: str):
    """Decorator: the rule of the primitives ``names``."""

    def decorate(function: Rule) -> Rule:
        RULES.update({name: function for name in names})
        return function

    return decorate


def refuse(node: Node, what: str, reader: str | None = None) -> NotImplementedError:
    """The error. reader: the path of the kernel that, left in floating point, would avoid it."""
    remedy = "" if reader is None else f" Leave the layer that reads it in floating point with {skipping(reader)}."
    return NotImplementedError(f"{node.name} at {node.source}: {what} cannot be written as ONNX.{remedy}")


def tensor_of(writer: Writer, value: Input) -> Tensor:
    """An operand as a tensor of the file."""
    if isinstance(value, Tensor):
        return value
    return Tensor(writer.constant(value), value.shape, tuple(range(value.ndim)), value.dtype)


def together(writer: Writer, node: Node, inputs: list[Input]) -> tuple[list[str], tuple[int, ...]]:
    """Names of operands that lie alike, and how they lie."""
    axes = max((v for v in inputs if isinstance(v, Tensor)), key=lambda v: len(v.shape)).axes
    names = []
    for value in inputs:
        if isinstance(value, Tensor):
            names.append(writer.lay(value, axes if value.shape else ()).name)
        else:
            names.append(writer.constant(value.transpose(axes) if value.ndim else value))
    return names, axes


def result(node: Node, name: str, axes: Sequence[int], like: Tensor | None = None) -> Tensor:
    """The tensor that a node makes, on the grid of ``like`` where that holds integers."""
    shape = tuple(node.outputs[0].shape)
    if like is not None:
        return replace(like, name=name, shape=shape, axes=tuple(axes))
    return Tensor(name, shape, tuple(axes), np.dtype(node.outputs[0].dtype))


@rule(*UNARY)
def unary(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    return result(node, writer.node(UNARY[node.name], [x.name]), x.axes)


@rule("max")
def maximum(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    numbers = [v for v in inputs if not isinstance(v, Tensor)]
    if len(numbers) == 1 and numbers[0].ndim == 0 and numbers[0] == 0:
        (x,) = (v for v in inputs if isinstance(v, Tensor))
        return result(node, writer.node("Relu", [x.name]), x.axes)
    return binary(writer, node, inputs)


@rule(*(name for name in BINARY if name != "max"))
def binary(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    names, axes = together(writer, node, inputs)
    return result(node, writer.node(BINARY[node.name], names), axes)


@rule("ne")
def not_equal(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    names, axes = together(writer, node, inputs)
    return result(node, writer.node("Not", [writer.node("Equal", names)]), axes)


@rule("square")
def square(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    return result(node, writer.node("Mul", [x.name, x.name]), x.axes)


@rule("rsqrt")
def rsqrt(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    return result(node, writer.node("Reciprocal", [writer.node("Sqrt", [x.name])]), x.axes)


@rule("erfc")
def complementary_error(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    one = writer.constant(np.ones((), x.dtype))
    return result(node, writer.node("Sub", [one, writer.node("Erf", [x.name])]), x.axes)


@rule("integer_pow")
def integer_pow(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    power = writer.constant(np.asarray(node.params["y"], x.dtype))
    return result(node, writer.node("Pow", [x.name, power]), x.axes)


@rule("clamp")
def clamp(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    low, x, high = inputs
    names, axes = together(writer, node, [x, low, high])
    return result(node, writer.node("Min", [writer.node("Max", names[:2]), names[2]]), axes)


@rule("select_n")
def select(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    if len(inputs) != 3:
        raise refuse(node, "a choice among more than two")
    (condition, otherwise, chosen), axes = together(writer, node, inputs)
    return result(node, writer.node("Where", [condition, chosen, otherwise]), axes)


@rule("convert_element_type")
def convert(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    return writer.cast(tensor_of(writer, inputs[0]), node.params["new_dtype"])


@rule("copy", "copy_p", "stop_gradient", "optimization_barrier")
def same(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    return tensor_of(writer, inputs[0])


# Rearrangements, of real numbers and of integers alike


@rule("transpose")
def transpose(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    order = tuple(node.params["permutation"])
    return result(node, x.name, [order.index(axis) for axis in x.axes], like=x)


@rule("reshape", "squeeze", "expand_dims")
def reshape(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    if node.params.get("dimensions") is not None and node.name == "reshape":
        raise refuse(node, "a reshape that transposes")
    return writer.reshape(tensor_of(writer, inputs[0]), node.outputs[0].shape)


@rule("broadcast_in_dim")
def broadcast(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x, shape = tensor_of(writer, inputs[0]), node.outputs[0].shape
    places = node.params["broadcast_dimensions"]
    spread = [1] * len(shape)
    for axis, place in enumerate(places):
        spread[place] = x.shape[axis]
    x = writer.reshape(x, spread)
    if tuple(spread) == tuple(shape):
        return x
    sizes = writer.constant(
        np.array([n if n != m else 1 for n, m in zip(shape, spread, strict=True)], np.int64), "shape"
    )
    return result(node, writer.node("Expand", [x.name, sizes]), x.axes, like=x)


@rule("slice")
def slice_(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    steps = node.params["strides"] or (1,) * len(x.shape)
    cuts = zip(node.params["start_indices"], node.params["limit_indices"], steps, strict=True)
    return _cut(writer, node, x, {i: cut for i, cut in enumerate(cuts) if cut != (0, x.shape[i], 1)})


@rule("rev")
def reverse(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    return _cut(writer, node, x, {axis: (-1, np.iinfo(np.int64).min, -1) for axis in node.params["dimensions"]})


def _cut(writer: Writer, node: Node, x: Tensor, cuts: dict[int, tuple[int, int, int]]) -> Tensor:
    if not cuts:
        return x
    columns = [np.array(column, np.int64) for column in zip(*cuts.values(), strict=True)]
    starts, ends, steps = (writer.constant(column, "cut") for column in columns)
    places = writer.constant(np.array([x.axes.index(axis) for axis in cuts], np.int64), "axes")
    return result(node, writer.node("Slice", [x.name, starts, ends, places, steps]), x.axes, like=x)


@rule("pad")
def pad(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x, number = tensor_of(writer, inputs[0]), inputs[1]
    config = [tuple(int(n) for n in sides) for sides in node.params["padding_config"]]
    if any(inner for *_, inner in config) or isinstance(number, Tensor):
        raise refuse(node, "padding between elements, or with a computed number,")
    if not any(before or after for before, after, _ in config):
        return x
    return _padded(writer, node, x, [(before, after) for before, after, _ in config], number)


def _padded(writer: Writer, node: Node, x: Tensor, sides: list[tuple[int, int]], number: np.ndarray) -> Tensor:
    amounts = [sides[axis][0] for axis in x.axes] + [sides[axis][1] for axis in x.axes]
    padding = writer.constant(np.array(amounts, np.int64), "padding")
    fill = writer.constant(np.asarray(number).astype(x.dtype).reshape(()), "fill")
    return result(node, writer.node("Pad", [x.name, padding, fill]), x.axes, like=x)


@rule("concatenate")
def concatenate(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    names, axes = together(writer, node, inputs)
    like = next(v for v in inputs if isinstance(v, Tensor))
    return result(node, writer.node("Concat", names, axis=axes.index(node.params["dimension"])), axes, like=like)


@rule("stack")
def stack(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    shape, axis = list(node.outputs[0].shape), node.params["axis"]
    slots: list[Input] = [writer.reshape(tensor_of(writer, v), [*shape[:axis], 1, *shape[axis + 1 :]]) for v in inputs]
    names, axes = together(writer, node, slots)
    return result(node, writer.node("Concat", names, axis=axes.index(axis)), axes)


@rule("gather")
def gather(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    """``jnp.take`` along one axis with indices known by now; those out of range are clipped or become 0."""
    x, indices = tensor_of(writer, inputs[0]), inputs[1]
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else None
    whole = all(size == (1 if i == axis else n) for i, (size, n) in enumerate(zip(sizes, x.shape, strict=True)))
    along = axis is not None and tuple(numbers.collapsed_slice_dims) == (axis,) and not numbers.operand_batching_dims
    if isinstance(indices, Tensor) or indices.ndim != 2 or not along or not whole:
        raise refuse(node, "anything but a choice of indices along one axis")
    assert axis is not None
    if tuple(numbers.offset_dims) != tuple(i for i in range(len(x.shape)) if i != axis):
        raise refuse(node, "a choice of indices that moves axes")
    chosen, last = indices[:, 0].astype(np.int64), x.shape[axis] - 1
    outside = (chosen < 0) | (chosen > last)
    if node.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP and outside.any():
        if node.params["fill_value"] != 0:
            raise refuse(node, "a choice of indices out of range")
        sides = [(0, 1 if i == axis else 0) for i in range(len(x.shape))]
        chosen = np.where(outside, last + 1, chosen)
        x = _padded(writer, node, x, sides, np.asarray(x.fill))
    chosen = np.clip(chosen, 0, last + 1 if outside.any() else last)
    name = writer.node("Gather", [x.name, writer.constant(chosen, "indices")], axis=x.axes.index(axis))
    return result(node, name, x.axes, like=x)


# Reductions and pooling


@rule("reduce_max", "reduce_min", "reduce_sum", "reduce_prod")
def reduce_(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x, gone = tensor_of(writer, inputs[0]), tuple(node.params["axes"])
    op = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum", "reduce_prod": "ReduceProd"}
    places = writer.constant(np.array([x.axes.index(axis) for axis in gone], np.int64), "axes")
    name = writer.node(op[node.name], [x.name, places], keepdims=0)
    kept = sorted(set(range(len(x.shape))) - set(gone))
    axes = [kept.index(axis) for axis in x.axes if axis not in gone]
    return result(node, name, axes, like=x if node.name in ("reduce_max", "reduce_min") else None)


@rule("argmax", "argmin")
def arg(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = writer.in_order(tensor_of(writer, inputs[0]))
    op = "ArgMax" if node.name == "argmax" else "ArgMin"
    found = writer.node(op, [x.name], axis=node.params["axes"][0], keepdims=0)
    shape = tuple(node.outputs[0].shape)
    tensor = Tensor(found, shape, tuple(range(len(shape))), np.dtype(np.int64))
    return writer.cast(tensor, node.params["index_dtype"])


@rule("reduce_window_max", "reduce_window_sum")
def window(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    x = tensor_of(writer, inputs[0])
    x, attributes = windows(writer, node, x)
    if node.name == "reduce_window_max":
        return result(node, writer.node("MaxPool", [x.name], **attributes), x.axes, like=x)
    mean = writer.node("AveragePool", [x.name], count_include_pad=1, **attributes)
    count = writer.constant(np.asarray(np.prod(attributes["kernel_shape"]), x.dtype))
    return result(node, writer.node("Mul", [mean, count]), x.axes)


def windows(writer: Writer, node: Node, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """``x`` with the axes that windows run over last, and the attributes of a pooling over them."""
    size, p = node.params["window_dimensions"], node.params
    moving = [i for i in range(len(size)) if size[i] > 1 or p["window_strides"][i] > 1 or any(p["padding"][i])]
    still = [i for i in range(len(size)) if i not in moving]
    if len(still) > 2:  # a channels-last image pooled along one axis
        moving, still = sorted([*moving, *still[1:-1]]), [still[0], still[-1]]
    if len(still) != 2 or any(n != 1 for n in p["base_dilation"]):
        raise refuse(node, f"windows over axes {moving}")
    attributes: dict[str, Any] = {
        "kernel_shape": [size[i] for i in moving],
        "strides": [p["window_strides"][i] for i in moving],
        "pads": [p["padding"][i][0] for i in moving] + [p["padding"][i][1] for i in moving],
        "dilations": [p["window_dilation"][i] for i in moving],
    }
    return writer.lay(x, (*still, *moving)), attributes


@rule("dot_general")
def dot_general(writer: Writer, node: Node, inputs: list[Input]) -> Tensor:
    """Axes as ``(batch, free, contracted) @ (batch, contracted, free)``."""
    (a_sum, b_sum), (a_batch, b_batch) = node.params["dimension_numbers"]
    a, b = (tensor_of(writer, v) for v in inputs)
    a_free = [i for i in range(len(a.shape)) if i not in (*a_sum, *a_batch)]
    b_free = [i for i in range(len(b.shape)) if i not in (*b_sum, *b_batch)]
    if len(a_sum) != 1 or len(b_free) != 1 or (a_batch and len(a_free) != 1):
        raise refuse(node, "a product over several axes")
    a, b = writer.lay(a, (*a_batch, *a_free, *a_sum)), writer.lay(b, (*b_batch, *b_sum, *b_free))
    return result(node, writer.node("MatMul", [a.name, b.name]), range(len(node.outputs[0].shape)))
