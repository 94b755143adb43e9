"""Pruning in several rounds: how much every round keeps, and the loop of score, cut and train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any, Literal, NamedTuple

from ehap_jax.graph.trace import Graph
from ehap_jax.pruning.allocate import allocate
from ehap_jax.pruning.expand import expand_variables
from ehap_jax.pruning.group_scores import GroupPrices
from ehap_jax.pruning.mask import mask_variables
from ehap_jax.pruning.plan import PruningPlan
from ehap_jax.pruning.scores import Scores
from ehap_jax.pruning.shrink import shrink_variables

Schedule = Callable[[float], float]


def linear(progress: float) -> float:
    """The same amount goes in every round: ``t``."""
    return progress


def cubic(progress: float) -> float:
    """Much goes early, while it is easy, little at the end: ``1 - (1 - t)³`` (arXiv 1710.01878, eq. 1)."""
    return 1.0 - (1.0 - progress) ** 3


def kept_fractions(final: float, rounds: int, *, schedule: Schedule = cubic, initial: float = 1.0) -> tuple[float, ...]:
    """The fraction of the whole network that each of ``rounds`` rounds keeps; the last one is ``final``.

    ``f_i = initial + (final - initial) · schedule(i / rounds)`` for i = 1 … rounds. ``schedule`` is :func:`linear`,
    :func:`cubic` or any function of the progress in (0, 1] that never falls and ends at 1.

    Raises ValueError for fractions out of (0, 1], fewer than one round, or a schedule that is none.

    >>> kept_fractions(0.4, 3, schedule=linear)
    (0.8, 0.6, 0.4)
    >>> [round(f, 3) for f in kept_fractions(0.4, 3)]
    [0.578, 0.422, 0.4]
    """
    if not 0 < final <= initial <= 1:
        raise ValueError(f"fractions need 0 < final <= initial <= 1, got final={final!r} and initial={initial!r}.")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds!r}.")
    progress = [float(schedule(i / rounds)) for i in range(1, rounds + 1)]
    rising = all(a <= b for a, b in pairwise([0.0, *progress]))
    if not rising or not all(map(isfinite, progress)) or abs(progress[-1] - 1) > 1e-9:
        raise ValueError(
            f"a schedule rises from 0 to 1 as its argument does; this one gives {[round(p, 6) for p in progress]}."
        )
    return (*(round(initial + (final - initial) * p, 12) for p in progress[:-1]), final)


class Pruned(NamedTuple):
    """plan: of the full network. variables: what it leaves, trained; for ``shrink(apply, plan)``."""

    plan: PruningPlan
    variables: Any


def prune_iteratively(
    graph: Graph,
    variables,
    fractions: Sequence[float],
    *,
    score: Callable[[Any], Scores | GroupPrices],
    train: Callable[[PruningPlan, Any, int], Any] | None = None,
    recalibrate: Callable[[Any], Any] | None = None,
    budget: Literal["params", "macs", "bytes", "channels", "latency"] = "macs",
    **options: Any,
) -> Pruned:
    """Score, cut, recalibrate and train, once per fraction; what has gone stays gone.

    ``fractions`` of the full network's ``budget``, as from :func:`kept_fractions`. ``score(variables)`` sees full-size
    variables with zeros where channels went. ``train(plan, variables, round)`` gets and returns the shrunk variables,
    those of ``shrink(apply, plan)``; None trains nothing. ``recalibrate(variables)`` gets and returns variables of full
    size, zero where channels went, before they are trained: a ``partial`` of :func:`~ehap_jax.pruning.recalibrate`, so
    that the next round is scored on a network whose normalisation fits. ``options`` go to ``allocate``. All effects are
    those of the functions given.

    Raises ValueError for fractions that rise or are none, and whatever ``allocate`` raises.

    >>> import jax, jax.numpy as jnp
    >>> from ehap_jax.graph import trace_graph
    >>> from ehap_jax.pruning import magnitude_scores
    >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
    >>> w = {"in": jnp.arange(12.0).reshape(3, 4), "out": jnp.ones((4, 2))}
    >>> graph = trace_graph(apply)(w, jnp.ones((1, 3)))
    >>> plan, w = prune_iteratively(
    ...     graph, w, kept_fractions(0.5, 2), score=lambda w: magnitude_scores(graph, w))
    >>> plan.keep["in"].tolist(), w["in"].shape
    ([2, 3], (3, 2))
    """
    if not fractions or any(b > a for a, b in pairwise(fractions)):
        raise ValueError(f"fractions must be given and never rise, got {list(fractions)}.")
    given: dict[str, Any] = dict(options)
    plan: PruningPlan | None = None
    small = variables
    for number, fraction in enumerate(fractions):
        plan = allocate(graph, score(variables), start=plan, **{budget: fraction}, **given)
        if recalibrate is not None:
            variables = recalibrate(mask_variables(variables, plan))
        small = shrink_variables(variables, plan)
        if train is not None:
            small = train(plan, small, number)
        variables = expand_variables(small, plan)
    assert plan is not None
    return Pruned(plan, small)
