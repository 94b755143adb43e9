"""What `benchmarks.exact_trace` found: seconds joined with agreement, the verdicts on its goals, table and plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ehap_jax.report.figure_style import new_figure, save_figure

PROBES = 300
"""Of the estimates that one ±1 combination is to beat; what the papers take."""
SOONER = 300
"""How many times sooner than probes reach a rank correlation of 0.99 the exact ranking is to be there."""
IMAGES, CPU_SECONDS, GPU_SECONDS, GIGABYTES = 512, 20.0, 1.0, 2.0
"""For the exact trace of ResNet-32 on two cores, or on a GPU."""


def require_layout(results: Mapping[str, Any]) -> None:
    """Refuse what was written by an earlier version of the benchmark.

    Raises:
        ValueError: something measured does not say with which versions, nor does its network.
    """
    found = {"timing": results.get("timing", [])}
    for network, entry in results.get("networks", {}).items():
        parts = {"costs": entry.get("costs", {}).values(), "quality": entry.get("rows", [])}
        own = {part: rows for part, rows in parts.items() if part not in entry.get("provenance", {})}
        found |= {f"{part} of {network}": rows for part, rows in own.items()}
    for what, rows in found.items():
        if any("versions" not in row for row in rows):
            raise ValueError(
                f"{what}: rows without `versions`, of an earlier layout; move the file away, or name another with --out"
            )


def clock_of(measured: Mapping[str, Any]) -> str:
    """On a CPU its own clock, which other programs disturb less than the wall's."""
    return "cpu_seconds" if measured["versions"]["device"]["backend"] == "cpu" else "seconds"


def clock_of_costs(entry: Mapping[str, Any]) -> str:
    """The one that compares the costs of a network."""
    clocks = {clock_of({**entry.get("provenance", {}).get("costs", {}), **c}) for c in entry.get("costs", {}).values()}
    return clocks.pop() if len(clocks) == 1 else "seconds"


UNITS = {"cpu_seconds": "CPU s", "seconds": "s"}


def seconds_of(costs: Mapping[str, Any], method: str, samples: float | None, clock: str) -> float | None:
    """What so many samples of a method cost; sampled labels cost what signs do.

    None where that was not measured, or where a probe took no time, which cannot be.
    """
    cost = costs.get(cost_name(method, samples))
    if cost is None or ("probe" in cost and cost["probe"][clock] <= 0):
        return None
    return cost["start"][clock] + (cost["probe"][clock] * samples if "probe" in cost and samples else 0.0)


def cost_name(method: str, samples: float | None) -> str:
    if method in ("signs", "labels"):
        return f"signs {samples}"
    return {"rms": "hutchinson", "published": "hutchinson float16"}.get(method, method)


def probes_to_goal(entry: Mapping[str, Any]) -> float | None:
    """By the standard errors of the most probes there are."""
    found = [row["probes_to_goal"] for row in entry.get("rows", []) if "probes_to_goal" in row]
    return found[-1] if found else None


def goals(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal that can be judged: what was measured, the bound, and whether it is met."""
    found = []

    def judge(goal: str, network: str, measured: float, bound: float, met: bool, **about: Any) -> None:
        verdict = {"measured": measured, "bound": bound, "met": bool(met)}
        found.append({"goal": goal, "network": network, **verdict, **about})

    for network, entry in results.get("networks", {}).items():
        costs, needed, clock = entry.get("costs", {}), probes_to_goal(entry), clock_of_costs(entry)
        subject = {"images": entry["images"], "weights": entry["weights"]}
        exact, one = (seconds_of(costs, method, 1, clock) for method in ("exact", "signs"))
        many = seconds_of(costs, "hutchinson", PROBES, clock)
        long = seconds_of(costs, "hutchinson", needed, clock) if needed else None
        about = {**subject, "clock": clock}
        if exact and long:
            ratio = long / exact
            goal = "extrapolated: exact is so many times sooner than probes at 0.99"
            judge(goal, network, ratio, SOONER, ratio >= SOONER, probes=needed, **about)
        if one and many:
            goal = f"extrapolated: {PROBES} probes take so many times one combination"
            judge(goal, network, many / one, PROBES, many / one >= PROBES, **about)
        ours = [row["spearman"] for row in entry.get("rows", []) if (row["method"], row["samples"]) == ("signs", 1)]
        theirs = [row["spearman"] for row in entry.get("rows", []) if row["method"] == "hutchinson"]
        counts = [row["samples"] for row in entry.get("rows", []) if row["method"] == "hutchinson"]
        if ours and counts and max(counts) >= PROBES:
            best = theirs[counts.index(PROBES)]
            goal = f"the worst single combination ranks better than {PROBES} probes"
            judge(goal, network, min(ours), best, min(ours) > best, **subject)
    for row in results.get("timing", []):
        if (row["network"], row["images"]) == ("resnet32", IMAGES):
            # How long one waits is what this goal is about, so the wall's clock on every device.
            bound, taken = CPU_SECONDS if clock_of(row) == "cpu_seconds" else GPU_SECONDS, row["second_call"]["seconds"]
            judge(f"seconds of the exact trace of {IMAGES} images", "resnet32", taken, bound, taken <= bound)
            peak = row["peak_memory_gb"]
            judge("gigabytes of memory for it", "resnet32", peak, GIGABYTES, peak <= GIGABYTES)
    return found


def describe(row: Mapping[str, Any], costs: Mapping[str, Any] | None = None, clock: str = "seconds") -> str:
    costs = costs or {}
    seconds = seconds_of(costs, row["method"], row["samples"], clock)
    parts = [f"{row['method']:18} {row['samples'] or '':>5}"]
    if seconds is not None:
        extrapolated = " extrapolated" if "probe" in costs[cost_name(row["method"], row["samples"])] else ""
        parts.append(f"{seconds:9.2f} {UNITS[clock]}{extrapolated}")
    parts += [f"spearman {row['spearman']:.4f}", f"overlap {row['overlap_30']:.3f}"]
    if "expected_spearman" in row:
        parts.append(f"expected {row['expected_spearman']:.3f}, normal noise {row['normal_spearman']:.3f}")
    return "  ".join(parts)


def table(results: Mapping[str, Any]) -> str:
    lines = []
    for row in results.get("timing", []):
        clock = clock_of(row)
        times = {what: row[f"{what}_call"][clock] for what in ("first", "second")}
        times["one combination"] = row["one_combination"][clock]
        shown = "  ".join(f"{what} {time:6.1f} {UNITS[clock]}" for what, time in times.items())
        wall = f" (second {row['second_call']['seconds']:.1f} s by the wall clock)" if clock == "cpu_seconds" else ""
        lines.append(f"{row['network']} {row['images']:4d} images  {shown}{wall}  peak {row['peak_memory_gb']:.2f} GB")
    for network, entry in results.get("networks", {}).items():
        costs, clock = entry.get("costs", {}), clock_of_costs(entry)
        lines.append(f"{network}, {entry['images']} images, {entry['weights']}")
        exact = seconds_of(costs, "exact", None, clock)
        lines += [] if exact is None else [f"  exact {exact:.2f} {UNITS[clock]}"]
        lines += [f"  {describe(row, costs, clock)}" for row in entry.get("rows", [])]
        needed = probes_to_goal(entry)
        if needed is not None:
            lines.append(f"  extrapolated: 0.99 takes about {needed:.0f} probes; z-scores {entry['z_scores']}")
    for row in results.get("goals", []):
        verdict = "met" if row["met"] else "NOT met"
        size = f", {row['images']} images, {row['weights']}" if "images" in row else ""
        clock = {"cpu_seconds": ", by the CPU clock", "seconds": ", by the wall clock"}.get(row.get("clock", ""), "")
        what = f"{row['network']}{size}: {row['goal']}"
        lines.append(f"{what}: {row['measured']:.4g} (goal {row['bound']:.4g}){clock}: {verdict}")
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
    networks = {n: e for n, e in results.get("networks", {}).items() if e.get("rows") and "exact" in e.get("costs", {})}
    if not networks:
        return
    figure = new_figure(3.6 * len(networks) + 1, 7.6)
    metrics = {"spearman": "rank correlation with exact", "overlap_30": "overlap (IoU) of the lowest 30 %"}
    panels = figure.subplots(2, len(networks), squeeze=False, sharex="col", sharey="row")
    for column, (network, entry) in enumerate(networks.items()):
        costs, rows, clock = entry["costs"], [*entry["rows"]], clock_of_costs(entry)
        rows.append({"method": "exact", "samples": None, **dict.fromkeys(metrics, 1.0)})
        # The published ranking stays what it is after its first probes, for as long as it goes on.
        rows += [{**row, "samples": PROBES} for row in rows if row["method"] == "published"]
        for axes, (metric, title) in zip(panels[:, column], metrics.items(), strict=True):
            for method, (label, style, colour) in STYLES.items():
                ours = [row for row in rows if row["method"] == method]
                times = [seconds_of(costs, method, row["samples"], clock) for row in ours]
                if ours and None not in times:
                    size = 13 if method == "exact" else 5
                    axes.plot(times, [r[metric] for r in ours], style, color=colour, label=label, markersize=size)
            axes.set(xscale="log", ylim=(-0.06, 1.05))
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(title)
        weights = "trained" if entry["weights"].startswith("trained") else "drawn"
        panels[0, column].set_title(f"{network}, {entry['images']} images\n({weights} weights)", fontsize=10)
        what = {"cpu_seconds": "CPU seconds", "seconds": "seconds"}[clock]
        panels[1, column].set_xlabel(f"{what}, without compilation\n(of probes extrapolated)")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    save_figure(figure, path)
