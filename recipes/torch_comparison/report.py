"""What `recipes.compare_torch` writes of a comparison: tables, plots, and what the fields of `comparison.json` mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ehap_jax.pruning import Scores
from ehap_jax.report import score_scatter
from ehap_jax.report.figure_style import BLUE, LINE, RED, new_figure, save_figure
from ehap_jax.training import RunDirectory
from recipes.torch_comparison.limits import beyond_limits, limited_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANING = {
    "identity": "JAX against PyTorch on the same weights, images and probes. relative: ‖JAX - PyTorch‖ / ‖PyTorch‖ "
    "over all elements; max_abs: the largest difference. limits: what is allowed.",
    "scores": "HAP's score of every output channel from the same probes in both. spearman: rank correlation over all "
    "channels; kept_overlap: for every kept fraction of channels, intersection over union of the kept channels.",
    "schedule": "Per number of probes, against the reference ranking: fixed weighs all probes alike (JAX), published "
    "weighs probe i by 2^(16 - 8i) as the released code does (PyTorch, the same probes). In float32 throughout, so "
    "that the schedule is the only difference. same_kept_as_fixed: overlap of the two.",
    "reference": "exact: the trace without probes (the Gauss-Newton trace, proven equal to the Hessian's); "
    "probes: many equally weighted probes, drawn independently of those compared.",
    "pruned": "Test accuracy right after pruning, without fine-tuning, per criterion and kept fraction of channels. "
    "JAX runs the masked network, PyTorch the shrunk one; logits_max_abs is the largest difference between the two.",
    "int8": "The dense network and the one pruned most, in INT8 with ranges from the training images, no training: "
    "every quantised activation of the compared test images as `to_integer` and `interop.torch_integer` compute it. "
    "not_comparable: what has no integer form in one of the two.",
    "method": "Under union coupling of a post-activation ResNet: each framework ranks and prunes by itself, from its "
    "own scores of the same probes (`interop.reference.union`). channels_that_differ: kept by one of the two only.",
    "cost": "Each framework in a process of its own, the same images, float32 products as precise as for the figures "
    "above (`precision`): first_call_seconds compiles, the others are from the second call. On a machine that "
    "others use (load_average above the number of cores) compare the CPU seconds. not_measured: why there are none. "
    "Memory in MiB of resident memory (on a GPU, of its memory); memory_before has both frameworks imported.",
}


def write_results(run: RunDirectory, document: Mapping[str, Any], both: Mapping[str, Scores]) -> None:
    """The table on the screen and as text, the JSON file and the two plots."""
    screen, plain = Console(), Console(record=True, width=110, file=StringIO())
    for table in tables(document):
        screen.print(table)
        plain.print(table)
    run.write_text("comparison.txt", plain.export_text())
    run.write_json("comparison.json", document)
    save_figure(schedule_figure(document), run.file("schedule.png"))
    scatter = score_scatter(both["PyTorch"].values, both["JAX"].values, ("PyTorch", "JAX"))
    save_figure(scatter, run.file("scores.png"))


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The comparison for people to read; no table of what was not compared."""
    shown = [same_table(document), ranking_table(document), pruned_table(document["pruned"])]
    shown += [method_table(document["method"])] if document["method"] else []
    shown += [int8_table(document["int8"])]
    return shown + ([cost_table(document["cost"])] if document["cost"] else [])


def same_table(document: Mapping[str, Any]) -> Table:
    """Every figure that has a limit, and what else should be the same."""
    name, identity, scores = document["checkpoint"]["file"], document["identity"], document["scores"]
    table = _table(f"{name}: the same numbers?", "JAX against PyTorch", "found", "at most")
    found, beyond = limited_figures(document), beyond_limits(document)
    for figure, limit in document["limits"].items():
        value = f"{found[figure]:.3g}{' !' if figure in beyond else ''}" if figure in found else "not comparable"
        table.add_row(figure.replace("_", " "), value, f"{limit:g}")
    table.add_row("accuracy", " | ".join(_accuracies(identity)), "")
    table.add_row("scores, Spearman", f"{scores['spearman']:.6f}", "")
    for ratio, overlap in scores["kept_overlap"].items():
        table.add_row(f"kept channels in common, {ratio} kept", f"{overlap:.4f}", "")
    return table


def ranking_table(document: Mapping[str, Any]) -> Table:
    """Both schedules against the reference ranking, a row per number of probes."""
    ratios = list(document["scores"]["kept_overlap"])
    title = f"Against the {document['reference']} ranking: probes weighed alike | as published"
    table = _table(title, "probes", "Spearman", *[f"kept in common, {r} kept" for r in ratios])
    for row in document["schedule"]:
        fixed, published = row["fixed"], row["published"]
        cells = [f"{fixed['spearman']:.4f} | {published['spearman']:.4f}"]
        cells += [f"{fixed['kept_overlap'][r]:.3f} | {published['kept_overlap'][r]:.3f}" for r in ratios]
        table.add_row(str(row["probes"]), *cells)
    return table


def pruned_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy by criterion and kept fraction."""
    table = _table("Accuracy after pruning, not fine-tuned", "kept channels", "criterion", "JAX", "PyTorch")
    for row in rows:
        table.add_row(f"{row['kept_channels']:g}", row["criterion"], *_accuracies(row))
    return table


def method_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What differs where each framework ranks and prunes by itself."""
    table = _table("Ranked and pruned by each", "kept channels", "kept by one only", "logits", "JAX", "PyTorch")
    for row in rows:
        cells = (str(row["channels_that_differ"]), f"{row['logits_max_abs']:.3g}", *_accuracies(row))
        table.add_row(f"{row['kept_channels']:g}", *cells)
    return table


def int8_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How many integers differ, or why they could not be compared."""
    table = _table("INT8, not trained", "kept channels", "integers", "differ", "accuracy, JAX", "PyTorch")
    for row in rows:
        if "not_comparable" in row:
            cells = [f"not comparable: {row['not_comparable']}"]
        else:
            cells = [f"{row['integers']:,}", str(row["integers_that_differ"]), *_accuracies(row)]
        table.add_row(f"{row['kept_channels']:g}", *cells)
    return table


def cost_table(cost: Mapping[str, Mapping[str, Any]]) -> Table:
    """Time and memory, a column per framework."""
    table = _table("Cost of a trace, each in a process of its own", "", *cost)
    table.add_row("device", *[each.get("device") or f"not measured: {each['not_measured']}" for each in cost.values()])
    for key, what in (
        ("seconds_per_probe", "seconds per probe"),
        ("cpu_seconds_per_probe", "CPU seconds per probe"),
        ("first_call_seconds", "first call, s"),
        ("memory_before", "memory before, MiB"),
        ("peak_memory", "peak memory, MiB"),
        ("load_average", "load average meanwhile"),
    ):
        table.add_row(what, *[f"{each[key]:.4g}" if key in each else "" for each in cost.values()])
    return table


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def _accuracies(row: Mapping[str, Any]) -> list[str]:
    return [f"{row[f'accuracy_{framework}']:.2%}" for framework in ("jax", "torch")]


def schedule_figure(document: Mapping[str, Any]) -> Figure:
    """Agreement with the reference over the number of probes, for both schedules."""
    rows = document["schedule"]
    ratio = list(document["scores"]["kept_overlap"])[-1]
    figure = new_figure(8.4, 3.6)
    panels = figure.subplots(1, 2)
    for axes, title in zip(panels, ("Spearman of all scores", f"kept channels in common, {ratio} kept"), strict=True):
        for schedule, colour, label in (
            ("fixed", BLUE, "probes weighed alike"),
            ("published", RED, "published schedule"),
        ):
            values = [
                row[schedule]["spearman"] if axes is panels[0] else row[schedule]["kept_overlap"][ratio] for row in rows
            ]
            axes.plot([row["probes"] for row in rows], values, marker="o", markersize=4, color=colour, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("probes")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.grid(color=LINE)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"Agreement with the {document['reference']} ranking", x=0.01, ha="left", fontsize=10)
    return figure
