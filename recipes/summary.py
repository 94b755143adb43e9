"""What the report of a run is made from: its stages over seeds, its plan and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from ehap_jax.graph import Cost
from ehap_jax.pruning import Scores
from ehap_jax.report import Convergence, score_arrays
from ehap_jax.training import RunDirectory


class Stage(NamedTuple):
    """A network after one stage: accuracy on the test split in [0, 1], and what it costs."""

    accuracy: float
    cost: Cost


def summarise(
    seeds: Sequence[Mapping[str, Stage]], *, seconds: Mapping[str, float], checks: Mapping[str, float]
) -> dict[str, Any]:
    """``summary.json``: per stage accuracy over seeds, and the cost, averaged over seeds."""
    stages = []
    for name in seeds[0]:
        accuracies = [stages_of_seed[name].accuracy for stages_of_seed in seeds]
        costs = [stages_of_seed[name].cost for stages_of_seed in seeds]
        stages.append(
            {
                "stage": name,
                "accuracy": mean(accuracies),
                "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
                "accuracies": accuracies,
                **{field: round(mean(getattr(cost, field) for cost in costs)) for field in Cost._fields},
            }
        )
    return {"stages": stages, "seeds": list(range(len(seeds))), "seconds": dict(seconds), "checks": dict(checks)}


def write_scores(
    run: RunDirectory,
    scores: Mapping[str, Scores],
    sem: Scores | None = None,
    convergence: Convergence | None = None,
) -> None:
    """``scores.npz``: scores by policy or criterion, and what is known of their uncertainty.

    Args:
        run: where to.
        scores: by the name the report shows.
        sem: standard errors of the scores, in their units: `hessian_scores` of the trace's standard errors.
        convergence: the course of the estimate.
    """
    partial = run.file(".scores.partial.npz")
    found = {name: criterion.values for name, criterion in scores.items()}
    arrays = score_arrays(found, sem=None if sem is None else sem.values, convergence=convergence)
    np.savez(partial, **arrays)  # pyright: ignore[reportArgumentType]
    partial.replace(run.file("scores.npz"))
