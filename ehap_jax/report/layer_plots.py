"""Pictures of a network layer by layer: sensitivities, kept channels.

Networks of more than `LAYERS_PER_ROW` layers wrap into rows with one scale, so that every layer keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ehap_jax.report.figure_style import BAR, BLUE, INK, MANY_POINTS, RED, new_figure, nonempty, plain_axes, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LAYERS_PER_ROW = 40


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
    paths = nonempty(list(scores), "scores")
    values = [np.asarray(scores[path], float).ravel() for path in paths]
    everything = np.concatenate(values)
    dead, negative = int((everything == 0).sum()), int((everything < 0).sum())
    rows = _rows(len(paths))
    figure = new_figure(_width(rows[0]), (3.6 + 0.45 * bool(dead or negative)) * len(rows))
    grid = figure.add_gridspec(2 * len(rows), 1, height_ratios=[8, 1] * len(rows))
    spread = np.random.default_rng(0)  # sideways, so that points do not hide each other
    main = None
    for number, row in enumerate(rows):
        top = main = figure.add_subplot(grid[2 * number], sharey=main)
        plain_axes(top)
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
    set_title(figure.axes[0], "Sensitivity per layer", counts)
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
    paths = nonempty(list(dict.fromkeys([*axes_of, *plan["keep"]])), "the plan")
    full = np.array([plan["shapes"][path][axes_of.get(path, -1)] for path in paths])
    kept = np.array([len(plan["keep"].get(path, range(n))) for path, n in zip(paths, full, strict=True)])
    rows = _rows(len(paths))
    figure = new_figure(_width(rows[0]), 2.9 * len(rows))
    axes = None
    for number, row in enumerate(rows):
        axes = figure.add_subplot(len(rows), 1, number + 1, sharey=axes)
        plain_axes(axes)
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
    set_title(first, "Kept channels per layer", f"{kept.sum():,} of {full.sum():,} ({kept.sum() / full.sum():.0%})")
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
