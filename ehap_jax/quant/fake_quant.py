"""The same function with INT8 rounding in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ehap_jax import _compat
from ehap_jax.graph.trace import REMAT, Body, Constant, Graph, Node, Operand, Value, trace_graph
from ehap_jax.quant.fold import Site, Sites, apply_moves, find_sites, fold
from ehap_jax.quant.numerics import (
    Grid,
    GridKind,
    activation_grid,
    at_least_float32,
    fake_quantise,
    quantise,
    symmetric_grid,
)
from ehap_jax.quant.observers import QState, RangeState, empty_range, observe
from ehap_jax.quant.residual import find_branches
from ehap_jax.quant.rules import INT8, QuantRule, match_rules

LARGEST_BIAS = 2**30
LARGEST_INT32 = 2**31 - 128  # the largest float32 below 2³¹


class Quantized(NamedTuple):
    """A quantised function, as two pure functions.

    init: ``init(variables, x) -> qstate``, one range that has seen nothing per quantised activation.
    apply: ``apply(variables, qstate, x, *, update) -> (y, qstate)``; ``update`` (a Python bool) observes every
        activation before it is rounded.
    """

    init: Callable[..., QState]
    apply: Callable[..., tuple[Any, QState]]


def fake_quant(apply: Callable, rules: Sequence[QuantRule] = INT8) -> Quantized:
    """``apply(variables, x)`` with its conv and dense layers computing on integer grids.

    For every layer whose kernel derives from variables: the affine tail after it (BatchNorm with frozen statistics,
    scale, bias) is folded into kernel and bias first; the folded kernel is rounded symmetrically per output channel,
    its input asymmetrically per tensor, its bias to int32 at scale ``s_x · s_w``. Gradients pass straight through, zero
    where clipped, and reach kernel, scale and bias through the folding. Operands of residual sums are rounded too,
    unless the rule's ``residual_bits`` is None, each branch with a range of its own (or that of the layer which reads
    the same value). Other operations, such as pooling, stay in floating point between rounded values.

    ``apply`` is the evaluation-mode function, dense or made by ``shrink``. Ranges are named after the kernel that reads
    the value first; a kernel applied twice has one range per use. Rematerialisation inside ``apply`` is dropped, as its
    ranges have to leave it. A range that has seen no data gives NaN under jit and an error outside it.

    Raises ValueError for a rule that matches no kernel or a range that has seen no data, KeyError for a qstate of
    another network, NotImplementedError for a layer that cannot be replaced (inside a custom derivative rule, a loop or
    a branch) unless a rule skips it.

    >>> import jax, jax.numpy as jnp
    >>> q = fake_quant(lambda w, x: x @ w["kernel"])
    >>> w, x = {"kernel": jnp.array([[1.0], [-0.5]])}, jnp.array([[1.0, 2.55]])
    >>> y, ranges = q.apply(w, q.init(w, x), x, update=True)
    >>> round(float(y[0, 0]), 3), round(float(ranges["kernel"].high), 2)
    (-0.285, 2.55)
    """

    def init(variables, x) -> QState:
        return {name: empty_range() for name in _prepare(apply, rules, variables, x).names.values()}

    def quantized(variables, qstate: QState, x, *, update: bool) -> tuple[Any, QState]:
        network = _prepare(apply, rules, variables, x)
        _check_ranges(network, qstate, update)
        ranges = dict(qstate)
        observed: set[str] = set()

        def grid_of(rounding: _Rounding, rule: QuantRule, read: Read) -> Grid:
            name = network.names[rounding]
            if update and name not in observed:
                ranges[name] = observe(ranges[name], read(rounding.value), rule, bits=rounding.bits)
                observed.add(name)
            return _activation_grid(ranges[name], rounding, rule)

        def layer(site: Site, rule: QuantRule, read: Read):
            return _quantised_layer(site, rule, grid_of(_input_rounding(site, rule), rule, read), read)

        def branch(operand: Operand, rounding: _Rounding, rule: QuantRule, read: Read):
            grid = grid_of(rounding, rule, read)
            return fake_quantise(read(operand), grid, learned=rule.observer == "learned")

        outputs = _run(network, network.graph.body, jax.tree.leaves((variables, x)), layer, branch)
        return jax.tree.unflatten(network.graph.output_tree, outputs), ranges

    return Quantized(init, quantized)


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
    network = _prepare(apply, rules, variables, x)
    _check_ranges(network, qstate, update=False)
    found: dict[str, QuantizedKernel] = {}

    def layer(site: Site, rule: QuantRule, read: Read):
        rounding = _input_rounding(site, rule)
        seen = _activation_grid(qstate[network.names[rounding]], rounding, rule)
        numbers = _layer_numbers(site, rule, seen, read)
        for what, scale in (("input range", seen.scale), ("folded kernel", numbers.weights.scale)):
            if not isinstance(scale, Tracer) and not bool(jnp.all(jnp.isfinite(scale))):
                raise ValueError(f"{site.name}: its {what} is not finite, which no integer can stand for.")
        bias = None if numbers.bias is None else quantise(numbers.offset, numbers.bias).astype(jnp.int32)
        found[site.name] = QuantizedKernel(
            quantise(numbers.kernel, numbers.weights).astype(jnp.int8),
            numbers.weights.scale.astype(jnp.float32),
            bias,
            seen.scale.astype(jnp.float32),
            seen.zero_point.astype(jnp.int32),
        )

    _run(network, network.graph.body, jax.tree.leaves((variables, x)), layer, lambda *_: None)
    return found


def quantized_bytes(apply: Callable, variables, x, rules: Sequence[QuantRule] = INT8) -> int:
    """Storage of the quantised network in bytes.

    Integer kernels at their own number of bits; per layer a float32 scale per output channel (or one) and int32 biases;
    a float32 scale and a zero point per quantised activation; every variable that was not folded in its own dtype.
    """
    network = _prepare(apply, rules, variables, x)
    graph, sites = network.graph, network.sites
    kernels: dict[Any, int] = {}
    total = 0
    for node, site in network.layers.items():
        rule = network.rules[site.path]
        folded = tuple((s.node.name, s.flipped, _sources(s.vector, sites)) for s in site.tail if s.vector is not None)
        kernels[site.path, folded] = -(-prod(node.inputs[site.kernel_operand].shape) * rule.weight_bits // 8)
        total += 4 * (site.channels if rule.per_channel else 1) + (4 * site.channels if site.has_offset else 0)
    total += sum(kernels.values())
    total += sum(4 + -(-rounding.bits // 8) for rounding in network.names)
    needed = _unfolded_leaves(network)
    return total + sum(prod(v.shape) * jnp.dtype(v.dtype).itemsize for p, v in graph.leaves.items() if p in needed)


Read = Callable[[Operand], Any]


@dataclass(frozen=True)
class _Rounding:
    """A value, the kind of grid it is rounded to and how it is observed; layers that agree on all share a range."""

    value: Operand
    bits: int
    kind: GridKind
    observer: tuple[str, float, float]


@dataclass(frozen=True, eq=False)
class _Network:
    """A traced function with what is quantised in it.

    layers: the quantised ones. branches: the quantised operands of residual sums, by node and position, as the value
    whose range they have and their rule. names: the range of every rounding.
    """

    graph: Graph
    sites: Sites
    rules: dict[str, QuantRule]
    layers: dict[Node, Site]
    branches: dict[tuple[Node, int], tuple[_Rounding, QuantRule]]
    names: dict[_Rounding, str]


def _input_rounding(site: Site, rule: QuantRule) -> _Rounding:
    return _Rounding(site.activation, rule.activation_bits, rule.activations, _observer(rule))


def _observer(rule: QuantRule) -> tuple[str, float, float]:
    return rule.observer, rule.decay, rule.percentile


def _prepare(apply, rules, variables, x) -> _Network:
    graph = trace_graph(apply)(variables, x)
    sites = find_sites(graph)
    matched = match_rules(rules, sites.paths)
    for path, reason in sites.blocked.items():
        if path in matched:
            raise NotImplementedError(
                f"{path} cannot be quantised: {reason} would not see the quantised layer. Move the layer out, or leave "
                "it in floating point with QuantRule(pattern=..., skip=True) before the other rules."
            )
    layers = {node: site for node, site in sites.by_node.items() if site.path in matched}
    names: dict[_Rounding, str] = {}
    for site in layers.values():
        names.setdefault(_input_rounding(site, matched[site.path]), site.name)
    branches: dict[tuple[Node, int], tuple[_Rounding, QuantRule]] = {}
    for branch in find_branches(graph.body, layers.values(), sites):
        rule = matched[branch.site.path]
        if rule.residual_bits is not None:
            rounding = _Rounding(branch.origin, rule.residual_bits, _residual_kind(rule), _observer(rule))
            branches[branch.node, branch.position] = (rounding, rule)
            if rounding not in names:
                name = f"{branch.site.name}:{branch.side}"
                namesakes = sum(other.split("##")[0] == name for other in names.values())
                names[rounding] = f"{name}##{namesakes + 1}" if namesakes else name
    return _Network(graph, sites, matched, layers, branches, names)


def _residual_kind(rule: QuantRule) -> GridKind:
    """Branches before a sum have both signs, so what is unsigned at a layer's input is symmetric there."""
    return "symmetric" if rule.activations == "unsigned" else rule.activations


def _check_ranges(network: _Network, qstate: QState, update: bool) -> None:
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


def _activation_grid(seen: RangeState, rounding: _Rounding, rule: QuantRule) -> Grid:
    grid = activation_grid(rounding.kind, seen.low, seen.high, bits=rounding.bits, learned=rule.observer == "learned")
    return grid._replace(scale=jnp.where(seen.count > 0, grid.scale, jnp.full_like(grid.scale, jnp.nan)))


class _LayerNumbers(NamedTuple):
    """kernel: folded, on grid ``weights``. offset: the folded bias (channels,), on grid ``bias`` (None without one)."""

    kernel: jax.Array
    weights: Grid
    offset: jax.Array
    bias: Grid | None


def _layer_numbers(site: Site, rule: QuantRule, activations: Grid, read: Read) -> _LayerNumbers:
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
        return _LayerNumbers(kernel, symmetric_grid(kernel, bits=rule.weight_bits, axis=axis), offset, None)
    input_scale = jax.lax.stop_gradient(activations.scale).astype(kernel.dtype)
    needed = (jnp.abs(offset) / (input_scale * LARGEST_BIAS)).reshape(along)
    needed = needed if rule.per_channel else jnp.max(needed, keepdims=True)
    weights = symmetric_grid(kernel, bits=rule.weight_bits, axis=axis, at_least=needed)
    step = jnp.broadcast_to(weights.scale.reshape(-1), offset.shape) * input_scale
    return _LayerNumbers(kernel, weights, offset, Grid(step, jnp.zeros_like(step), -LARGEST_INT32, LARGEST_INT32))


def _quantised_layer(site: Site, rule: QuantRule, activations: Grid, read: Read):
    numbers = _layer_numbers(site, rule, activations, read)
    x, kernel = read(site.activation), read(site.kernel)
    inputs = [fake_quantise(x, activations, learned=rule.observer == "learned")]
    inputs.insert(site.kernel_operand, fake_quantise(numbers.kernel, numbers.weights).astype(kernel.dtype))
    (y,) = _compat.bind(site.node.primitive, inputs, site.node.params)
    y = apply_moves(site, y)
    if numbers.bias is not None:
        bias = fake_quantise(numbers.offset, numbers.bias)
        y = y.astype(at_least_float32(y.dtype))
        y = y + bias.astype(y.dtype).reshape([-1 if i == site.out_axis else 1 for i in range(y.ndim)])
    return y.astype(site.result.dtype)


def _run(network: _Network, body: Body, args: Sequence, layer: Callable, branch: Callable) -> list:
    """Evaluate ``body``.

    ``layer(site, rule, read)`` gives a layer's result after its tail, or None to leave the layer as it is;
    ``branch(operand, rounding, rule, read)`` what a residual sum reads, or None.
    """
    sites = network.sites
    env: dict[Value, Any] = dict(zip(body.inputs, args, strict=True))
    env.update(body.constants)
    folded: set[Node] = set()

    def read(operand: Operand):
        return operand.value if isinstance(operand, Constant) else env[operand]

    def evaluate(node: Node) -> None:
        inputs = [read(v) for v in node.inputs]
        for position, operand in enumerate(node.inputs):
            if (node, position) in network.branches:
                rounded = branch(operand, *network.branches[node, position], read)
                inputs[position] = inputs[position] if rounded is None else rounded
        if node.name in REMAT and node.body is not None:
            outputs = _run(network, node.body, inputs, layer, branch)
        else:
            outputs = _compat.bind(node.primitive, inputs, node.params)
        env.update(zip(node.outputs, outputs, strict=True))

    # What depends on variables alone comes first: tails are folded before their layer runs.
    for node in body.nodes:
        if node in sites.variable_nodes:
            evaluate(node)
    for node in body.nodes:
        if node in sites.variable_nodes or node in folded:
            continue
        site = network.layers.get(node)
        result = None if site is None else layer(site, network.rules[site.path], read)
        if site is None or result is None:
            evaluate(node)
        else:
            env[site.result] = result
            folded.update(step.node for step in site.tail)
    return [read(v) for v in body.outputs]


def _sources(operand: Operand, sites: Sites) -> frozenset[str]:
    return sites.sources.get(operand, frozenset()) if isinstance(operand, Value) else frozenset()


def _unfolded_leaves(network: _Network) -> set[str]:
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
