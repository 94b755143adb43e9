"""Which values of a network are rounded, on which grid, and under which name.

A value is rounded where it is made, and everything that reads it reads the rounded value: a runtime has nothing else.
Only a reader whose rule asks for another grid gets a rounding of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, prod
from typing import TypeGuard

from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, Body, Constant, Graph, Node, Operand, Value, trace_graph
from ehap_jax.quant.fold import AFFINE, Site, Sites, TailStep, affine_chain, find_sites
from ehap_jax.quant.numerics import GridKind
from ehap_jax.quant.residual import find_branches
from ehap_jax.quant.rules import QuantRule, match_rules, skipping

# Rounding commutes with these: they only move numbers about, choose among them, or put numbers between them.
REARRANGEMENTS = frozenset(
    {"transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy", "pad", "slice", "rev", "gather"}
    | {"reduce_window_max"}
)


JOINS = frozenset({"concatenate", "reduce_max"})  # rounding commutes with these, too; several operands need one grid


def fills(node: Node) -> bool:
    """Whether a pad or a gather puts numbers other than 0 between those it moves, which then are rounded, too.

    Infinite ones, which only a maximum reads, and the NaN of indices out of range have no place on a grid.
    """
    if node.name == "pad":
        number = node.inputs[1]
        return isinstance(number, Value) or _fills(number.value)
    return node.name == "gather" and _fills(node.params["fill_value"])


def _fills(number: float | None) -> bool:
    return number is not None and isfinite(number) and number != 0


@dataclass(frozen=True)
class Rounding:
    """A value, the kind of grid it is rounded to and how it is observed; readers that agree on all share a range."""

    value: Value
    bits: int
    kind: GridKind
    observer: tuple[str, float, float]


@dataclass(frozen=True)
class Pool:
    """A mean: ``reduce`` sums over some axes or windows, ``divide`` divides by how many numbers that are."""

    reduce: Node
    divide: Node
    count: int

    @property
    def result(self) -> Value:
        return self.divide.outputs[0]


@dataclass(frozen=True, eq=False)
class Scale:
    """``scale · base + offset`` per channel that no layer could take up, such as the BatchNorm of a residual sum.

    steps: the operations, as in the tail of a layer. axis: of the channels (None: one number). result: their end.
    """

    base: Value
    steps: tuple[TailStep, ...]
    axis: int | None

    @property
    def result(self) -> Value:
        return self.steps[-1].node.outputs[0]

    @property
    def channels(self) -> int:
        return 1 if self.axis is None else self.base.shape[self.axis]


@dataclass(frozen=True, eq=False)
class Network:
    """A traced function with what is quantised in it.

    layers: the quantised ones. sums: nodes that add two rounded values. pools and scales: means and affine functions of
    a rounded value, by their result. made: the rounding of a value where it is made, with the rule it follows. own: a
    reader's own rounding instead, by node and operand. inputs: the rounding of what a layer reads.
    names: the range of every rounding.
    """

    graph: Graph
    sites: Sites
    rules: dict[str, QuantRule]
    layers: dict[Node, Site]
    sums: frozenset[Node]
    pools: dict[Value, Pool]
    scales: dict[Value, Scale]
    made: dict[Value, tuple[Rounding, QuantRule]]
    own: dict[tuple[Node, int], tuple[Rounding, QuantRule]]
    inputs: dict[Node, Rounding]
    names: dict[Rounding, str]

    def reader(self, name: str) -> str:
        """The path of the kernel that a range, or a tensor on the way to it, is named after."""
        return max((path for path in self.rules if name.startswith(path)), key=len)


def prepare(apply: Callable, rules: Sequence[QuantRule], variables, x) -> Network:
    """Trace ``apply(variables, x)`` and decide what is rounded.

    Rounded are the input of every layer that a rule matches, the operands of residual sums and the operand of every
    mean whose result is rounded. A range is named after the layer that reads the value first, ``kernel path``, else
    ``path:out`` (the layer at the end of a residual branch), ``path:shortcut``, ``path:pool`` or ``path:scale`` (the
    mean, or the affine function that no layer could take up, before that layer).

    Raises ValueError for a rule that matches no kernel, NotImplementedError for a layer that cannot be replaced.
    """
    graph = trace_graph(apply)(variables, x)
    sites = find_sites(graph)
    matched = match_rules(rules, sites.paths) if rules else {}
    for path, reason in sites.blocked.items():
        if path in matched:
            raise NotImplementedError(
                f"{path} cannot be quantised: {reason} would not see the quantised layer. Move the layer out, or leave "
                f"it in floating point with {skipping(path)} before the other rules."
            )
    layers = {node: site for node, site in sites.by_node.items() if site.path in matched}
    return _Search(graph, sites, matched, layers).network()


def bounds(node: Node) -> tuple[Value, float, float] | None:
    """(operand, low, high) of a node that only clips its one operand (ReLU, ReLU6, clamp), else None."""
    if node.body is not None:
        if node.name not in CUSTOM_RULE or len(node.body.outputs) != 1:
            return None
        low, high, value = -inf, inf, node.body.outputs[0]
        made_by = {out: inner for inner in node.body.nodes for out in inner.outputs}
        while value not in node.body.inputs:
            found = bounds(made_by[value]) if value in made_by else None
            if found is None:
                return None
            value, low, high = found[0], max(low, found[1]), min(high, found[2])
        operand = node.inputs[node.body.inputs.index(value)]
        return (operand, low, high) if isinstance(operand, Value) and low <= high else None
    if node.name == "clamp":
        smallest, operand, largest = node.inputs
        if isinstance(smallest, Constant) and isinstance(largest, Constant) and isinstance(operand, Value):
            return operand, float(smallest.value), float(largest.value)
    elif node.name in ("max", "min"):
        values = [v for v in node.inputs if isinstance(v, Value)]
        numbers = [float(v.value) for v in node.inputs if isinstance(v, Constant)]
        if len(values) == 1 and len(numbers) == 1:
            return (values[0], numbers[0], inf) if node.name == "max" else (values[0], -inf, numbers[0])
    return None


def _observer(rule: QuantRule) -> tuple[str, float, float]:
    return rule.observer, rule.decay, rule.percentile


def _residual_kind(rule: QuantRule) -> GridKind:
    """Values before a sum have both signs, so what is unsigned at a layer's input is symmetric there."""
    return "symmetric" if rule.activations == "unsigned" else rule.activations


class _Search:
    """Collects who wants which value rounded, then decides which rounding is made where."""

    def __init__(self, graph: Graph, sites: Sites, rules: dict[str, QuantRule], layers: dict[Node, Site]) -> None:
        self.graph, self.sites, self.rules, self.layers = graph, sites, rules, layers
        self.made_by = {out: node for node in graph.body.walk() for out in node.outputs}
        self.results = {site.result: site for site in layers.values()}
        self.after_layers: set[Value] = set()
        self._follow(graph.body)
        self.names: dict[Rounding, str] = {}
        self.wanted: dict[tuple[Node, int], tuple[Rounding, QuantRule]] = {}
        self.pools: dict[Value, Pool] = {}
        self.scales: dict[Value, Scale] = {}

    def network(self) -> Network:
        for site in self.layers.values():
            rule = self.rules[site.path]
            rounding = Rounding(self.origin(site.activation), rule.activation_bits, rule.activations, _observer(rule))
            self.want(site.node, 1 - site.kernel_operand, rounding, rule, site.name)
        sums: dict[Node, int] = {}
        for branch in find_branches(self.graph.body, self.layers.values(), self.sites):
            rule = self.rules[branch.site.path]
            if rule.residual_bits is not None:
                rounding = Rounding(
                    self.origin(branch.node.inputs[branch.position]),
                    rule.residual_bits,
                    _residual_kind(rule),
                    _observer(rule),
                )
                self.want(branch.node, branch.position, rounding, rule, f"{branch.site.name}:{branch.side}")
                sums[branch.node] = sums.get(branch.node, 0) + 1
        for rounding, rule in list(self.wanted.values()):
            self.look_upstream(rounding.value, rounding, rule)
        made, own = self.decide()
        inputs = {
            node: own[node, 1 - site.kernel_operand][0]
            if (node, 1 - site.kernel_operand) in own
            else made[self.origin(site.activation)][0]
            for node, site in self.layers.items()
        }
        used = {rounding for rounding, _ in (*made.values(), *own.values())}
        return Network(
            graph=self.graph,
            sites=self.sites,
            rules=self.rules,
            layers=self.layers,
            sums=frozenset(node for node, rounded in sums.items() if rounded == 2),
            pools=self.pools,
            scales=self.scales,
            made=made,
            own=own,
            inputs=inputs,
            names={rounding: name for rounding, name in self.names.items() if rounding in used},
        )

    def origin(self, value: Operand) -> Value:
        """The value that this one rearranges, with nothing but zeros added, and that so can be rounded in its place."""
        assert isinstance(value, Value), "what a quantised layer reads depends on the data"
        while value not in self.results and (node := self.made_by.get(value)) is not None:
            source = node.inputs[0] if node.name in REARRANGEMENTS and not fills(node) else None
            if not isinstance(source, Value) or source in self.sites.sources:
                break
            value = source
        return value

    def want(self, node: Node, position: int, rounding: Rounding, rule: QuantRule, name: str) -> None:
        self.wanted[node, position] = rounding, rule
        if rounding not in self.names:
            namesakes = sum(other.split("##")[0] == name for other in self.names.values())
            self.names[rounding] = f"{name}##{namesakes + 1}" if namesakes else name

    def look_upstream(self, value: Value, rounding: Rounding, rule: QuantRule) -> None:
        """Round the operand of every mean or affine function that a rounded value is made of."""
        while value not in self.results and value in self.made_by:
            found = self.pool(value) or self.scale(value)
            if found is not None:
                self.read_by(found, rounding, rule)
                return
            node = self.made_by[value]
            if node.name in JOINS or fills(node):
                for operand in filter(self._data, node.inputs):
                    self.look_upstream(operand, rounding, rule)
                return
            clip = bounds(node)
            source = self.origin(value if clip is None else clip[0])
            if source is value:
                return
            value = source

    def read_by(self, found: Pool | Scale, reader: Rounding, rule: QuantRule) -> None:
        if found.result in self.pools or found.result in self.scales:
            return
        if isinstance(found, Pool):
            self.pools[found.result], node, suffix = found, found.reduce, "pool"
        else:
            self.scales[found.result], node, suffix = found, found.steps[0].node, "scale"
        position = next(i for i, v in enumerate(node.inputs) if isinstance(v, Value) and v not in self.sites.sources)
        value = self.origin(node.inputs[position])
        known = [r for r in self.names if r.value is value]
        rounding = known[0] if known else Rounding(value, reader.bits, _residual_kind(rule), reader.observer)
        name = self.names[reader].split(":")[0].split("##")[0]
        self.want(node, position, rounding, rule, f"{name}:{suffix}")
        self.look_upstream(rounding.value, rounding, rule)

    def pool(self, value: Value) -> Pool | None:
        """``reduce_sum(x) / n`` or ``reduce_window_sum(x) / n`` (or times 1/n), n the number of terms."""
        divide = self.made_by[value]
        if divide.name not in ("div", "mul") or not isinstance(divide.inputs[0], Value):
            return None
        number, summed = divide.inputs[1], divide.inputs[0]
        while (reduce := self.made_by.get(summed)) is not None and reduce.name in ("reshape", "broadcast_in_dim"):
            if prod(reduce.outputs[0].shape) != prod(reduce.inputs[0].shape):
                return None  # keepdims only adds axes of size 1
            (summed,) = (v for v in reduce.inputs if isinstance(v, Value))
        if not isinstance(number, Constant) or reduce is None or not self._data(reduce.inputs[0]):
            return None
        if reduce.name == "reduce_sum":
            count = prod(reduce.inputs[0].shape[axis] for axis in reduce.params["axes"])
        elif reduce.name == "reduce_window_sum":
            count = prod(reduce.params["window_dimensions"])
        else:
            return None
        by = float(number.value) if divide.name == "div" else 1 / float(number.value)
        return Pool(reduce, divide, count) if abs(by - count) < 1e-6 * count else None

    def scale(self, value: Value) -> Scale | None:
        """The chain of affine per-channel operations that ends in ``value``, up to a layer or a mean."""
        nodes: list[Node] = []
        assert isinstance(value, Value), "what a quantised layer reads depends on the data"
        while value not in self.results and (node := self.made_by.get(value)) is not None and node.name in AFFINE:
            data = [v for v in node.inputs if self._data(v)]
            if len(data) != 1 or data[0].shape != node.outputs[0].shape or self.pool(value) is not None:
                break
            nodes.append(node)
            (value,) = data
        if not nodes or not self._data(value):
            return None
        for axis in (None, *range(len(value.shape))):
            if steps := affine_chain(reversed(nodes), value, axis, self.sites, self.made_by):
                return Scale(value, steps, axis)
        return None

    def decide(self) -> tuple[dict, dict]:
        """Every value gets the finest of the roundings wanted for it; who wanted another has its own."""
        made: dict[Value, tuple[Rounding, QuantRule]] = {}
        for rounding, rule in self.wanted.values():
            if rounding.value not in made or rounding.bits > made[rounding.value][0].bits:
                made[rounding.value] = rounding, rule
        own: dict[tuple[Node, int], tuple[Rounding, QuantRule]] = {}
        for (node, position), (rounding, rule) in self.wanted.items():
            if made[rounding.value][0] != rounding:
                reads = node.inputs[position]
                assert isinstance(reads, Value)
                instead = replace(rounding, value=reads)
                self.names.setdefault(instead, self.names[rounding])
                own[node, position] = instead, rule
        return made, own

    def _data(self, operand: Operand) -> TypeGuard[Value]:
        return isinstance(operand, Value) and operand in self.after_layers

    def _follow(self, body: Body) -> None:
        """Values that depend on a quantised layer."""
        for node in body.nodes:
            if node.body is not None and node.name in REMAT:
                pairs = zip(node.body.inputs, node.inputs, strict=True)
                self.after_layers.update(inner for inner, outer in pairs if self._data(outer))
                self._follow(node.body)
            if (
                node in self.layers
                or any(self._data(v) for v in node.inputs)
                or (node.body is not None and any(inner in self.layers for inner in node.body.walk()))
            ):
                self.after_layers.update(node.outputs)
