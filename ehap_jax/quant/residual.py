"""Residual sums of a network: which operands are branches, and whose rule they follow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ehap_jax.graph.trace import CUSTOM_RULE, REMAT, Body, Node, Operand, Value
from ehap_jax.quant.fold import Site, Sites

SUMS = frozenset({"add", "sub", "add_any"})


@dataclass(frozen=True, eq=False)
class Branch:
    """One operand of a sum of two activations.

    node, position: the sum, and which operand. site: the layer whose rule holds, side: "out" where the branch ends in
    that layer, else "shortcut".
    """

    node: Node
    position: int
    site: Site
    side: str


def find_branches(body: Body, layers: Iterable[Site], sites: Sites) -> Iterator[Branch]:
    """The branches of every sum with a quantised layer at the end of at least one of them.

    A layer is at the end of a branch if nothing but rearrangements and operations with a single operand that depends on
    the data (such as ReLU) follow it; of several that are concatenated (a kernel with implants is two) the first. A
    layer that a rule leaves in floating point ends a branch without a rule.
    """
    layers = list(layers)
    results: dict[Value, Site | None] = dict.fromkeys(site.result for site in sites.by_node.values())
    results |= {site.result: site for site in layers}
    folded = {step.node for site in layers for step in site.tail}
    yield from _in_body(body, results, folded, sites)


def _in_body(body: Body, results: dict[Value, Site | None], folded: set[Node], sites: Sites) -> Iterator[Branch]:
    made_by = {out: node for node in body.nodes for out in node.outputs}
    for node in body.nodes:
        if node.name in REMAT and node.body is not None:
            yield from _in_body(node.body, results, folded, sites)
        if node.name not in SUMS or node in folded or node in sites.variable_nodes:
            continue
        operands = [v for v in node.inputs if isinstance(v, Value) and v not in sites.sources]
        if len(operands) < 2:
            continue
        ends = [_layer_at_the_end(v, results, made_by, sites) for v in operands]
        inside = None
        if ends == [None, None]:  # a sum of sums follows the rule of a layer inside
            found = (_layer_at_the_end(v, results, made_by, sites, through_sums=True) for v in operands)
            inside = next((site for site in found if site is not None), None)
        for position, site in enumerate(ends):
            rule_of = site or ends[1 - position] or inside
            if rule_of is not None:
                yield Branch(node, position, rule_of, "out" if site else "shortcut")


def _layer_at_the_end(value: Operand, results, made_by, sites: Sites, through_sums: bool = False) -> Site | None:
    while value not in results:
        node = made_by.get(value)
        if node is None or (node.body is not None and node.name not in CUSTOM_RULE):
            return None
        data = [v for v in node.inputs if isinstance(v, Value) and v not in sites.sources]
        if len(data) > 1 and (node.name == "concatenate" or (through_sums and node.name in SUMS)):
            ends = [_layer_at_the_end(v, results, made_by, sites, through_sums) for v in data]
            if node.name == "concatenate" and None in ends:
                return None
            return next((site for site in ends if site is not None), None)
        if len(data) != 1:
            return None
        value = data[0]
    return results[value]
