"""Many prunings of one dense network, cell by cell: criterion, kept fraction and seed; each is done once and kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple, Protocol

from ehap_jax.data import Dataset
from ehap_jax.graph import Cost, count_cost
from ehap_jax.report import accuracy_curves, write_report
from ehap_jax.report.figure_style import save_figure
from ehap_jax.training import Deadline, Progress
from recipes.command import TrainingOptions
from recipes.criteria import Criterion
from recipes.int8 import train_int8
from recipes.lab import Lab, Phase, accuracy, check_phases
from recipes.network import Network, load_data, load_network
from recipes.pruned import PruneConfig, check_pruning, finetune, paper_pruning, prune_network
from recipes.summary import negative

DENSE = "dense"
"""The criterion of the cell that prunes nothing and is fine-tuned like all others: what they are compared with."""


@dataclass(frozen=True)
class CellsConfig:
    """Which cells, and what happens in each."""

    criteria: tuple[Criterion, ...] = ("hessian", "magnitude", "random")
    keeps: tuple[float, ...] = (0.5, 0.25, 0.1)
    """Kept fractions of the budget."""
    seeds: int = 3
    """How many, starting from 0; a seed chooses the Hessian batch, the random scores and the order of training."""
    prune: PruneConfig = field(default_factory=paper_pruning)
    """Criterion and fraction in it are replaced by those of the cell."""
    finetune: Phase = field(default_factory=lambda: Phase(epochs=1, learning_rate=0.05))
    int8: Phase = field(default_factory=lambda: Phase(epochs=1, learning_rate=0.005))
    int8_criteria: tuple[Criterion, ...] = ("hessian",)
    """Which criteria's networks go on to INT8."""


class Cell(NamedTuple):
    """One experiment."""

    criterion: str
    keep: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.criterion}-{self.keep:g}-seed{self.seed}"


def cells_of(config: CellsConfig) -> list[Cell]:
    """The dense cells first, then seed by seed, so that a run that is stopped early has whole seeds.

    Raises:
        ValueError: nothing to do, or a fraction out of range.
    """
    if config.seeds < 1:
        raise ValueError(f"--cells.seeds must be at least 1, got {config.seeds}")
    if not config.criteria or not config.keeps:
        raise ValueError("--cells.criteria and --cells.keeps each need at least one value")
    if not all(0 < keep <= 1 for keep in config.keeps):
        raise ValueError(f"--cells.keeps are fractions in (0, 1], got {config.keeps}")
    cells = []
    for seed in range(config.seeds):
        cells.append(Cell(DENSE, 1.0, seed))
        cells += [Cell(criterion, keep, seed) for keep, criterion in product(config.keeps, config.criteria)]
    return cells


def check_cells(config: CellsConfig, network: Network, dataset: Dataset) -> None:
    """Everything that can be wrong with the cells, before any work starts.

    Raises:
        ValueError: naming the option, or the target that is out of reach.
    """
    cells_of(config)
    phases = {"--cells.finetune": config.finetune, "--cells.int8": config.int8}
    check_phases(dataset, phases, taught=("--cells.finetune",))
    graph = network.graph()
    for keep in config.keeps:
        settings = replace(config.prune, keep=keep)
        check_pruning(dataset, graph, settings, *config.criteria, option="--cells.prune")


class Comparison(Protocol):
    """The configuration of a recipe over cells."""

    @property
    def dense(self) -> Path: ...
    @property
    def data(self) -> str: ...
    @property
    def train_images(self) -> int | None: ...
    @property
    def cells(self) -> CellsConfig: ...


def compare_cells(
    config: Comparison, options: TrainingOptions, *, name: str, plot: str, cost: Literal["params", "macs", "bytes"]
) -> None:
    """Do all cells; write `name`.json, `name`.txt, a plot and a page of those that are done, also when stopped.

    Raises:
        OutOfTime: the time limit has passed.
    """
    deadline = Deadline(options.max_minutes)
    network = load_network(config.dense)
    dataset = load_data(network, config.data, config.train_images)
    check_cells(config.cells, network, dataset)
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        start = accuracy(lab, network.apply, network.variables)
        try:
            run_cells(lab, network, config.cells)
        finally:
            result = {"model": network.architecture.model, **comparison(lab, config.cells, start)}
            run.write_json(f"{name}.json", result)
            run.write_text(f"{name}.txt", cells_table(result))
            if result["rows"]:
                run.write_json("summary.json", summary_of(result))
                save_figure(accuracy_curves(stages_of(result["statistics"]), cost), run.file(plot))
                write_report(run.path)
        progress.note((run.path / f"{name}.txt").read_text())


def comparison(lab: Lab, config: CellsConfig, start: float) -> dict[str, Any]:
    """What the finished cells say; `start` is the accuracy before anything was trained here."""
    cells = cells_of(config)
    rows = [lab.run.read_json(_file(cell)) for cell in cells if lab.run.file(_file(cell)).exists()]
    return {
        "data": lab.dataset.name,
        "train_images": len(lab.dataset.x_train),
        "test_images": len(lab.dataset.x_test),
        "accuracy_start": start,
        "cells_done": len(rows),
        "cells": len(cells),
        "statistics": statistics(rows),
        "differences": paired_differences(rows, config.criteria),
        "rows": rows,
    }


def run_cells(lab: Lab, network: Network, config: CellsConfig) -> None:
    """Do all cells in order; those already in the run are not repeated.

    Raises:
        OutOfTime: the lab's deadline has passed; finished cells are kept.
    """
    cells = cells_of(config)
    for number, cell in enumerate(cells):
        if not lab.run.file(_file(cell)).exists():
            lab.run.write_json(_file(cell), run_cell(lab, network, cell, config))
            if number + 1 < len(cells):
                lab.deadline.check(f"{number + 1} of {len(cells)} cells done")


def _file(cell: Cell) -> str:
    return f"cells/{cell.name}.json"


def run_cell(lab: Lab, network: Network, cell: Cell, config: CellsConfig) -> dict[str, Any]:
    """Prune, fine-tune and, where asked for, train in INT8; accuracies are of the test split, once per stage.

    `accuracy_int8` is that of the fake-quantised network, `bytes_int8` those of the integers it stands for.
    """
    started = time.perf_counter()
    graph, name = network.graph(), f"{cell.criterion}-{cell.keep:g}"
    found: dict[str, Any] = {"accuracy_pruned": None, "negative_scores": 0, "accuracy_int8": None, "bytes_int8": None}
    if cell.criterion == DENSE:
        small, cost = network, count_cost(graph)
    else:
        settings = replace(config.prune, criterion=cell.criterion, keep=cell.keep)
        small, scores, plan, _ = prune_network(lab, cell.seed, network, graph, settings, prefix=f"{name}-")
        cost = count_cost(graph, plan)
        found |= {
            "accuracy_pruned": accuracy(lab, small.apply, small.variables),
            "negative_scores": negative(scores),
        }
    tuned = finetune(lab, cell.seed, small, config.finetune, network, stage=name)
    found |= {"accuracy": accuracy(lab, tuned.apply, tuned.variables)}
    if cell.criterion in config.int8_criteria:
        int8 = train_int8(lab, cell.seed, tuned.apply, tuned.variables, config.int8, stage=f"{name}-int8")
        found |= {"accuracy_int8": accuracy(lab, int8.apply, int8.variables), "bytes_int8": int8.bytes}
    return {**cell._asdict(), **cost._asdict(), **found, "seconds": time.perf_counter() - started}


def statistics(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per criterion and fraction: accuracies over seeds (one per seed, mean, standard deviation), and mean costs."""
    found = []
    for criterion, keep in dict.fromkeys((row["criterion"], row["keep"]) for row in rows):
        chosen = [row for row in rows if (row["criterion"], row["keep"]) == (criterion, keep)]
        entry: dict[str, Any] = {"criterion": criterion, "keep": keep, "seeds": [row["seed"] for row in chosen]}
        entry |= {name: mean(row[name] for row in chosen) for name in Cost._fields}
        for name in ("accuracy_pruned", "accuracy", "accuracy_int8", "bytes_int8"):
            entry[name] = spread([row[name] for row in chosen if row[name] is not None])
        found.append(entry)
    return found


def stages_of(statistics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The statistics as stages of ``summary.json``, one curve per criterion, and one of its INT8 networks."""
    stages = []
    for entry in statistics:
        dense = entry["criterion"] == DENSE
        name = DENSE if dense else f"{entry['criterion']} {entry['keep']:g}"
        costs = {field: round(entry[field]) for field in Cost._fields}
        stages.append(_stage(name, entry["criterion"], entry["accuracy"], costs))
        if entry["accuracy_int8"] is not None:
            small = costs | {"bytes": round(entry["bytes_int8"]["mean"])}
            stages.append(_stage(f"{name}, INT8", f"{entry['criterion']}, INT8", entry["accuracy_int8"], small))
    return stages


def _stage(name: str, curve: str, found: dict[str, Any], costs: dict[str, int]) -> dict[str, Any]:
    accuracy = {"accuracy": found["mean"], "accuracy_std": found["std"], "accuracies": found["values"]}
    return {"stage": name, "curve": curve, **accuracy, **costs}


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """``summary.json`` of the finished cells."""
    seconds = {"all cells": sum(row["seconds"] for row in result["rows"])}
    seeds = sorted({row["seed"] for row in result["rows"]})
    return {"stages": stages_of(result["statistics"]), "seeds": seeds, "seconds": seconds, "checks": {}}


def paired_differences(rows: Sequence[dict[str, Any]], criteria: Sequence[str]) -> list[dict[str, Any]]:
    """The first criterion less every other one, seed by seed at the same fraction, in fractions of 1."""
    first, *others = criteria
    by_cell = {Cell(row["criterion"], row["keep"], row["seed"]): row["accuracy"] for row in rows}
    found = []
    for keep, other in product(dict.fromkeys(cell.keep for cell in by_cell if cell.criterion == first), others):
        pairs = [(Cell(first, keep, seed), Cell(other, keep, seed)) for seed in {cell.seed: None for cell in by_cell}]
        gaps = [by_cell[a] - by_cell[b] for a, b in pairs if a in by_cell and b in by_cell]
        if gaps:
            found.append({"first": first, "other": other, "keep": keep, "difference": spread(gaps)})
    return found


def spread(values: Iterable[float]) -> dict[str, Any] | None:
    """Mean, standard deviation (None for one value) and the values; None where there are none."""
    values = list(values)
    if not values:
        return None
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": values}


def cells_table(result: dict[str, Any]) -> str:
    """The statistics and the differences for people, in per cent, ± standard deviation over seeds."""
    header = ("criterion", "keep", "params", "MACs", "pruned", "fine-tuned", "INT8")
    table = [
        (
            entry["criterion"],
            f"{entry['keep']:g}",
            f"{entry['params']:,.0f}",
            f"{entry['macs'] / 1e6:.1f} M",
            *(percent(entry[name]) for name in ("accuracy_pruned", "accuracy", "accuracy_int8")),
        )
        for entry in result["statistics"]
    ]
    unfinished = result["cells"] - result["cells_done"]
    lines = [
        *([f"UNFINISHED: {unfinished} of {result['cells']} cells are still to do"] if unfinished else []),
        f"{result['data']}: {result['train_images']} training images, accuracy on {result['test_images']} test images; "
        f"{percent(spread([result['accuracy_start']]))} before any training here",
        "",
        *aligned([header, *table]),
        "",
        *(
            f"{gap['first']} - {gap['other']} at {gap['keep']:g}: {percent(gap['difference'])} points"
            for gap in result["differences"]
        ),
    ]
    return "\n".join(lines) + "\n"


def percent(found: dict[str, Any] | None) -> str:
    """A `spread` in per cent."""
    if found is None:
        return "-"
    deviation = "" if found["std"] is None else f" ± {100 * found['std']:.2f}"
    return f"{100 * found['mean']:.2f}{deviation}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text side by side, the first one to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
