"""Labels on channel indices, what must live and die together, and the solution of it.

Every index along every axis of every parameter is a label, an integer; values carry labels per axis and index. Rules
(``graph/rules``) move labels through primitives and state what they learn here:

- ``equal(a, b)``: index by index, these live and die together;
- ``freeze(a, why)``: these can never go;
- ``add(a, b)``: two activations are summed; under group coupling that is ``equal``, under union coupling the sum keeps
  the union of what its operands keep;
- ``produce(a)``: these are the outputs of a conv or dense kernel.

Nothing is decided while the graph is walked: :func:`solve` sees all constraints at once, so their order cannot matter.
Label 0 is the index that never goes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Coupling = Literal["group", "union"]
ALIVE = 0

# The labels of one axis: a tuple of arrays of the axis' length. An index is kept while all its labels are. No array
# at all is an axis whose indices cannot go; two arrays arise where two labelled axes are merged by a reshape.
Axis = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Labels:
    """What is known about one value.

    axes: labels per axis. zero: the axes along which an index is exactly zero once its label is pruned and masked.
    from_variables: the value depends on the variables alone, not on the input.
    """

    axes: tuple[Axis, ...]
    zero: frozenset[int] = frozenset()
    from_variables: bool = False

    @property
    def live(self) -> bool:
        """True if any axis can lose an index."""
        return any(self.axes)


@dataclass
class Leaf:
    """The label range of one axis of one variable: labels ``start … start + size - 1``."""

    path: str
    axis: int
    start: int
    size: int
    rank: int


@dataclass
class Structure:
    """The constraints collected from one graph.

    factors: kind of split -> which of the factors that the labels vary along keeps them (elsewhere the first).
    splits: the same kinds -> labels that were kept, and how many factors could have kept them.
    constants: arrays that the network closed over.
    """

    factors: Mapping[Hashable, int] = field(default_factory=dict)
    splits: dict[Hashable, list[tuple[np.ndarray, int]]] = field(default_factory=lambda: defaultdict(list))
    constants: dict[Any, Any] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _count: int = 1
    _copies: list[tuple[int, int]] = field(default_factory=list)
    _equal: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _adds: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]] = field(default_factory=list)
    _produced: list[np.ndarray] = field(default_factory=list)

    def fresh(self, size: int, *, copies: bool = False) -> np.ndarray:
        """``size`` new labels. ``copies``: they name copies along an axis made by broadcasting."""
        labels = np.arange(self._count, self._count + size)
        self._count += size
        if copies:
            self._copies.append((int(labels[0]) if size else self._count, self._count))
        return labels

    def is_copies(self, labels: np.ndarray) -> bool:
        """True for the labels of an axis made by broadcasting."""
        first = int(labels[0]) if labels.size else 0
        i = bisect_right(self._copies, first, key=lambda span: span[0]) - 1
        return i >= 0 and first < self._copies[i][1]

    def leaf(self, path: str, shape: tuple[int, ...]) -> Labels:
        """New labels for every axis of a variable; masked variables are zero where they are pruned."""
        axes = []
        for axis, size in enumerate(shape):
            labels = self.fresh(size)
            self.leaves.append(Leaf(path, axis, int(labels[0]) if size else self._count, size, len(shape)))
            axes.append((labels,))
        return Labels(tuple(axes), frozenset(range(len(shape))), True)

    def equal(self, a: Axis, b: Axis, why: str) -> Axis:
        """State that two axes keep the same indices; returns the labels of the result."""
        if not a or not b:
            self.freeze(a or b, why)
            return ()
        if len(a) != len(b):  # heads x features against one merged axis: whole heads go, as where an axis is split
            longer, shorter = (a, b) if len(a) > len(b) else (b, a)
            self.freeze(longer[len(shorter) :], why)
            return self.equal(longer[: len(shorter)], shorter, why)
        for x, y in zip(a, b, strict=True):
            if x is not y:
                self._equal.append((x, y))
        return min(a, b, key=self._order)

    def _order(self, axis: Axis) -> tuple[int, int]:
        """Results are named after the variable of highest rank (a kernel, not its gain), after copies last of all."""
        labels = axis[0]
        leaf = self.leaf_of(labels)
        return (-leaf.rank if leaf else int(self.is_copies(labels)), int(labels[0]) if labels.size else 0)

    def leaf_of(self, labels: np.ndarray) -> Leaf | None:
        """The axis of a variable that these labels are from, judged by the first; None for other labels."""
        first = int(labels[0]) if labels.size else ALIVE
        i = bisect_right(self.leaves, first, key=lambda leaf: leaf.start) - 1
        return self.leaves[i] if i >= 0 and first < self.leaves[i].start + self.leaves[i].size else None

    def add(self, a: Axis, b: Axis, both_zero: bool, why: str) -> Axis:
        """The labels of a sum of two activations. ``both_zero``: pruned indices of both operands are exactly zero."""
        if len(a) > 1 or len(b) > 1 or (not a and not b):
            return self.equal(a, b, why)
        if not (a and b) and any(map(self.is_copies, (*a, *b))):
            return self.equal(a, b, why)  # copies have no channels of their own to lose
        size = next(len(labels) for axis in (a, b) for labels in axis)
        x, y = (axis[0] if axis else np.full(size, ALIVE) for axis in (a, b))
        if np.array_equal(x, y):
            return a
        result = self.fresh(size)
        self._adds.append((result, x, y, both_zero))
        return (result,)

    def freeze(self, axis: Axis, why: str) -> None:
        """State that these indices can never go."""
        for labels in axis:
            self.frozen.append((labels, why))
            self._equal.append((labels, np.zeros_like(labels)))

    def split(self, kind: Hashable, grid: np.ndarray, why: str) -> tuple[int, np.ndarray]:
        """(axis, labels along it) of labels laid out over the factors of an axis; they vary along one at least.

        One factor keeps the labels, the indices of the others live and die together: whole heads, whole groups.
        """
        varies = [axis for axis in range(grid.ndim) if (grid != grid.take([0], axis)).any()]
        axis = varies[min(self.factors.get(kind, 0), len(varies) - 1)]
        lines = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)
        own = lines[:, 0].copy()
        if len(varies) > 1:
            self.equal((lines.ravel(),), (np.repeat(own, lines.shape[1]),), why)
            self.splits[kind].append((own, len(varies)))
        return axis, own

    def produce(self, axis: Axis) -> None:
        """State that these are the output channels of a conv or dense kernel."""
        self._produced.extend(axis)

    def produced(self) -> np.ndarray:
        """Every label that is an output channel of a kernel, sorted."""
        return np.unique(np.concatenate(self._produced)) if self._produced else np.zeros(0, int)

    def paths(self, labels: Iterable[Labels]) -> list[str]:
        """Paths of the variables that these labels come from or are tied to."""
        held = [a for value in labels for axis in value.axes for a in axis]
        if not held:
            return []
        classes = self.ties()
        ids = np.unique(classes[np.concatenate(held)])
        return sorted(
            {leaf.path for leaf in self.leaves if np.isin(classes[leaf.start : leaf.start + leaf.size], ids).any()}
        )

    def ties(self) -> np.ndarray:
        """The class of every label, had nothing been frozen and every sum merged its operands."""
        ties = [*self._equal, *((r, a) for r, a, _, _ in self._adds), *((r, b) for r, _, b, _ in self._adds)]
        return self._components([(a[both], b[both]) for a, b in ties for both in [(a != ALIVE) & (b != ALIVE)]])

    def solve(self, coupling: Coupling) -> Solution:
        """Classes of labels that live and die together, and the sums that keep a union."""
        if coupling not in ("group", "union"):
            raise ValueError(f'coupling must be "group" or "union", got {coupling!r}.')
        edges = list(self._equal)
        if coupling == "group" or not self._adds:
            for result, a, b, _ in self._adds:
                edges += [(result, a), (result, b)]
            return Solution(self, self._components(edges), np.zeros((0, 3), int))
        adds = np.concatenate([np.stack([r, a, b], 1) for r, a, b, _ in self._adds])
        union = np.concatenate([np.full(len(r), zero) for r, _, _, zero in self._adds])
        produced = self.produced()
        while True:
            merged = adds[~union]
            classes = self._components([*edges, (merged[:, 0], merged[:, 1]), (merged[:, 0], merged[:, 2])])
            keep = self._can_stay_union(classes, adds, union, produced)
            if np.array_equal(keep, union):
                return Solution(self, classes, classes[adds[union]])
            union = keep

    def _can_stay_union(self, classes, adds, union, produced) -> np.ndarray:
        """A sum keeps a union while its result is nothing else: no producer, no other sum, none of its operands."""
        result, a, b = classes[adds].T
        has_source = np.zeros(len(classes), bool)
        has_source[classes[ALIVE]] = True
        has_source[classes[produced]] = True
        is_produced = np.zeros(len(classes), bool)
        is_produced[classes[produced]] = True
        results_per_class = np.bincount(result[union], minlength=len(classes))
        has_source[result[union]] = True
        alive = classes[ALIVE]
        clash = is_produced[result] | (results_per_class[result] > 1) | (result == a) | (result == b)
        return union & has_source[a] & has_source[b] & (~clash | (result == alive))

    def _components(self, edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        if not edges:
            return np.arange(self._count)
        a = np.concatenate([e[0] for e in edges])
        b = np.concatenate([e[1] for e in edges])
        matrix = coo_array((np.ones(len(a), bool), (a, b)), shape=(self._count, self._count))
        return connected_components(matrix, directed=False)[1]


@dataclass(frozen=True)
class Solution:
    """``classes[label]`` is the class a label belongs to; ``unions`` rows are classes (result, operand, operand)."""

    structure: Structure
    classes: np.ndarray
    unions: np.ndarray

    @property
    def frozen_class(self) -> int:
        return int(self.classes[ALIVE])

    def produced_classes(self) -> np.ndarray:
        """Classes that contain an output channel of a kernel and nothing frozen, sorted."""
        found = np.unique(self.classes[self.structure.produced()])
        return found[(found != self.frozen_class) & ~np.isin(found, self.unions[:, 0])]

    def alive(self, pruned_classes: np.ndarray) -> np.ndarray:
        """Which classes live, a boolean array, when ``pruned_classes`` are gone."""
        alive = np.ones(self.classes.max(initial=0) + 1, bool)
        alive[pruned_classes] = False
        results = np.unique(self.unions[:, 0])
        results = results[results != self.frozen_class]
        alive[results] = False
        while True:  # a stream is a chain of sums: as many rounds as the longest chain, at most
            before = alive.copy()
            result, a, b = self.unions.T
            np.logical_or.at(alive, result, alive[a] | alive[b])
            if np.array_equal(before, alive):
                return alive

    def free(self) -> int:
        """How many output channels of kernels are not frozen."""
        return int((self.classes[self.structure.produced()] != self.frozen_class).sum())

    def blocked_splits(self) -> dict[Hashable, int]:
        """Kinds of split some of whose labels are frozen, and how many factors could keep them."""
        blocked = {}
        for kind, found in self.structure.splits.items():
            for own, options in found:
                if (self.classes[own] == self.frozen_class).any():
                    blocked[kind] = options
        return blocked

    def kept(self, axis: Axis, alive: np.ndarray) -> np.ndarray | None:
        """The kept indices of an axis, or None where all are."""
        if not axis:
            return None
        keep = np.ones(len(axis[0]), bool)
        for labels in axis:
            keep &= alive[self.classes[labels]]
        return None if keep.all() else np.flatnonzero(keep)
