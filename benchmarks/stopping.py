"""When do stopping rules stop, and how wrong is the trace then? Three rules on the same probes, beside the exact trace.

    python -m recipes.pretrain digits --output runs/pretrain-digits          # a small trained network
    python -m benchmarks.stopping runs/pretrain-digits --data digits --seeds 50
    python -m benchmarks.stopping resnet20.th --data npz:cifar10.npz --seeds 10

The network is whatever `recipes.network.load_network` reads; its trace must be known without probes, as for ResNets.
For every seed probes are drawn up to ``--probes``, and each rule is asked after every probe:

rtol            the standard error of the total is at most ``rtol * |total|`` (`channel_trace(rtol=)`)
stable          at most the tolerance of the channels are expected on the wrong side (`stable_decision`)
running mean    one more probe moves the total by less than the tolerance, relatively (PyHessian's `trace`, tol=1e-3)

Reported per rule, over seeds: probes at the stop; the true relative error of the total there, as median, root mean
square and maximum; for a rule that names a relative tolerance, the root mean square over it; the share of channels that
are in another half than by the exact scores; how many seeds never stopped (they count with their last probe). Nothing
is timed. Results of several networks lie side by side in one file.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.measure import provenance, read_results, write_results
from benchmarks.trained import flat, hap_scores
from ehap_jax.curvature import TraceEstimate, channel_trace, gauss_newton_trace, stable_decision
from ehap_jax.curvature.channel_trace import MIN_PROBES_TO_STOP
from ehap_jax.data import load_dataset
from ehap_jax.training import Progress
from recipes.lab import evaluation_loss, training_batch
from recipes.network import load_network

RTOLS = (0.1, 0.05, 0.02)
DECISIONS = (0.1, 0.05)
"""Tolerated shares of misplaced channels, half of all channels being pruned."""
RUNNING = (1e-2, 1e-3)
"""The second is PyHessian's default."""


class Course(NamedTuple):
    """One seed's estimate after every number of probes: totals, their standard errors, HAP scores, settled decisions.

    totals, sems: (probes,). scores: (probes, channels). settled: {tolerance: (probes,) of bool}.
    """

    totals: np.ndarray
    sems: np.ndarray
    scores: np.ndarray
    settled: dict[float, np.ndarray]


def course_of(loss, variables: Any, batch: Any, seed: int, probes: int, microbatch: int | None) -> Course:
    """All of one seed's probes."""
    rules = {tolerance: stable_decision(variables, prune=0.5, tolerance=tolerance) for tolerance in DECISIONS}
    rows: list[tuple[float, float, np.ndarray, list[bool]]] = []

    def look(estimate: TraceEstimate) -> bool:
        settled = [estimate.count >= MIN_PROBES_TO_STOP and rule(estimate) for rule in rules.values()]
        scores = hap_scores(flat(estimate.mean, variables), variables)
        rows.append((estimate.total(), estimate.total_sem(), scores, settled))
        return False

    options: dict[str, Any] = {"key": jax.random.key(seed), "probes_per_step": 1, "microbatch": microbatch}
    state = None
    for count in range(1, MIN_PROBES_TO_STOP):  # before that channel_trace does not ask
        found = channel_trace(loss, variables, batch, num_probes=count, state=state, **options)
        look(found)
        state = found.state
    last = channel_trace(loss, variables, batch, num_probes=probes, state=state, until=look, **options)
    if len(rows) < probes:  # the last one, which is not asked about
        look(last)
    totals, sems, scores, settled = zip(*rows, strict=True)
    by_rule = np.array(settled).T
    return Course(np.array(totals), np.array(sems), np.array(scores), dict(zip(rules, by_rule, strict=True)))


def first_true(asked: np.ndarray) -> int | None:
    """The number of probes after which a rule stops; None: never."""
    return int(np.argmax(asked)) + 1 if asked.any() else None


def running_mean_rule(totals: np.ndarray, tolerance: float) -> np.ndarray:
    """After every probe, whether PyHessian stops: the mean has moved by less than ``tolerance``, relatively.

    >>> running_mean_rule(np.array([1.0, 2.0, 2.001]), 1e-2).tolist()
    [False, False, True]
    """
    before = np.concatenate([[0.0], totals[:-1]])
    return np.abs(totals - before) / (np.abs(before) + 1e-6) < tolerance


def rtol_rule(course: Course, rtol: float) -> np.ndarray:
    """After every probe, whether `channel_trace` with this ``rtol`` stops."""
    enough = np.arange(1, len(course.totals) + 1) >= MIN_PROBES_TO_STOP
    return enough & (course.sems <= rtol * np.abs(course.totals))


def misplaced(scores: np.ndarray, truth: np.ndarray) -> float:
    """The share of channels that are in another half than by the exact scores."""
    pruned = round(0.5 * len(truth))
    lowest = [np.zeros(len(truth), bool) for _ in range(2)]
    for mask, values in zip(lowest, (scores, truth), strict=True):
        mask[np.argsort(values, kind="stable")[:pruned]] = True
    return float(np.mean(lowest[0] != lowest[1]))


def summarise(stops: list[int | None], courses: list[Course], exact: float, truth: np.ndarray) -> dict[str, Any]:
    """One row of the table."""
    at = [len(course.totals) if stop is None else stop for stop, course in zip(stops, courses, strict=True)]
    errors = np.array([abs(course.totals[n - 1] / exact - 1) for n, course in zip(at, courses, strict=True)])
    wrong = [misplaced(course.scores[n - 1], truth) for n, course in zip(at, courses, strict=True)]
    return {
        "probes": {"median": float(np.median(at)), "min": min(at), "max": max(at)},
        "relative_error": {
            "median": float(np.median(errors)),
            "rms": float(np.sqrt(np.mean(errors**2))),
            "max": float(errors.max()),
        },
        "misplaced_share": float(np.mean(wrong)),
        "never_stopped": sum(stop is None for stop in stops),
    }


def measure(
    network_path: str, data: str, images: int, microbatch: int | None, seeds: int, probes: int
) -> dict[str, Any]:
    """All rules on one network."""
    network = load_network(network_path)
    dataset = load_dataset(data, normalisation=network.architecture.normalisation)
    batch, loss = training_batch(dataset, images), evaluation_loss(network.apply)
    variables = network.variables
    exact = gauss_newton_trace(network.apply, variables, batch)
    truth = hap_scores(flat(exact.mean, variables), variables)
    courses = []
    with Progress() as progress, progress.stage("seeds", seeds) as advance:
        for seed in range(seeds):
            courses.append(course_of(loss, variables, batch, seed, probes, microbatch))
            advance()
    rules = {f"rtol {r:g}": (r, [first_true(rtol_rule(c, r)) for c in courses]) for r in RTOLS}
    rules |= {f"stable decision {t:g}": (None, [first_true(c.settled[t]) for c in courses]) for t in DECISIONS}
    rules |= {
        f"running mean {t:g}": (t, [first_true(running_mean_rule(c.totals, t)) for c in courses]) for t in RUNNING
    }
    rows = []
    for name, (tolerance, stops) in rules.items():
        row = {"rule": name, **summarise(stops, courses, exact.total(), truth)}
        if tolerance is not None:
            row["rms_error_over_tolerance"] = row["relative_error"]["rms"] / tolerance
        rows.append(row)
    return {
        "network": network.architecture.model,
        "data": data.partition(":")[0],
        "images": images,
        "seeds": seeds,
        "probes_at_most": probes,
        "exact_total": exact.total(),
        "channels": len(truth),
        "rows": rows,
        **provenance(),
    }


def table(found: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [f"{found['network']}, {found['images']} images, {found['seeds']} seeds, {found['channels']} channels"]
    lines.append(
        f"{'rule':22} {'probes':>15} {'error: median':>14} {'rms':>8} {'max':>8} {'misplaced':>10} {'never':>6}"
    )
    for row in found["rows"]:
        probes, error = row["probes"], row["relative_error"]
        span = f"{probes['median']:g} ({probes['min']}-{probes['max']})"
        lines.append(
            f"{row['rule']:22} {span:>15} {error['median']:14.2%} {error['rms']:8.2%} {error['max']:8.2%} "
            f"{row['misplaced_share']:10.1%} {row['never_stopped']:6d}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="a checkpoint or the run directory of a recipe")
    parser.add_argument("--data", default="digits", help='"digits", "npz:PATH" or "tfds:NAME"')
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--microbatch", type=int, default=None)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--probes", type=int, default=400, help="at most, more than 16")
    parser.add_argument("--out", type=Path, default=Path("results/stopping.json"))
    options = parser.parse_args()
    if options.probes <= MIN_PROBES_TO_STOP or options.seeds < 1:
        parser.error(f"--probes must be more than {MIN_PROBES_TO_STOP} and --seeds at least 1")
    found = measure(options.network, options.data, options.images, options.microbatch, options.seeds, options.probes)
    write_results(options.out, {**read_results(options.out), found["network"]: found})
    print(table(found))


if __name__ == "__main__":
    main()
