"""The steps of a program as ONNX nodes: QDQ around every operation on integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from ehap_jax.graph.trace import Operand, Value
from ehap_jax.quant.fold import MOVES, Site
from ehap_jax.quant.integer import ZERO
from ehap_jax.quant.integer_arithmetic import negated
from ehap_jax.quant.onnx_graph import Tensor, Writer
from ehap_jax.quant.onnx_rules import Input, refuse, windows, write_node
from ehap_jax.quant.program import (
    AddStep,
    ClipStep,
    DequantizeStep,
    FloatLayerStep,
    FloatStep,
    IntegerGrid,
    Integers,
    LayerStep,
    MoveStep,
    PoolStep,
    Program,
    QuantizeStep,
    RequantizeStep,
    ScaleStep,
    Step,
    Target,
)
from ehap_jax.quant.weights import value_of

NumpyWeights = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Kernel, bias and scale of a layer."""


class StepWriter:
    """Writes a program. tensors: where every tensor of the program is in the file, by its name in the program."""

    def __init__(
        self,
        program: Program,
        known: Mapping[Value, np.ndarray],
        layers: Mapping[str, NumpyWeights],
        folded: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ) -> None:
        self.network, self.known, self.layers, self.folded = program.network, known, layers, folded
        self.writer = Writer()
        self.tensors: dict[str, Tensor] = {}
        for name, value in zip(program.inputs, program.network.graph.arguments, strict=True):
            shape = tuple(value.shape)
            self.tensors[name] = Tensor(self.writer.name(name), shape, tuple(range(len(shape))), np.dtype(value.dtype))
        for step in program.steps:
            self.step(step)

    def step(self, step: Step) -> None:
        match step:
            case QuantizeStep(source, target):
                self.quantise(self.tensors[source], target)
            case DequantizeStep(source, out, dtype):
                # ONNX Runtime would give what stands between the two roundings an integer kernel of its own making,
                # weights included; a sum of one operand keeps it from seeing them together.
                real = self.dequantised(self.tensors[source.name], source.grid)
                self.tensors[out] = self.writer.cast(replace(real, name=self.writer.node("Sum", [real.name])), dtype)
            case LayerStep(site, source, target):
                self.layer(site, source, target)
            case ScaleStep():
                self.scale(step)
            case AddStep(a, b, subtract, target):
                self.add(a, b, subtract, target)
            case PoolStep():
                self.pool(step)
            case MoveStep():
                self.move(step)
            case ClipStep(source, target):
                self.clip(source, target)
            case RequantizeStep(
                source, target
            ):  # adding 0 is an integer kernel; two roundings in a row would be merged
                x = self.dequantised(self.tensors[source.name], source.grid)
                zero = Tensor(self.scalar(0, np.uint8), (), (), np.dtype(np.uint8))
                self.quantise(
                    replace(x, name=self.writer.node("Add", [x.name, self.dequantised(zero, ZERO).name])), target
                )
            case FloatLayerStep(site, source, out):
                kernel, bias = self.folded[site.name]
                kernel = self.oriented(site, kernel)
                bias = self.per_column(site, kernel, bias)
                weights = [self.writer.constant(kernel, site.path), self.writer.constant(bias)]
                self.tensors[out] = self.moved(site, self.apply(site, self.rows(site, self.tensors[source]), weights))
            case FloatStep(node, operands, outs):
                tensor = write_node(self.writer, node, [self.operand(v) for v in operands])
                self.tensors[outs[0]] = tensor

    def operand(self, operand: str | Operand) -> Input:
        return self.tensors[operand] if isinstance(operand, str) else np.asarray(value_of(operand, self.known))

    # Between integers and real numbers

    def quantise(self, x: Tensor, target: Target) -> None:
        """Round a real tensor to its grid, with a Clip where the grid or a ReLU ends before the type does."""
        x, grid, name = self.writer.cast(x, np.float32), target.out.grid, target.out.name
        narrower = (target.low, target.high) != (np.iinfo(grid.dtype).min, np.iinfo(grid.dtype).max)
        clip_integers = narrower and grid.dtype.itemsize == 1
        if narrower and not clip_integers:  # ONNX Runtime clips no 16-bit integers
            ends = [self.scalar((end - grid.zero) * grid.scale, np.float32) for end in (target.low, target.high)]
            x = replace(x, name=self.writer.node("Clip", [x.name, *ends]))
        inputs = [x.name, self.scalar(grid.scale, np.float32), self.scalar(grid.zero, grid.dtype)]
        made = self.writer.name(f"{name}/unclipped" if clip_integers else name)
        made = self.writer.node("QuantizeLinear", inputs, out=made)
        tensor = replace(x, name=made, dtype=grid.dtype, fill=grid.zero)
        self.tensors[name] = self.clipped(tensor, target) if clip_integers else tensor

    def clip(self, source: Integers, target: Target) -> None:
        if source.grid.dtype.itemsize == 1:
            self.tensors[target.out.name] = self.clipped(self.tensors[source.name], target)
        else:
            self.quantise(self.dequantised(self.tensors[source.name], source.grid), target)

    def clipped(self, tensor: Tensor, target: Target) -> Tensor:
        limits = [self.scalar(limit, target.out.grid.dtype) for limit in (target.low, target.high)]
        made = self.writer.node("Clip", [tensor.name, *limits], out=self.writer.name(target.out.name))
        return replace(tensor, name=made)

    def dequantised(self, tensor: Tensor, grid: IntegerGrid) -> Tensor:
        inputs = [tensor.name, self.scalar(grid.scale, np.float32), self.scalar(grid.zero, grid.dtype)]
        made = self.writer.node("DequantizeLinear", inputs)
        return replace(tensor, name=made, dtype=np.dtype(np.float32), fill=0)

    def scalar(self, number: float, dtype) -> str:
        return self.writer.constant(np.asarray(number, dtype), "number")

    def weights(self, integers: np.ndarray, scale: np.ndarray, axis: int, hint: str) -> str:
        """The name of dequantised weights, one scale per index of ``axis``.

        Integers and zero points are stored for each: ONNX Runtime replaces both where it makes weights unsigned.
        """
        constant, zeros = self.writer.constant, np.zeros(scale.shape, integers.dtype)
        names = [constant(integers, hint, shared=False), constant(scale), constant(zeros, "zeros", shared=False)]
        return self.writer.node("DequantizeLinear", names, axis=axis)

    # Operations on integers

    def move(self, step: MoveStep) -> None:
        """On the integers; those of 16 bits, which ONNX Runtime cannot pad or pool, as the numbers they stand for."""
        grid, inputs = step.out.grid, list[Input]()
        wide = grid.dtype.itemsize > 1
        for operand in step.operands:
            if isinstance(operand, Integers):
                tensor = self.tensors[operand.name]
                inputs.append(self.dequantised(tensor, grid) if wide else tensor)
            elif step.node.name == "gather":
                inputs.append(operand)
            elif wide:
                inputs.append(((operand - grid.zero) * np.float32(grid.scale)).astype(np.float32))
            else:
                inputs.append(operand.astype(grid.dtype))
        moved = write_node(self.writer, step.node, inputs)
        if wide:
            self.quantise(moved, Target(step.out, grid.low, grid.high))
        else:
            self.tensors[step.out.name] = moved

    def layer(self, site: Site, source: Integers, target: Target | str) -> None:
        kernel, bias, scale = self.layers[site.name]
        kernel = self.oriented(site, kernel)
        bias, scale = self.per_column(site, kernel, bias), self.per_column(site, kernel, scale)
        x = self.dequantised(self.rows(site, self.tensors[source.name]), source.grid)
        weights = [self.weights(kernel, scale, 0 if site.node.name == "conv_general_dilated" else 1, site.name)]
        if bias.any():
            weights.append(self.weights(bias, np.float32(source.grid.scale) * scale, 0, f"{site.name}/bias"))
        y = self.apply(site, x, weights)
        if isinstance(target, str):
            self.tensors[target] = self.writer.cast(self.moved(site, y), site.result.dtype)
        else:
            self.quantise(y, target)
            self.tensors[target.out.name] = self.moved(site, self.tensors[target.out.name])

    def oriented(self, site: Site, kernel: np.ndarray) -> np.ndarray:
        """The kernel as ONNX wants it: output and input channels, then space; or (inputs, outputs) of a dense layer."""
        numbers = site.node.params["dimension_numbers"]
        if site.node.name == "conv_general_dilated":
            return kernel.transpose(numbers.rhs_spec)
        contracted, batch = numbers[0][site.kernel_operand], numbers[1][site.kernel_operand]
        if batch:
            raise refuse(site.node, f"the dense layer {site.name} with a kernel per example")
        free = [axis for axis in range(kernel.ndim) if axis not in contracted]
        return kernel.transpose(*contracted, *free).reshape(prod(kernel.shape[axis] for axis in contracted), -1)

    def per_column(self, site: Site, kernel: np.ndarray, vector: np.ndarray) -> np.ndarray:
        """Numbers per output channel for every column of a dense kernel, whose last axis the channels are."""
        return vector if site.node.name == "conv_general_dilated" else np.tile(vector, kernel.shape[1] // vector.size)

    def rows(self, site: Site, x: Tensor) -> Tensor:
        """The input of a dense layer as a matrix."""
        if site.node.name == "conv_general_dilated":
            return x
        contracted = site.node.params["dimension_numbers"][0][1 - site.kernel_operand]
        x = self.writer.lay(x, (*(i for i in range(len(x.shape)) if i not in contracted), *contracted))
        columns = prod(x.shape[axis] for axis in contracted)
        flat = replace(x, shape=x.lies, axes=tuple(range(len(x.shape))))
        return self.writer.reshape(flat, (prod(x.shape) // columns, columns))

    def moved(self, site: Site, y: Tensor) -> Tensor:
        """What a layer made, in the shape that JAX gives it, and the moves of its tail."""
        if site.node.name != "conv_general_dilated":
            source = site.activation.shape
            contracted = site.node.params["dimension_numbers"][0][1 - site.kernel_operand]
            rows = [n for axis, n in enumerate(source) if axis not in contracted]
            shape, count = site.node.outputs[0].shape, len(site.node.outputs[0].shape) - len(rows)
            columns = shape[len(rows) :] if site.kernel_operand == 1 else shape[:count]
            y = self.writer.reshape(y, (*rows, *columns))
            if site.kernel_operand == 0:
                y = replace(y, shape=tuple(shape), axes=(*range(count, len(shape)), *range(count)))
        for step in site.tail:
            if step.node.name in MOVES and step.node.name != "convert_element_type":
                y = write_node(self.writer, step.node, [y])
        return y

    def apply(self, site: Site, x: Tensor, weights: list[str]) -> Tensor:
        """The layer on real tensors; of a dense one, matrices."""
        if site.node.name == "conv_general_dilated":
            return self.convolve(site, x, weights)
        columns = prod(site.node.outputs[0].shape) // x.shape[0]
        return Tensor(self.writer.node("Gemm", [x.name, *weights]), (x.shape[0], columns), (0, 1), x.dtype)

    def convolve(self, site: Site, x: Tensor, weights: list[str]) -> Tensor:
        p, numbers = site.node.params, site.node.params["dimension_numbers"]
        if p["batch_group_count"] != 1 or any(n != 1 for n in p["lhs_dilation"]):
            raise refuse(site.node, f"the transposed or batch-grouped convolution {site.name}")
        x = self.writer.lay(x, numbers.lhs_spec)
        name = self.writer.node(
            "Conv",
            [x.name, *weights],
            strides=list(p["window_strides"]),
            pads=[int(before) for before, _ in p["padding"]] + [int(after) for _, after in p["padding"]],
            dilations=list(p["rhs_dilation"]),
            group=p["feature_group_count"],
        )
        return Tensor(name, tuple(site.node.outputs[0].shape), tuple(numbers.out_spec), x.dtype)

    def scale(self, step: ScaleStep) -> None:
        """A convolution of 1×1 with a group per channel."""
        kernel, bias, scale = self.layers[step.name]
        rank = len(step.source.shape)
        axis = rank - 1 if step.scale.axis is None else step.scale.axis
        channels = step.source.shape[axis]
        kernel, bias, scale = (np.broadcast_to(v, (channels,)) for v in (kernel, bias, scale))
        others = [i for i in range(rank) if i not in (0, axis)]
        if rank < 3 or axis == 0:
            what = f"an affine function of shape {step.source.shape} that no layer took up"
            raise refuse(step.scale.steps[0].node, what, self.network.reader(step.name))
        x = self.writer.lay(self.tensors[step.source.name], (0, axis, *others))
        x = self.dequantised(x, step.source.grid)
        kernel = kernel.reshape(channels, 1, *(1 for _ in others))
        weights = [self.weights(kernel, scale, 0, step.name)]
        if bias.any():
            weights.append(self.weights(bias, np.float32(step.source.grid.scale) * scale, 0, f"{step.name}/bias"))
        self.quantise(replace(x, name=self.writer.node("Conv", [x.name, *weights], group=channels)), step.target)

    def add(self, a: Integers, b: Integers, subtract: bool, target: Target) -> None:
        first = self.tensors[a.name]
        second, grid = self.writer.lay(self.tensors[b.name], first.axes), b.grid
        if subtract:
            second, grid = replace(second, name=self.writer.node("BitwiseNot", [second.name])), negated(grid)
        operands = [self.dequantised(first, a.grid), self.dequantised(second, grid)]
        shape = target.out.shape
        self.quantise(
            replace(operands[0], name=self.writer.node("Add", [v.name for v in operands]), shape=shape), target
        )

    def pool(self, step: PoolStep) -> None:
        node, x = step.pool.reduce, self.tensors[step.source.name]
        if node.name == "reduce_window_sum":  # a mean is a convolution with ones
            x, attributes = windows(self.writer, node, x)
            channels = x.shape[x.axes[1]]
            ones = np.ones((channels, 1, *attributes["kernel_shape"]), np.int8)
            scale = np.full(channels, np.float32(1) / np.float32(step.pool.count), np.float32)
            x = self.dequantised(x, step.source.grid)
            name = self.writer.node(
                "Conv", [x.name, self.weights(ones, scale, 0, "mean")], group=channels, **attributes
            )
            self.quantise(replace(x, name=name, shape=step.target.out.shape), step.target)
            return
        gone = tuple(node.params["axes"])
        kept = [axis for axis in range(len(x.shape)) if axis not in gone]
        if len(kept) != 2:
            raise refuse(node, f"a mean of shape {x.shape} over axes {gone}", self.network.reader(step.target.out.name))
        x = self.writer.lay(x, (*kept, *gone))
        real = self.dequantised(x, step.source.grid)
        real = replace(real, name=self.writer.node("GlobalAveragePool", [real.name]))
        out = replace(step.target.out, name=f"{step.target.out.name}/kept")
        self.quantise(real, replace(step.target, out=out))
        pooled = self.tensors[out.name]
        axes = self.writer.constant(np.arange(2, len(x.shape)), "axes")
        squeezed = self.writer.node("Squeeze", [pooled.name, axes], out=self.writer.name(step.target.out.name))
        shape = tuple(x.shape[axis] for axis in kept)
        tensor = replace(pooled, name=squeezed, shape=shape, axes=(0, 1))
        self.tensors[step.target.out.name] = self.writer.reshape(tensor, step.target.out.shape)


def outputs_of(program: Program, writer: StepWriter) -> list[Any]:
    """The tensors of the program's results."""
    found = []
    for out in program.outputs:
        if not isinstance(out, str):
            raise NotImplementedError("an output that does not depend on the input cannot be written as ONNX.")
        found.append(writer.writer.in_order(writer.tensors[out]))
    return found
