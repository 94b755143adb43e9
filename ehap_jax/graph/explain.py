"""The structure of a network as a table: what can be pruned, what is tied to what, and why the rest is fixed."""

from __future__ import annotations

from collections import defaultdict

from ehap_jax.graph.channels import ChannelStructure, channel_structure
from ehap_jax.graph.cost import Plan, implant_counts, implanted_macs, kept_shape, leaf_sizes, node_macs
from ehap_jax.graph.layers import network_layers
from ehap_jax.graph.structure import Coupling
from ehap_jax.graph.trace import Graph, Node

HEADER = ("kernel", "shape", "set", "kept", "params", "MACs", "fixed because")


def explain(graph: Graph, plan: Plan | None = None, *, coupling: Coupling = "group") -> str:
    """One line per conv or dense kernel, in the order in which the network applies them.

    shape: of the full kernel. set: kernels with the same number lose channels together ("-": fixed). kept: output
    channels kept under ``plan`` / in full, and how many of them are 1×1 implants. params and MACs: of the kernel itself
    under ``plan``, for the traced input. Where a kernel is fixed, the first thing that fixes it. ``coupling`` is the
    plan's where there is one.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
    >>> graph = trace_graph(apply)({"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> print(explain(graph))
    kernel  shape  set  kept  params  MACs  fixed because
    in      3x4    1    4/4   12      12
    out     4x2    -    2/2   8       8     network output y axis 1
    total                     20      20
    """
    structure = channel_structure(graph, coupling if plan is None else plan.coupling)
    alive = structure.alive({} if plan is None else plan.keep)
    shape = kept_shape(structure, alive)
    macs: dict[str | None, int] = defaultdict(int)
    implants = {} if plan is None else implant_counts(plan)
    sizes = leaf_sizes(graph, shape, implants)
    for node, count in implanted_macs(graph, shape, implants):
        macs[kernel_of(structure, node)] += count
    sets = coupled_sets(structure)
    rows: list[tuple[str, ...]] = [HEADER]
    for path in kernels_in_order(structure):
        axis, full = structure.kernel_axes[path], graph.leaves[path].shape
        kept = shape(graph.leaves[path])
        rows.append(
            (
                path,
                "x".join(map(str, full)),
                str(sets.get(path, "-")),
                f"{kept[axis]}/{full[axis]}" + (f" ({implants[path]} 1x1)" if path in implants else ""),
                str(sizes[path]),
                str(macs.pop(path, 0)),
                "" if path in sets else structure.why_fixed(path),
            )
        )
    if any(macs.values()):
        rows.append(("(no kernel)", "", "", "", "", str(sum(macs.values())), ""))
    totals = [sum(int(row[i] or 0) for row in rows[1:]) for i in (4, 5)]
    rows.append(("total", "", "", "", str(totals[0]), str(totals[1]), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def coupled_sets(structure: ChannelStructure) -> dict[str, int]:
    """Kernel path -> number of the set of kernels that it shares groups with, directly or through others."""
    members: dict[str, set[str]] = {}
    for group in structure.groups():
        joined = set(group.producers).union(*(members.get(path, set()) for path in group.producers))
        for path in joined:
            members[path] = joined
    numbers: dict[str, int] = {}
    for path in kernels_in_order(structure):
        if path in members and path not in numbers:
            numbers.update(dict.fromkeys(members[path], len(set(numbers.values())) + 1))
    return numbers


def kernels_in_order(structure: ChannelStructure) -> list[str]:
    """Paths of the kernels in the order in which the network first applies them."""
    nodes = (node for node, _ in node_macs(structure.graph.body, lambda operand: operand.shape))
    applied = dict.fromkeys(kernel_of(structure, node) for node in nodes)
    return [path for path in dict.fromkeys((*applied, *structure.kernel_axes)) if path is not None]


def kernel_of(structure: ChannelStructure, node: Node) -> str | None:
    """Path of the kernel that a conv or product applies, None where it applies none (attention)."""
    layer = network_layers(structure.graph).by_node.get(node)
    return layer.path if layer is not None and layer.path in structure.kernel_axes else None
