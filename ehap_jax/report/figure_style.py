"""How every figure looks: its palette, its axes, its title.

Figures are made through matplotlib's object interface, so no backend is chosen and no global state is touched.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ehap_jax._whole_files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every kind of colour vision. The page maps some of it to its theme.
BLUE, ORANGE, GREEN, PURPLE, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00"
INK, SOFT, LINE, BAR = "#1b1b1b", "#767676", "#e6e6e6", "#dcdcdc"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, INK)
MARKERS = "osD^vP"
MANY_POINTS = 3000  # more than these are embedded as a picture where the figure is saved as SVG


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches. Raises ImportError, which names the extra to install, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ehap-jax[report]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture in the format of its suffix, whole or not at all; replaces an earlier one."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)


def plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(INK)
    axes.spines[:].set_linewidth(0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, which="both", width=0.7)
    axes.xaxis.label.set(color=INK, fontsize=9)
    axes.yaxis.label.set(color=INK, fontsize=9)
    axes.grid(axis="y", color=LINE, linewidth=0.6)


def set_title(axes: Axes, text: str, note: str = "") -> None:
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


def series_style(number: int) -> dict[str, Any]:
    """How the so-many-th series of a plot looks."""
    color, marker = SERIES[number % len(SERIES)], MARKERS[(number + number // len(SERIES)) % len(MARKERS)]
    return {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.2, "elinewidth": 1}


def nonempty(items, what: str):
    if not len(items):
        raise ValueError(f"{what} is empty; there is nothing to draw")
    return items
