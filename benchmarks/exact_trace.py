"""Channel traces: exact, from random combinations of classes, and from Hutchinson probes; how good, how soon.

    python -m benchmarks.exact_trace --data DIR            # everything, then results/exact_trace.json and .png
    python -m benchmarks.exact_trace --data DIR --only timing

DIR holds `akamaster/resnet20-12fca82f.th` and `akamaster/resnet32-d509ac18.th` (from github.com/akamaster's
pytorch_resnet_cifar10), and `cifar10_lossless_subset.npz` with `x_train` (uint8, NHWC) and `y_train`.

Three parts, each of which can run alone. `timing`: the exact trace in a fresh process per network and number of images,
first call (with compilation) and second, with the peak resident memory of the process. `combinations` and `probes`:
ResNet-20, 128 images: the rank correlation of HAP scores with the exact ones and the overlap (intersection over union)
of the lowest 30 % of channels, after every number of random combinations and of Hutchinson probes, with the wall-clock
and CPU seconds after compilation (on a shared machine compare the second). `probes` also has the z-scores,
(Hutchinson - exact) / standard error, over all channels whose standard error is not zero. Its probes are kept in a file
beside the results, and asking for more goes on from there. Beside every mean of probes stand the agreement that its
own standard errors let expect (`expected_agreement`), and, as method `rms`, the ranking by the root mean square
of the same probes' products (`TraceEstimate.probe_rms`), with which the noise of a probe itself ranks the channels.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import fresh_process, peak_memory, provenance, read_results, timed, write_results
from benchmarks.trained import CHUNK, flat, hap_scores, load, mean_loss, quality
from ehap_jax.curvature import Policy, channel_trace, expected_agreement, fingerprint, load_trace, save_trace
from ehap_jax.curvature.gauss_newton import gauss_newton_trace

TIMED = (("resnet20", 128), ("resnet20", 512), ("resnet32", 512))
PROBES = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000)
COMBINATIONS = {"signs": (1, 2, 4, 8), "labels": (1, 4)}
SEEDS = 5


def time_exact(data: Path, network: str, images: int) -> dict[str, Any]:
    """Run in a process of its own: the first call compiles, the second does not."""
    apply, variables, batch = load(data, network, images)
    before = peak_memory()
    trace, first = timed(lambda: gauss_newton_trace(apply, variables, batch))
    _, second = timed(lambda: gauss_newton_trace(apply, variables, batch))
    _, one = timed(lambda: gauss_newton_trace(apply, variables, batch, classes=1, key=jax.random.key(0)))
    _, one = timed(lambda: gauss_newton_trace(apply, variables, batch, classes=1, key=jax.random.key(0)))
    return {
        "network": network,
        "images": images,
        "first_call": first,
        "second_call": second,
        "one_combination": one,
        "total_trace": trace.total(),
        "peak_memory_gb": peak_memory(),
        "memory_before_gb": before,
        "load_average": os.getloadavg()[0],
    }


def exact_of(apply, variables, batch) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Exact channel traces, their HAP scores, and a row of the table."""
    gauss_newton_trace(apply, variables, batch)
    trace, seconds = timed(lambda: gauss_newton_trace(apply, variables, batch))
    exact = flat(trace.mean, variables)
    row = {"method": "exact", "samples": trace.count, **seconds, "spearman": 1.0, "overlap_30": 1.0}
    return exact, hap_scores(exact, variables), row


def compare_combinations(data: Path, images: int) -> dict[str, Any]:
    apply, variables, batch = load(data, "resnet20", images)
    _, truth, row = exact_of(apply, variables, batch)
    rows = [row]

    def measure(method: str, **options) -> dict[str, Any]:
        found, seconds = timed(lambda: gauss_newton_trace(apply, variables, batch, **options))
        scores = hap_scores(flat(found.mean, variables), variables)
        return {"method": method, "samples": found.count, **seconds, **quality(scores, truth)}

    for draw, counts in COMBINATIONS.items():
        for count in counts:
            runs = [measure(draw, classes=count, draw=draw, key=jax.random.key(seed)) for seed in range(1 + SEEDS)]
            rows += runs[1:]  # the first compiled
            print(rows[-1], flush=True)
    half = Policy("float16")
    rows.append([measure("exact float16", policy=half) for _ in range(2)][1])
    return {"network": "resnet20", "images": images, "rows": rows, "load_average": os.getloadavg()[0], **provenance()}


def compare_probes(data: Path, images: int, probes: int, kept: Path, rows: list) -> dict[str, Any]:
    """Hutchinson's probes, going on from those in the file ``kept`` and the rows that were made of them."""
    apply, variables, batch = load(data, "resnet20", images)
    exact, truth, _ = exact_of(apply, variables, batch)
    loss, key = mean_loss(apply), jax.random.key(100)
    options: dict[str, Any] = {"key": key, "probes_per_step": 10, "microbatch": CHUNK}
    spent = {"seconds": 0.0, "cpu_seconds": 0.0}
    state, estimate = None, channel_trace(loss, variables, batch, num_probes=1, **options)  # compiles
    made_from = fingerprint(loss, variables, batch, key=key, microbatch=CHUNK)
    if rows:
        estimate = load_trace(kept, variables, made_from)
        state, spent = estimate.state, {name: rows[-1][name] for name in spent}
    done = estimate.count if state else 0
    for count in [n for n in PROBES if done < n <= probes]:
        estimate, seconds = timed(
            lambda n=count, s=state: channel_trace(loss, variables, batch, num_probes=n, state=s, **options)
        )
        state, spent = estimate.state, {name: spent[name] + seconds[name] for name in spent}
        scores = hap_scores(flat(estimate.mean, variables), variables)
        row = {"method": "hutchinson", "samples": count, **spent, **quality(scores, truth)}
        if count > 1:
            expected = expected_agreement(estimate, variables, prune=0.3)
            row |= {"expected_spearman": expected.rank_correlation, "expected_overlap_30": expected.overlap}
        spread = hap_scores(flat(estimate.probe_rms(), variables), variables)
        rows += [{"method": "rms", "samples": count, **spent, **quality(spread, truth)}, row]
        save_trace(kept, estimate, made_from)
        print(rows[-1], flush=True)
    mean, sem = flat(estimate.mean, variables), flat(estimate.sem, variables)
    alive = sem > 0
    z = (mean - exact)[alive] / sem[alive]
    return {
        "network": "resnet20",
        "images": images,
        "rows": rows,
        "z_scores": {
            "probes": estimate.count,
            "channels": int(alive.sum()),
            "mean": float(z.mean()),
            "std": float(z.std(ddof=1)),
            "dead_channels": int((~alive).sum()),
            "largest_exact_trace_of_a_dead_channel": float(np.max(exact[~alive], initial=0.0)),
        },
        "total": {"exact": float(exact.sum()), "hutchinson": estimate.total(), "sem": estimate.total_sem()},
        "load_average": os.getloadavg()[0],
        **provenance(),
    }


def draw_plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = [row for part in ("combinations", "probes") for row in results[part]["rows"]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharex=True, layout="constrained")
    styles = {
        "hutchinson": ("Hutchinson probes", "o-", "tab:gray"),
        "rms": ("root mean square of the same probes' products", "o--", "tab:green"),
        "signs": ("±1 combinations of classes, K = 1, 2, 4, 8", "s", "tab:blue"),
        "labels": ("sampled labels, K = 1, 4", "^", "tab:orange"),
        "exact": ("exact, all classes", "*", "tab:red"),
    }
    for ax, metric, title in zip(
        axes,
        ("spearman", "overlap_30"),
        ("rank correlation with the exact scores", "overlap (IoU) of the lowest 30 %"),
        strict=True,
    ):
        for method, (label, style, colour) in styles.items():
            rows = [row for row in every if row["method"] == method]
            size = 14 if method == "exact" else 5
            x, y = [row["cpu_seconds"] for row in rows], [row[metric] for row in rows]
            ax.plot(x, y, style, color=colour, label=label, markersize=size)
        ax.set(xscale="log", xlabel="CPU seconds, without compilation", title=title, ylim=(-0.03, 1.04))
        ax.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle(f"ResNet-20, CIFAR-10, {results['probes']['images']} images")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(results: dict[str, Any]) -> str:
    lines = []
    for row in results.get("timing", []):
        lines.append(
            f"{row['network']} {row['images']:4d} images  first {row['first_call']['seconds']:6.1f} s  "
            f"second {row['second_call']['seconds']:6.1f} s ({row['second_call']['cpu_seconds']:.1f} CPU s)  "
            f"one combination {row['one_combination']['seconds']:.1f} s  peak {row['peak_memory_gb']:.2f} GB"
        )
    for row in [row for part in ("combinations", "probes") for row in results.get(part, {}).get("rows", [])]:
        seconds = f"{row['seconds']:8.2f} s ({row['cpu_seconds']:8.2f} CPU s)" if "seconds" in row else " " * 25
        name = f"{row['method']:14} {row['samples']:5d}"
        expected = f"  expected {row['expected_spearman']:.3f}" if "expected_spearman" in row else ""
        lines.append(f"{name} {seconds}  spearman {row['spearman']:.4f}{expected}  overlap {row['overlap_30']:.3f}")
    if "probes" in results:
        lines.append(str(results["probes"]["z_scores"]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/exact_trace.json"))
    parser.add_argument("--only", choices=("timing", "combinations", "probes", "plot"))
    parser.add_argument("--images", type=int, default=128, help="of the rankings")
    parser.add_argument("--probes", type=int, default=100, help="of Hutchinson")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(time_exact(options.data, options.one[0], int(options.one[1]))))
        return
    results = read_results(options.out)
    if options.only in (None, "timing"):
        results["timing"] = []
        for network, images in TIMED:
            line = ["--data", str(options.data), "--one", network, str(images)]
            results["timing"].append({**fresh_process("benchmarks.exact_trace", line), **provenance()})
            write_results(options.out, results)
    if options.only in (None, "combinations"):
        results["combinations"] = compare_combinations(options.data, options.images)
    if options.only in (None, "probes"):
        kept = options.out.with_suffix(".probes.npz")
        rows = results.get("probes", {}).get("rows", []) if kept.exists() else []
        results["probes"] = compare_probes(options.data, options.images, options.probes, kept, rows)
    write_results(options.out, results)
    if "combinations" in results and "probes" in results:
        draw_plot(results, options.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
