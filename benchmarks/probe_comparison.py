"""Rows of `benchmarks.channel_trace` beside each other: ratios, shares of the device's peak, the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.probe_rows import OURS, PEAKS, TORCH, Row

BASES = {"tf32": ("float32",), "bfloat16": ("float32", "tf32"), "float16": ("float32", "tf32")}
"""Which of our own precisions another one is compared with."""

PACKAGES = ("jax", "jaxlib", "torch")


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of one device, and of the same versions and flags as far as both record them."""
    ours, theirs = (setting_of(row) for row in (one, other))
    return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def setting_of(row: dict[str, Any]) -> dict[str, Any]:
    """What must be equal where rows are compared."""
    versions = row["versions"]
    recorded = {name: versions.get("packages", {}).get(name) for name in PACKAGES} | {"flags": row.get("xla_flags")}
    device = {"device": versions["device"]["kind"], "cpu": row["cpu"], "cores": row["cores"]}
    return device | {name: value for name, value in recorded.items() if value is not None}


DERIVED = ("flops", "of_matmul_peak", "of_conv_peak", "times_as_fast_as", "fastest_pytorch")
EARLIER = ("needed_gb_of_float32", "peak_memory_gb_of_float32")
"""What earlier files have beside the measurements, which now stands with the ratios."""


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what takes several of them: shares of the device's peaks, times as fast, shares of memory."""
    rows = [{name: value for name, value in row.items() if name not in (*DERIVED, *EARLIER)} for row in rows]
    return [row if "failed" in row or row["variant"] in PEAKS else {**row, **beside(row, rows)} for row in rows]


def beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row beside the others that are comparable; of several alike, the last one."""
    others = [other for other in rows if "failed" not in other and comparable(other, row)]
    flops = row["flop_per_probe"] / row["ms"] * 1e3
    found: dict[str, Any] = {"flops": flops}
    peaks = [other for other in others if other["variant"] in PEAKS and other["precision"] == row["precision"]]
    for what in ("matmul", "conv") if peaks else ():
        found[f"of_{what}_peak"] = flops / max(peak[f"{what}_flops"] for peak in peaks)
    if row["variant"] not in OURS:
        return found
    alike = [other for other in others if all(other[k] == row[k] for k in ("network", "batch", "side"))]
    pytorch = {o["variant"]: o for o in alike if o["variant"] in TORCH and o["precision"] == row["precision"]}
    ours = [o for o in alike if o["variant"] == row["variant"] and o["chunk"] == row["chunk"]]
    bases = {f"ehap {o['precision']}": o for o in ours if o["precision"] in BASES.get(row["precision"], ())}
    found["times_as_fast_as"] = {
        **{name: times_as_fast(row, other) for name, other in pytorch.items()},
        **{name: times_as_fast(row, other) | memory_of(row, other) for name, other in bases.items()},
    }
    if pytorch:
        clock = clocks(row)[0]
        name = min(pytorch, key=lambda name: pytorch[name][clock])
        found["fastest_pytorch"] = {"variant": name, "by": clock, **found["times_as_fast_as"][name]}
    return found


def clocks(row: dict[str, Any]) -> tuple[str, ...]:
    """The first one is what compares best: on a CPU, other programs disturb its own clock less than the wall's."""
    return ("cpu_ms", "ms") if row["versions"]["device"]["backend"] == "cpu" else ("ms",)


def times_as_fast(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many times the time of ``row`` the other took, by every clock; and of what, and how busy the machine was."""
    both = (row, other)
    return {
        **{clock: other[clock] / row[clock] for clock in clocks(row)},
        "commits": [(one["versions"].get("git") or {}).get("commit") for one in both],
        "load_averages": [one["load_average"] for one in both],
    }


def memory_of(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Shares of the other's memory, and the products that needed them; nothing where a product is not recorded."""
    products = [one.get("product") for one in (row, other)]
    if None in products:
        return {}
    shares = {f"of_{memory}": row[memory] / other[memory] for memory in ("needed_gb", "peak_memory_gb")}
    return {**shares, "products": products}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as text."""
    head = (
        f"{'row':<52}{'ms/probe':>10}{'n':>4}{'CPU ms':>10}{'peak GB':>9}{'compile s':>11}"
        f"{'GFLOP/s':>10}{'of matmul':>11}{'of conv':>9}"
    )
    return "\n".join([head, *(line for row in rows for line in lines_of(row))])


def lines_of(row: dict[str, Any]) -> list[str]:
    """A row as text, and below it a line for every ratio."""
    name = Row(**{k: row[k] for k in Row.__dataclass_fields__}).name
    if "failed" in row:
        return [f"{name:<52}{row['failed']}"]
    if row["variant"] in PEAKS:
        peaks = [row[f"{what}_flops"] / 1e9 for what in ("matmul", "conv")]
        return [f"{name:<52}matmul {peaks[0]:.0f} GFLOP/s, convolution {peaks[1]:.0f}"]
    shares = [f"{row[k]:.0%}" if k in row else "-" for k in ("of_matmul_peak", "of_conv_peak")]
    lines = [
        f"{name:<52}{row['ms']:>10.1f}{row['probes']:>4}{row['cpu_ms']:>10.0f}{row['peak_memory_gb']:>9.2f}"
        f"{row['compile_seconds']:>11.1f}{row['flops'] / 1e9:>10.0f}{shares[0]:>11}{shares[1]:>9}"
    ]
    lines += [f"    times as fast as {other}: {ratio_line(r)}" for other, r in row.get("times_as_fast_as", {}).items()]
    if "fastest_pytorch" in row:
        best = row["fastest_pytorch"]
        lines.append(f"    PyTorch's fastest is {best['variant']}: {ratio_line(best)}")
    return lines


def ratio_line(ratio: dict[str, Any]) -> str:
    """As in "1.21 by CPU, 0.98 by wall clock (commits 1234567, 89abcde; load 0.6, 1.1)"."""
    names = {"cpu_ms": "CPU", "ms": "wall clock"}
    times = ", ".join(f"{ratio[clock]:.2f} by {name}" for clock, name in names.items() if clock in ratio)
    commits = ", ".join((commit or "unknown")[:7] for commit in ratio["commits"])
    loads = ", ".join(f"{load:.1f}" for load in ratio["load_averages"])
    text = f"{times} (commits {commits}; load {loads})"
    if "products" in ratio:
        text += f", memory {ratio['of_needed_gb']:.2f} by the compiler, {ratio['of_peak_memory_gb']:.2f} at the peak"
        text += f" ({' against '.join(ratio['products'])})"
    return text
