"""Which price of a channel group prunes best: what it costs to remove, or a trace, a magnitude, a gradient?

One dense network is pruned to the same fractions by every criterion, with and without "per unit saved", under group
coupling and without any training. Accuracy is measured right after pruning, with recalibrated BatchNorm statistics
(``recalibrate(relative_to=...)``), and for some fractions after the same short fine-tuning.

    python -m recipes.compare_removal short resnet20.th --data npz:cifar10.npz    # two CPU cores, about an hour
    python -m recipes.compare_removal full resnet20.th --data npz:cifar10.npz     # more fractions, three seeds

A seed chooses the images of the scores, the random scores and the order of training, so that criteria are compared in
pairs. Criteria were compared, and the default temperature was chosen, on the validation split; the test split is for
the table. Writes ``removal.json``, ``removal.txt`` and ``removal.png``; every finished cell is kept in ``cells/``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from ehap_jax.curvature import (
    centred_logits,
    channel_trace,
    gauss_newton_trace,
    removal_costs,
    softened_softmax,
    softmax_cross_entropy,
)
from ehap_jax.graph import Graph, count_cost
from ehap_jax.pruning import (
    PruningPlan,
    allocate,
    group_fisher_scores,
    group_magnitude_scores,
    group_taylor_scores,
    hessian_scores,
    kept_fractions,
    linear,
    magnitude_scores,
    mask_variables,
    prune_iteratively,
    random_scores,
)
from ehap_jax.report.figure_style import new_figure, save_figure
from ehap_jax.training import Deadline, Progress, all_devices
from recipes.cells import aligned, percent, spread
from recipes.command import TrainingOptions, run_command
from recipes.compare_estimators import masked
from recipes.lab import Lab, Phase, accuracy, check_phases, evaluation_loss, train, training_batch
from recipes.network import Network, load_data, load_network
from recipes.pruned import recalibrated

Unit = Literal["macs", "params"]
MEASURED = ("accuracy_pruned", "accuracy_recalibrated", "accuracy_tuned")


@dataclass(frozen=True)
class Config:
    """Compare prices of channel groups on one dense network."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of recipes.pretrain."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    examples: int = 512
    """Images of the scores, a seed's choice of the training images."""
    statistics_images: int = 1024
    """Training images from which statistics are recalibrated."""
    probes: int = 0
    """Hutchinson probes of HAP's estimated trace; 0 leaves that criterion out."""
    macs: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
    """Kept fractions of the multiply-accumulates."""
    params: tuple[float, ...] = (0.7, 0.5, 0.35)
    """Kept fractions of the parameters."""
    tune: tuple[float, ...] = (0.7, 0.5, 0.35)
    """Those of the fractions of which networks are fine-tuned, too."""
    rounds: int = 5
    """Of pruning and recalibration, for the criteria in rounds."""
    seeds: int = 3
    finetune: Phase = field(default_factory=lambda: Phase(epochs=1, learning_rate=0.01))


VARIANTS = {
    "short": (
        "an hour on two CPU cores",
        Config(examples=256, macs=(0.7, 0.5, 0.35), params=(0.5,), tune=(0.5,), seeds=2, train_images=2000),
    ),
    "full": ("all fractions, 300 probes", Config(probes=300)),
}


class Cell(NamedTuple):
    """One pruning: ``per`` the budget's unit, ``interactions`` and ``rounds`` as in the criterion's name."""

    criterion: str
    per: bool
    unit: Unit
    keep: float
    seed: int

    @property
    def file(self) -> str:
        name = self.criterion.replace(" ", "-").replace(",", "")
        return f"cells/{name}{'-per' if self.per else ''}-{self.unit}{self.keep:g}-seed{self.seed}.json"


def criteria(config: Config) -> dict[str, tuple[bool, ...]]:
    """Their names, and whether they are taken as they are, per unit saved, or both; the best last."""
    both, per = (False, True), (True,)
    return {
        "random": both,
        "taylor": both,
        "magnitude": both,
        "group magnitude": both,
        "group fisher": both,
        **({"HAP, probes": both} if config.probes else {}),
        "HAP, exact": both,
        "removal, T=1": both,
        "removal, T=4": both,
        "removal, logits": both,
        "removal, T=4, interactions": per,
        "removal, T=4, rounds": per,
        "removal, T=4, rounds and interactions": per,
    }


def cells(config: Config) -> list[Cell]:
    """Seed by seed, so that a run that is stopped early has whole seeds."""
    fractions = [("macs", keep) for keep in config.macs] + [("params", keep) for keep in config.params]
    return [
        Cell(criterion, per, unit, keep, seed)  # pyright: ignore[reportArgumentType]
        for seed, (unit, keep), (criterion, pers) in product(range(config.seeds), fractions, criteria(config).items())
        for per in pers
    ]


def check_config(config: Config) -> None:
    """Everything that can be wrong with the settings, before any work starts."""
    if config.seeds < 1 or config.rounds < 1:
        raise ValueError("--seeds and --rounds are at least 1")
    if config.probes < 0:
        raise ValueError(f"--probes is 0 or more, got {config.probes}")
    if not (config.macs or config.params) or not all(0 < keep < 1 for keep in (*config.macs, *config.params)):
        raise ValueError("--macs and --params are fractions between 0 and 1, and one of them has some")


def main(config: Config, options: TrainingOptions) -> None:
    check_config(config)
    network = load_network(config.dense)
    dataset = load_data(network, config.data, config.train_images)
    check_phases(dataset, {"--finetune": config.finetune})
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, Deadline(options.max_minutes), options.sinks(config))
        start = accuracy(lab, network.apply, network.variables)
        try:
            run_cells(lab, network, config)
        finally:
            result = summary(lab, config, start)
            run.write_json("removal.json", result)
            run.write_text("removal.txt", table(result))
            if result["statistics"]:
                save_figure(curves(result), run.file("removal.png"))
        progress.note((run.path / "removal.txt").read_text())


def run_cells(lab: Lab, network: Network, config: Config) -> None:
    """Do what is not done yet.

    Raises:
        OutOfTime: the lab's deadline has passed; finished cells are kept.
    """
    graph, scored = network.graph(), {}
    todo = [cell for cell in cells(config) if not lab.run.file(cell.file).exists()]
    with lab.progress.stage("cells", len(todo)) as advance:
        for number, cell in enumerate(todo):
            if cell.seed not in scored:
                scored = {cell.seed: dense_scores(lab, network, graph, config, cell.seed)}
            lab.run.write_json(cell.file, run_cell(lab, network, graph, config, cell, scored[cell.seed]))
            advance()
            if number + 1 < len(todo):
                lab.deadline.check(f"{number + 1} of {len(todo)} cells done")


def run_cell(
    lab: Lab, network: Network, graph: Graph, config: Config, cell: Cell, scores: Callable[[str], Any]
) -> dict[str, Any]:
    """Prune, measure, recalibrate, measure, fine-tune, measure."""
    started = time.perf_counter()
    plan = plan_of(lab, network, graph, config, cell, scores)
    pruned = mask_variables(network.variables, plan)
    again = recalibrated(lab.dataset, network, pruned, network.variables, config.statistics_images)
    again = mask_variables(again, plan)
    found: dict[str, Any] = {
        **cell._asdict(),
        **count_cost(graph, plan)._asdict(),
        "accuracy_pruned": accuracy(lab, network.apply, pruned),
        "accuracy_recalibrated": accuracy(lab, network.apply, again),
        "validation_recalibrated": accuracy(lab, network.apply, again, "val"),
        "accuracy_tuned": None,
    }
    if cell.keep in config.tune:
        variables = {**again, "mask": mask_variables(jax.tree.map(jnp.ones_like, again), plan)}
        tuned = train(lab, Path(cell.file).stem, cell.seed, masked(network.train_apply), variables, config.finetune)
        found["accuracy_tuned"] = accuracy(lab, masked(network.apply), tuned)
    return found | {"seconds": time.perf_counter() - started}


def plan_of(
    lab: Lab, network: Network, graph: Graph, config: Config, cell: Cell, scores: Callable[[str], Any]
) -> PruningPlan:
    """By the scores of the dense network, or in rounds."""
    target: dict[str, Any] = {
        "per": cell.unit if cell.per else None,
        "interactions": "interactions" in cell.criterion,
    }
    if "rounds" not in cell.criterion:
        return allocate(graph, scores(cell.criterion), **target, **{cell.unit: cell.keep})  # pyright: ignore
    batch = training_batch(lab.dataset, config.examples, cell.seed)
    plan, _ = prune_iteratively(
        graph,
        network.variables,
        kept_fractions(cell.keep, config.rounds, schedule=linear),
        score=lambda variables: removal_costs(network.apply, variables, batch, head=softened_softmax(4.0)),
        recalibrate=lambda masked: recalibrated(
            lab.dataset, network, masked, network.variables, config.statistics_images
        ),
        budget=cell.unit,
        **target,
    )
    return plan


def dense_scores(lab: Lab, network: Network, graph: Graph, config: Config, seed: int) -> Callable:
    """``scores(criterion)`` of one seed, each computed when first asked for."""
    variables, batch = network.variables, training_batch(lab.dataset, config.examples, seed)
    costs = lru_cache(lambda head: removal_costs(network.apply, variables, batch, head=head))

    def hap_by_probes():
        with lab.progress.counted(f"seed {seed}: probes", config.probes) as report:
            estimate = channel_trace(
                evaluation_loss(network.apply),
                variables,
                batch,
                key=jax.random.key(2000 + seed),
                num_probes=config.probes,
                microbatch=128,
                mesh=all_devices("probe"),
                save_to=lab.run.file(f"traces/seed{seed}.npz"),
                progress=report,
            )
        return hessian_scores(graph, variables, estimate)

    made: Mapping[str, Callable[[], Any]] = {
        "random": lambda: random_scores(graph, key=jax.random.key(3000 + seed)),
        "magnitude": lambda: magnitude_scores(graph, variables),
        "group magnitude": lambda: group_magnitude_scores(graph, variables),
        "taylor": lambda: group_taylor_scores(costs(softmax_cross_entropy)),
        "group fisher": lambda: group_fisher_scores(costs(softmax_cross_entropy)),
        "HAP, probes": hap_by_probes,
        "HAP, exact": lambda: hessian_scores(
            graph, variables, gauss_newton_trace(network.apply, variables, batch, mesh=all_devices("data"))
        ),
        "removal, T=1": lambda: costs(softmax_cross_entropy),
        "removal, T=4": lambda: costs(softened_softmax(4.0)),
        "removal, logits": lambda: costs(centred_logits),
        "removal, T=4, interactions": lambda: costs(softened_softmax(4.0)),
    }
    return lru_cache(lambda criterion: made[criterion]())


def summary(lab: Lab, config: Config, start: float) -> dict[str, Any]:
    """What the finished cells say."""
    wanted = cells(config)
    rows = [lab.run.read_json(cell.file) for cell in wanted if lab.run.file(cell.file).exists()]
    statistics = []
    for unit, keep, criterion, per in dict.fromkeys(
        (row["unit"], row["keep"], row["criterion"], row["per"]) for row in rows
    ):
        chosen = [
            row
            for row in rows
            if (row["unit"], row["keep"], row["criterion"], row["per"]) == (unit, keep, criterion, per)
        ]
        measured = {
            n: spread([r[n] for r in chosen if r[n] is not None]) for n in (*MEASURED, "validation_recalibrated")
        }
        statistics.append({"criterion": criterion, "per": per, "unit": unit, "keep": keep, **measured})
    return {
        "data": lab.dataset.name,
        "train_images": len(lab.dataset.x_train),
        "test_images": len(lab.dataset.x_test),
        "accuracy_start": start,
        "cells_done": len(rows),
        "cells": len(wanted),
        "statistics": statistics,
        "seconds": sum(row["seconds"] for row in rows),
    }


def table(result: dict[str, Any]) -> str:
    """The statistics for people, by budget; ± is the standard deviation over seeds."""
    unfinished = result["cells"] - result["cells_done"]
    lines = [
        *([f"UNFINISHED: {unfinished} of {result['cells']} cells are still to do"] if unfinished else []),
        f"{result['data']}: accuracy in per cent on {result['test_images']} test images; "
        f"{100 * result['accuracy_start']:.2f} before pruning",
    ]
    header = ("criterion", "right after", "recalibrated", "fine-tuned")
    for unit, keep in dict.fromkeys((e["unit"], e["keep"]) for e in result["statistics"]):
        entries = [e for e in result["statistics"] if (e["unit"], e["keep"]) == (unit, keep)]
        rows = [(label(e["criterion"], e["per"]), *(percent(e[name]) for name in MEASURED)) for e in entries]
        lines += ["", f"{keep:.0%} of the {unit}", *aligned([header, *rows])]
    return "\n".join(lines) + "\n"


def label(criterion: str, per: bool) -> str:
    return f"{criterion}, per unit" if per else criterion


def curves(result: dict[str, Any]):
    """Recalibrated accuracy against the kept fraction of each budget, every criterion in its better form."""
    figure = new_figure(11, 5)
    units = list(dict.fromkeys(entry["unit"] for entry in result["statistics"]))
    names = list(dict.fromkeys(entry["criterion"] for entry in result["statistics"]))
    for axes, unit in zip(figure.subplots(1, len(units), squeeze=False)[0], units, strict=True):
        for number, name in enumerate(names):
            best: dict[float, float] = {}
            for entry in result["statistics"]:
                if (entry["unit"], entry["criterion"]) == (unit, name):
                    found = 100 * entry["accuracy_recalibrated"]["mean"]
                    best[entry["keep"]] = max(found, best.get(entry["keep"], 0.0))
            style = "o-" if name.startswith("removal") else "s--"
            axes.plot(list(best), list(best.values()), style, color=f"C{number % 10}", label=name)
        axes.axhline(100 * result["accuracy_start"], color="grey", linewidth=0.8)
        axes.set(xlabel=f"kept fraction of the {unit}", ylabel="test accuracy, %, recalibrated")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="compare_removal")


if __name__ == "__main__":
    sys.exit(command())
