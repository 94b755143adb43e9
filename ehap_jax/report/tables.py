"""The table of a run: what every stage scores and costs."""

from __future__ import annotations

from typing import Any

from rich.table import Table

HEADER = ("stage", "test accuracy", "parameters", "MACs", "bytes")


def stage_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row of text per stage; costs with their share of the first stage's."""
    first = summary["stages"][0]
    rows = []
    for stage in summary["stages"]:
        accuracy = f"{100 * stage['accuracy']:.2f} %"
        if stage.get("accuracy_std") is not None:
            accuracy += f" ± {100 * stage['accuracy_std']:.2f}"
        costs = (f"{stage[name]:,} ({stage[name] / first[name]:.0%})" for name in ("params", "macs", "bytes"))
        rows.append((stage["stage"], accuracy, *costs))
    return rows


def stage_table(summary: dict[str, Any]) -> Table:
    """The rows as a table for the terminal."""
    count = len(summary["stages"][0]["accuracies"])
    table = Table(title=f"{count} seed{'s' if count > 1 else ''}, mean ± standard deviation", title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left")
    for row in stage_rows(summary):
        table.add_row(*row)
    return table
