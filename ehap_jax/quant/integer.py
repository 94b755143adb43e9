"""The quantised network in integers: int8 weights, uint8 activations, int32 sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ehap_jax import _compat
from ehap_jax.graph.trace import Operand, Value
from ehap_jax.quant import integer_arithmetic as arithmetic
from ehap_jax.quant.fake_quant import Quantized
from ehap_jax.quant.fold import Site, apply_moves, fold, fold_steps
from ehap_jax.quant.integer_speed import Execution, default_execution
from ehap_jax.quant.numerics import activation_grid, quantise, symmetric_grid
from ehap_jax.quant.observers import QState, check_calibrated
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
    lower,
)
from ehap_jax.quant.roundings import Network, Scale, prepare
from ehap_jax.quant.rules import QuantRule, skipping
from ehap_jax.quant.weights import (
    LARGEST_BIAS,
    check_layers,
    check_ranges,
    evaluated_variables,
    grid_of_range,
    layer_integers,
    unfolded_leaves,
    unsigned_shift,
    value_of,
    variable_values,
)

ZERO = IntegerGrid(1.0, 0, 0, 255)
"""The grid of the 0 that is added to integers to bring them to another grid, as the ONNX file does."""


class LayerWeights(NamedTuple):
    """kernel: int8. bias: int32 (channels,) at scale ``input scale · scale``. scale: float32 (channels,)."""

    kernel: jax.Array
    bias: jax.Array
    scale: jax.Array


@dataclass(frozen=True)
class Certificate:
    """What a layer's sums can come to, whatever the input; with the bias int32 holds them.

    largest: the largest |Σ (x_q − zero) · w_q| that any input causes. float32_parts: how many input channels at a time
    (of a dense layer: indices of its longest contracted axis) float32 sums exactly, in any order, because they stay
    below 2²⁴; () where a single one does not.
    """

    largest: int
    float32_parts: tuple[int, ...]

    @property
    def float32_exact(self) -> bool:
        """Whether the whole sum is exact in float32."""
        return len(self.float32_parts) == 1


@dataclass(frozen=True)
class Structure:
    """What the program of a network follows from, for any batch size; hashable."""

    function: Callable
    rules: tuple[QuantRule, ...]
    grids: tuple[tuple[str, IntegerGrid], ...]
    tree: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    def program(self, x) -> Program:
        """The steps for inputs of the shape of ``x``."""
        shapes = tuple((tuple(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(x))
        return _program(self, jax.tree.structure(x), shapes)


@lru_cache(maxsize=64)
def _program(structure: Structure, tree, shapes) -> Program:
    variables = jax.tree.unflatten(structure.tree, [jax.ShapeDtypeStruct(*leaf) for leaf in structure.leaves])
    x = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in shapes])
    network = prepare(structure.function, structure.rules, variables, x)
    return lower(network, dict(structure.grids), evaluated_variables(network, {}))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A network in integers, as a function ``network(x) -> logits`` and a pytree of its weights.

    layers: by name (kernel path, "#2" at its second use; "…:scale" for an affine function that no layer took up).
    multipliers: float32 (channels,), from a layer's sums to each thing it outputs. variables: what is read in floating
    point, by path. structure: where the program comes from. certificates and execution: by layer.
    """

    layers: dict[str, LayerWeights]
    multipliers: dict[str, jax.Array]
    variables: dict[str, jax.Array]
    structure: Structure = field(metadata={"static": True})
    certificates: tuple[tuple[str, Certificate], ...] = field(metadata={"static": True})
    execution: tuple[tuple[str, Execution], ...] = field(metadata={"static": True})

    def __call__(self, x):
        """What the function returns, in its dtypes.

        Raises ValueError (outside jit) where ``x`` holds NaN or infinity: they would become some integer.
        """
        program = self.structure.program(x)
        tensors, known = self._run(program, x)
        outputs = [tensors[out] if isinstance(out, str) else value_of(out, known) for out in program.outputs]
        return jax.tree.unflatten(program.network.graph.output_tree, outputs)

    def tensors(self, x) -> dict[str, jax.Array]:
        """Every quantised activation by name, as integers of its grid (uint8 where they are unsigned 8-bit ones)."""
        program = self.structure.program(x)
        tensors, _ = self._run(program, x)
        return {
            name: arithmetic.integers_of(tensors[out.name], out.grid).astype(out.grid.dtype)
            for name, out in program.integers.items()
        }

    def _run(self, program: Program, x) -> tuple[dict[str, jax.Array], Mapping[Value, Any]]:
        _require_finite(x)
        known = variable_values(program.network, self.variables)
        tensors: dict[str, jax.Array] = dict(zip(program.inputs, jax.tree.leaves(x), strict=True))
        for step in program.steps:
            self._step(step, tensors, known)
        return tensors, known

    def _step(self, step: Step, tensors: dict[str, jax.Array], known: Mapping[Value, Any]) -> None:
        match step:
            case QuantizeStep(source, target):
                tensors[target.out.name] = arithmetic.quantise_to(tensors[source], target)
            case DequantizeStep(source, out, dtype):
                tensors[out] = arithmetic.dequantise_from(tensors[source.name], source.grid).astype(dtype)
            case ClipStep(source, target):
                tensors[target.out.name] = arithmetic.clip(tensors[source.name], target)
            case RequantizeStep(source, target):
                tensors[target.out.name] = arithmetic.add(
                    tensors[source.name], source.grid, arithmetic.store(jnp.int32(0), ZERO), ZERO, target
                )
            case LayerStep(site, source, target):
                in_float32 = dict(self.execution)[site.name] == "float32"
                parts = dict(self.certificates)[site.name].float32_parts if in_float32 else ()
                kernel = self.layers[site.name].kernel
                total = arithmetic.accumulate(
                    site.node, site.kernel_operand, tensors[source.name], source.grid, kernel, parts
                )
                self._finish(site.name, apply_moves(site, total), site.out_axis, target, tensors, site.result.dtype)
            case ScaleStep(scale, name, source, target):
                zero = source.grid.zero - source.grid.stored_offset
                kernel = self.layers[name].kernel.astype(jnp.int32)
                x = tensors[source.name].astype(jnp.int32) - zero
                total = x * along(kernel, scale.axis, x.ndim)
                self._finish(name, total.reshape(target.out.shape), scale.axis, target, tensors)
            case AddStep(a, b, subtract, target):
                second, grid = tensors[b.name], b.grid
                if subtract:
                    integers = arithmetic.integers_of(second, grid)
                    flipped = np.iinfo(grid.dtype).min + np.iinfo(grid.dtype).max - integers
                    grid = arithmetic.negated(grid)
                    second = arithmetic.store(flipped, grid)
                tensors[target.out.name] = arithmetic.add(tensors[a.name], a.grid, second, grid, target)
            case PoolStep(pool, source, target):
                stored = tensors[source.name]
                tensors[target.out.name] = arithmetic.pool(pool.reduce, stored, source.grid, pool.count, target)
            case MoveStep(node, operands, out):
                tensors[out.name] = _move(node, operands, out, tensors)
            case FloatLayerStep(site, source, out):
                tensors[out] = _float_layer(site, tensors[source], known)
            case FloatStep(node, operands, outs):
                inputs = [tensors[v] if isinstance(v, str) else value_of(v, known) for v in operands]
                tensors.update(zip(outs, _compat.bind(node.primitive, inputs, node.params), strict=True))

    def _finish(
        self,
        name: str,
        total,
        axis: int | None,
        target: Target | str,
        tensors: dict[str, jax.Array],
        dtype: Any = jnp.float32,
    ) -> None:
        """Bias, and the scale of the result; ``dtype``, where that is a real tensor."""
        total = total + along(self.layers[name].bias, axis, total.ndim)
        if isinstance(target, str):
            multiplier = along(self.multipliers[target], axis, total.ndim)
            tensors[target] = (total.astype(jnp.float32) * multiplier).astype(dtype)
        else:
            multiplier = along(self.multipliers[target.out.name], axis, total.ndim)
            tensors[target.out.name] = arithmetic.requantise(total, multiplier, target)


def to_integer(
    quantized: Quantized,
    variables,
    qstate: QState,
    *,
    example,
    execution: Execution | Mapping[str, Execution] | None = None,
) -> IntegerNetwork:
    """The integer network that ``quantized`` was trained to be.

    Weights int8 per channel, activations 8-bit integers with a zero point, biases and sums int32; requantised as
    ``rint(float32(acc) · float32(s_x · s_w / s_y)) + zero``, half to even (Jacob et al. 2018, arXiv 1712.05877, eq. 4,
    with a float32 multiplier). Sums, means and dense layers round as ONNX Runtime's QLinearAdd,
    QLinearGlobalAveragePool and QGemm do; ReLU is clipping at the zero point. Everything from the first rounding to
    the logits is integers.

    ``example`` gives shape and dtype of the input (an array or ``jax.ShapeDtypeStruct``); other batch sizes work too.
    ``execution``: "int8" or "float32", for all layers or by layer name; both give the same integers, float32 by
    summing as many input channels at a time as the certificate says that it sums exactly. By default what
    :func:`ehap_jax.quant.integer_speed.default_execution` says for this backend.

    Raises NotImplementedError for an operation between quantised layers that has no integer form, ValueError for a
    range that has seen no data, is not finite or a single point, for sums that do not fit into int32, and for
    ``execution="float32"`` where a single input channel would not be exact.

    >>> import jax.numpy as jnp
    >>> from ehap_jax.quant import fake_quant
    >>> q = fake_quant(lambda w, x: x @ w["kernel"])
    >>> w, x = {"kernel": jnp.array([[1.0], [-0.5]])}, jnp.array([[1.0, 2.55]])
    >>> _, ranges = q.apply(w, q.init(w, x), x, update=True)
    >>> network = to_integer(q, w, ranges, example=x)
    >>> network.tensors(x)["kernel"].tolist(), round(float(network(x)[0, 0]), 3)
    ([[100, 255]], -0.285)
    """
    network = prepare(quantized.function, quantized.rules, variables, example)
    structure, layers = integer_weights(network, quantized, variables, qstate)
    program = structure.program(jax.tree.map(_struct, example))
    paths = dict(zip(network.graph.leaves, jax.tree.leaves(variables), strict=True))
    layers |= jax.jit(partial(scale_weights, program))(paths)
    multipliers = {name: jnp.asarray(m) for name, m in step_multipliers(program, layers).items()}
    certificates = certify(program, layers)
    return IntegerNetwork(
        layers=layers,
        multipliers=multipliers,
        variables={path: paths[path] for path in sorted(unfolded_leaves(network))},
        structure=structure,
        certificates=tuple(certificates.items()),
        execution=tuple(_choose(program, certificates, execution).items()),
    )


def integer_weights(
    network: Network, quantized: Quantized, variables, qstate: QState
) -> tuple[Structure, dict[str, LayerWeights]]:
    """The hashable part of an integer network, and the weights of its layers."""
    check_ranges(network, qstate)
    check_calibrated(qstate)
    roundings = {network.names[r]: (r, rule) for r, rule in (*network.made.values(), *network.own.values())}
    made = jax.jit(lambda ranges: {name: grid_of_range(ranges[name], *roundings[name])[:2] for name in roundings})
    found, grids = jax.device_get(made(qstate)), {}
    for name, (rounding, _) in roundings.items():
        scale, zero = found[name]
        unit = activation_grid(rounding.kind, jnp.float32(0), jnp.float32(1), bits=rounding.bits)
        shift = unsigned_shift(unit.low, rounding.bits)
        grids[name] = IntegerGrid(float(np.float32(scale)), int(zero) + shift, unit.low + shift, unit.high + shift)
    layers: dict[str, LayerWeights] = {}
    channels = {site.name: site.channels for site in network.layers.values()}
    kernels = jax.jit(partial(layer_integers, network))(variables, qstate)
    check_layers(kernels)
    for name, found in kernels.items():
        zeros = jnp.zeros(channels[name], jnp.int32)
        scale = jnp.broadcast_to(found.scale.reshape(-1), (channels[name],))
        layers[name] = LayerWeights(found.integers, zeros if found.bias is None else found.bias, scale)
    leaves = tuple((tuple(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(variables))
    tree = jax.tree.structure(variables)
    return Structure(quantized.function, quantized.rules, tuple(grids.items()), tree, leaves), layers


def scale_weights(program: Program, leaves: Mapping[str, Any]) -> dict[str, LayerWeights]:
    """Affine functions that no layer took up, as layers with one weight per channel."""
    known = variable_values(program.network, leaves)
    found: dict[str, LayerWeights] = {}
    for step in program.steps:
        if isinstance(step, ScaleStep):
            found[step.name] = _scale_weights(step.scale, step.source.grid, known)
    return found


def _scale_weights(scale: Scale, source: IntegerGrid, known: Mapping[Value, Any]) -> LayerWeights:
    factor, offset = fold_steps(scale.steps, scale.channels, partial(value_of, known=known), jnp.float32)
    needed = jnp.abs(offset) / (np.float32(source.scale) * np.float32(LARGEST_BIAS))
    grid = symmetric_grid(factor, axis=0, at_least=needed)
    bias = jnp.rint(offset / (grid.scale * np.float32(source.scale))).astype(jnp.int32)
    return LayerWeights(quantise(factor, grid).astype(jnp.int8), bias, grid.scale)


def step_multipliers(program: Program, layers: Mapping[str, LayerWeights]) -> dict[str, np.ndarray]:
    """float32(s_x · s_w / s_y) by output, (channels,); s_x · s_w where the output is real."""
    found: dict[str, np.ndarray] = {}
    for step in program.steps:
        if isinstance(step, LayerStep | ScaleStep):
            name = step.site.name if isinstance(step, LayerStep) else step.name
            product = np.float32(step.source.grid.scale) * np.asarray(layers[name].scale, np.float32)
            if isinstance(step.target, str):
                found[step.target] = product
            else:
                found[step.target.out.name] = product / np.float32(step.target.out.grid.scale)
    return found


def certify(program: Program, layers: Mapping[str, LayerWeights]) -> dict[str, Certificate]:
    """The certificate of every conv and dense layer; ValueError where int32 may overflow."""
    found: dict[str, Certificate] = {}
    for step in program.steps:
        if isinstance(step, LayerStep):
            site, (kernel, bias, _) = step.site, jax.device_get(layers[step.site.name])
            reaches = arithmetic.reach(site, step.source.grid, kernel)
            largest, with_bias = arithmetic.largest_sums(site, reaches, bias)
            if with_bias >= 2**31:
                raise ValueError(
                    f"{site.name}: its sums can reach {with_bias}, which int32 cannot hold; use fewer bits or "
                    f"leave it in floating point with {skipping(site.path)}."
                )
            found[site.name] = Certificate(largest, arithmetic.float32_parts(reaches))
    return found


def along(vector: jax.Array, axis: int | None, rank: int) -> jax.Array:
    """``(channels,)`` along one axis of an array of ``rank``; a single number where there is no axis."""
    return vector.reshape([-1 if i == axis else 1 for i in range(rank)])


def _choose(program: Program, certificates: Mapping[str, Certificate], wanted) -> dict[str, Execution]:
    layers = [step for step in program.steps if isinstance(step, LayerStep)]
    unknown = sorted(set(wanted) - {step.site.name for step in layers}) if isinstance(wanted, Mapping) else []
    if unknown:
        names = ", ".join(step.site.name for step in layers)
        raise ValueError(f"execution names {', '.join(unknown)}, which are no layers here; they are {names}.")
    chosen: dict[str, Execution] = {}
    for step in layers:
        name, certificate = step.site.name, certificates[step.site.name]
        given = wanted.get(name) if isinstance(wanted, Mapping) else wanted
        how = default_execution(step.site, certificate.float32_parts, jax.default_backend()) if given is None else given
        if how not in ("int8", "float32"):
            raise ValueError(f'execution must be "int8" or "float32", got {how!r} for {name}.')
        if how == "float32" and not certificate.float32_parts:
            raise ValueError(
                f"{name}: the sums of a single input channel are not exact in float32 (they can reach 2²⁴); use "
                'execution="int8" for it.'
            )
        chosen[name] = how
    return chosen


def _require_finite(x) -> None:
    leaves = [leaf for leaf in jax.tree.leaves(x) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not any(isinstance(leaf, Tracer) for leaf in leaves) and not all(jnp.isfinite(leaf).all() for leaf in leaves):
        raise ValueError("the input holds NaN or infinity, which no integer can stand for")


def _struct(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


def _move(
    node, operands: tuple[Integers | np.ndarray, ...], out: Integers, tensors: Mapping[str, jax.Array]
) -> jax.Array:
    inputs, params = list[jax.Array](), dict(node.params)
    for operand in operands:
        if isinstance(operand, Integers):
            inputs.append(tensors[operand.name])
        else:
            known = jnp.asarray(operand)
            inputs.append(known if node.name == "gather" else arithmetic.store(known, out.grid))
    if node.name == "gather" and params["fill_value"] is not None and not np.isnan(params["fill_value"]):
        params["fill_value"] = out.grid.integer(params["fill_value"]) - out.grid.stored_offset
    (moved,) = _compat.bind(node.primitive, inputs, params)
    return moved


def _float_layer(site: Site, x: jax.Array, known: Mapping[Value, Any]) -> jax.Array:
    read: Callable[[Operand], Any] = partial(value_of, known=known)
    kernel, bias = folded_kernel(site, read)
    inputs = [x]
    inputs.insert(site.kernel_operand, kernel)
    (y,) = _compat.bind(site.node.primitive, inputs, site.node.params)
    return (apply_moves(site, y) + along(bias, site.out_axis, len(site.result.shape))).astype(site.result.dtype)


def folded_kernel(site: Site, read: Callable[[Operand], Any]) -> tuple[jax.Array, jax.Array]:
    """A layer's kernel and bias with its tail folded in, in floating point."""
    kernel = jnp.asarray(read(site.kernel))
    scale, offset = fold(site, read, kernel.dtype)
    return kernel * along(scale, site.kernel_axis, kernel.ndim), offset
