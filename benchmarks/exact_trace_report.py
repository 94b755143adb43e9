"""What `benchmarks.exact_trace` found: seconds joined with agreement, the verdicts on its goals, table and plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROBES = 300
"""Of the estimates that one ±1 combination is to beat; what the papers take."""
SOONER = 300
"""How many times sooner than probes reach a rank correlation of 0.99 the exact ranking is to be there."""
IMAGES, CPU_SECONDS, GPU_SECONDS, GIGABYTES = 512, 20.0, 1.0, 2.0
"""For the exact trace of ResNet-32 on two cores, or on a GPU."""


def seconds_of(costs: Mapping[str, Any], method: str, samples: float | None, clock: str = "seconds") -> float | None:
    """What so many samples of a method cost; None where that was not measured. Sampled labels cost what signs do."""
    if method in ("signs", "labels"):
        method = f"signs {samples}"
    cost = costs.get({"rms": "hutchinson", "published": "hutchinson float16"}.get(method, method))
    if cost is None:
        return None
    return cost["start"][clock] + (cost["probe"][clock] * samples if "probe" in cost and samples else 0.0)


def probes_to_goal(entry: Mapping[str, Any]) -> float | None:
    """By the standard errors of the most probes there are."""
    found = [row["probes_to_goal"] for row in entry.get("rows", []) if "probes_to_goal" in row]
    return found[-1] if found else None


def goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal that can be judged: what was measured, the bound, and whether it is met."""
    found = []

    def judge(goal: str, network: str, measured: float, bound: float, met: bool) -> None:
        found.append({"goal": goal, "network": network, "measured": measured, "bound": bound, "met": bool(met)})

    for network, entry in results.get("networks", {}).items():
        costs, needed = entry.get("costs", {}), probes_to_goal(entry)
        exact, one = (seconds_of(costs, method, 1) for method in ("exact", "signs"))
        many = seconds_of(costs, "hutchinson", PROBES)
        long = seconds_of(costs, "hutchinson", needed) if needed else None
        if exact and long:
            ratio = long / exact
            judge("exact is so many times sooner than probes at 0.99", network, ratio, SOONER, ratio >= SOONER)
        if one and many:
            judge("300 probes take so many times one combination", network, many / one, PROBES, many / one >= PROBES)
        ours = [row["spearman"] for row in entry.get("rows", []) if (row["method"], row["samples"]) == ("signs", 1)]
        theirs = [row["spearman"] for row in entry.get("rows", []) if row["method"] == "hutchinson"]
        counts = [row["samples"] for row in entry.get("rows", []) if row["method"] == "hutchinson"]
        if ours and counts and max(counts) >= PROBES:
            best = theirs[counts.index(PROBES)]
            judge(
                "the worst single combination ranks better than 300 probes", network, min(ours), best, min(ours) > best
            )
    for row in results.get("timing", []):
        if (row["network"], row["images"]) == ("resnet32", IMAGES):
            gpu = row["versions"]["device"]["backend"] != "cpu"
            bound, seconds = GPU_SECONDS if gpu else CPU_SECONDS, row["second_call"]["seconds"]
            judge(f"seconds of the exact trace of {IMAGES} images", "resnet32", seconds, bound, seconds <= bound)
            peak = row["peak_memory_gb"]
            judge("gigabytes of memory for it", "resnet32", peak, GIGABYTES, peak <= GIGABYTES)
    return found


def describe(row: Mapping[str, Any], costs: Mapping[str, Any] | None = None) -> str:
    seconds = seconds_of(costs or {}, row["method"], row["samples"])
    parts = [f"{row['method']:18} {row['samples'] or '':>5}"]
    parts += [] if seconds is None else [f"{seconds:9.2f} s"]
    parts += [f"spearman {row['spearman']:.4f}", f"overlap {row['overlap_30']:.3f}"]
    if "expected_spearman" in row:
        parts.append(f"expected {row['expected_spearman']:.3f}, normal noise {row['normal_spearman']:.3f}")
    return "  ".join(parts)


def table(results: Mapping[str, Any]) -> str:
    lines = []
    for row in results.get("timing", []):
        lines.append(
            f"{row['network']} {row['images']:4d} images  first {row['first_call']['seconds']:6.1f} s  "
            f"second {row['second_call']['seconds']:6.1f} s ({row['second_call']['cpu_seconds']:.1f} CPU s)  "
            f"one combination {row['one_combination']['seconds']:.1f} s  peak {row['peak_memory_gb']:.2f} GB"
        )
    for network, entry in results.get("networks", {}).items():
        costs = entry.get("costs", {})
        lines.append(f"{network}, {entry['images']} images, {entry['weights']}")
        lines += [f"  exact {seconds_of(costs, 'exact', None):.2f} s"] if "exact" in costs else []
        lines += [f"  {describe(row, costs)}" for row in entry.get("rows", [])]
        needed = probes_to_goal(entry)
        lines += [] if needed is None else [f"  0.99 takes about {needed:.0f} probes; z-scores {entry['z_scores']}"]
    for row in results.get("goals", []):
        verdict = "met" if row["met"] else "NOT met"
        lines.append(f"{row['network']}: {row['goal']}: {row['measured']:.4g} (goal {row['bound']:.4g}): {verdict}")
    return "\n".join(lines)


STYLES = {
    "hutchinson": ("Hutchinson, float32", "o-", "tab:gray"),
    "hutchinson float16": ("Hutchinson, float16", "x:", "black"),
    "published": ("as published, float16", "--", "tab:purple"),
    "rms": ("root mean square of the same products", "o--", "tab:green"),
    "signs": ("±1 combinations of classes, K = 1, 2, 4, 8", "s", "tab:blue"),
    "labels": ("sampled labels, K = 1, 4", "^", "tab:orange"),
    "exact float16": ("exact, float16", "P", "tab:pink"),
    "exact": ("exact, all classes", "*", "tab:red"),
}


def draw_plot(results: Mapping[str, Any], path: Path) -> None:
    """Agreement against time, a column per network of which both were measured; no file where there is none."""
    from matplotlib.figure import Figure

    networks = {n: e for n, e in results.get("networks", {}).items() if e.get("rows") and "exact" in e.get("costs", {})}
    if not networks:
        return
    figure = Figure(figsize=(3.6 * len(networks) + 1, 7.6), layout="constrained")
    metrics = {"spearman": "rank correlation with exact", "overlap_30": "overlap (IoU) of the lowest 30 %"}
    panels = figure.subplots(2, len(networks), squeeze=False, sharex="col", sharey="row")
    for column, (network, entry) in enumerate(networks.items()):
        costs, rows = entry["costs"], [*entry["rows"]]
        rows.append({"method": "exact", "samples": None, **dict.fromkeys(metrics, 1.0)})
        # The published ranking stays what it is after its first probes, for as long as it goes on.
        rows += [{**row, "samples": PROBES} for row in rows if row["method"] == "published"]
        for axes, (metric, title) in zip(panels[:, column], metrics.items(), strict=True):
            for method, (label, style, colour) in STYLES.items():
                ours = [row for row in rows if row["method"] == method]
                times = [seconds_of(costs, method, row["samples"]) for row in ours]
                if ours and None not in times:
                    size = 13 if method == "exact" else 5
                    axes.plot(times, [r[metric] for r in ours], style, color=colour, label=label, markersize=size)
            axes.set(xscale="log", ylim=(-0.06, 1.05))
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(title)
        drawn = "" if entry["weights"].startswith("trained") else "\n(drawn weights)"
        panels[0, column].set_title(f"{network}, {entry['images']} images{drawn}", fontsize=10)
        panels[1, column].set_xlabel("seconds, without compilation")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
