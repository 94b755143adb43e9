"""How much of a channel ranking low precision keeps: the same probes in four precisions, beside another seed's.

    python -m benchmarks.fidelity --data DIR [--networks resnet20 resnet32] [--images 512] [--probes 32]

DIR as for `benchmarks.exact_trace`. Every precision sees the same Rademacher probes and the same images; each is
compared with float64: Spearman's rank correlation of HAP scores, the share of the kept half of all channels that is
the same, the relative error of the traces (Euclidean norm, and median over channels), and for float16 the scales it
settled on and how many products it had to repeat. `seed` is float32 with other probes: what the choice of probes
changes at this number of them. `exact` is the exact trace against those float64 probes: what is still missing.

Accuracy only: nothing is timed, and it may run beside other work. Every precision runs in a process of its own and
keeps its probes next to the result; a run that was stopped goes on from them. Writes results/fidelity.json and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.measure import fresh_process, provenance, read_results, write_results
from benchmarks.trained import CHUNK, WEIGHTS, flat, hap_scores, load, lowest_sets, mean_loss, spearman
from ehap_jax.curvature import Policy, channel_trace, gauss_newton_trace
from ehap_jax.report.figure_style import new_figure, save_figure
from ehap_jax.training import Deadline

KEY, OTHER_KEY = 32, 33
RUNS = {
    "float64": ("float64", KEY),
    "float32": ("float32", KEY),
    "float16": ("float16", KEY),
    "bfloat16": ("bfloat16", KEY),
    "seed": ("float32", OTHER_KEY),
}
"""Name of a run: its precision and the key of its probes."""
BOUNDS = {"float16": (0.999, 0.98), "bfloat16": (0.99, 0.98)}
"""Least rank correlation with float64, and least share of the kept half."""


def probe(data: Path, network: str, run: str, images: int, probes: int, kept: Path, minutes: float | None) -> Any:
    """In a process of its own, as float64 needs 64-bit types switched on before anything else."""
    compute, key = RUNS[run]
    apply, variables, batch = load(data, network, images)
    deadline = Deadline(minutes)
    trace = channel_trace(
        mean_loss(apply),
        variables,
        batch,
        key=jax.random.key(key),
        num_probes=probes,
        policy=Policy(compute),
        microbatch=CHUNK,
        probes_per_step=2,
        save_to=kept,
        save_every=10.0,
        until=lambda _: deadline.passed,
    )
    mean = flat(trace.mean, variables)
    return {
        "run": run,
        "compute": compute,
        "key": key,
        "probes": int(trace.count),
        "rejected": int(trace.rejected),
        "loss_scale": float(trace.state.loss_scale),
        "probe_scale": float(trace.state.probe_scale),
        "total": trace.total(),
        "total_sem": trace.total_sem(),
        "traces": mean.tolist(),
        "scores": hap_scores(mean, variables).tolist(),
    }


def exact(data: Path, network: str, images: int) -> dict[str, Any]:
    apply, variables, batch = load(data, network, images)
    traces = flat(gauss_newton_trace(apply, variables, batch).mean, variables)
    return {"run": "exact", "traces": traces.tolist(), "scores": hap_scores(traces, variables).tolist()}


def agreement(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How far one run is from another."""
    traces, truth = np.array(found["traces"]), np.array(reference["traces"])
    scores, true_scores = np.array(found["scores"]), np.array(reference["scores"])
    ours, theirs = lowest_sets(scores, true_scores, 0.5)
    half = len(scores) - len(ours)
    same = len(scores) - len(ours | theirs)
    alive = truth != 0
    return {
        "spearman": spearman(scores, true_scores),
        "kept_half_shared": same / half,
        "kept_half_differs_in": half - same,
        "channels": len(scores),
        "relative_error": float(np.linalg.norm(traces - truth) / np.linalg.norm(truth)),
        "median_relative_error": float(np.median(np.abs(traces - truth)[alive] / np.abs(truth[alive]))),
        "opposite_sign": int(np.sum(traces * truth < 0)),
    }


def within(row: dict[str, Any]) -> bool | None:
    """Whether a precision keeps to its bounds; None where it has none."""
    if row["run"] not in BOUNDS:
        return None
    least_correlation, least_share = BOUNDS[row["run"]]
    return row["spearman"] >= least_correlation and row["kept_half_shared"] >= least_share


def compare(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every run that has as many probes as the float64 one (and the exact trace) against it."""
    reference = runs["float64"]
    rows = []
    for name, found in runs.items():
        if name == "float64" or found.get("probes", reference["probes"]) != reference["probes"]:
            continue
        about = {key: value for key, value in found.items() if key not in ("traces", "scores")}
        row = {**about, **agreement(found, reference)}
        rows.append({**row, "within_bounds": within(row)})
    return rows


def table(results: dict[str, Any]) -> str:
    lines = []
    for network, found in results.items():
        reference = found["runs"].get("float64", {})
        lines.append(f"{network}, {found['images']} images, {reference.get('probes', 0)} probes, against float64")
        for row in found.get("rows", []):
            verdict = {None: "", True: "  within the bounds", False: "  NOT within the bounds"}[row["within_bounds"]]
            lines.append(
                f"  {row['run']:9} spearman {row['spearman']:.5f}  kept half shared {row['kept_half_shared']:.4f} "
                f"({row['kept_half_differs_in']} of {row['channels']} channels differ)  "
                f"relative error {row['relative_error']:.1e}, median {row['median_relative_error']:.1e}  "
                f"opposite sign {row['opposite_sign']}  repeated {row.get('rejected', '-')}{verdict}"
            )
    return "\n".join(lines)


def draw_plot(results: dict[str, Any], path: Path) -> None:
    """Scores of each run against those of float32 with the same probes."""
    panels = (
        ("float16", "float16, same probes", "tab:blue"),
        ("bfloat16", "bfloat16, same probes", "tab:orange"),
        ("seed", "float32, other probes", "tab:gray"),
    )
    whole = {name: found["runs"] for name, found in results.items() if {"float32", *RUNS} <= found["runs"].keys()}
    if not whole:
        return
    figure = new_figure(11, 3.9 * len(whole))
    axes = figure.subplots(len(whole), 3, squeeze=False, sharex="row", sharey="row")
    for row, (network, runs) in zip(axes, whole.items(), strict=True):
        across = np.array(runs["float32"]["scores"])
        threshold = float(np.quantile(np.abs(across[across != 0]), 0.1))
        for ax, (run, label, colour) in zip(row, panels, strict=True):
            up = np.array(runs[run]["scores"])
            ax.plot(across, up, ".", color=colour, markersize=4, alpha=0.6)
            ends = [min(across.min(), up.min()), max(across.max(), up.max())]
            ax.plot(ends, ends, "k-", linewidth=0.6)
            ax.set_xscale("symlog", linthresh=threshold)
            ax.set_yscale("symlog", linthresh=threshold)
            ax.set_title(f"{network}: {label}\nSpearman {spearman(up, across):.4f}", fontsize=10)
            ax.set_xlabel("HAP score, float32")
            ax.grid(alpha=0.3)
            ax.tick_params(axis="x", labelrotation=45, labelsize=7)
            ax.tick_params(axis="y", labelsize=7)
        row[0].set_ylabel("HAP score")
    first = next(iter(results.values()))
    figure.suptitle(f"Every point is a channel; {first['images']} images, {first['probes']} probes")
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/fidelity.json"))
    parser.add_argument("--networks", nargs="+", choices=sorted(WEIGHTS), default=sorted(WEIGHTS))
    parser.add_argument("--runs", nargs="+", choices=sorted(RUNS), default=list(RUNS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        network, run = given.one
        kept = given.out.with_suffix(f".{network}.{run}.{given.images}x{given.probes}.npz")
        print(json.dumps(probe(given.data, network, run, given.images, given.probes, kept, given.max_minutes)))
        return
    results, deadline = read_results(given.out), Deadline(given.max_minutes)
    for network in given.networks:
        size = {"images": given.images, "probes": given.probes}
        entry = results.get(network, {})
        if {name: entry.get(name) for name in size} != size:
            entry = {**size, "runs": {"exact": exact(given.data, network, given.images)}}
        results[network] = entry
        for run in given.runs:
            if deadline.passed or entry["runs"].get(run, {}).get("probes") == given.probes:
                continue
            line = ["--data", str(given.data), "--out", str(given.out), "--one", network, run]
            line += ["--images", str(given.images), "--probes", str(given.probes)]
            left = deadline.minutes_left()
            line += [] if left is None else ["--max-minutes", str(left)]
            environment = {"JAX_ENABLE_X64": "1"} if RUNS[run][0] == "float64" else None
            entry["runs"][run] = fresh_process("benchmarks.fidelity", line, environment)
            entry["rows"] = compare(entry["runs"]) if "float64" in entry["runs"] else []
            write_results(given.out, {**results, network: {**entry, **provenance()}})
            print(table({network: entry}), flush=True)
    draw_plot(results, given.out.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
