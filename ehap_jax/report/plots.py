"""The pictures of a run: pure functions from data to matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, GREY, RED = "#0072B2", "#E69F00", "#009E73", "#8a8a8a", "#D55E00"


def sensitivity_per_layer(scores: Mapping[str, np.ndarray]) -> Figure:
    """Every channel's score per layer on a logarithmic axis, the median as a bar.

    Channels at exactly 0 (grey triangle) and negative estimates (red triangle) are counted below the axis' data.
    """
    figure, axes = _figure(_wide(len(scores)), 3.6)
    values = [np.asarray(v, float) for v in scores.values()]
    positive = [v[v > 0] for v in values]
    everything = np.concatenate([*positive, np.zeros(0)])
    floor = everything.min() if everything.size else 1.0
    spread = np.random.default_rng(0)  # sideways, so that points do not hide each other
    for i, (found, above) in enumerate(zip(values, positive, strict=True)):
        sideways = i + spread.uniform(-0.22, 0.22, len(above))
        axes.scatter(sideways, above, s=9, color=BLUE, alpha=0.55, linewidths=0)
        if len(above):
            axes.hlines(np.median(above), i - 0.32, i + 0.32, color="black", linewidth=1.2)
        for level, count, color in ((0.4, (found == 0).sum(), GREY), (0.15, (found < 0).sum(), RED)):
            if count:
                axes.scatter([i], [floor * level], marker="v", color=color, s=24, zorder=3)
                axes.annotate(
                    str(count), (i, floor * level), (7, -3), textcoords="offset points", fontsize=7, color=color
                )
    axes.set_yscale("log")
    axes.set_ylabel("score per channel")
    _title(axes, "Sensitivity per layer")
    _layer_axis(axes, list(scores))
    return figure


def kept_channels(plan: Mapping[str, Any]) -> Figure:
    """Kept and pruned output channels per kernel of a plan (the contents of ``plan.json``)."""
    axes_of = plan.get("axes", {})
    paths = list(axes_of) or list(plan["keep"])
    full = np.array([plan["shapes"][path][axes_of.get(path, -1)] for path in paths])
    kept = np.array([len(plan["keep"].get(path, range(n))) for path, n in zip(paths, full, strict=True)])
    figure, axes = _figure(_wide(len(paths)), 3.2)
    axes.bar(range(len(paths)), full, color="#dcdcdc", label="in full")
    axes.bar(range(len(paths)), kept, color=BLUE, label="kept")
    if len(paths) <= 40:
        for i, (k, n) in enumerate(zip(kept, full, strict=True)):
            axes.annotate(f"{k}/{n}", (i, n), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_ylabel("output channels")
    _title(axes, "Kept channels per layer")
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper left")
    _layer_axis(axes, paths)
    return figure


def score_scatter(reference: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], names: Sequence[str]) -> Figure:
    """Scores of one precision against those of another, channel by channel, from the same probes.

    ``names`` are those of ``reference`` and ``other``. Spearman's rank correlation is over all channels; the picture
    shows the pairs that are positive in both.
    """
    from scipy.stats import spearmanr

    x = np.concatenate([np.asarray(reference[path], float) for path in reference])
    y = np.concatenate([np.asarray(other[path], float) for path in reference])
    correlation = float(spearmanr(x, y).statistic)  # pyright: ignore[reportAttributeAccessIssue]
    shown = (x > 0) & (y > 0)
    figure, axes = _figure(4.4, 4.2)
    axes.scatter(x[shown], y[shown], s=10, color=BLUE, alpha=0.6, linewidths=0)
    if shown.any():
        span = [min(x[shown].min(), y[shown].min()), max(x[shown].max(), y[shown].max())]
        axes.plot(span, span, color=GREY, linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(f"score, {names[0]}")
    axes.set_ylabel(f"score, {names[1]}")
    agreement = f"Spearman {correlation:.5f} ({shown.sum()} of {len(x)} channels shown)"
    _title(axes, f"{names[1]} against {names[0]}\n{agreement}")
    return figure


def accuracy_per_stage(stages: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy of every stage: one dot per seed, mean and standard deviation beside them."""
    figure, axes = _figure(5.2, 3.4)
    for i, stage in enumerate(stages):
        values = 100 * np.asarray(stage["accuracies"], float)
        axes.scatter(np.full(len(values), i - 0.08), values, s=16, color=BLUE, alpha=0.7, linewidths=0)
        deviation = 100 * stage["accuracy_std"] if stage.get("accuracy_std") is not None else 0.0
        axes.errorbar(i + 0.08, 100 * stage["accuracy"], deviation, fmt="o", color="black", markersize=4, capsize=3)
        text = f"{100 * stage['accuracy']:.1f}"
        axes.annotate(text, (i + 0.08, 100 * stage["accuracy"]), (7, -3), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(stages)), [stage["stage"] for stage in stages])
    axes.set_xlim(-0.5, len(stages) - 0.3)
    axes.set_ylabel("test accuracy, %")
    _title(axes, "Accuracy per stage")
    axes.grid(axis="y", color="#e6e6e6")
    return figure


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ehap-jax[report]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return figure, axes


def _title(axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def _wide(layers: int) -> float:
    return min(max(5.5, 0.55 * layers + 1.5), 16.0)


def _layer_axis(axes, paths: Sequence[str]) -> None:
    """Short names of layers, thinned out where there are many."""
    step = -(-len(paths) // 48)
    ticks = range(0, len(paths), step)
    axes.set_xticks(ticks, [short_name(paths[i]) for i in ticks], rotation=60, ha="right", fontsize=7)
    axes.set_xlim(-0.6, len(paths) - 0.4)
    axes.grid(axis="y", color="#e6e6e6")


def short_name(path: str) -> str:
    """``layer1_0/conv1`` for ``params/layer1_0/conv1/kernel``."""
    return path.removeprefix("params/").removesuffix("/kernel")
