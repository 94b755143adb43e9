"""Pictures of accuracy: stage by stage, and against size or work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ehap_jax.report.figure_style import (
    BLUE,
    INK,
    LINE,
    SOFT,
    new_figure,
    nonempty,
    plain_axes,
    series_style,
    set_title,
)
from ehap_jax.report.tables import dense_stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FOCUS = 0.10  # accuracies further than this below the reference are off the close-up


def accuracy_per_stage(stages: Sequence[Mapping[str, Any]]) -> Figure:
    """Test accuracy of every stage: one dot per seed, and beside them the mean ± standard deviation.

    Args:
        stages: those of ``summary.json``; "accuracy", "accuracy_std" and "accuracies" are in [0, 1] and drawn in
            percent. Where a stage collapses, such as a pruned network before it is fine-tuned, a second panel shows
            the others close up, with an arrow for what lies below it.

    Raises:
        ValueError: there is no stage.
    """
    nonempty(stages, "the summary")
    reference = dense_stage(stages)["accuracy"]
    near = [s for s in stages if s["accuracy"] >= reference - FOCUS]
    closer = len(near) < len(stages)
    figure = new_figure(8.6 if closer else 5.2, 3.5)
    full = figure.add_subplot(1, 1 + closer, 1)
    _draw_accuracies(full, stages)
    seeds = max(len(stage["accuracies"]) for stage in stages)
    set_title(full, "Accuracy per stage", f"{seeds} seed{'s' if seeds > 1 else ''}")
    if closer:
        close = figure.add_subplot(1, 2, 2)
        found = np.concatenate([100 * np.asarray(s["accuracies"], float) for s in near])
        low, high = found.min(), found.max()
        room = max(high - low, 0.5) * 0.35
        close.set_ylim(low - 2 * room, high + room)
        _draw_accuracies(close, stages, floor=low - 1.6 * room)
        close.set_ylabel("")
        set_title(close, "Close up", "an arrow points to what is below")
    return figure


def accuracy_against_cost(runs: Mapping[str, Sequence[Mapping[str, Any]]], cost: str = "bytes") -> Figure:
    """Test accuracy against size or work for several runs, each relative to its own dense network.

    Args:
        runs: name -> its stages, as in ``summary.json``. One colour and marker per run, or per curve of a run
            whose stages lie on curves, joined in the order of the costs, mean ± standard deviation. Stages more than
            ten points below the dense network that lie on no curve, such as those before fine-tuning, are left out
            and counted.
        cost: "params", "macs" or "bytes".

    Raises:
        ValueError: there is no run, or no such cost.
    """
    nonempty(list(runs), "the comparison")
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
    figure = new_figure(7.4, 4.0 + 0.22 * max(len(series) - 4, 0))
    axes = figure.add_subplot()
    plain_axes(axes)
    for number, (name, dense, stages) in enumerate(series):
        near = [s for s in stages if s.get("curve") is not None or s["accuracy"] >= dense["accuracy"] - FOCUS]
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
            **series_style(number),
        )
    axes.axhline(0, color=SOFT, linewidth=0.8, zorder=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{costs}, % of the dense network")
    axes.set_ylabel("accuracy − dense, points")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    note = f"{left_out} stage{'s' * (left_out != 1)} more than {100 * FOCUS:.0f} points below not shown"
    set_title(axes, f"Accuracy against {costs}", note if left_out else "")
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
    nonempty(points, "the list of stages on a curve")
    dense, costs = dense_stage(points), _cost_name(cost)
    figure = new_figure(7.4, 4.2)
    axes = figure.add_subplot()
    plain_axes(axes)
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
            **series_style(number),
        )
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{costs}, % of the dense network")
    axes.set_ylabel("test accuracy, %")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    seeds = [len(stage["accuracies"]) for stage in points]
    count = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    note = f"{count} seed{'s' * (max(seeds) > 1)}" + (", mean ± standard deviation" if max(seeds) > 1 else "")
    set_title(axes, f"Accuracy against {costs}", note)
    return figure


def _draw_accuracies(axes: Axes, stages: Sequence[Mapping[str, Any]], floor: float | None = None) -> None:
    """Dots and means; with a ``floor``, stages below it become an arrow there."""
    plain_axes(axes)
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


def _cost_name(cost: str) -> str:
    names = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}
    if cost not in names:
        raise ValueError(f"a cost is one of {', '.join(names)}, not {cost!r}")
    return names[cost]
