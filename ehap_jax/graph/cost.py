"""Parameters, multiply-accumulates and bytes of a network, in full or under a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np

from ehap_jax.graph.channels import ChannelStructure, channel_structure
from ehap_jax.graph.interpret import RULES
from ehap_jax.graph.kernel_uses import KernelUse, centre_taps
from ehap_jax.graph.structure import Coupling
from ehap_jax.graph.trace import SCAN, Body, Graph, Node, Operand

Shape = Callable[[Operand], tuple[int, ...]]


class Cost(NamedTuple):
    """params: trained numbers. macs: multiply-accumulates of convs and matrix products, for the input shape the graph
    was traced with, every round of a scan included; the insides of ``while`` and ``cond`` are not counted. bytes:
    storage of all variables, running statistics included, in their own dtypes."""

    params: int
    macs: int
    bytes: int


class Plan(Protocol):
    """What :func:`count_cost` reads of a pruning plan."""

    @property
    def coupling(self) -> Coupling: ...

    @property
    def keep(self) -> Mapping[str, Any]: ...

    @property
    def implants(self) -> Mapping[str, Any]: ...


def count_cost(graph: Graph, plan: Plan | None = None) -> Cost:
    """Cost of ``graph``, or of what ``plan`` leaves of it.

    >>> import jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> count_cost(trace_graph(lambda w, x: x @ w)(jnp.ones((3, 4)), jnp.ones((1, 3))))
    Cost(params=12, macs=12, bytes=48)
    """
    if plan is None:
        return _cost(graph, lambda operand: operand.shape, {})
    structure = channel_structure(graph, plan.coupling)
    return cost_of_alive(structure, structure.alive(plan.keep), implant_counts(plan))


def cost_of_alive(structure: ChannelStructure, alive: np.ndarray, implants: Mapping[str, int]) -> Cost:
    """Cost when only the label classes ``alive`` remain and kernels have so many 1×1 ``implants`` among the kept."""
    return _cost(structure.graph, kept_shape(structure, alive), implants)


def implant_counts(plan: Plan) -> dict[str, int]:
    """Kernel path -> number of output channels that keep only a 1×1 kernel."""
    return {path: len(implant.channels) for path, implant in plan.implants.items()}


def kept_shape(structure: ChannelStructure, alive: np.ndarray) -> Shape:
    """The shape of any value of the graph when only the label classes ``alive`` remain."""

    def shape(operand: Operand) -> tuple[int, ...]:
        kept = structure.kept(operand, alive)
        return tuple(n if k is None else len(k) for n, k in zip(operand.shape, kept, strict=True))

    return shape


def node_macs(body: Body, shape: Shape) -> Iterator[tuple[Node, int]]:
    """Every conv and matrix product with its multiply-accumulates, those inside calls and scans included."""
    for node in body.nodes:
        rule = RULES.get(node.name)
        if node.body is not None:
            rounds = node.params["length"] if node.name == SCAN else 1
            yield from ((inner, rounds * count) for inner, count in node_macs(node.body, shape))
        elif rule is not None and rule.macs is not None:
            yield node, rule.macs(node, [shape(v) for v in node.inputs], [shape(v) for v in node.outputs])


def implanted_macs(graph: Graph, shape: Shape, implants: Mapping[str, int]) -> Iterator[tuple[Node, int]]:
    """:func:`node_macs` with as many channels of the kernels in ``implants`` at one tap each."""
    reads = {node: path for path in implants for node in _use(graph, path).nodes}
    for node, count in node_macs(graph.body, shape):
        path = reads.get(node)
        yield node, count if path is None else _with_implants(graph, path, count, shape, implants)


def leaf_sizes(graph: Graph, shape: Shape, implants: Mapping[str, int]) -> dict[str, int]:
    """Numbers in every variable."""
    sizes = {path: prod(shape(value)) for path, value in graph.leaves.items()}
    return {**sizes, **{path: _with_implants(graph, path, sizes[path], shape, implants) for path in implants}}


def _with_implants(graph: Graph, path: str, count: int, shape: Shape, implants: Mapping[str, int]) -> int:
    """What remains of ``count``, equal parts per output channel of a kernel, once implants have one tap of many."""
    use = _use(graph, path)
    each = count // shape(graph.leaves[path])[use.axis]
    return count - implants[path] * (each - each // use.taps)


def _use(graph: Graph, path: str) -> KernelUse:
    use = centre_taps(graph)[path]
    if isinstance(use, str):
        raise ValueError(f"{path} cannot hold 1×1 implants: {use}.")
    return use


def _cost(graph: Graph, shape: Shape, implants: Mapping[str, int]) -> Cost:
    sizes = leaf_sizes(graph, shape, implants)
    return Cost(
        params=sum(sizes[path] for path in graph.parameters),
        macs=sum(count for _, count in implanted_macs(graph, shape, implants)),
        bytes=sum(sizes[path] * value.dtype.itemsize for path, value in graph.leaves.items()),
    )
