"""Does the noise of Hutchinson's probes matter for pruning, or does fine-tuning forgive it?

EHAP (arXiv 2306.07030) and HAP (arXiv 2101.08940) rank channels by a few hundred probes (EHAP's released
half-precision code by one, in effect). Here one dense network is pruned to the same fractions by 1, 10, ... probes, by
the root mean square of a few probes' products (`TraceEstimate.probe_rms`), by the exact trace, by magnitude and by
chance, and then fine-tuned alike. Besides accuracies it reports by how much the loss on the images of the trace rises,
and what the second-order expansion predicts: half the sum of the exact scores of what was pruned.

    python -m recipes.compare_estimators short resnet20.th --data npz:cifar10.npz     # two CPU cores, about an hour
    python -m recipes.compare_estimators full resnet20.th --data tfds:cifar10         # a GPU

Seeds choose the probes, the random scores and the order of training; the images of the trace are the same for all.
Expect large differences before fine-tuning and small ones after. Writes ``estimators.json``, ``estimators.txt`` and
``estimators.png``; every finished cell is kept in ``cells/``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ehap_jax.curvature import channel_trace, gauss_newton_trace
from ehap_jax.graph import Graph, count_cost
from ehap_jax.pruning import (
    PruningPlan,
    Scores,
    allocate,
    hessian_scores,
    magnitude_scores,
    mask_variables,
    random_scores,
)
from ehap_jax.report.figure_style import new_figure, save_figure
from ehap_jax.training import Deadline, Progress, all_devices
from recipes.cells import aligned, percent, spread
from recipes.command import TrainingOptions, run_command
from recipes.lab import Lab, Phase, accuracy, check_phases, evaluation_loss, train, training_batch
from recipes.network import Network, load_data, load_network

MEASURED = ("accuracy_pruned", "accuracy", "loss_increase", "predicted_increase")


@dataclass(frozen=True)
class Config:
    """Compare estimators of the same second-order scores."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of recipes.pretrain."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    probes: tuple[int, ...] = (1, 10, 300)
    """Numbers of Hutchinson probes; a seed's smaller numbers are the first of its largest."""
    rms_probes: tuple[int, ...] = (10,)
    """Numbers of probes for the ranking by their root mean square."""
    examples: int = 512
    """Images of the traces."""
    microbatch: int | None = 16
    """Images that are differentiated at a time."""
    keeps: tuple[float, ...] = (0.5, 0.3, 0.1)
    """Kept fractions of the parameters."""
    seeds: int = 5
    finetune: Phase = field(default_factory=lambda: Phase(epochs=1, learning_rate=0.01))


VARIANTS = {
    "short": ("an hour on two CPU cores: fewer probes and images", Config(probes=(1, 10, 100), examples=128)),
    "full": ("the numbers of the paper: 300 probes, 512 images, longer fine-tuning", Config(finetune=Phase(20, 0.02))),
}


def main(config: Config, options: TrainingOptions) -> None:
    if min((*config.probes, *config.rms_probes), default=0) < 1 or config.seeds < 1:
        raise ValueError("--probes, --rms-probes and --seeds are at least 1")
    if not config.keeps or not all(0 < keep < 1 for keep in config.keeps):
        raise ValueError(f"--keeps are fractions between 0 and 1, got {config.keeps}")
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
            run.write_json("estimators.json", result)
            run.write_text("estimators.txt", table(result))
            if result["statistics"]:
                save_figure(curves(result["statistics"]), run.file("estimators.png"))
        progress.note((run.path / "estimators.txt").read_text())


def estimators(config: Config) -> list[str]:
    """Their names, the best last but for those that see no curvature."""
    probes = [f"{count} probe{'s' if count > 1 else ''}" for count in config.probes]
    return ["random", "magnitude", *probes, *(f"rms of {count}" for count in config.rms_probes), "exact"]


def cells(config: Config) -> list[tuple[str, float, int]]:
    """Estimator, kept fraction and seed; seed by seed, so that a run that is stopped early has whole seeds."""
    return [(e, keep, seed) for seed, keep, e in product(range(config.seeds), config.keeps, estimators(config))]


def file_of(estimator: str, keep: float, seed: int) -> str:
    return f"cells/{estimator.replace(' ', '-')}-{keep:g}-seed{seed}.json"


def run_cells(lab: Lab, network: Network, config: Config) -> None:
    """Do what is not done yet.

    Raises:
        OutOfTime: the lab's deadline has passed; finished cells are kept.
    """
    graph, batch = network.graph(), training_batch(lab.dataset, config.examples)
    trace = gauss_newton_trace(network.apply, network.variables, batch, mesh=all_devices("data"))
    exact = hessian_scores(graph, network.variables, trace)
    scored: dict[int, Mapping[str, Scores]] = {}
    todo = [cell for cell in cells(config) if not lab.run.file(file_of(*cell)).exists()]
    for number, (estimator, keep, seed) in enumerate(todo):
        if seed not in scored:
            scored[seed] = seed_scores(lab, network, graph, batch, config, seed) | {"exact": exact}
        lab.run.write_json(
            file_of(estimator, keep, seed),
            {
                "estimator": estimator,
                "keep": keep,
                "seed": seed,
                **run_cell(lab, network, graph, batch, scored[seed][estimator], exact, config, keep, seed, estimator),
            },
        )
        if number + 1 < len(todo):
            lab.deadline.check(f"{number + 1} of {len(todo)} cells done")


def seed_scores(lab: Lab, network: Network, graph: Graph, batch, config: Config, seed: int) -> dict[str, Scores]:
    """The scores of one seed by the name of their estimator; its traces are kept in the run.

    Raises:
        OutOfTime: the lab's deadline has passed among probes, which are kept.
    """
    variables = network.variables
    found = {
        "random": random_scores(graph, key=jax.random.key(3000 + seed)),
        "magnitude": magnitude_scores(graph, variables),
    }
    for count in sorted({*config.probes, *config.rms_probes}):
        with lab.progress.counted(f"seed {seed}: {count} probes", count) as report:
            # Every number starts anew, for a file of its own: the first probes are the same, and few.
            estimate = channel_trace(
                evaluation_loss(network.apply),
                variables,
                batch,
                key=jax.random.key(2000 + seed),
                num_probes=count,
                microbatch=config.microbatch,
                mesh=all_devices("probe"),
                until=lambda _: lab.deadline.passed,
                save_to=lab.run.file(f"traces/seed{seed}-{count}.npz"),
                progress=report,
            )
        if estimate.count < count:
            lab.deadline.check(f"{estimate.count} of {count} probes of seed {seed} done")
        if count in config.probes:
            found[f"{count} probe{'s' if count > 1 else ''}"] = hessian_scores(graph, variables, estimate)
        if count in config.rms_probes:
            found[f"rms of {count}"] = hessian_scores(graph, variables, estimate.probe_rms())
    return found


def run_cell(
    lab: Lab,
    network: Network,
    graph: Graph,
    batch,
    scores: Scores,
    exact: Scores,
    config: Config,
    keep: float,
    seed: int,
    estimator: str,
) -> dict[str, Any]:
    """Prune by ``scores``, measure, fine-tune, measure."""
    started = time.perf_counter()
    plan = allocate(graph, scores, params=keep, coupling="union")
    loss = jax.jit(evaluation_loss(network.apply))
    rise = float(loss(mask_variables(network.variables, plan), batch)) - float(loss(network.variables, batch))
    variables = {**network.variables, "mask": mask_variables(jax.tree.map(jnp.ones_like, network.variables), plan)}
    apply = masked(network.apply)
    pruned = accuracy(lab, apply, variables)
    stage = f"{estimator}-{keep:g}".replace(" ", "-")
    tuned = train(lab, stage, seed, masked(network.train_apply), variables, config.finetune)
    return {
        **count_cost(graph, plan)._asdict(),
        "accuracy_pruned": pruned,
        "loss_increase": rise,
        "predicted_increase": predicted_increase(exact, plan),
        "accuracy": accuracy(lab, apply, tuned),
        "seconds": time.perf_counter() - started,
    }


@lru_cache(maxsize=8)
def masked(apply: Callable) -> Callable:
    """``apply`` on its variables times what the collection ``"mask"`` holds.

    It computes what the shrunk network does, in training, too, and is compiled once for all plans.
    """

    def run(variables, x):
        kept = jax.tree.map(jnp.multiply, {name: variables[name] for name in variables["mask"]}, variables["mask"])
        return apply(kept, x)

    return run


def predicted_increase(exact: Scores, plan: PruningPlan) -> float:
    """Half the sum of the exact scores of the channels that go: HAP's estimate of the rise of the loss (eq. 8)."""
    gone = 0.0
    for path, values in exact.values.items():
        kept = np.asarray(plan.keep.get(path, np.arange(values.size)))
        gone += values.sum() - values[kept].sum()
    return 0.5 * float(gone)


def summary(lab: Lab, config: Config, start: float) -> dict[str, Any]:
    """What the finished cells say."""
    wanted = cells(config)
    rows = [lab.run.read_json(file_of(*cell)) for cell in wanted if lab.run.file(file_of(*cell)).exists()]
    statistics = []
    for keep, estimator in product(config.keeps, estimators(config)):
        chosen = [row for row in rows if (row["estimator"], row["keep"]) == (estimator, keep)]
        if chosen:
            measured = {name: spread([row[name] for row in chosen]) for name in MEASURED}
            params = float(np.mean([row["params"] for row in chosen]))
            statistics.append({"estimator": estimator, "keep": keep, "params": params, **measured})
    return {
        "data": lab.dataset.name,
        "train_images": len(lab.dataset.x_train),
        "test_images": len(lab.dataset.x_test),
        "accuracy_start": start,
        "cells_done": len(rows),
        "cells": len(wanted),
        "statistics": statistics,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The statistics for people; ± is the standard deviation over seeds."""
    header = ("estimator", "keep", "loss rises by", "½ S predicts", "pruned, %", "fine-tuned, %")
    rows = [
        (
            entry["estimator"],
            f"{entry['keep']:g}",
            plain(entry["loss_increase"]),
            plain(entry["predicted_increase"]),
            percent(entry["accuracy_pruned"]),
            percent(entry["accuracy"]),
        )
        for entry in result["statistics"]
    ]
    unfinished = result["cells"] - result["cells_done"]
    lines = [
        *([f"UNFINISHED: {unfinished} of {result['cells']} cells are still to do"] if unfinished else []),
        f"{result['data']}: {result['train_images']} training images, accuracy on {result['test_images']} test images; "
        f"{percent(spread([result['accuracy_start']]))} before any training here",
        "",
        *aligned([header, *rows]),
    ]
    return "\n".join(lines) + "\n"


def plain(found: dict[str, Any]) -> str:
    """A `spread` as it is."""
    deviation = "" if found["std"] is None else f" ± {found['std']:.2g}"
    return f"{found['mean']:.3g}{deviation}"


def curves(statistics: Sequence[dict[str, Any]]):
    """Accuracy right after pruning and after fine-tuning against the kept fraction, one curve per estimator."""
    figure = new_figure(11, 4.5)
    titles = {"accuracy_pruned": "right after pruning", "accuracy": "after fine-tuning"}
    names = list(dict.fromkeys(entry["estimator"] for entry in statistics))
    for axes, (measure, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for number, name in enumerate(names):
            entries = [entry for entry in statistics if entry["estimator"] == name]
            axes.errorbar(
                # A little to the side, so that bars at the same fraction can be told apart.
                [entry["keep"] * (1 + 0.02 * (number - len(names) / 2)) for entry in entries],
                [100 * entry[measure]["mean"] for entry in entries],
                yerr=[100 * (entry[measure]["std"] or 0.0) for entry in entries],
                fmt="o-",
                color=f"C{number}",
                capsize=3,
                label=name,
            )
        axes.set(xscale="log", xlabel="kept fraction of the parameters", ylabel="test accuracy, %", title=title)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    return figure


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="compare_estimators")


if __name__ == "__main__":
    sys.exit(command())
