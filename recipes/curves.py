"""Accuracy against cost, one curve per criterion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {"params": "parameters", "macs": "multiply-accumulates", "bytes": "bytes"}


def accuracy_curves(statistics: Sequence[dict[str, Any]], *, cost: Literal["params", "macs", "bytes"]) -> Figure:
    """Mean ± standard deviation of the fine-tuned accuracy against the cost, both over seeds; INT8 where there is one.

    Args:
        statistics: of `recipes.cells.statistics`.
        cost: what the horizontal axis counts.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ehap-jax[report]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, criterion in enumerate(dict.fromkeys(entry["criterion"] for entry in statistics)):
        entries = sorted((e for e in statistics if e["criterion"] == criterion), key=lambda e: e[cost])
        for name, style in (("accuracy", "o-"), ("accuracy_int8", "s:")):
            chosen = [entry for entry in entries if entry[name] is not None]
            if chosen:
                axes.errorbar(
                    [entry[cost] for entry in chosen],
                    [100 * entry[name]["mean"] for entry in chosen],
                    yerr=[100 * (entry[name]["std"] or 0.0) for entry in chosen],
                    fmt=style,
                    color=f"C{number}",
                    capsize=3,
                    label=criterion if name == "accuracy" else f"{criterion}, INT8",
                )
    axes.set_xscale("log")
    axes.set_xlabel(_NAMES[cost])
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
