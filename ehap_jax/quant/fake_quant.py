"""The same function with INT8 rounding in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ehap_jax import _compat
from ehap_jax.graph.trace import REMAT, Body, Constant, Graph, Node, Operand, Value, trace_graph
from ehap_jax.quant.fold import Site, Sites, find_sites, fold
from ehap_jax.quant.numerics import Grid, asymmetric_grid, fake_quantise, quantise, signed_grid, symmetric_grid
from ehap_jax.quant.observers import RangeState, empty_range, observe
from ehap_jax.quant.rules import INT8, QuantRule, match_rules

QState = dict[str, RangeState]


class Quantized(NamedTuple):
    """A quantised function, as two pure functions.

    init: ``init(variables, x) -> qstate``, a range that has seen nothing per quantised layer.
    apply: ``apply(variables, qstate, x, *, update) -> (y, qstate)``; ``update`` (a Python bool) observes the input of
        every layer before it is rounded.
    """

    init: Callable[..., QState]
    apply: Callable[..., tuple[Any, QState]]


def fake_quant(apply: Callable, rules: Sequence[QuantRule] = INT8) -> Quantized:
    """``apply(variables, x)`` with its conv and dense layers computing on integer grids.

    For every layer whose kernel derives from variables: the affine tail after it (BatchNorm with frozen statistics,
    scale, bias) is folded into kernel and bias first; the folded kernel is rounded symmetrically per output channel,
    its input asymmetrically per tensor, its bias to int32 at scale ``s_x · s_w``. Gradients pass straight through, zero where
    clipped, and reach kernel, scale and bias through the folding. ``apply`` is the evaluation-mode function, dense or
    made by ``shrink``. A kernel applied twice has one range per use. Rematerialisation inside ``apply`` is dropped, as
    its ranges have to leave it.

    Raises ValueError for a rule that matches no kernel, KeyError for a qstate of another network, NotImplementedError
    for a layer inside a custom derivative rule.

    >>> import jax, jax.numpy as jnp
    >>> q = fake_quant(lambda w, x: x @ w["kernel"])
    >>> w, x = {"kernel": jnp.array([[1.0], [-0.5]])}, jnp.array([[1.0, 2.55]])
    >>> y, ranges = q.apply(w, q.init(w, x), x, update=True)
    >>> round(float(y[0, 0]), 3), round(float(ranges["kernel"].high), 2)
    (-0.285, 2.55)
    """

    def init(variables, x) -> QState:
        _, sites, matched = _prepare(apply, rules, variables, x)
        return {_input_name(site, sites): empty_range() for site in _quantised(sites, matched)}

    def quantized(variables, qstate: QState, x, *, update: bool) -> tuple[Any, QState]:
        graph, sites, matched = _prepare(apply, rules, variables, x)
        wanted = {_input_name(site, sites) for site in _quantised(sites, matched)}
        if wanted != qstate.keys():
            raise KeyError(
                f"this qstate is for another network or other rules: missing {sorted(wanted - qstate.keys())[:3]}, "
                f"unexpected {sorted(qstate.keys() - wanted)[:3]}."
            )
        ranges = dict(qstate)
        observed: set[str] = set()

        def layer(site: Site, inputs: list, read: Callable[[Operand], Any]):
            rule = matched.get(site.path)
            if rule is None:
                return None
            name = _input_name(site, sites)
            if update and name not in observed:
                ranges[name] = observe(ranges[name], inputs[0], rule.decay)
                observed.add(name)
            return _quantised_layer(site, rule, ranges[name], inputs, read)

        outputs = _run(graph.body, jax.tree.leaves((variables, x)), sites, layer)
        return jax.tree.unflatten(graph.output_tree, outputs), ranges

    return Quantized(init, quantized)


class QuantizedKernel(NamedTuple):
    """integers: int8, in the kernel's own layout, BatchNorm folded in. scale: float32, broadcastable against it."""

    integers: jax.Array
    scale: jax.Array


def quantize_weights(apply: Callable, variables, x, rules: Sequence[QuantRule] = INT8) -> dict[str, QuantizedKernel]:
    """The integers of the fake-quantised kernels, by layer (the kernel's path, with "#2" for its second use)."""
    graph, sites, matched = _prepare(apply, rules, variables, x)
    found: dict[str, QuantizedKernel] = {}

    def layer(site: Site, inputs: list, read):
        rule = matched.get(site.path)
        if rule is not None:
            folded, _ = _folded(site, inputs[1], read)
            grid = _weight_grid(site, rule, folded)
            found[site.name] = QuantizedKernel(quantise(folded, grid).astype(jnp.int8), grid.scale.astype(jnp.float32))

    _run(graph.body, jax.tree.leaves((variables, x)), sites, layer)
    return found


def quantized_bytes(apply: Callable, variables, x, rules: Sequence[QuantRule] = INT8) -> int:
    """Storage of the quantised network in bytes.

    Integer kernels, per layer one float32 scale per output channel (or one) and int32 biases, a float32 scale and a
    zero point byte per layer input, and every variable that was not folded in its own dtype.
    """
    graph, sites, matched = _prepare(apply, rules, variables, x)
    quantised = _quantised(sites, matched)
    total = 0
    for path in {site.path for site in quantised}:
        total += -(-prod(graph.leaves[path].shape) * matched[path].weight_bits // 8)
    for site in quantised:
        channels = site.node.inputs[1].shape[site.kernel_axis]
        total += 4 * channels + 4 * (channels if matched[site.path].per_channel else 1)
    total += 5 * len({_input_name(site, sites) for site in quantised})
    kept_float = {site.path for site in sites.by_node.values()} - {site.path for site in quantised}
    for path, value in graph.leaves.items():
        if path not in sites.folded_leaves or path in kept_float:
            total += prod(value.shape) * jnp.dtype(value.dtype).itemsize
    return total


def _prepare(apply, rules, variables, x) -> tuple[Graph, Sites, dict[str, QuantRule]]:
    graph = trace_graph(apply)(variables, x)
    sites = find_sites(graph)
    return graph, sites, match_rules(rules, dict.fromkeys(site.path for site in sites.by_node.values()))


def _quantised(sites: Sites, matched: dict[str, QuantRule]) -> list[Site]:
    return [site for site in sites.by_node.values() if site.path in matched]


def _input_name(site: Site, sites: Sites) -> str:
    """One range per value that is read: that of the first layer which reads it."""
    return next(s.name for s in sites.by_node.values() if s.node.inputs[0] is site.node.inputs[0])


def _weight_grid(site: Site, rule: QuantRule, kernel) -> Grid:
    return symmetric_grid(kernel, bits=rule.weight_bits, axis=site.kernel_axis if rule.per_channel else None)


def _folded(site: Site, kernel, read) -> tuple[jax.Array, jax.Array]:
    """The kernel times the tail's scale, and the tail's offset (channels,)."""
    scale, offset = fold(site, read, kernel.shape[site.kernel_axis], kernel.dtype)
    along = [-1 if i == site.kernel_axis else 1 for i in range(kernel.ndim)]
    return kernel * scale.reshape(along), offset


def _quantised_layer(site: Site, rule: QuantRule, seen: RangeState, inputs: list, read):
    x, kernel = inputs
    folded, offset = _folded(site, kernel, read)
    weights = _weight_grid(site, rule, folded)
    make = signed_grid if rule.symmetric_activations else asymmetric_grid
    activations = make(seen.low, seen.high, bits=rule.activation_bits)
    node = site.node
    (y,) = _compat.bind(node.primitive, [fake_quantise(x, activations), fake_quantise(folded, weights)], node.params)
    limit = 2**31 - 1
    step = jax.lax.stop_gradient(weights.scale.reshape(-1) * activations.scale.astype(weights.scale.dtype))
    # A channel whose kernel is all zero has no scale of its own to round its bias by.
    empty = jnp.all(folded == 0, axis=tuple(i for i in range(folded.ndim) if i != site.kernel_axis))
    grid = Grid(step, jnp.zeros_like(step), -limit, limit)
    bias = jnp.where(empty, offset, fake_quantise(offset, grid)) if site.tail else None
    if bias is None:
        return y
    along = [-1 if i == site.out_axis else 1 for i in range(y.ndim)]
    return y + bias.reshape(along).astype(y.dtype)


def _run(body: Body, args: Sequence, sites: Sites, layer: Callable) -> list:
    """Evaluate ``body``; ``layer(site, inputs, read)`` gives a layer's result after its tail, or None to leave it."""
    env: dict[Value, Any] = dict(zip(body.inputs, args, strict=True))
    env.update(body.constants)

    def read(operand: Operand):
        return operand.value if isinstance(operand, Constant) else env[operand]

    def evaluate(node: Node) -> None:
        inputs = [read(v) for v in node.inputs]
        if node.name in REMAT and node.body is not None:
            outputs = _run(node.body, inputs, sites, layer)
        else:
            outputs = _compat.bind(node.primitive, inputs, node.params)
        env.update(zip(node.outputs, outputs, strict=True))

    # What depends on variables alone comes first: tails are folded before their layer runs.
    for node in body.nodes:
        if node in sites.variable_nodes:
            evaluate(node)
    for node in body.nodes:
        if node in sites.variable_nodes or node.outputs[0] in env:
            continue
        site = sites.by_node.get(node)
        result = None if site is None else layer(site, [read(v) for v in node.inputs], read)
        if site is None or result is None:
            evaluate(node)
        else:
            env[site.result] = result
            env.update({skipped.outputs[0]: result for skipped in site.skipped})
    return [read(v) for v in body.outputs]
