"""From scores to a plan: the least important groups go until a budget is met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import floor
from typing import Literal, NamedTuple

import numpy as np

from ehap_jax.graph.channels import ChannelGroup, ChannelStructure, channel_structure
from ehap_jax.graph.cost import Cost, cost_of_alive, kept_shape
from ehap_jax.graph.kernel_uses import KernelUse, centre_taps
from ehap_jax.graph.structure import Coupling
from ehap_jax.graph.trace import Graph
from ehap_jax.pruning.group_scores import AGGREGATE, GroupPrices, GroupScores, scores_of_groups
from ehap_jax.pruning.latency import LatencyTable
from ehap_jax.pruning.plan import PruningPlan
from ehap_jax.pruning.removal_order import LayerLimits, greedy, interleaved, ranked, within_limits
from ehap_jax.pruning.savings import Savings, Unit
from ehap_jax.pruning.scores import Scores


class OutOfReachError(ValueError):
    """A budget below what the limits of an allocation allow."""


def allocate(
    graph: Graph,
    scores: Scores | GroupPrices,
    *,
    params: float | None = None,
    macs: float | None = None,
    channels: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    latency_table: LatencyTable | None = None,
    coupling: Coupling = "group",
    per: Unit | None = None,
    interactions: bool = False,
    max_layer_ratio: float = 0.95,
    round_to: int = 1,
    min_channels: int = 1,
    exclude: Sequence[str] = (),
    aggregate: Literal["sum", "mean", "max"] = "sum",
    ranking: Literal["global", "layer", "isomorphic"] = "global",
    implants: float = 0.0,
    max_implant_ratio: float = 1.0,
    start: PruningPlan | None = None,
) -> PruningPlan:
    """Remove groups in ascending order of score until at most a fraction of the network is kept.

    Exactly one of ``params``, ``macs``, ``bytes``, ``channels`` (of the prunable kernels) and ``latency`` (the sum over
    the layers by ``latency_table``, see ``measure_latency``) is the fraction in (0, 1] that is kept; the result is
    within one group of it. A group's score is the ``aggregate`` of its producers' channels;
    groups of exact zeros (dead channels) go first, ties by ‖w‖² where scores have it, then by position. No kernel loses
    more than ``max_layer_ratio`` of its output channels or keeps fewer than ``min_channels`` (its best ones stay), and
    with ``round_to`` the kept number of every pruned kernel is a multiple of it where its size allows. Groups with a
    kernel whose path matches a pattern of ``exclude`` (``"*/downsample*"``) stay whole.

    ``scores`` are of channels (:class:`Scores`) or of groups (``removal_costs``, ``group_magnitude_scores``, …).

    ``per`` ranks by score per unit saved: by what removing a group saves of the multiply-accumulates, parameters,
    bytes or seconds (by ``latency_table``) once those that rank before it are gone. ``interactions`` prices what is
    left anew after each removal, from the Gram matrix of ``removal_costs``: two groups that do the same cost little
    alone and much together.

    ``ranking`` says what is compared with what. ``"global"``: all groups. ``"layer"``: groups of the same kernels, so
    that every layer loses the same fraction. ``"isomorphic"``: layers of the same structure (number and kind of the
    kernels and other variables they tie together), each such class losing the same fraction (arXiv 2407.04616).

    ``implants`` is the fraction of the groups to go, the most sensitive of them, that HAP keeps as neural implants:
    their 3×3 kernels become 1×1, so that a channel is kept, implanted or pruned as its score falls. At most
    ``max_implant_ratio`` of a kernel's channels are; what is beyond, and what no kernel can hold (``centre_taps``), is
    pruned. The budget counts implants; ``channels`` counts them as kept.

    ``start`` is an earlier plan for the same network: what it removed goes first and stays gone, whatever its scores
    are now, and its implants stay implants or go (pruning in rounds, see ``prune_iteratively``).

    Raises OutOfReachError (a ValueError) for a fraction below what the limits allow, and gives the range, or where
    nothing can go; ValueError for one out of (0, 1], a ``start`` of another network or coupling, prices of groups of
    another network or coupling, groups that save nothing of ``per``, ``interactions`` of scores that have none, or a
    pattern of ``exclude`` that matches nothing.
    """
    budget, fraction = _budget(params=params, macs=macs, channels=channels, bytes=bytes, latency=latency)
    if not 0 <= max_layer_ratio < 1:
        raise ValueError(f"max_layer_ratio must be in [0, 1), got {max_layer_ratio!r}.")
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to!r}.")
    if min_channels < 1:
        raise ValueError(f"min_channels must be at least 1, got {min_channels!r}.")
    if ranking not in ("global", "layer", "isomorphic"):
        raise ValueError(f'ranking must be "global", "layer" or "isomorphic", got {ranking!r}.')
    if aggregate not in AGGREGATE:
        raise ValueError(f"aggregate must be one of {', '.join(AGGREGATE)}, got {aggregate!r}.")
    for name, value in (("implants", implants), ("max_implant_ratio", max_implant_ratio)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value!r}.")
    if (latency is None and per != "latency") != (latency_table is None):
        raise ValueError("latency and latency_table go together: make a table with measure_latency(graph).")
    if per not in (None, "macs", "params", "bytes", "latency"):
        raise ValueError(f'per must be "macs", "params", "bytes", "latency" or None, got {per!r}.')
    if ranking != "global" and (per or interactions):
        raise ValueError(f'per and interactions compare all groups; they need ranking="global", got {ranking!r}.')
    if latency is not None and implants:
        raise ValueError("latency tables have no 1×1 implants; give another budget with them.")
    structure = channel_structure(graph, coupling)
    sizes = {path: graph.leaves[path].shape[axis] for path, axis in structure.kernel_axes.items()}
    _check_lengths(scores, sizes)
    groups = structure.groups()
    wanted = _without(groups, exclude, structure.kernel_axes)
    priced = scores_of_groups(graph, scores, coupling, aggregate, wanted)
    limits_of_layers = LayerLimits(sizes, max_layer_ratio, min_channels)
    gone_first = _gone_first(ranked(priced, wanted), groups, graph, coupling, start)
    if per or interactions:
        numbers = greedy(
            priced,
            wanted,
            limits_of_layers,
            savings=_savings(structure, per, latency_table, wanted) if per else None,
            interactions=_interactions(priced) if interactions else None,
            first=gone_first,
        )
    else:
        early = set(gone_first)
        order = [k for k in ranked(priced, wanted) if k not in early]
        if ranking != "global":
            class_of = _layer if ranking == "layer" else _isomorphism_class
            order = interleaved(order, lambda k: class_of(groups[k], graph))
        numbers = within_limits([*gone_first, *order], groups, limits_of_layers)
    removable, gone = [groups[k] for k in numbers], len(gone_first)
    if not removable and fraction < 1:
        raise OutOfReachError(_nothing_to_remove(groups, wanted, coupling, max_layer_ratio, min_channels))
    holders = _implant_holders(graph, removable) if implants else {}
    limits = {path: floor(max_implant_ratio * size + 1e-9) for path, size in sizes.items()}
    budget_table = latency_table if budget == "latency" else None
    total = _measure(structure, Decision([], {}), groups, budget, budget_table)

    def decide(count: int) -> Decision:
        return _decide(removable[:count], sizes, round_to, round(implants * count), holders, limits)

    def kept_fraction(count: int) -> float:
        return _measure(structure, decide(count), groups, budget, budget_table) / total if total else 1.0

    lowest = kept_fraction(len(removable))
    if lowest > fraction:
        raise OutOfReachError(
            f"{budget}={fraction:g} is out of reach: with max_layer_ratio={max_layer_ratio:g}, "
            f"min_channels={min_channels}, round_to={round_to} and {len(exclude)} exclusions this network can keep "
            f"between {lowest:.4f} and 1 of its {budget}."
        )
    low, high = min(gone, len(removable)), len(removable)
    while low < high:
        middle = (low + high) // 2
        if kept_fraction(middle) <= fraction:
            high = middle
        else:
            low = middle + 1
    decision = decide(low)
    cost, full = (_cost(structure, taken) for taken in (decision, Decision([], {})))
    provenance = {
        "criterion": scores.criterion,
        "budget": {budget: fraction},
        "per": per,
        "interactions": interactions,
        "max_layer_ratio": max_layer_ratio,
        "round_to": round_to,
        "min_channels": min_channels,
        "exclude": list(exclude),
        "ranking": ranking,
        "aggregate": aggregate,
        "implants": implants,
        "max_implant_ratio": max_implant_ratio,
        "latency_device": None if latency_table is None else latency_table.device,
        "scores": dict(scores.provenance),
        "negative_scores": scores.negative if isinstance(scores, Scores) else int((priced.prices < 0).sum()),
        "cost": cost._asdict(),
        "full_cost": full._asdict(),
    }
    keep = _keep(structure, decision.removed)
    return PruningPlan.from_keep(graph, keep, coupling=coupling, implants=decision.implants, provenance=provenance)


class Decision(NamedTuple):
    """removed: groups that go. implants: kernel path -> channels that keep only a 1×1 kernel."""

    removed: list[ChannelGroup]
    implants: dict[str, list[int]]


def _budget(**given: float | None) -> tuple[str, float]:
    named = [(name, value) for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}; got {', '.join(n for n, _ in named) or 'none'}.")
    name, fraction = named[0]
    if not 0 < fraction <= 1:
        raise ValueError(f"{name} is the fraction that is kept, in (0, 1]; got {fraction!r}.")
    return name, fraction


def _check_lengths(scores: Scores | GroupPrices, sizes: Mapping[str, int]) -> None:
    for path, values in scores.values.items() if isinstance(scores, Scores) else ():
        if path in sizes and len(values) != sizes[path]:
            raise ValueError(f"{path} has {sizes[path]} output channels, but {len(values)} scores.")


def _interactions(priced: GroupScores):
    if priced.interactions is None:
        raise ValueError(
            f'interactions=True needs scores that know them, as those of removal_costs do; "{priced.criterion}" does '
            "not."
        )
    return priced.interactions


def _savings(structure: ChannelStructure, per: Unit, table: LatencyTable | None, wanted: Sequence[int]) -> Savings:
    savings = Savings(structure, per, table)
    now = savings.now
    idle = [k for k in wanted if now[k] <= 0]
    if idle and per != "latency":  # a layer's time may be the same for several widths
        producers = dict(structure.groups()[idle[0]].producers)
        raise ValueError(
            f"removing {producers} saves no {per}, so it has no score per unit of it; leave it out with exclude=, or "
            "give another per."
        )
    return savings


def _nothing_to_remove(groups, wanted, coupling: str, max_layer_ratio: float, min_channels: int) -> str:
    if not groups:
        return (
            f'nothing can be removed from this network under coupling="{coupling}": none of its channels is free; '
            "explain(graph) says why."
        )
    return (
        f"nothing can be removed: of {len(groups)} groups {len(groups) - len(wanted)} are excluded, and "
        f"max_layer_ratio={max_layer_ratio:g} and min_channels={min_channels} keep the others."
    )


def _without(groups: Sequence[ChannelGroup], exclude: Sequence[str], kernels) -> list[int]:
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a sequence of patterns, not the string {exclude!r}.")
    for pattern in exclude:
        if not any(fnmatchcase(path, pattern) for path in kernels):
            raise ValueError(f"exclude pattern {pattern!r} matches no kernel; there are {', '.join(sorted(kernels))}.")
    return [k for k, g in enumerate(groups) if not any(fnmatchcase(path, p) for path in g.producers for p in exclude)]


def _gone_first(
    order: Sequence[int], groups: Sequence[ChannelGroup], graph: Graph, coupling: Coupling, start: PruningPlan | None
) -> list[int]:
    """What an earlier plan removed, then its implants, each in the order given."""
    if start is None:
        return []
    if start.coupling != coupling:
        raise ValueError(f'start was made for coupling "{start.coupling}", not "{coupling}".')
    if dict(start.shapes) != {path: tuple(value.shape) for path, value in graph.leaves.items()}:
        raise ValueError("start is a plan for a network with other variables or shapes than this graph's.")

    def place(group: ChannelGroup) -> int:
        members = [(path, i) for path, indices in group.producers.items() for i in indices]
        if any(path in start.keep and i not in start.keep[path] for path, i in members):
            return 0
        return 1 if any(path in start.implants and i in start.implants[path].channels for path, i in members) else 2

    places = {k: place(groups[k]) for k in order}
    return sorted((k for k in order if places[k] < 2), key=lambda k: places[k])


def _layer(group: ChannelGroup, graph: Graph):
    return frozenset(group.producers)


def _isomorphism_class(group: ChannelGroup, graph: Graph):
    """What the group ties together, names and widths left out: rank, axis, spatial size and count of indices."""
    return tuple(
        sorted(
            (len(shape), axis, shape[:-2] if len(shape) > 2 else (), path in group.producers)
            for path, axis in group.slices
            for shape in [graph.leaves[path].shape]
        )
    )


def _rounded(removed: Sequence[ChannelGroup], sizes: Mapping[str, int], round_to: int) -> list[ChannelGroup]:
    """``removed`` less the best groups that must come back for every kernel to keep a multiple of ``round_to``."""
    gone: Counter[str] = Counter()
    members: dict[str, list[int]] = {}
    for position, group in enumerate(removed):
        for path, indices in group.producers.items():
            gone[path] += len(indices)
            members.setdefault(path, []).append(position)
    back: set[int] = set()

    def uneven() -> str | None:
        return next((p for p in members if gone[p] and (sizes[p] - gone[p]) % round_to), None)

    while (path := uneven()) is not None:
        position = members[path].pop()
        if position not in back:
            back.add(position)
            gone.subtract({p: len(indices) for p, indices in removed[position].producers.items()})
    return [group for position, group in enumerate(removed) if position not in back]


def _implant_holders(graph: Graph, groups: Sequence[ChannelGroup]) -> dict[str, KernelUse]:
    """The kernels of ``groups`` that can hold implants."""
    uses = {path: use for path, use in centre_taps(graph).items() if isinstance(use, KernelUse)}
    found = {path: uses[path] for group in groups for path in group.producers if path in uses}
    if groups and not found:
        reasons = {path: centre_taps(graph)[path] for group in groups for path in group.producers}
        raise ValueError(f"no kernel that may lose channels can hold 1×1 implants: {reasons}.")
    return found


def _decide(taken, sizes, round_to: int, band: int, holders, limits: Mapping[str, int]) -> Decision:
    """What becomes of the groups ``taken``: the last ``band`` are implants where that is possible, the others go.

    The most sensitive come first, so that a kernel at its limit prunes the less sensitive ones. What rounding spares is
    an implant rather than whole, where there are any.
    """
    held: dict[str, list[int]] = {}

    def implant(group: ChannelGroup) -> bool:
        own = {path: indices for path, indices in group.producers.items() if path in holders}
        if not own or any(len(held.get(path, [])) + len(idx) > limits[path] for path, idx in own.items()):
            return False
        for path, indices in own.items():
            held.setdefault(path, []).extend(indices)
        return True

    first = len(taken) - band
    spared = {position for position in range(len(taken) - 1, first - 1, -1) if implant(taken[position])}
    pruned = [group for position, group in enumerate(taken) if position not in spared]
    removed = _rounded(pruned, sizes, round_to)
    if band:
        gone = set(map(id, removed))
        for group in reversed(pruned):
            if id(group) not in gone:
                implant(group)
    return Decision(removed, held)


def _keep(structure: ChannelStructure, removed) -> dict[str, np.ndarray]:
    gone: dict[str, set[int]] = {}
    for group in removed:
        for path, indices in group.producers.items():
            gone.setdefault(path, set()).update(indices)
    leaves, axes = structure.graph.leaves, structure.kernel_axes
    return {p: np.setdiff1d(np.arange(leaves[p].shape[axes[p]]), sorted(lost)) for p, lost in gone.items()}


def _cost(structure: ChannelStructure, decision: Decision) -> Cost:
    implants = {path: len(channels) for path, channels in decision.implants.items()}
    return cost_of_alive(structure, structure.alive(_keep(structure, decision.removed)), implants)


def _measure(structure: ChannelStructure, decision: Decision, groups, budget: str, table: LatencyTable | None) -> float:
    if table is not None:
        return table.seconds(
            structure.graph, kept_shape(structure, structure.alive(_keep(structure, decision.removed)))
        )
    if budget == "channels":
        size = sum(len(indices) for group in groups for indices in group.producers.values())
        return size - sum(len(indices) for group in decision.removed for indices in group.producers.values())
    return getattr(_cost(structure, decision), budget)
