"""The pictures of a run: pure functions from data to matplotlib figures.

Figures are made through matplotlib's object interface, so no backend is chosen and no global state is touched. Networks
of more than `LAYERS_PER_ROW` layers wrap into rows with one scale, so that every layer keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ehap_jax.report.tables import dense_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every kind of colour vision. The page maps some of it to its theme.
BLUE, ORANGE, GREEN, PURPLE, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00"
INK, SOFT, LINE, BAR = "#1b1b1b", "#767676", "#e6e6e6", "#dcdcdc"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, INK)
MARKERS = "osD^vP"
LAYERS_PER_ROW = 40
MANY_POINTS = 3000  # more than these are embedded as a picture where the figure is saved as SVG
FOCUS = 0.10  # accuracies further than this below the reference are off the close-up


def sensitivity_per_layer(scores: Mapping[str, np.ndarray]) -> Figure:
    """Every channel's score per layer on a logarithmic axis, the layer's median as a bar.

    Args:
        scores: kernel path -> (channels,) scores, in the order in which the layers are drawn. A negative estimate is
            drawn as a hollow triangle at its absolute value. A channel at exactly 0, a dead one, has no place on the
            axis. Both are counted per layer below it. The median is that of all channels, and has no bar where it is
            not positive.

    Raises:
        ValueError: there is no layer.
    """
    paths = _nonempty(list(scores), "scores")
    values = [np.asarray(scores[path], float).ravel() for path in paths]
    everything = np.concatenate(values)
    dead, negative = int((everything == 0).sum()), int((everything < 0).sum())
    rows = _rows(len(paths))
    figure = _figure(_width(rows[0]), (3.6 + 0.45 * bool(dead or negative)) * len(rows))
    grid = figure.add_gridspec(2 * len(rows), 1, height_ratios=[8, 1] * len(rows))
    spread = np.random.default_rng(0)  # sideways, so that points do not hide each other
    main = None
    for number, row in enumerate(rows):
        top = main = figure.add_subplot(grid[2 * number], sharey=main)
        _plain_axes(top)
        _draw_scores(top, [values[i] for i in row], spread, rasterized=len(everything) > MANY_POINTS)
        bottom = top
        if dead or negative:
            bottom = figure.add_subplot(grid[2 * number + 1], sharex=top)
            top.tick_params(labelbottom=False, bottom=False)
            _count_below(bottom, [values[i] for i in row])
        top.set_ylabel("score per channel")
        _name_layers(bottom, [paths[i] for i in row])
        top.set_xlim(-0.6, len(row) - 0.4)
    if np.any(everything):
        figure.axes[0].set_yscale("log")
    counts = f"{len(everything):,} channels, {dead:,} exactly 0 (dead), {negative:,} negative"
    _title(figure.axes[0], "Sensitivity per layer", counts)
    return figure


def kept_channels(plan: Mapping[str, Any]) -> Figure:
    """Kept and pruned output channels of every kernel of a plan, the contents of ``plan.json``.

    Args:
        plan: ``"keep"``: kernel path -> kept output indices, ``"shapes"``: variable path -> full shape, ``"axes"``:
            kernel path -> output axis. Kernels of ``"axes"`` without an entry in ``"keep"`` are whole; where there
            is no ``"axes"``, the kernels of ``"keep"`` are drawn and their output axis is the last.

    Raises:
        ValueError: the plan names no kernel.
    """
    axes_of = plan.get("axes") or {}
    paths = _nonempty(list(dict.fromkeys([*axes_of, *plan["keep"]])), "the plan")
    full = np.array([plan["shapes"][path][axes_of.get(path, -1)] for path in paths])
    kept = np.array([len(plan["keep"].get(path, range(n))) for path, n in zip(paths, full, strict=True)])
    rows = _rows(len(paths))
    figure = _figure(_width(rows[0]), 2.9 * len(rows))
    axes = None
    for number, row in enumerate(rows):
        axes = figure.add_subplot(len(rows), 1, number + 1, sharey=axes)
        _plain_axes(axes)
        places, index = range(len(row)), list(row)
        axes.bar(places, full[index], color=BAR, width=0.8, label="pruned")
        axes.bar(places, kept[index], color=BLUE, width=0.8, label="kept")
        crowded = len(rows[0]) > 16
        for place, i in zip(places, index, strict=True):
            axes.annotate(
                f"{kept[i]}/{full[i]}",
                (place, full[i]),
                (0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90 if crowded else 0,
                fontsize=6.5 if crowded else 7.5,
                color=INK,
            )
        axes.set_ylabel("output channels")
        _name_layers(axes, [paths[i] for i in row])
        axes.set_xlim(-0.6, len(row) - 0.4)
    first = figure.axes[0]
    first.set_ylim(0, full.max() * (1.28 if len(rows[0]) > 16 else 1.14))
    if len(rows) == 1:
        first.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), labelcolor=INK)
    _title(first, "Kept channels per layer", f"{kept.sum():,} of {full.sum():,} ({kept.sum() / full.sum():.0%})")
    return figure


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

    for path in _nonempty(list(reference), names[0]):
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
    figure = _figure(4.9, 4.7)
    axes = figure.add_subplot()
    _plain_axes(axes)
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
    _title(axes, f"{names[1]} against {names[0]}", "\n".join(lines))
    return figure


def accuracy_per_stage(stages: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy of every stage: one dot per seed, and beside them the mean ± standard deviation.

    Args:
        stages: those of ``summary.json``; "accuracy", "accuracy_std" and "accuracies" are in [0, 1] and drawn in
            percent. Where a stage collapses, such as a pruned network before it is fine-tuned, a second panel shows
            the others close up, with an arrow for what lies below it.

    Raises:
        ValueError: there is no stage.
    """
    _nonempty(stages, "the summary")
    reference = dense_stage(stages)["accuracy"]
    near = [s for s in stages if s["accuracy"] >= reference - FOCUS]
    closer = len(near) < len(stages)
    figure = _figure(8.6 if closer else 5.2, 3.5)
    full = figure.add_subplot(1, 1 + closer, 1)
    _draw_accuracies(full, stages)
    seeds = max(len(stage["accuracies"]) for stage in stages)
    _title(full, "Accuracy per stage", f"{seeds} seed{'s' if seeds > 1 else ''}")
    if closer:
        close = figure.add_subplot(1, 2, 2)
        found = np.concatenate([100 * np.asarray(s["accuracies"], float) for s in near])
        low, high = found.min(), found.max()
        room = max(high - low, 0.5) * 0.35
        close.set_ylim(low - 2 * room, high + room)
        _draw_accuracies(close, stages, floor=low - 1.6 * room)
        close.set_ylabel("")
        _title(close, "Close up", "an arrow points to what is below")
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
    figure = _figure(6.4, 3.5)
    axes = figure.add_subplot()
    _plain_axes(axes)
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
    _title(axes, "Convergence of the trace", f"{last} after {probes[-1]:,.0f} probes")
    return figure


def accuracy_against_cost(runs: Mapping[str, Sequence[Mapping[str, Any]]], cost: str = "bytes") -> Figure:
    """Test accuracy against size or work for several runs, each relative to its own dense network.

    Args:
        runs: name -> its stages, as in ``summary.json``. One colour and marker per run, or per curve of a run
            whose stages lie on curves, joined in the order of the costs, mean ± standard deviation. Stages more than
            ten points below the dense network are left out and counted.
        cost: "params", "macs" or "bytes".

    Raises:
        ValueError: there is no run, or no such cost.
    """
    _nonempty(list(runs), "the comparison")
    costs = _cost_name(cost)
    left_out = 0
    series = [
        (
            name if curve is None else f"{name}: {curve}",
            dense_stage(stages),
            [s for s in stages if s.get("curve") == curve],
        )
        for name, stages in runs.items()
        for curve in dict.fromkeys(stage.get("curve") for stage in stages)
    ]
    figure = _figure(7.4, 4.0 + 0.22 * max(len(series) - 4, 0))
    axes = figure.add_subplot()
    _plain_axes(axes)
    for number, (name, dense, stages) in enumerate(series):
        near = [s for s in stages if s["accuracy"] >= dense["accuracy"] - FOCUS]
        left_out += len(stages) - len(near)
        near.sort(key=lambda stage: stage[cost])
        if not near:
            continue
        axes.errorbar(
            [100 * s[cost] / dense[cost] for s in near],
            [100 * (s["accuracy"] - dense["accuracy"]) for s in near],
            [100 * (s.get("accuracy_std") or 0.0) for s in near],
            label=name.replace("$", r"\$"),
            linestyle=":",
            **_series(number),
        )
    axes.axhline(0, color=SOFT, linewidth=0.8, zorder=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{costs}, % of the dense network")
    axes.set_ylabel("accuracy − dense, points")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    note = f"{left_out} stage{'s' * (left_out != 1)} more than {100 * FOCUS:.0f} points below dense not shown"
    _title(axes, f"Accuracy against {costs}", note if left_out else "")
    return figure


def accuracy_curves(stages: Sequence[Mapping[str, Any]], cost: str = "macs") -> Figure:
    """Test accuracy against size or work, one curve per way of pruning: the Pareto plot of a sweep.

    Args:
        stages: those of ``summary.json`` that have a "curve", the name of the curve they lie on; mean ± standard
            deviation over the seeds. A curve of one stage called "dense" is a dashed line across.
        cost: "params", "macs" or "bytes", in per cent of the dense network's.

    Raises:
        ValueError: no stage lies on a curve, or there is no such cost.
    """
    points = [stage for stage in stages if stage.get("curve")]
    _nonempty(points, "the list of stages on a curve")
    dense, costs = dense_stage(points), _cost_name(cost)
    figure = _figure(7.4, 4.2)
    axes = figure.add_subplot()
    _plain_axes(axes)
    curves = dict.fromkeys(stage["curve"] for stage in points if stage is not dense or stage["stage"] != "dense")
    if dense["stage"] == "dense":
        label = f"dense, {100 * dense['accuracy']:.2f} %"
        axes.axhline(100 * dense["accuracy"], color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=0, label=label)
    for number, curve in enumerate(curves):
        found = sorted((stage for stage in points if stage["curve"] == curve), key=lambda stage: stage[cost])
        axes.errorbar(
            [100 * stage[cost] / dense[cost] for stage in found],
            [100 * stage["accuracy"] for stage in found],
            [100 * (stage.get("accuracy_std") or 0.0) for stage in found],
            label=str(curve).replace("$", r"\$"),
            capsize=2.5,
            **_series(number),
        )
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{costs}, % of the dense network")
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    seeds = [len(stage["accuracies"]) for stage in points]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    note = f"{count} seed{'s' * (max(seeds) > 1)}" + (", mean ± standard deviation" if max(seeds) > 1 else "")
    _title(axes, f"Accuracy against {costs}", note)
    return figure


def cost_bars(costs: Mapping[str, Mapping[str, float]]) -> Figure:
    """What was measured of time and memory, as bars with their numbers; one panel per quantity.

    Args:
        costs: quantity with its unit, such as "seconds per probe" -> name, such as "float16" -> positive number.

    Raises:
        ValueError: there is nothing to draw.
    """
    _nonempty(list(costs), "the costs")
    longest = max(len(bars) for bars in costs.values())
    figure = _figure(4.4 * len(costs), 1.1 + 0.38 * longest)
    for number, (quantity, bars) in enumerate(costs.items()):
        axes = figure.add_subplot(1, len(costs), number + 1)
        _plain_axes(axes)
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
        _title(axes, quantity[:1].upper() + quantity[1:])
    return figure


def short_name(path: str) -> str:
    """``layer1_0/conv1`` for ``params/layer1_0/conv1/kernel``."""
    return path.removeprefix("params/").removesuffix("/kernel")


def _draw_scores(axes: Axes, values: Sequence[np.ndarray], spread: np.random.Generator, *, rasterized: bool) -> None:
    reach = 0.3
    for i, found in enumerate(values):
        sideways = i + spread.uniform(-reach, reach, len(found))
        above, below = found > 0, found < 0
        axes.scatter(
            sideways[above], found[above], s=8, color=BLUE, alpha=0.5, linewidths=0, zorder=2, rasterized=rasterized
        )
        axes.scatter(
            sideways[below],
            -found[below],
            s=13,
            marker="v",
            facecolors="none",
            edgecolors=RED,
            linewidths=0.8,
            zorder=3,
            rasterized=rasterized,
        )
        if len(found) and np.median(found) > 0:
            axes.hlines(float(np.median(found)), i - 0.4, i + 0.4, color=INK, linewidth=1.4, zorder=4)


def _count_below(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """A table of two lines under the scores: how many channels are at 0, how many estimates are negative."""
    for i, found in enumerate(values):
        for level, count, color in ((0, (found == 0).sum(), INK), (1, (found < 0).sum(), RED)):
            if count:
                axes.text(i, level, str(count), ha="center", va="center", fontsize=7, color=color)
    axes.set_ylim(1.7, -0.7)
    axes.set_yticks([0, 1], ["exactly 0", "▽ negative"], fontsize=7)
    axes.get_yticklabels()[1].set_color(RED)
    axes.get_yticklabels()[0].set_color(INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.get_yticklabels()[1].set_color(RED)


def _draw_accuracies(axes: Axes, stages: Sequence[Mapping[str, Any]], floor: float | None = None) -> None:
    """Dots and means; with a ``floor``, stages below it become an arrow there."""
    _plain_axes(axes)
    for i, stage in enumerate(stages):
        values, mean = 100 * np.asarray(stage["accuracies"], float), 100 * stage["accuracy"]
        if floor is not None and mean < floor:
            axes.annotate(f"↓ {mean:.1f}", (i, floor), ha="center", va="bottom", fontsize=8, color=SOFT)
            continue
        places = i - 0.14 + np.linspace(-0.06, 0.06, len(values)) if len(values) > 1 else [i - 0.14]
        axes.scatter(places, values, s=18, color=BLUE, alpha=0.75, linewidths=0, zorder=3)
        axes.hlines(mean, i, i + 0.22, color=INK, linewidth=1.6, zorder=4)
        if stage.get("accuracy_std") is not None:
            deviation = 100 * stage["accuracy_std"]
            axes.vlines(i + 0.11, mean - deviation, mean + deviation, color=INK, linewidth=1, zorder=4)
        axes.annotate(
            f"{mean:.1f}" if floor is None else f"{mean:.2f}",
            (i + 0.22, mean),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_xticks(range(len(stages)), [str(stage["stage"]) for stage in stages], parse_math=False)
    axes.set_xlim(-0.5, len(stages) - 0.35)
    axes.set_ylabel("test accuracy, %")


def _series(number: int) -> dict[str, Any]:
    """How the so-many-th series of a plot looks."""
    color, marker = SERIES[number % len(SERIES)], MARKERS[(number + number // len(SERIES)) % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.2, "elinewidth": 1}


def _cost_name(cost: str) -> str:
    names = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
    if cost not in names:
        raise ValueError(f"a cost is one of {', '.join(names)}, not {cost!r}")
    return names[cost]


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ehap-jax[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.spines[:].set_linewidth(0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, which="both", width=0.7)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(axis="y", color=LINE, linewidth=0.6)


def _title(axes: Axes, text: str, note: str = "") -> None:
    """A bold title with a quieter line or two under it, both above the axes."""
    lines = note.count("\n") + 1 if note else 0
    axes.set_title(
        text, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=7 + 11.5 * lines, parse_math=False
    )
    if note:
        axes.annotate(
            note,
            (0, 1),
            (0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            va="bottom",
            fontsize=8,
            color=INK,
            linespacing=1.2,
        )


def _correlation(value: float) -> str:
    """Five digits, and never 1 for what is only close to it."""
    return "above 0.99999" if 0.999995 <= value < 1 else f"{value:.5f}"


def _rows(count: int) -> list[range]:
    """Layers 0 to ``count`` in as few rows as `LAYERS_PER_ROW` allows, of nearly one length."""
    number = -(-count // LAYERS_PER_ROW)
    length = -(-count // number)
    return [range(start, min(start + length, count)) for start in range(0, count, length)]


def _width(row: Sequence[int]) -> float:
    return float(np.clip(0.42 * len(row) + 2.0, 6.4, 11.0))


def _name_layers(axes: Axes, paths: Sequence[str]) -> None:
    steep = len(paths) > 12
    labels = [short_name(path) for path in paths]
    axes.set_xticks(
        range(len(paths)),
        labels,
        rotation=90 if steep else 40,
        ha="center" if steep else "right",
        va="top" if steep else "center",
        rotation_mode="default" if steep else "anchor",
        fontsize=7 if steep else 8,
        parse_math=False,
    )


def _nonempty(items, what: str):
    if not len(items):
        raise ValueError(f"{what} is empty; there is nothing to draw")
    return items
