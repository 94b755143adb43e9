"""What the report of a run is made from: its stages over seeds, its plan and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

from ehap_jax._whole_files import write_arrays
from ehap_jax.curvature import RemovalCosts
from ehap_jax.graph import Cost
from ehap_jax.pruning import Scores
from ehap_jax.report import Convergence, score_arrays
from ehap_jax.training import RunDirectory


class Stage(NamedTuple):
    """A network after one stage: accuracy on the test split in [0, 1], and what it costs."""

    accuracy: float
    cost: Cost


def summarise(
    seeds: Sequence[Mapping[str, Stage]],
    *,
    seconds: Mapping[str, float],
    checks: Mapping[str, float],
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """``summary.json``: per stage accuracy over seeds, and the cost, averaged over seeds.

    Args:
        seeds: stages by name, of every seed.
        seconds: by what took them.
        checks: what was verified, and how closely it holds.
        costs: what the report draws as bars; see `probe_costs`.
    """
    stages = []
    for name in seeds[0]:
        accuracies = [stages_of_seed[name].accuracy for stages_of_seed in seeds]
        networks = [stages_of_seed[name].cost for stages_of_seed in seeds]
        stages.append(
            {
                "stage": name,
                "accuracy": mean(accuracies),
                "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
                "accuracies": accuracies,
                **{field: round(mean(getattr(cost, field) for cost in networks)) for field in Cost._fields},
            }
        )
    return {"stages": stages, "seeds": list(range(len(seeds))), "seconds": dict(seconds), "checks": dict(checks)} | (
        {"costs": costs} if costs else {}
    )


def probe_costs(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Time and memory of a probe by precision, those that are known, for the bars of the report."""
    found = {
        "seconds per probe": {name: row.get("seconds_per_probe") for name, row in rows.items()},
        "megabytes at the peak of a probe": {
            name: row["probe_bytes"] / 1e6 if row.get("probe_bytes") else None for name, row in rows.items()
        },
    }
    known = {name: {key: value for key, value in bars.items() if value} for name, bars in found.items()}
    return {name: bars for name, bars in known.items() if bars}


def write_scores(
    run: RunDirectory,
    scores: Mapping[str, Scores | RemovalCosts],
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
    found = {name: values_of(criterion) for name, criterion in scores.items()}
    arrays = score_arrays(found, sem=None if sem is None else sem.values, convergence=convergence)
    write_arrays(run.file("scores.npz"), arrays)


def values_of(scores: Scores | RemovalCosts) -> Mapping[str, np.ndarray]:
    """Scores by kernel: (channels,) in order. Prices are of groups: each of their channels has the group's, and
    channels that no group has, which cannot go, have none."""
    if isinstance(scores, Scores):
        return scores.values
    found: dict[str, dict[int, float]] = {}
    for group, price in zip(scores.groups, scores.prices, strict=True):
        for path, channels in group.producers.items():
            found.setdefault(path, {}).update(dict.fromkeys(channels, float(price)))
    return {path: np.array([prices[c] for c in sorted(prices)]) for path, prices in found.items()}


def negative(scores: Scores | RemovalCosts) -> int:
    """How many channels have a negative score: noise of an estimator."""
    return sum(int((np.asarray(values) < 0).sum()) for values in values_of(scores).values())
