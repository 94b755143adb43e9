"""Channel groups: which indices of which axes live and die together, derived from the jaxpr alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ehap_jax import _compat
from ehap_jax.graph import rules as _rules  # noqa: F401  registers every primitive's rule
from ehap_jax.graph.interpret import RULES
from ehap_jax.graph.structure import Coupling, Labels, Solution, Structure
from ehap_jax.graph.trace import SCAN, Body, Constant, Graph, Node, Operand, Value


class UnknownPrimitiveError(NotImplementedError):
    """A channel axis reached a primitive that has no rule."""


@dataclass(frozen=True)
class ChannelGroup:
    """One unit of pruning: everything that goes when one channel goes.

    producers: kernel path -> indices of its output channels in the group.
    slices: (path, axis) -> indices, over all variables, the producers' included.
    """

    producers: Mapping[str, tuple[int, ...]]
    slices: Mapping[tuple[str, int], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class ChannelStructure:
    """A graph's labels and their solution under one coupling."""

    graph: Graph
    labels: Mapping[Value, Labels]
    solution: Solution
    kernel_axes: Mapping[str, int]

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Prunable groups, in the order in which their first producer is written."""
        classes = self.solution.produced_classes()
        prunable = np.zeros(self.solution.classes.max(initial=0) + 1, bool)
        prunable[classes] = True
        slices: dict[int, dict[tuple[str, int], tuple[int, ...]]] = {int(c): {} for c in classes}
        for leaf in self.solution.structure.leaves:
            of_index = self.solution.classes[leaf.start : leaf.start + leaf.size]
            by_class = defaultdict(list)
            for index in np.flatnonzero(prunable[of_index]):
                by_class[int(of_index[index])].append(int(index))
            for cls, indices in by_class.items():
                slices[cls][leaf.path, leaf.axis] = tuple(indices)
        producers = [
            {path: idx for (path, axis), idx in members.items() if self.kernel_axes.get(path) == axis}
            for members in slices.values()
        ]
        return tuple(ChannelGroup(p, members) for p, members in zip(producers, slices.values(), strict=True) if p)

    def group_numbers(self) -> np.ndarray:
        """For every class of labels the position of its group in :meth:`groups`, -1 where it is none."""
        classes, numbers = self.solution.classes, np.full(self.solution.classes.max(initial=0) + 1, -1)
        for leaf in self.solution.structure.leaves:  # a group has a kernel's output axis in it
            if self.kernel_axes.get(leaf.path) == leaf.axis:
                numbers[classes[leaf.start : leaf.start + leaf.size]] = 0
        grouped = [c for c in self.solution.produced_classes() if numbers[c] == 0]
        numbers[:] = -1
        numbers[grouped] = np.arange(len(grouped))
        return numbers

    def alive(self, keep: Mapping[str, Any]) -> np.ndarray:
        """Which classes live when kernels keep only the output channels ``keep`` (others keep all).

        Raises ValueError where two kernels that must agree do not, or a channel that cannot go is missing.
        """
        classes, state = self.solution.classes, {}
        prunable = set(self.solution.produced_classes().tolist())
        for leaf in self.solution.structure.leaves:
            if self.kernel_axes.get(leaf.path) != leaf.axis:
                continue
            kept = keep.get(leaf.path)
            stays = np.ones(leaf.size, bool)
            if kept is not None:
                stays[:] = False
                stays[np.asarray(kept, int)] = True
            for index in range(leaf.size):
                cls = int(classes[leaf.start + index])
                if not stays[index] and cls not in prunable:
                    raise ValueError(
                        f"{leaf.path}: output channel {index} cannot be pruned; it is fixed by the network."
                    )
                first = state.setdefault(cls, (bool(stays[index]), leaf.path, index))
                if cls in prunable and first[0] != stays[index]:
                    raise ValueError(
                        f"{leaf.path} channel {index} and {first[1]} channel {first[2]} live and die together, "
                        "but the plan keeps only one of them. Was it made for another coupling or network?"
                    )
        return self.solution.alive(np.array([c for c, (s, *_) in state.items() if c in prunable and not s], int))

    def why_fixed(self, path: str) -> str:
        """What first keeps the output channels of a kernel from being pruned ("" where nothing does)."""
        structure, axis = self.solution.structure, self.kernel_axes[path]
        leaf = next(leaf for leaf in structure.leaves if (leaf.path, leaf.axis) == (path, axis))
        ties = structure.ties()
        own = ties[leaf.start : leaf.start + leaf.size]
        return next((why for labels, why in structure.frozen if np.isin(ties[labels], own).any()), "")

    def kept_slices(self, alive: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
        """{variable path: {axis: kept indices}} of everything that is smaller than in full."""
        slices: dict[str, dict[int, np.ndarray]] = {}
        for leaf in self.solution.structure.leaves:
            keep = alive[self.solution.classes[leaf.start : leaf.start + leaf.size]]
            if not keep.all():
                slices.setdefault(leaf.path, {})[leaf.axis] = np.flatnonzero(keep)
        return slices

    def kept(self, operand: Operand, alive: np.ndarray) -> tuple[np.ndarray | None, ...]:
        """Kept indices per axis of a value of the graph, None for whole axes."""
        if isinstance(operand, Constant):
            return (None,) * len(operand.shape)
        return tuple(self.solution.kept(axis, alive) for axis in self.labels[operand].axes)


def channel_structure(graph: Graph, coupling: Coupling = "group") -> ChannelStructure:
    """Labels propagated through ``graph`` and solved for ``coupling``; kept with the graph."""
    if coupling not in graph.structures:
        if "labels" not in graph.structures:
            graph.structures["labels"] = _label(graph)
        labels, structure = graph.structures["labels"]
        solution = structure.solve(coupling)
        axes = _kernel_axes(structure, solution) if coupling == "group" else channel_structure(graph).kernel_axes
        graph.structures[coupling] = ChannelStructure(graph, labels, solution, axes)
    return graph.structures[coupling]


def _label(graph: Graph) -> tuple[dict[Value, Labels], Structure]:
    """Labels of every value of ``graph`` and the constraints between them.

    Where an axis is split (``qkv.reshape(..., 3, heads, features)``) one factor keeps the labels: the first, or another
    where the first cannot shrink. Any choice is right; one that leaves more channels free is better. Splits of one kind
    (source line and shapes) take the same factor. As long as that frees channels, the factor of one kind, or of all
    together, is changed: whichever change frees most, the first of equals.
    """
    factors: dict[Hashable, int] = {}
    found = _label_with(graph, factors)
    while True:
        solution = found[1].solve("group")
        blocked = solution.blocked_splits()
        options = range(1, max(blocked.values(), default=1))
        together = [{kind: o for kind, n in blocked.items() if o < n} for o in options]
        alone = [{kind: o} for kind, n in blocked.items() for o in range(1, n)]
        trials = [{**factors, **change} for change in together + [one for one in alone if one not in together]]
        best, winner = solution.free(), None
        for trial in trials:
            other = _label_with(graph, trial)
            free = other[1].solve("group").free()
            if free > best:
                best, winner = free, (trial, other)
        if winner is None:
            return found
        factors, found = winner


def _label_with(graph: Graph, factors: Mapping[Hashable, int]) -> tuple[dict[Value, Labels], Structure]:
    structure = Structure(factors)
    labels: dict[Value, Labels] = {}
    for path, value in graph.leaves.items():
        labels[value] = structure.leaf(path, value.shape)
    for value in graph.arguments:
        labels[value] = Labels(((),) * len(value.shape))
    _propagate(structure, graph.body, labels, graph.on_unknown)
    for path, operand in zip(graph.output_paths, graph.body.outputs, strict=True):
        _close_output(structure, graph, labels, path, operand)
    return labels, structure


def channel_groups(graph: Graph, *, coupling: Coupling = "group") -> tuple[ChannelGroup, ...]:
    """The prunable channel groups of ``graph``: one per set of output channels that can only go together.

    Under ``"group"`` coupling all writers of a residual stream lose a channel together (DepGraph, arXiv 2301.12900);
    under ``"union"`` each loses its own, and a stream channel goes when every writer has lost it (HAP, arXiv
    2101.08940).

    Raises :class:`UnknownPrimitiveError` where a channel axis reaches a primitive without a rule, unless the graph was
    traced with ``on_unknown="freeze"``.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
    >>> graph = trace_graph(apply)({"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}, jnp.ones((1, 3)))
    >>> channel_groups(graph)[0].slices
    {('in', 1): (0,), ('out', 0): (0,)}
    """
    return channel_structure(graph, coupling).groups()


def _propagate(structure: Structure, body: Body, labels: dict[Value, Labels], on_unknown: str) -> None:
    structure.constants.update(body.constants)
    for value, array in body.constants.items():
        axes = tuple((structure.fresh(size),) for size in value.shape)
        labels[value] = Labels(axes, frozenset(_zero_axes(array)), True)
    for node in body.nodes:
        inputs = [_read(labels, operand) for operand in node.inputs]
        if node.body is not None:
            outputs = _propagate_call(structure, node, inputs, labels, on_unknown)
        elif node.name in RULES:
            outputs = RULES[node.name].propagate(structure, node, inputs)
        else:
            outputs = _unknown(structure, node, inputs, on_unknown)
        for value, found in zip(node.outputs, outputs, strict=True):
            assert len(found.axes) == len(value.shape), (node.name, node.source)
            labels[value] = found


def _propagate_call(structure: Structure, node: Node, inputs, labels, on_unknown: str) -> list[Labels]:
    assert node.body is not None
    if node.name == SCAN:
        return _propagate_scan(structure, node, node.body, inputs, labels, on_unknown)
    labels.update(zip(node.body.inputs, inputs, strict=True))
    _propagate(structure, node.body, labels, on_unknown)
    return [_read(labels, operand) for operand in node.body.outputs]


def _propagate_scan(structure: Structure, node: Node, body: Body, inputs, labels, on_unknown: str) -> list[Labels]:
    """The body sees one slice of what is scanned over; what is carried keeps the same indices in every round."""
    consts, carried = _compat.scan_operands(node.params)
    carry, slices = list(inputs[consts:carried]), []
    for value in inputs[carried:]:
        structure.freeze(value.axes[0], f"scanned over at {node.source}")
        zero = frozenset(i - 1 for i in value.zero if i > 0) | (value.zero & {-1})
        slices.append(Labels(value.axes[1:], zero, value.from_variables))
    while True:  # what is zero, and what depends on variables alone, can only become less
        labels.update(zip(body.inputs, [*inputs[:consts], *carry, *slices], strict=True))
        _propagate(structure, body, labels, on_unknown)
        outputs = [_read(labels, operand) for operand in body.outputs]
        after = [
            Labels(a.axes, a.zero & b.zero, a.from_variables and b.from_variables)
            for a, b in zip(carry, outputs, strict=False)
        ]
        if [(v.zero, v.from_variables) for v in after] == [(v.zero, v.from_variables) for v in carry]:
            break
        carry = after
    for a, b in zip(carry, outputs, strict=False):
        for x, y in zip(a.axes, b.axes, strict=True):
            structure.equal(x, y, f"carried through a scan at {node.source}")
    stacked = [
        Labels(((), *v.axes), frozenset(i + 1 for i in v.zero if i >= 0) | (v.zero & {-1}), v.from_variables)
        for v in outputs[len(carry) :]
    ]
    return [*carry, *stacked]


def derivative_structure(
    parent: ChannelStructure, node: Node, alive: np.ndarray
) -> tuple[ChannelStructure, np.ndarray]:
    """Labels inside the custom derivative rule of ``node`` and which of their classes live, given the network's.

    The rule's inputs carry the classes of the call's inputs; its tangents and cotangents keep what their values keep.
    """
    classes = parent.solution.classes
    structure = Structure(_count=2 + len(alive))

    def seed(operand: Operand, slope: bool) -> Labels:
        found = _read(parent.labels, operand)
        axes = tuple(tuple(classes[labels] + 1 for labels in axis) for axis in found.axes)
        return Labels(axes, frozenset() if slope else found.zero, found.from_variables)

    structure.freeze((np.array([parent.solution.frozen_class + 1]),), "fixed by the network")
    forward = node.name == "custom_jvp_call"
    primals = [seed(v, False) for v in node.inputs]
    slopes = [seed(v, True) for v in (node.inputs if forward else node.outputs)]
    expected = [seed(v, True) for v in ((*node.outputs, *node.outputs) if forward else node.inputs)]
    labels = dict(zip(node.derivative.inputs, [*primals, *slopes], strict=True))
    _propagate(structure, node.derivative, labels, parent.graph.on_unknown)
    why = f"derivative rule of {node.params.get('name', node.name)} at {node.source}"
    for operand, wanted in zip(node.derivative.outputs, expected, strict=True):
        for a, b in zip(_read(labels, operand).axes, wanted.axes, strict=True):
            structure.equal(a, b, why)
    solution = structure.solve("group")
    inner = np.ones(solution.classes.max(initial=0) + 1, bool)
    of_parent = solution.classes[1 : 1 + len(alive)]
    np.logical_and.at(inner, of_parent, alive)
    if (inner[of_parent] != alive).any():
        raise ValueError(f"cannot shrink the {why}: it ties channels together that the network does not.")
    return ChannelStructure(parent.graph, labels, solution, {}), inner


def _unknown(structure: Structure, node: Node, inputs: list[Labels], on_unknown: str) -> list[Labels]:
    if any(value.live for value in inputs):
        paths = structure.paths(inputs)
        if on_unknown == "error":
            raise UnknownPrimitiveError(
                f"no rule for primitive {node.name!r} at {node.source}, touching {', '.join(paths) or 'no variable'}. "
                'Teach it once (CONTRIBUTING.md, "how to add a primitive rule"), or trace with '
                'trace_graph(apply, on_unknown="freeze") to keep those axes whole.'
            )
        for value in inputs:
            for axis in value.axes:
                structure.freeze(axis, f"unknown primitive {node.name} at {node.source}")
    return [Labels(((),) * len(v.shape)) for v in node.outputs]


def _close_output(structure: Structure, graph: Graph, labels, path: str, operand: Operand) -> None:
    found = _read(labels, operand)
    state = graph.state_leaf(path, operand.shape)
    for axis, own in enumerate(found.axes):
        if state is None:
            structure.freeze(own, f"network output {path or 'y'} axis {axis}")
        else:
            structure.equal(own, labels[graph.leaves[state]].axes[axis], f"next value of {state}")


def _read(labels: Mapping[Value, Labels], operand: Operand) -> Labels:
    if isinstance(operand, Value):
        return labels[operand]
    return Labels(((),) * len(operand.shape), frozenset(_zero_axes(operand.value)), True)


def _zero_axes(array) -> range:
    """All axes of a constant that is zero everywhere; ``-1`` stands for "zero" where there is no axis."""
    try:
        is_zero = not np.any(np.asarray(array))
    except TypeError:  # PRNG keys and tracers have no value to look at
        is_zero = False
    return range(-1, np.ndim(array)) if is_zero else range(0)


def _kernel_axes(structure: Structure, solution: Solution) -> dict[str, int]:
    """The output axis of every kernel: of several (a kernel used both ways round), the first that can lose channels."""
    produced, prunable = structure.produced(), solution.produced_classes()
    axes: dict[str, tuple[bool, int]] = {}
    for leaf in structure.leaves:
        labels = np.intersect1d(np.arange(leaf.start, leaf.start + leaf.size), produced)
        if len(labels):
            fixed = not np.isin(solution.classes[labels], prunable).any()
            axes[leaf.path] = min(axes.get(leaf.path, (True, leaf.axis)), (fixed, leaf.axis))
    return {path: axis for path, (_, axis) in axes.items()}
