"""Is the exact trace the mean of Hutchinson's probes? z-scores of every channel on trained networks.

    python -m benchmarks.zscores --data DIR [--networks resnet20 resnet32] [--images 512] [--probes 500]

DIR as for `benchmarks.exact_trace`. For every channel z = (Hutchinson - exact) / standard error; if both are unbiased
and the standard error is right, z has mean 0 and standard deviation 1. The standard error of the mean of z itself is
reported beside it: the channels of one network share their probes, so it comes from the spread between layers. Accuracy
only: nothing is timed, and it may run beside other work. The probes are kept next to the result, and a run that was
stopped, by hand or by `--max-minutes` (exit status 3), goes on from them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import provenance, read_results, write_results
from benchmarks.trained import CHUNK, WEIGHTS, flat, hap_scores, load, mean_loss, quality
from ehap_jax.curvature import channel_trace, expected_agreement, gauss_newton_trace
from ehap_jax.curvature.problem import path_name
from ehap_jax.training import Deadline, OutOfTime, Progress


def z_scores(data: Path, network: str, images: int, probes: int, kept: Path, deadline: Deadline) -> dict[str, Any]:
    """Of one network.

    Raises:
        OutOfTime: the deadline has passed; the probes so far are in the file ``kept``.
    """
    apply, variables, batch = load(data, network, images)
    exact = gauss_newton_trace(apply, variables, batch)
    with Progress() as progress, progress.stage(f"{network}: probes", probes) as advance:
        before = 0

        def report(done: int, _: int) -> None:
            nonlocal before
            advance(done - before)
            before = done

        found = channel_trace(
            mean_loss(apply),
            variables,
            batch,
            key=jax.random.key(2024),
            num_probes=probes,
            microbatch=CHUNK,
            probes_per_step=5,
            save_to=kept,
            progress=report,
            until=lambda _: deadline.passed,
        )
    if found.count < probes:
        deadline.check(f"{found.count} of {probes} probes of {network}")
    layers = []
    for (path, mean), sem, truth in zip(
        jax.tree_util.tree_leaves_with_path(found.mean),
        jax.tree.leaves(found.sem),
        jax.tree.leaves(exact.mean),
        strict=True,
    ):
        alive = np.asarray(sem) > 0
        z = (np.asarray(mean, np.float64) - np.asarray(truth, np.float64))[alive] / np.asarray(sem, np.float64)[alive]
        layers.append({"layer": path_name(path), "channels": z.size, "mean": z.mean(), "std": z.std(ddof=1)})
    every = flat(found.mean, variables), flat(found.sem, variables), flat(exact.mean, variables)
    alive = every[1] > 0
    z = (every[0] - every[2])[alive] / every[1][alive]
    return {
        "network": network,
        "images": images,
        "probes": found.count,
        "channels": int(alive.sum()),
        "z_mean": float(z.mean()),
        "z_mean_standard_error": float(np.std([row["mean"] for row in layers], ddof=1) / np.sqrt(len(layers))),
        "z_std": float(z.std(ddof=1)),
        "median_deviation_of_a_probe_over_trace": float(
            np.median(every[1][alive] / every[2][alive]) * found.count**0.5
        ),
        "dead_channels": int((~alive).sum()),
        "largest_exact_trace_of_a_dead_channel": float(np.max(every[2][~alive], initial=0.0)),
        "total": {"exact": float(every[2].sum()), "hutchinson": found.total(), "sem": found.total_sem()},
        **quality(hap_scores(every[0], variables), hap_scores(every[2], variables)),
        "expected": expected_agreement(found, variables, prune=0.3)._asdict(),
        "layers": [{k: float(v) if k in ("mean", "std") else v for k, v in row.items()} for row in layers],
        **provenance(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/zscores.json"))
    parser.add_argument("--networks", nargs="+", choices=sorted(WEIGHTS), default=sorted(WEIGHTS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--probes", type=int, default=500)
    parser.add_argument("--max-minutes", type=float)
    options = parser.parse_args()
    results, deadline = read_results(options.out), Deadline(options.max_minutes)
    for network in options.networks:
        kept = options.out.with_suffix(f".{network}.npz")
        try:
            results[network] = z_scores(options.data, network, options.images, options.probes, kept, deadline)
        except OutOfTime as stopped:
            print(f"{stopped}; run again to go on", file=sys.stderr)
            return 3
        write_results(options.out, results)
        print({name: value for name, value in results[network].items() if name != "layers"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
