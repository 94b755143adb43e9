"""What removing each group saves, now that others are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Literal

import numpy as np

from ehap_jax.graph.channels import ChannelStructure
from ehap_jax.graph.cost import node_macs
from ehap_jax.graph.gates import ALWAYS, Numbering
from ehap_jax.graph.interpret import RULES
from ehap_jax.graph.trace import Graph, Operand, Value
from ehap_jax.pruning.latency import LatencyTable, layers_of

Unit = Literal["macs", "params", "bytes", "latency"]
Cost = Callable[[Callable[[Operand], tuple[int, ...]]], float]


class Savings:
    """The units that every group of a structure saves if it goes next.

    A network's cost is a sum of terms (layers, variables), each a function of the sizes of a few axes. A group takes a
    known number of indices off each of these axes, so its saving is known without pruning anything.

    Attributes:
      now: (K,), zero for groups that are gone.
    """

    def __init__(self, structure: ChannelStructure, unit: Unit, table: LatencyTable | None = None) -> None:
        self._numbering = Numbering.of(structure)
        self._alive = np.ones(self._numbering.groups, bool)
        self._terms = [_Term(structure, self._numbering, cost, read) for cost, read in _terms(structure, unit, table)]
        self._killer = self._killers()
        self._saved = np.zeros((len(self._terms), self._numbering.groups))
        for row, term in enumerate(self._terms):
            self._saved[row] = term.saved(self._killer, self._numbering.groups)

    @property
    def now(self) -> np.ndarray:
        return self._saved.sum(0)

    def remove(self, group: int) -> None:
        """Take one group away."""
        self._alive[group] = False
        before, self._killer = self._killer, self._killers()
        changed = np.flatnonzero(before != self._killer)
        for row, term in enumerate(self._terms):
            if term.reads(changed):
                self._saved[row] = term.saved(self._killer, self._numbering.groups)

    def _killers(self) -> np.ndarray:
        """For every gate the group that would close it: itself, the last operand of a sum, `NOBODY`, or `GONE`."""
        groups = self._numbering.groups
        killer = np.full(groups + sum(map(len, self._numbering.sums)) + 1, NOBODY)
        killer[:groups] = np.where(self._alive, np.arange(groups), GONE)
        for result, a, b in (level.T for level in self._numbering.sums):
            left, right = killer[a], killer[b]
            killer[result] = np.where(left == GONE, right, np.where(right == GONE, left, NOBODY))
            killer[result] = np.where(left == right, left, killer[result])
        return killer


NOBODY, GONE = -1, -2


class _Term:
    """One part of the cost, and the axes that it depends on."""

    def __init__(self, structure: ChannelStructure, numbering: Numbering, cost: Cost, read: Sequence[Operand]) -> None:
        self._cost, self._shapes = cost, {id(operand): operand.shape for operand in read}
        self._axes: list[tuple[tuple[int, int], tuple[np.ndarray, ...]]] = []  # (operand, axis), gates of its indices
        classes = structure.solution.classes
        for operand in read:
            for axis, own in enumerate(structure.labels[operand].axes if isinstance(operand, Value) else ()):
                gates = tuple(numbering.of_class[classes[labels]] for labels in own)
                if any((g != ALWAYS).any() for g in gates):
                    self._axes.append(((id(operand), axis), gates))
        self._gates = np.unique(np.concatenate([g for _, gates in self._axes for g in gates] or [np.zeros(0, int)]))

    def reads(self, gates: np.ndarray) -> bool:
        return bool(np.isin(gates, self._gates).any())

    def saved(self, killer: np.ndarray, groups: int) -> np.ndarray:
        """(groups,): the term's cost now less its cost without each group."""
        sizes, losses = [], np.zeros((len(self._axes), groups), int)
        for row, (_, gates) in enumerate(self._axes):
            killers = np.array([killer[g] for g in gates])
            killers = killers[:, (killers != GONE).all(0)]
            sizes.append(killers.shape[1])
            for number, own in enumerate(killers):  # an index that one group kills twice dies once
                counted = (own >= 0) & ~(killers[:number] == own).any(0)
                losses[row] += np.bincount(own[counted], minlength=groups)
        touched = np.flatnonzero(losses.any(0))
        found = np.zeros(groups)
        if len(touched):
            lost = losses[:, touched]
            code = np.ravel_multi_index(tuple(lost), tuple(lost.max(1) + 1))  # one integer per kind of loss
            _, first, of_kind = np.unique(code, return_index=True, return_inverse=True)
            full = self._at(sizes)
            found[touched] = np.array([full - self._at(sizes - kind) for kind in lost[:, first].T])[of_kind.ravel()]
        return found

    def _at(self, sizes: Sequence[int] | np.ndarray) -> float:
        shapes = {operand: list(shape) for operand, shape in self._shapes.items()}
        for ((operand, axis), _), size in zip(self._axes, sizes, strict=True):
            shapes[operand][axis] = int(size)
        return self._cost(lambda operand: tuple(shapes[id(operand)]))


def _terms(structure: ChannelStructure, unit: Unit, table: LatencyTable | None) -> Iterator[tuple[Cost, list[Operand]]]:
    """Every term: its cost by the shapes of values, and the values whose shapes it reads."""
    graph = structure.graph
    if unit == "macs":
        yield from _layers(graph)
    elif unit == "latency":
        assert table is not None
        for layer in layers_of(graph):
            grid = table.grid(layer)
            yield (
                lambda shape, layer=layer, grid=grid: layer.rounds * grid.at(*layer.widths(shape)),
                [*layer.node.inputs, *layer.node.outputs],
            )
    else:
        for path in graph.parameters if unit == "params" else graph.leaves:
            value = graph.leaves[path]
            each = value.dtype.itemsize if unit == "bytes" else 1
            yield lambda shape, value=value, each=each: each * prod(shape(value)), [value]


def _layers(graph: Graph) -> Iterator[tuple[Cost, list[Operand]]]:
    for node, count in node_macs(graph.body, lambda operand: operand.shape):
        macs = RULES[node.name].macs
        assert macs is not None
        rounds = count // max(macs(node, [v.shape for v in node.inputs], [v.shape for v in node.outputs]), 1)

        def cost(shape, node=node, macs=macs, rounds=rounds):
            return rounds * macs(node, [shape(v) for v in node.inputs], [shape(v) for v in node.outputs])

        yield cost, [*node.inputs, *node.outputs]
