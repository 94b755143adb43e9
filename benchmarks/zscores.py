"""Is the exact trace the mean of Hutchinson's probes? z-scores of every channel on trained networks.

    python -m benchmarks.zscores --data DIR [--networks resnet20 resnet32] [--images 512] [--probes 500] [--groups 10]

DIR as for `benchmarks.exact_trace`. For every channel z = (Hutchinson - exact) / standard error; if both are unbiased
and the standard error is right, z has mean 0 and standard deviation 1. All channels share their probes, so that the
mean of z does not come closer to 0 with more channels, nor, being in standard errors, with more probes. What it varies
by is measured: the probes come in groups of equal size, each with a key of its own, whose means of z tell it.

Accuracy only: nothing is timed, and it may run beside other work. The groups are kept next to the result, and a run
that was stopped, by hand or by `--max-minutes` (exit status 3), goes on from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import provenance, read_results, write_results
from benchmarks.trained import CHUNK, WEIGHTS, flat, hap_scores, load, mean_loss, quality
from ehap_jax._paths import path_name
from ehap_jax.curvature import TraceEstimate, channel_trace, expected_agreement, gauss_newton_trace
from ehap_jax.curvature.estimate import Moments, estimate_of
from ehap_jax.training import Deadline, OutOfTime, Progress

MEAN_WITHIN, STD_WITHIN = 0.1, 0.1
"""How far the mean of z may be from 0, and its standard deviation from 1."""


def probed(data: Path, network: str, images: int, probes: int, groups: int, kept: Path, deadline: Deadline):
    """The network's variables, its exact traces, and a trace estimate of each group of probes.

    Raises:
        OutOfTime: the deadline has passed; the probes so far are in files named after ``kept``.
    """
    apply, variables, batch = load(data, network, images)
    exact = gauss_newton_trace(apply, variables, batch)
    each, found = probes // groups, []
    with Progress() as progress:
        for group in range(groups):
            with progress.counted(f"{network}: probes {group * each + 1} to {(group + 1) * each}", each) as report:
                estimate = channel_trace(
                    mean_loss(apply),
                    variables,
                    batch,
                    key=jax.random.fold_in(jax.random.key(2025), group),
                    num_probes=each,
                    microbatch=CHUNK,
                    probes_per_step=5,
                    save_to=kept.with_suffix(f".{group}.npz"),
                    progress=report,
                    until=lambda _: deadline.passed,
                )
            found.append(estimate)
            if sum(one.count for one in found) < probes:
                deadline.check(f"group {group + 1} of {groups} of the probes of {network}")
    return variables, exact, found


def pooled(groups: Sequence[TraceEstimate], variables: Any) -> TraceEstimate:
    """The estimate of all the probes of several groups of equal size (Chan, Golub and LeVeque 1983)."""
    each = groups[0].count
    means = [jax.device_get(group.state.moments.mean) for group in groups]
    within = [jax.device_get(group.state.moments.squares) for group in groups]
    mean = jax.tree.map(lambda *m: np.mean(np.asarray(m, np.float64), axis=0), *means)
    between = jax.tree.map(lambda *m: each * len(m) * np.var(np.asarray(m, np.float64), axis=0), *means)
    squares = jax.tree.map(lambda b, *w: b + np.sum(np.asarray(w, np.float64), axis=0), between, *within)
    state = groups[0].state._replace(count=np.int32(each * len(groups)), moments=Moments(mean, squares))

    def like_params(found: dict[str, Any]):
        return jax.tree_util.tree_map_with_path(lambda path, _: found.get(path_name(path)), variables)

    return estimate_of(like_params, state)


def z_scores(variables: Any, exact: TraceEstimate, groups: Sequence[TraceEstimate]) -> dict[str, Any]:
    """What the probes of all groups say of the exact traces."""
    whole = pooled(groups, variables)
    mean, sem, truth = (flat(tree, variables) for tree in (whole.mean, whole.sem, exact.mean))
    alive = sem > 0
    z = (mean - truth)[alive] / sem[alive]
    of_groups = [np.mean((flat(group.mean, variables) - truth)[alive] / sem[alive]) for group in groups]
    standard_error = float(np.std(of_groups, ddof=1) / len(groups) ** 0.5)
    return {
        "probes": whole.count,
        "groups": len(groups),
        "channels": int(alive.sum()),
        "z_mean": float(z.mean()),
        "z_mean_standard_error": standard_error,
        "z_std": float(z.std(ddof=1)),
        "within": bool(abs(z.mean()) <= MEAN_WITHIN and abs(z.std(ddof=1) - 1) <= STD_WITHIN),
        "median_deviation_of_a_probe_over_trace": float(np.median(sem[alive] / truth[alive]) * whole.count**0.5),
        "dead_channels": int((~alive).sum()),
        "largest_exact_trace_of_a_dead_channel": float(np.max(truth[~alive], initial=0.0)),
        "total": {"exact": float(truth.sum()), "hutchinson": whole.total(), "sem": whole.total_sem()},
        **quality(hap_scores(mean, variables), hap_scores(truth, variables)),
        "expected": expected_agreement(whole, variables, prune=0.3)._asdict(),
        "layers": layers(whole, exact),
    }


def layers(found: TraceEstimate, exact: TraceEstimate) -> list[dict[str, Any]]:
    """Number, mean and standard deviation of the z-scores of each layer."""
    rows = []
    for (path, mean), sem, truth in zip(
        jax.tree_util.tree_leaves_with_path(found.mean),
        jax.tree.leaves(found.sem),
        jax.tree.leaves(exact.mean),
        strict=True,
    ):
        mean, sem, truth = (np.asarray(x, np.float64) for x in (mean, sem, truth))
        z = (mean - truth)[sem > 0] / sem[sem > 0]
        rows.append(
            {"layer": path_name(path), "channels": z.size, "mean": float(z.mean()), "std": float(z.std(ddof=1))}
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/zscores.json"))
    parser.add_argument("--networks", nargs="+", choices=sorted(WEIGHTS), default=sorted(WEIGHTS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--probes", type=int, default=500)
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--max-minutes", type=float)
    options = parser.parse_args()
    if options.groups < 2 or options.probes % options.groups or options.probes // options.groups < 2:
        parser.error("--groups must be 2 or more, and divide --probes into groups of 2 or more")
    results, deadline = read_results(options.out), Deadline(options.max_minutes)
    for network in options.networks:
        kept = options.out.with_suffix(f".{network}.npz")
        sizes = options.images, options.probes, options.groups
        try:
            found = z_scores(*probed(options.data, network, *sizes, kept, deadline))
        except OutOfTime as stopped:
            print(f"{stopped}; run again to go on", file=sys.stderr)
            return 3
        results[network] = {"network": network, "images": options.images, **found, **provenance()}
        write_results(options.out, results)
        print({name: value for name, value in results[network].items() if name != "layers"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
