"""Scores of whole channel groups: what ``allocate`` ranks, and criteria that are of groups from the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ehap_jax.graph.channels import ChannelGroup, channel_structure
from ehap_jax.graph.structure import Coupling
from ehap_jax.graph.trace import Graph
from ehap_jax.pruning.scores import Scores, leaves_by_path


class GroupPrices(Protocol):
    """What ``allocate`` reads of removal costs, or of any criterion that prices groups."""

    @property
    def groups(self) -> tuple[ChannelGroup, ...]: ...
    @property
    def coupling(self) -> Coupling: ...
    @property
    def prices(self) -> np.ndarray: ...
    @property
    def criterion(self) -> str: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


class GatePrices(GroupPrices, Protocol):
    """Removal costs with the first-order moments of the gates."""

    @property
    def first_order(self) -> np.ndarray | None: ...
    @property
    def first_order_squares(self) -> np.ndarray | None: ...


@dataclass(frozen=True, eq=False)
class GroupScores:
    """One score per group of ``channel_groups(graph, coupling=coupling)``, higher is more important.

    groups: the groups. prices: (K,), their scores. criterion, provenance: what a plan says of them. norms: (K,), what
    breaks ties. interactions: of a group's position the (K,) by which the others' prices rise once it is gone, or None.
    """

    groups: tuple[ChannelGroup, ...]
    coupling: Coupling
    prices: np.ndarray
    criterion: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    norms: np.ndarray | None = None
    interactions: Callable[[int], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if np.shape(self.prices) != (len(self.groups),):
            raise ValueError(f"there are {len(self.groups)} groups, but prices of shape {np.shape(self.prices)}.")
        bad = np.flatnonzero(~np.isfinite(self.prices))
        if len(bad):
            first = next(iter(self.groups[bad[0]].producers.items()))
            raise ValueError(f"{len(bad)} of {len(self.groups)} prices are not finite, the first that of {first}.")


def group_taylor_scores(costs: GatePrices) -> GroupScores:
    """First-order Taylor importance of a group, ``a_g²``: the squared change of the mean loss, to first order.

    Of the gate of a whole group, where ``taylor_scores`` has one per kernel (Molchanov et al. 2019, arXiv 1906.10771).
    Raises ValueError where the costs have no first order.
    """
    return _of_gates(costs, costs.first_order, np.square, "group taylor")


def group_fisher_scores(costs: GatePrices) -> GroupScores:
    """Empirical Fisher information of a group's gate, ``½ mean_n (∂loss_n/∂m_g)²`` (Liu et al. 2021, arXiv 2108.00708).

    Raises ValueError where the costs have no first order.
    """
    return _of_gates(costs, costs.first_order_squares, lambda squares: 0.5 * squares, "group fisher")


def _of_gates(costs: GatePrices, found: np.ndarray | None, score: Callable, criterion: str) -> GroupScores:
    if found is None:
        raise ValueError(
            f"{criterion} needs the gradient of the loss: call removal_costs with a batch (x, labels) and a head that "
            "has a loss, such as softmax_cross_entropy."
        )
    return GroupScores(costs.groups, costs.coupling, score(found), criterion, costs.provenance)


def group_magnitude_scores(graph: Graph, variables, *, coupling: Coupling = "group") -> GroupScores:
    """Group L2 magnitude: the mean of ``‖w‖²`` over all kernel slices of a group, what writes it and what reads it.

    Relative to the mean over groups of the same kernels, as DepGraph has it (Fang et al. 2023, arXiv 2301.12900, its
    group norm with the reduction "mean" and the normaliser "mean").
    """
    groups, leaves = channel_structure(graph, coupling).groups(), leaves_by_path(variables, graph)
    squares = {
        (path, axis): np.square(np.moveaxis(np.asarray(leaves[path], np.float64), axis, 0)).reshape(size, -1).sum(1)
        for path in graph.parameters
        if len(graph.leaves[path].shape) >= 2
        for axis, size in enumerate(graph.leaves[path].shape)
    }
    raw = np.array(
        [np.concatenate([squares[s][list(i)] for s, i in g.slices.items() if s in squares]).mean() for g in groups]
    )
    kinds: dict[frozenset[str], list[int]] = {}
    for position, group in enumerate(groups):
        kinds.setdefault(frozenset(group.producers), []).append(position)
    prices = raw.copy()
    for members in kinds.values():
        prices[members] /= raw[members].mean() or 1.0
    return GroupScores(groups, coupling, prices, "group magnitude", norms=raw)


AGGREGATE: dict[str, Callable[[np.ndarray], Any]] = {"sum": np.sum, "mean": np.mean, "max": np.max}


def scores_of_groups(
    graph: Graph, scores: Scores | GroupPrices, coupling: Coupling, aggregate: str, wanted: Sequence[int]
) -> GroupScores:
    """The scores of groups from those of their producers' channels, or removal costs as they are.

    ``wanted`` are the positions of groups that need a score; the others get 0. Raises KeyError for a wanted kernel
    without scores, ValueError for prices of other groups.
    """
    groups = channel_structure(graph, coupling).groups()
    if not isinstance(scores, Scores):
        theirs = [dict(group.producers) for group in scores.groups]
        if scores.coupling != coupling or theirs != [dict(group.producers) for group in groups]:
            raise ValueError(
                f'these are prices of {len(theirs)} groups under coupling "{scores.coupling}", but this network has '
                f'{len(groups)} groups under coupling "{coupling}": they are for another network or coupling.'
            )
        interactions, norms = getattr(scores, "interactions", None), getattr(scores, "norms", None)
        return GroupScores(groups, coupling, scores.prices, scores.criterion, scores.provenance, norms, interactions)

    def of(group: ChannelGroup, values: Mapping[str, np.ndarray]) -> np.ndarray:
        missing = [path for path in group.producers if path not in values]
        if missing:
            raise KeyError(
                f"the scores have no entry for kernel {missing[0]}: they are for another network, or the kernel has to "
                "be excluded."
            )
        return np.concatenate([values[path][list(i)] for path, i in group.producers.items()])

    prices, norms = np.zeros(len(groups)), np.zeros(len(groups))
    for position in wanted:
        values = of(groups[position], scores.values)
        # A sum of scores that cancel is not a dead channel.
        prices[position] = AGGREGATE[aggregate](values) or (np.finfo(float).tiny if values.any() else 0.0)
        norms[position] = AGGREGATE[aggregate](of(groups[position], scores.norms))
    return GroupScores(groups, coupling, prices, scores.criterion, scores.provenance, norms)
