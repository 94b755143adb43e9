"""The integers of a quantised network: grids, folded kernels, biases, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ehap_jax import _compat
from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, Body, Constant, Operand, Value
from ehap_jax.quant.fold import Site, Sites, fold
from ehap_jax.quant.numerics import Grid, activation_grid, at_least_float32, quantise, symmetric_grid
from ehap_jax.quant.observers import QState, RangeState
from ehap_jax.quant.roundings import Network, Rounding, prepare
from ehap_jax.quant.rules import INT8, QuantRule

LARGEST_BIAS = 2**30
LARGEST_INT32 = 2**31 - 128  # the largest float32 below 2³¹


Read = Callable[[Operand], Any]


class QuantizedKernel(NamedTuple):
    """One layer's integers.

    integers: int8, in the kernel's own layout, the tail's scale folded in. scale: float32, broadcastable against it.
    bias: int32 (channels,) at scale ``input_scale · scale``, None without one. input_scale: float32 (),
    input_zero_point: int32 (), of the activation it reads.
    """

    integers: jax.Array
    scale: jax.Array
    bias: jax.Array | None
    input_scale: jax.Array
    input_zero_point: jax.Array


def quantize_weights(
    apply: Callable, variables, qstate: QState, x, rules: Sequence[QuantRule] = INT8
) -> dict[str, QuantizedKernel]:
    """The integers behind ``fake_quant(apply, rules)``, by layer (the kernel's path, with "#2" for its second use).

    Outside jit, raises ValueError for a folded kernel or a range that is not finite: NaN has no integer.
    """
    network = prepare(apply, rules, variables, x)
    check_ranges(network, qstate)
    found = layer_integers(network, variables, qstate)
    check_layers(found)
    return found


def layer_integers(network: Network, variables, qstate: QState) -> dict[str, QuantizedKernel]:
    """:func:`quantize_weights` of a network that was prepared already, unchecked."""
    known = variable_values(network, dict(zip(network.graph.leaves, jax.tree.leaves(variables), strict=True)))
    found: dict[str, QuantizedKernel] = {}
    for node, site in network.layers.items():
        rule, rounding = network.rules[site.path], network.inputs[node]
        seen = grid_of_range(qstate[network.names[rounding]], rounding, rule)
        numbers = layer_numbers(site, rule, seen, partial(value_of, known=known))
        bias = None if numbers.bias is None else quantise(numbers.offset, numbers.bias).astype(jnp.int32)
        found[site.name] = QuantizedKernel(
            quantise(numbers.kernel, numbers.weights).astype(jnp.int8),
            numbers.weights.scale.astype(jnp.float32),
            bias,
            seen.scale.astype(jnp.float32),
            seen.zero_point.astype(jnp.int32),
        )
    return found


def check_layers(layers: Mapping[str, QuantizedKernel]) -> None:
    """Raise ValueError (outside jit) for a layer with a scale that is not finite."""
    for name, found in layers.items():
        for what, scale in (("input range", found.input_scale), ("folded kernel", found.scale)):
            if not isinstance(scale, Tracer) and not bool(jnp.all(jnp.isfinite(scale))):
                raise ValueError(f"{name}: its {what} is not finite, which no integer can stand for.")


def variable_values(network: Network, leaves: Mapping[str, Any]) -> dict[Value, Any]:
    """Everything that can be computed from ``leaves`` (variables by path) and from no data."""
    known: dict[Value, Any] = {network.graph.leaves[path]: leaf for path, leaf in leaves.items()}

    def fill(body: Body) -> None:
        known.update(body.constants)
        for node in body.nodes:
            if node in network.sites.variable_nodes:
                if all(isinstance(v, Constant) or v in known for v in node.inputs):
                    outputs = _compat.bind(node.primitive, [value_of(v, known) for v in node.inputs], node.params)
                    known.update(zip(node.outputs, outputs, strict=True))
            elif node.body is not None and node.name in REMAT | CUSTOM_RULE:
                for inner, outer in zip(node.body.inputs, node.inputs, strict=True):
                    if isinstance(outer, Constant) or outer in known:
                        known[inner] = value_of(outer, known)
                fill(node.body)

    fill(network.graph.body)
    return known


def evaluated_variables(network: Network, leaves: Mapping[str, Any]) -> dict[Value, np.ndarray]:
    """:func:`variable_values` in one compiled function, as NumPy arrays; works while another function is traced."""
    values: list[Value] = []

    def run(leaves):
        known = variable_values(network, leaves)
        values.extend(known)
        return list(known.values())

    with jax.ensure_compile_time_eval():
        return dict(zip(values, jax.device_get(jax.jit(run)(dict(leaves))), strict=True))


def value_of(operand: Operand, known: Mapping[Value, Any]):
    """A constant's value, or what is known of a value."""
    return operand.value if isinstance(operand, Constant) else known[operand]


def quantized_bytes(apply: Callable, variables, x, rules: Sequence[QuantRule] = INT8) -> int:
    """Storage of the quantised network in bytes.

    Integer kernels at their own number of bits; per layer a float32 scale per output channel (or one) and int32 biases;
    a float32 scale and a zero point per quantised activation; every variable that was not folded in its own dtype.
    """
    network = prepare(apply, rules, variables, x)
    graph, sites = network.graph, network.sites
    kernels: dict[Any, int] = {}
    total = 0
    for node, site in network.layers.items():
        rule = network.rules[site.path]
        folded = tuple((s.node.name, s.flipped, _sources(s.vector, sites)) for s in site.tail if s.vector is not None)
        kernels[site.path, folded] = -(-prod(node.inputs[site.kernel_operand].shape) * rule.weight_bits // 8)
        total += 4 * (site.channels if rule.per_channel else 1) + (4 * site.channels if site.has_offset else 0)
    total += sum(kernels.values())
    stored = {name: rounding.bits for rounding, name in network.names.items()}
    total += sum(4 + -(-bits // 8) for bits in stored.values())
    needed = unfolded_leaves(network)
    return total + sum(prod(v.shape) * jnp.dtype(v.dtype).itemsize for p, v in graph.leaves.items() if p in needed)


def check_ranges(network: Network, qstate: QState, update: bool = False) -> None:
    """Raise where ``qstate`` is of another network, or (outside jit, without ``update``) a range has seen no data."""
    wanted = set(network.names.values())
    if wanted != qstate.keys():
        raise KeyError(
            f"this qstate is for another network or other rules: missing {sorted(wanted - qstate.keys())[:3]}, "
            f"unexpected {sorted(qstate.keys() - wanted)[:3]}."
        )
    counts = {name: state.count for name, state in qstate.items()}
    if not update and not any(isinstance(count, Tracer) for count in counts.values()):
        unseen = [name for name, count in counts.items() if not count]
        if unseen:
            raise ValueError(
                f"the range of {', '.join(unseen[:3])} ({len(unseen)} of {len(counts)}) has never seen data; "
                "run apply(..., update=True) on some batches first."
            )


def grid_of_range(seen: RangeState, rounding: Rounding, rule: QuantRule) -> Grid:
    """The grid that a range gives; NaN where it has seen no data."""
    grid = activation_grid(rounding.kind, seen.low, seen.high, bits=rounding.bits, learned=rule.observer == "learned")
    return grid._replace(scale=jnp.where(seen.count > 0, grid.scale, jnp.full_like(grid.scale, jnp.nan)))


def unsigned_shift(low: int, bits: int) -> int:
    """What is added to the integers of a signed grid so that they are unsigned, as runtimes want activations."""
    return 0 if low >= 0 else 2 ** (bits - 1)


class LayerNumbers(NamedTuple):
    """kernel: folded, on grid ``weights``. offset: the folded bias (channels,), on grid ``bias`` (None without one)."""

    kernel: jax.Array
    weights: Grid
    offset: jax.Array
    bias: Grid | None


def layer_numbers(site: Site, rule: QuantRule, activations: Grid, read: Read) -> LayerNumbers:
    """What a layer computes with: its tail folded, and the grids of kernel and bias.

    A channel whose weights are so small that its bias would not fit into 30 bits at scale ``s_x · s_w`` gets the larger
    scale at which it does; that includes channels whose weights are all zero.
    """
    kernel = read(site.kernel)
    kernel = kernel.astype(at_least_float32(kernel.dtype))
    scale, offset = fold(site, read, kernel.dtype)
    along = [-1 if i == site.kernel_axis else 1 for i in range(kernel.ndim)]
    kernel = kernel * scale.reshape(along)
    axis = site.kernel_axis if rule.per_channel else None
    if not site.has_offset:
        return LayerNumbers(kernel, symmetric_grid(kernel, bits=rule.weight_bits, axis=axis), offset, None)
    input_scale = jax.lax.stop_gradient(activations.scale).astype(kernel.dtype)
    needed = (jnp.abs(offset) / (input_scale * LARGEST_BIAS)).reshape(along)
    needed = needed if rule.per_channel else jnp.max(needed, keepdims=True)
    weights = symmetric_grid(kernel, bits=rule.weight_bits, axis=axis, at_least=needed)
    step = jnp.broadcast_to(weights.scale.reshape(-1), offset.shape) * input_scale
    return LayerNumbers(kernel, weights, offset, Grid(step, jnp.zeros_like(step), -LARGEST_INT32, LARGEST_INT32))


def _sources(operand: Operand, sites: Sites) -> frozenset[str]:
    return sites.sources.get(operand, frozenset()) if isinstance(operand, Value) else frozenset()


def unfolded_leaves(network: Network) -> set[str]:
    """Variables that the quantised network still needs as they are: what is not read by folding alone."""
    folds = {node: {site.kernel_operand} for node, site in network.layers.items()}
    for site in network.layers.values():
        folds.update({step.node: {0, 1} for step in site.tail})
    read_as_they_are: set[str] = set()
    used: set[str] = set()
    for node in network.graph.body.walk():
        for position, operand in enumerate(node.inputs):
            paths = _sources(operand, network.sites)
            used |= paths
            inside_call = node.name in REMAT and node.body is not None
            if node not in network.sites.variable_nodes and not inside_call and position not in folds.get(node, set()):
                read_as_they_are |= paths
    for operand in network.graph.body.outputs:
        read_as_they_are |= _sources(operand, network.sites)
    return read_as_they_are | (set(network.graph.leaves) - used)
