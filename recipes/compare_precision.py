"""Does a half-precision trace prune as well as a single-precision one, and what does it save?

EHAP's claim (arXiv 2306.07030, abstract): FP16 traces are 17 % to 44 % faster than FP32 on its GPUs, take about 40 %
less memory, and the pruned networks show no noticeable difference in accuracy. Here every precision traces the same
dense network with the same probes, prunes it to the same fraction and is fine-tuned alike, over several seeds;
differences are paired by seed.

    python -m recipes.compare_precision paper runs/pretrain                      # CIFAR-10 through TFDS, a GPU
    python -m recipes.compare_precision short resnet20.th --data npz:cifar10.npz # two CPU cores, hours

Expect the rank correlation with float32 above 0.99 and no difference in accuracy beyond its standard error. On a CPU
half precision is slower, not faster. Writes ``precision.json``, ``precision.txt`` and ``report.html``; every finished
seed and precision is kept in ``cells/``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import tyro

from ehap_jax.graph import Cost, Graph, count_cost
from ehap_jax.pruning import PruningPlan, hessian_scores
from ehap_jax.report import write_report
from ehap_jax.training import Deadline, Progress
from recipes.cells import aligned, percent, spread
from recipes.command import TrainingOptions, run_command
from recipes.criteria import Compute, Course, ScoreConfig, probe_memory, probed_trace
from recipes.lab import Lab, Phase, accuracy, check_phases, training_batch
from recipes.network import Network, load_data, load_network, save_plan
from recipes.pruned import TargetConfig, check_target, finetune, plan_of, shrink_network
from recipes.ranking import kept_overlap, spearman
from recipes.summary import Stage, probe_costs, summarise, write_scores


@dataclass(frozen=True)
class Config:
    """Compare precisions of the Hessian trace."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of recipes.pretrain."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    computes: tuple[Compute, ...] = ("float32", "float16")
    """Precisions; the first one is what the others are compared with."""
    seeds: int = 3
    """How many, starting from 0; a seed chooses the Hessian batch, the probes and the order of training."""
    prune: TargetConfig = field(default_factory=lambda: TargetConfig(keep=0.1))
    """`estimator` and `compute` in its scores do not matter here."""
    finetune: Phase = field(default_factory=lambda: Phase(epochs=300, learning_rate=0.0512, weight_decay=5e-4))


VARIANTS = {
    "short": (
        "minutes on a CPU: 30 probes on 64 images, two short epochs on a part of the training images",
        Config(
            train_images=10_000,
            prune=TargetConfig(keep=0.5, scores=ScoreConfig(examples=64, probes=30)),
            finetune=Phase(epochs=2, learning_rate=0.05, warmup=0.2),
        ),
    ),
    "paper": ("300 probes on 512 images, 10 % of the parameters, 300 epochs of fine-tuning", Config()),
}


def run_pair(lab: Lab, network: Network, graph: Graph, seed: int, compute: Compute, config: Config) -> dict[str, Any]:
    """Trace in one precision, prune, fine-tune. The test split is used once."""
    settings = replace(config.prune.scores, compute=compute)
    batch = training_batch(lab.dataset, settings.examples, seed)
    trace = probed_trace(lab, seed, network.apply, network.variables, batch, settings)
    course = Course(lab, seed, f"trace_{compute}")
    scores = hessian_scores(graph, network.variables, trace)
    plan = plan_of(graph, scores, config.prune)
    save_plan(plan, lab.run.file(f"seed{seed}/plan_{compute}.json"))
    pruned = shrink_network(lab, network, scores, plan)
    tuned = finetune(lab, seed, pruned.network, config.finetune, network, stage=f"finetuned_{compute}")
    first: Compute = config.computes[0]
    reference = probed_trace(lab, seed, network.apply, network.variables, batch, replace(settings, compute=first))
    reference_scores = hessian_scores(graph, network.variables, reference)
    memory = probe_memory(network.apply, network.variables, batch, settings)
    reference_plan = PruningPlan.load(lab.run.file(f"seed{seed}/plan_{first}.json"))
    return {
        "seed": seed,
        "compute": compute,
        "seconds_per_probe": course.seconds_per_probe,
        "load_average": course.load_average,
        "machine_shared": course.machine_shared,
        "probe_bytes": memory.needs[memory.product],
        "product": memory.product,
        "trace_total": trace.total(),
        "trace_sem": trace.total_sem(),
        "rank_correlation": spearman(scores, reference_scores),
        "kept_overlap": kept_overlap(plan, reference_plan),
        "accuracy": accuracy(lab, tuned.apply, tuned.variables),
        **count_cost(graph, plan)._asdict(),
    }


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    if config.seeds < 1 or not config.computes or len(set(config.computes)) < len(config.computes):
        raise ValueError("--seeds must be at least 1, and --computes different precisions, at least one")
    network = load_network(config.dense)
    dataset = load_data(network, config.data, config.train_images)
    check_phases(dataset, {"--finetune": config.finetune}, taught=("--finetune",))
    graph = network.graph()
    check_target(dataset, graph, config.prune, "--prune", "hessian")
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        pairs: list[tuple[int, Compute]] = [
            (seed, compute) for seed in range(config.seeds) for compute in config.computes
        ]
        for number, (seed, compute) in enumerate(pairs):
            file = f"cells/{compute}-seed{seed}.json"
            if not run.file(file).exists():
                run.write_json(file, run_pair(lab, network, graph, seed, compute, config))
                if number + 1 < len(pairs):
                    deadline.check(f"{number + 1} of {len(pairs)} networks done")
        rows = [run.read_json(f"cells/{compute}-seed{seed}.json") for seed, compute in pairs]
        result = {
            "data": dataset.name,
            "train_images": len(dataset.x_train),
            "test_images": len(dataset.x_test),
            "probes": config.prune.scores.probes,
            "examples": config.prune.scores.examples,
            "machine_shared": any(row["machine_shared"] for row in rows),
            "precisions": [
                precision(rows, compute, config.computes[0])
                | {"largest_batch": largest_batch(lab, network, config, rows, compute)}
                for compute in config.computes
            ],
            "rows": rows,
        }
        run.write_json("precision.json", result)
        run.write_text("precision.txt", precision_table(result))
        write_report_of(lab, network, graph, config, rows, result["precisions"])
        progress.note((run.path / "precision.txt").read_text())


def largest_batch(
    lab: Lab, network: Network, config: Config, rows: Sequence[dict[str, Any]], compute: Compute
) -> int | None:
    """About how many images fit, in this precision, into what a probe of the first precision needs for its batch.

    By what the compiler says that this batch and twice as many images need, with so much per image in between. None
    where products are computed in different ways, which cannot be compared.
    """
    examples = config.prune.scores.examples
    first, own = (
        next(row for row in rows if (row["seed"], row["compute"]) == (0, name))
        for name in (config.computes[0], compute)
    )
    if first is own:
        return examples
    images, labels = training_batch(lab.dataset, examples, 0)
    twice = jnp.concatenate([images, images]), jnp.concatenate([labels, labels])
    double = probe_memory(network.apply, network.variables, twice, replace(config.prune.scores, compute=compute))
    if not first["product"] == own["product"] == double.product:
        return None
    per_image = (double.needs[double.product] - own["probe_bytes"]) / examples
    return int(examples + (first["probe_bytes"] - own["probe_bytes"]) / per_image)


def write_report_of(
    lab: Lab,
    network: Network,
    graph: Graph,
    config: Config,
    rows: Sequence[dict[str, Any]],
    precisions: Sequence[dict[str, Any]],
) -> None:
    """Accuracies, costs and the first seed's scores as a page."""
    batch, scores = training_batch(lab.dataset, config.prune.scores.examples, 0), {}
    for compute in config.computes:
        settings = replace(config.prune.scores, compute=compute)
        trace = probed_trace(lab, 0, network.apply, network.variables, batch, settings)
        scores[compute] = hessian_scores(graph, network.variables, trace)
    write_scores(lab.run, scores, convergence=Course(lab, 0, f"trace_{config.computes[0]}").convergence())
    seeds: list[dict[str, Stage]] = [{} for _ in range(config.seeds)]
    for row in rows:
        cost = Cost(*(row[name] for name in Cost._fields))
        seeds[row["seed"]][row["compute"]] = Stage(row["accuracy"], cost)
    means = {
        entry["compute"]: {name: entry[name] and entry[name]["mean"] for name in ("seconds_per_probe", "probe_bytes")}
        for entry in precisions
    }
    lab.run.write_json("summary.json", summarise(seeds, seconds={}, checks={}, costs=probe_costs(means)))
    write_report(lab.run.path)


def precision(rows: Sequence[dict[str, Any]], compute: str, first: str) -> dict[str, Any]:
    """One precision over seeds, and its accuracy less that of the first one, seed by seed."""
    chosen = [row for row in rows if row["compute"] == compute]
    base = {row["seed"]: row["accuracy"] for row in rows if row["compute"] == first}
    found: dict[str, Any] = {"compute": compute}
    for name in ("accuracy", "rank_correlation", "kept_overlap", "seconds_per_probe", "probe_bytes", "params"):
        found[name] = spread([row[name] for row in chosen if row[name] is not None])
    return found | {"difference": spread([row["accuracy"] - base[row["seed"]] for row in chosen])}


def precision_table(result: dict[str, Any]) -> str:
    """For people; accuracies and differences in per cent, ± standard deviation over seeds."""
    header = ("trace in", "accuracy", "less the first", "rank correlation", "kept overlap", "s/probe", "MB/probe")
    rows = []
    for entry in result["precisions"]:
        time = entry["seconds_per_probe"]
        rows.append(
            (
                entry["compute"],
                percent(entry["accuracy"]),
                percent(entry["difference"]),
                f"{entry['rank_correlation']['mean']:.4f}",
                f"{entry['kept_overlap']['mean']:.4f}",
                "-" if time is None else f"{time['mean']:.3f}",
                f"{entry['probe_bytes']['mean'] / 1e6:.0f}",
            )
        )
    head = f"{result['data']}: {result['probes']} probes on {result['examples']} images"
    return "\n".join([head, "", *aligned([header, *rows])]) + "\n"


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="compare_precision")


if __name__ == "__main__":
    sys.exit(command())
