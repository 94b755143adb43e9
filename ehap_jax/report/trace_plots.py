"""Pictures of Hessian traces: one precision against another, convergence, time and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ehap_jax.report.figure_style import BLUE, INK, LINE, MANY_POINTS, SOFT, new_figure, nonempty, plain_axes, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def score_scatter(reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Scores of one precision against those of another, channel by channel, from the same probes.

    Args:
        reference, other: kernel path -> (channels,) scores, of the same kernels.
        names: what ``reference`` and ``other`` are.

    Spearman's rank correlation and the median of ``|other − reference| / |reference|`` are over all channels (the
    second over those not 0 in ``reference``); the axes, being logarithmic, show the pairs that are positive in both.

    Raises:
        ValueError: ``other`` lacks a kernel of ``reference``, or has another number of channels there.
    """
    from scipy.stats import spearmanr

    for path in nonempty(list(reference), names[0]):
        if path not in other or np.shape(other[path]) != np.shape(reference[path]):
            found = f"shape {np.shape(other[path])}" if path in other else "none"
            raise ValueError(
                f"scores of {path}: {names[0]} has shape {np.shape(reference[path])}, {names[1]} has {found}"
            )
    x = np.concatenate([np.asarray(reference[path], float).ravel() for path in reference])
    y = np.concatenate([np.asarray(other[path], float).ravel() for path in reference])
    varied = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    correlation = _correlation(float(spearmanr(x, y).statistic)) if varied else "undefined"  # pyright: ignore[reportAttributeAccessIssue]
    shown = (x > 0) & (y > 0)
    figure = new_figure(4.9, 4.7)
    axes = figure.add_subplot()
    plain_axes(axes)
    axes.scatter(
        x[shown], y[shown], s=11, color=BLUE, alpha=0.55, linewidths=0, rasterized=bool(shown.sum() > MANY_POINTS)
    )
    if shown.any():
        span = [min(x[shown].min(), y[shown].min()), max(x[shown].max(), y[shown].max())]
        axes.plot(span, span, color=SOFT, linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_xlabel(f"score, {names[0]}", parse_math=False)
    axes.set_ylabel(f"score, {names[1]}", parse_math=False)
    known = x != 0
    difference = f"{np.median(np.abs(y - x)[known] / np.abs(x)[known]):.2g}" if known.any() else "undefined"
    lines = (
        f"Spearman {correlation}, median relative difference {difference}",
        f"{shown.sum():,} of {len(x):,} channels shown: positive in both",
    )
    set_title(axes, f"{names[1]} against {names[0]}", "\n".join(lines))
    return figure


def trace_convergence(probes: np.ndarray, mean: np.ndarray, sem: np.ndarray) -> Figure:
    """Running estimate of the trace against the number of probes, with its 95 % interval.

    Args:
        probes: (n,) ascending numbers of probes.
        mean: (n,) running mean of the total trace after so many probes.
        sem: (n,) its standard error; NaN where it is not known, as after one probe. The band is mean ± 1.96 sem.

    Raises:
        ValueError: the shapes differ or are empty.
    """
    probes, mean, sem = (np.asarray(a, float) for a in (probes, mean, sem))
    if probes.ndim != 1 or not len(probes) or not probes.shape == mean.shape == sem.shape:
        raise ValueError(f"probes, mean and sem must be (n,) alike, got {probes.shape}, {mean.shape}, {sem.shape}")
    figure = new_figure(6.4, 3.5)
    axes = figure.add_subplot()
    plain_axes(axes)
    half = 1.96 * sem
    axes.fill_between(probes, mean - half, mean + half, color=BLUE, alpha=0.2, linewidth=0, label="95 % interval")
    axes.plot(probes, mean, color=BLUE, linewidth=1.6, marker="o" if len(probes) < 3 else "", label="running mean")
    axes.axhline(mean[-1], color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    settled = np.isfinite(half) & (probes >= min(5, probes[-1]))  # the first few intervals would dwarf the rest
    if settled.any():
        low, high = (mean - half)[settled].min(), (mean + half)[settled].max()
        axes.set_ylim(low - 0.08 * (high - low or 1), high + 0.08 * (high - low or 1))
    axes.set_xlabel("probes")
    axes.set_ylabel("trace of the Hessian")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    last = f"{mean[-1]:.4g}" + (f" ± {half[-1]:.2g}" if np.isfinite(half[-1]) else "")
    set_title(axes, "Convergence of the trace", f"{last} after {probes[-1]:,.0f} probes")
    return figure


def cost_bars(costs: Mapping[str, Mapping[str, float]]) -> Figure:
    """What was measured of time and memory, as bars with their numbers; one panel per quantity.

    Args:
        costs: quantity with its unit, such as "seconds per probe" -> name, such as "float16" -> positive number.

    Raises:
        ValueError: there is nothing to draw.
    """
    nonempty(list(costs), "the costs")
    longest = max(len(bars) for bars in costs.values())
    figure = new_figure(4.4 * len(costs), 1.1 + 0.38 * longest)
    for number, (quantity, bars) in enumerate(costs.items()):
        axes = figure.add_subplot(1, len(costs), number + 1)
        plain_axes(axes)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=LINE, linewidth=0.6)
        places, values = range(len(bars)), list(bars.values())
        axes.barh(places, values, color=BLUE, height=0.62)
        first = values[0]
        for place, value in zip(places, values, strict=True):
            share = f"  ({value / first:.2f} ×)" if place else ""
            axes.annotate(
                f"{value:,.4g}{share}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(places, list(bars), parse_math=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.45 * max(values))
        set_title(axes, quantity[:1].upper() + quantity[1:])
    return figure


def _correlation(value: float) -> str:
    """Five digits, and never 1 for what is only close to it."""
    return "above 0.99999" if 0.999995 <= value < 1 else f"{value:.5f}"
