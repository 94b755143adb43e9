"""The table of a run: what every stage scores and costs, for the terminal, for markdown and for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

HEADER = ("stage", "test accuracy", "parameters", "MACs", "bytes")


def dense_stage(stages: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """What the others are measured against: the stage named "dense", or the first where none is."""
    return next((stage for stage in stages if stage["stage"] == "dense"), stages[0])


def stage_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text per stage, in the columns of `HEADER`.

    Accuracy is mean ± standard deviation over the seeds in percent, then the points gained or lost against the dense
    network. Costs (MACs are multiply-accumulates of one example) are followed by their share of the dense network's.

    Example:
        >>> dense = {"stage": "dense", "accuracy": 0.98, "accuracies": [0.98], "params": 8, "macs": 200, "bytes": 32}
        >>> small = {**dense, "stage": "pruned", "accuracy": 0.97, "macs": 90}
        >>> stage_rows({"stages": [dense, small]})[1]
        ('pruned', '97.00 % (−1.00)', '8 (100%)', '90 (45%)', '32 (100%)')
    """
    dense = dense_stage(summary["stages"])
    rows = []
    for stage in summary["stages"]:
        accuracy = f"{100 * stage['accuracy']:.2f} %"
        if stage.get("accuracy_std") is not None:
            accuracy += f" ± {100 * stage['accuracy_std']:.2f}"
        if stage is not dense:
            accuracy += f" ({100 * (stage['accuracy'] - dense['accuracy']):+.2f})".replace("-", "−")
        costs = (f"{stage[name]:,} ({stage[name] / dense[name]:.0%})" for name in ("params", "macs", "bytes"))
        rows.append((str(stage["stage"]), accuracy, *costs))
    return rows


def stage_caption(summary: Mapping[str, Any]) -> str:
    """What the numbers of the table mean, in one line."""
    count = len(summary["stages"][0]["accuracies"])
    seeds = f"{count} seeds, mean ± standard deviation" if count > 1 else "1 seed"
    return f"{seeds}; in brackets points and shares against {dense_stage(summary['stages'])['stage']}"


def stage_table(summary: Mapping[str, Any]) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=stage_caption(summary), title_justify="left")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="right" if i else "left")
    for row in stage_rows(summary):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table


def stage_markdown(summary: Mapping[str, Any]) -> str:
    """The rows as a markdown table, for a README or a pull request."""
    return markdown_table(HEADER, stage_rows(summary))


def stage_html(summary: Mapping[str, Any]) -> str:
    """The rows as an HTML ``<table>``, every cell escaped."""
    return html_table(HEADER, stage_rows(summary))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose first column is text and whose others are numbers, set to the right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)]) + "\n"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table, every cell escaped."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
