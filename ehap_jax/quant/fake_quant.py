"""The same function with INT8 rounding in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ehap_jax import _compat
from ehap_jax.graph.trace import REMAT, Body, Constant, Node, Operand, Value
from ehap_jax.quant.fold import Site, apply_moves
from ehap_jax.quant.numerics import (
    Grid,
    at_least_float32,
    fake_quantise,
    quantise,
)
from ehap_jax.quant.observers import QState, empty_range, observe
from ehap_jax.quant.roundings import Network, Rounding, prepare
from ehap_jax.quant.rules import INT8, QuantRule
from ehap_jax.quant.weights import Read, check_ranges, grid_of_range, layer_numbers, unsigned_shift


class Quantized(NamedTuple):
    """A quantised function, as two pure functions.

    init: ``init(variables, x) -> qstate``, one range that has seen nothing per quantised activation.
    apply: ``apply(variables, qstate, x, *, update) -> (y, qstate)``; ``update`` (a Python bool) observes every
        activation before it is rounded.
    function, rules: what ``fake_quant`` was given.
    """

    init: Callable[..., QState]
    apply: Callable[..., tuple[Any, QState]]
    function: Callable
    rules: tuple[QuantRule, ...]


def fake_quant(apply: Callable, rules: Sequence[QuantRule] = INT8) -> Quantized:
    """``apply(variables, x)`` with its conv and dense layers computing on integer grids.

    For every layer whose kernel derives from variables: the affine tail after it (BatchNorm with frozen statistics,
    scale, bias) is folded into kernel and bias first; the folded kernel is rounded symmetrically per output channel,
    its input asymmetrically per tensor, its bias to int32 at scale ``s_x · s_w``. Gradients pass straight through, zero
    where clipped, and reach kernel, scale and bias through the folding. Operands of residual sums are rounded too,
    unless the rule's ``residual_bits`` is None, each branch with a range of its own (or that of the layer which reads
    the same value). So are the
    operands of means (pooling) and of affine functions of a sum (the BatchNorm of a pre-activation network). A value is
    rounded where it is made, and all that reads it reads it rounded; between rounded values everything else
    computes in floating point.

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
        return {name: empty_range() for name in prepare(apply, rules, variables, x).names.values()}

    def quantized(variables, qstate: QState, x, *, update: bool) -> tuple[Any, QState]:
        network = prepare(apply, rules, variables, x)
        check_ranges(network, qstate, update)
        ranges = dict(qstate)
        observed: set[str] = set()

        def grid_of(rounding: Rounding, rule: QuantRule, raw) -> Grid:
            name = network.names[rounding]
            if update and name not in observed:
                as_rounded = replace(rule, activations=rounding.kind)  # a residual branch is signed
                ranges[name] = observe(ranges[name], raw, as_rounded, bits=rounding.bits)
                observed.add(name)
            return grid_of_range(ranges[name], rounding, rule)

        def layer(site: Site, rule: QuantRule, x, read: Read):
            seen = grid_of_range(ranges[network.names[network.inputs[site.node]]], network.inputs[site.node], rule)
            return _quantised_layer(site, rule, seen, x, read)

        def rounded(rounding: Rounding, rule: QuantRule, raw):
            return fake_quantise(raw, grid_of(rounding, rule, raw), learned=rule.observer == "learned")

        outputs = _run(network, network.graph.body, jax.tree.leaves((variables, x)), layer, rounded)
        return jax.tree.unflatten(network.graph.output_tree, outputs), ranges

    return Quantized(init, quantized, apply, tuple(rules))


def rounded_activations(quantized: Quantized, variables, qstate: QState, x) -> dict[str, jax.Array]:
    """The integers (int32) that every range's values are rounded to on the way, by range; compare ``to_integer``'s.

    Integers of signed grids count from their smallest number's 0, as unsigned ones do.
    """
    network = prepare(quantized.function, quantized.rules, variables, x)
    check_ranges(network, qstate)
    found: dict[str, jax.Array] = {}

    def layer(site: Site, rule: QuantRule, x, read: Read):
        rounding = network.inputs[site.node]
        return _quantised_layer(site, rule, grid_of_range(qstate[network.names[rounding]], rounding, rule), x, read)

    def rounded(rounding: Rounding, rule: QuantRule, raw):
        name = network.names[rounding]
        grid = grid_of_range(qstate[name], rounding, rule)
        found[name] = quantise(raw, grid).astype(jnp.int32) + unsigned_shift(grid.low, rounding.bits)
        return fake_quantise(raw, grid, learned=rule.observer == "learned")

    _run(network, network.graph.body, jax.tree.leaves((variables, x)), layer, rounded)
    return found


def _quantised_layer(site: Site, rule: QuantRule, activations: Grid, x, read: Read):
    numbers = layer_numbers(site, rule, activations, read)
    kernel = read(site.kernel)
    inputs = [x]
    inputs.insert(site.kernel_operand, fake_quantise(numbers.kernel, numbers.weights).astype(kernel.dtype))
    (y,) = _compat.bind(site.node.primitive, inputs, site.node.params)
    y = apply_moves(site, y)
    if numbers.bias is not None:
        bias = fake_quantise(numbers.offset, numbers.bias)
        y = y.astype(at_least_float32(y.dtype))
        y = y + bias.astype(y.dtype).reshape([-1 if i == site.out_axis else 1 for i in range(y.ndim)])
    return y.astype(site.result.dtype)


def _run(network: Network, body: Body, args: Sequence, layer: Callable, rounded: Callable) -> list:
    """Evaluate ``body``.

    ``layer(site, rule, x, read)`` gives a layer's result after its tail,
    ``rounded(rounding, rule, raw)`` a value on its grid, asked for once where the value is first read.
    """
    sites = network.sites
    raw: dict[Value, Any] = dict(zip(body.inputs, args, strict=True))
    raw.update(body.constants)
    on_grid: dict[Value, Any] = {}
    folded: set[Node] = set()

    def read(operand: Operand):
        if isinstance(operand, Constant):
            return operand.value
        if operand not in network.made:
            return raw[operand]
        if operand not in on_grid:
            on_grid[operand] = rounded(*network.made[operand], raw[operand])
        return on_grid[operand]

    def read_by(node: Node, position: int):
        if (node, position) not in network.own:
            return read(node.inputs[position])
        return rounded(*network.own[node, position], raw[network.own[node, position][0].value])

    def evaluate(node: Node) -> None:
        inputs = [read_by(node, position) for position in range(len(node.inputs))]
        if node.name in REMAT and node.body is not None:
            outputs = _run(network, node.body, inputs, layer, rounded)
        else:
            outputs = _compat.bind(node.primitive, inputs, node.params)
        raw.update(zip(node.outputs, outputs, strict=True))

    # What depends on variables alone comes first: tails are folded before their layer runs.
    for node in body.nodes:
        if node in sites.variable_nodes:
            evaluate(node)
    for node in body.nodes:
        if node in sites.variable_nodes or node in folded:
            continue
        site = network.layers.get(node)
        if site is None:
            evaluate(node)
        else:
            raw[site.result] = layer(site, network.rules[site.path], read_by(node, 1 - site.kernel_operand), read)
            folded.update(step.node for step in site.tail)
    return [read(v) for v in body.outputs]
