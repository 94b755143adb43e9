"""In which order groups go: by price, by price per unit saved, and with what they cost each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import floor

import numpy as np

from ehap_jax.graph.channels import ChannelGroup
from ehap_jax.pruning.group_scores import GroupScores
from ehap_jax.pruning.savings import Savings


class LayerLimits:
    """How many channels every kernel may lose; counts those that are gone."""

    def __init__(self, sizes: Mapping[str, int], max_layer_ratio: float, min_channels: int) -> None:
        self._left = {
            path: min(floor(max_layer_ratio * size + 1e-9), max(size - min_channels, 0)) for path, size in sizes.items()
        }

    def allow(self, group: ChannelGroup) -> bool:
        return all(self._left[path] >= len(indices) for path, indices in group.producers.items())

    def take(self, group: ChannelGroup) -> None:
        for path, indices in group.producers.items():
            self._left[path] -= len(indices)


def ranked(scores: GroupScores, wanted: Sequence[int]) -> list[int]:
    """Ascending: exact zeros (dead channels), then by price, by norm, by position."""
    norms = np.zeros(len(scores.groups)) if scores.norms is None else scores.norms
    return sorted(wanted, key=lambda k: (bool(scores.prices[k]), scores.prices[k], norms[k], k))


def interleaved(order: Sequence[int], class_of: Callable[[int], object]) -> list[int]:
    """``order`` rearranged so that all classes lose the same fraction: by rank within the class over its size."""
    classes = [class_of(k) for k in order]
    size, seen = Counter(classes), Counter()
    keys = []
    for position, cls in enumerate(classes):
        keys.append(((seen[cls] + 0.5) / size[cls], position))
        seen[cls] += 1
    return [order[position] for _, position in sorted(keys)]


def within_limits(order: Sequence[int], groups: Sequence[ChannelGroup], limits: LayerLimits) -> list[int]:
    """Those of ``order`` that may go: whatever would take a kernel beyond its limit stays."""
    removable = []
    for k in order:
        if limits.allow(groups[k]):
            limits.take(groups[k])
            removable.append(k)
    return removable


def greedy(
    scores: GroupScores,
    wanted: Sequence[int],
    limits: LayerLimits,
    *,
    savings: Savings | None,
    interactions: Callable[[int], np.ndarray] | None,
    first: Sequence[int],
) -> list[int]:
    """The cheapest group goes, and what is left is priced again, until nothing more may go.

    O(K) a step, or O(R K) with interactions from a factor of R rows.

    ``savings`` divides prices by what removing a group saves by then. ``interactions`` adds to the others' prices what
    a removed group leaves them to cost. The groups ``first`` go before all others, in their order, if they may.
    """
    prices = np.array(scores.prices, np.float64)
    norms = np.zeros(len(prices)) if scores.norms is None else scores.norms
    open_ = np.zeros(len(prices), bool)
    open_[list(wanted)] = True
    order: list[int] = []

    def remove(k: int) -> None:
        limits.take(scores.groups[k])
        order.append(k)
        if interactions is not None:
            prices[:] += interactions(k)
        if savings is not None:
            savings.remove(k)

    for k in first:
        open_[k] = False
        if limits.allow(scores.groups[k]):
            remove(k)
    dead = np.asarray(scores.prices) == 0
    while open_.any():
        candidates = np.flatnonzero(open_ & dead) if (open_ & dead).any() else np.flatnonzero(open_)
        key = prices[candidates]
        if savings is not None:
            saved = savings.now[candidates]
            per_unit = np.divide(key, saved, out=np.full(key.shape, np.inf), where=saved > 0)
            key = np.where(key < 0, key * saved, np.where(key > 0, per_unit, 0.0))  # a gain counts more where more goes
        best = candidates[key == key.min()]
        k = int(best[np.lexsort((best, norms[best], prices[best]))[0]])
        open_[k] = False
        if limits.allow(scores.groups[k]):
            remove(k)
    return order
