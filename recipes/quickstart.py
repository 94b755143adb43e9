"""The whole method on real images, offline, in minutes on two CPU cores.

Trains a small CIFAR-style ResNet on scikit-learn's handwritten digits, measures the Hessian trace of every channel in
float32, bfloat16 and float16 with the same probes (EHAP, arXiv 2306.07030), prunes the least sensitive channels,
proves masked == shrunk, fine-tunes, trains with INT8 fake quantisation, and writes a report. "int8" in it is the
fake-quantised network, and its bytes are those of the integers it stands for; `recipes.ehap` and `recipes.quantize` run
the integers.

    python -m recipes.quickstart                # three seeds, 2.4 minutes
    python -m recipes.quickstart --seeds 1

Expect 99 % dense, fine-tuned and in INT8, at 45 % of the MACs, and at 12 to 14 % of the parameters, by processor
(``results/quickstart.json`` is of one).
A killed run continues with ``--resume`` and ends in the same numbers. The test split is evaluated once per stage, for
the table; no step of a run reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from ehap_jax import PruningPlan, Scores, allocate, count_cost, hessian_scores, random_scores
from ehap_jax.data import Dataset, load_dataset
from ehap_jax.graph.structure import Coupling
from ehap_jax.report import stage_table, write_report
from ehap_jax.training import Deadline, Progress
from recipes.command import TrainingOptions, run_command
from recipes.criteria import Course, ScoreConfig, probed_trace
from recipes.int8 import train_int8
from recipes.lab import Lab, Phase, accuracy, check_phases, train, training_batch
from recipes.network import Network, network_for, save_plan
from recipes.pruned import finetune, shrink_network
from recipes.summary import Stage, summarise, write_scores

POLICIES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Config:
    """Train, trace, prune, fine-tune and quantise a small ResNet on handwritten digits; writes a report."""

    data: str = "digits"
    """"digits", "npz:PATH", "folder:PATH" or "tfds:NAME"."""
    model: str = "resnet8"
    shortcut: str = "B"
    widths: tuple[int, int, int] = (16, 32, 64)
    seeds: int = 3
    """How many seeds, starting from 0."""
    dense: Phase = field(default_factory=lambda: Phase(30, learning_rate=0.1, batch_size=64, warmup=1))
    finetune: Phase = field(default_factory=lambda: Phase(40, learning_rate=0.1, batch_size=64, warmup=1))
    int8: Phase = field(default_factory=lambda: Phase(8, learning_rate=0.01, batch_size=64, warmup=1))
    trace_examples: int = 256
    """Training images in the Hessian batch, not augmented."""
    num_probes: int = 64
    macs: float = 0.45
    """Fraction of the multiply-accumulates that is kept."""
    coupling: Coupling = "group"


class SeedResult(NamedTuple):
    """Per stage the test accuracy and the cost, and what the report draws."""

    stages: dict[str, Stage]
    scores: dict[str, Scores]
    sem: Scores
    plan: PruningPlan
    masked_error: float


def run_seed(lab: Lab, config: Config, network: Network, seed: int) -> SeedResult:
    """The method, from initialisation to INT8, for one seed."""
    initial = network.architecture.initialise(seed)
    dense = network._replace(variables=train(lab, "dense", seed, network.train_apply, initial, config.dense))

    graph = dense.graph()
    batch = training_batch(lab.dataset, config.trace_examples)
    settings = {p: ScoreConfig(probes=config.num_probes, compute=p, microbatch=None) for p in POLICIES}
    traces = {p: probed_trace(lab, seed, dense.apply, dense.variables, batch, settings[p]) for p in POLICIES}
    scores = {policy: hessian_scores(graph, dense.variables, trace) for policy, trace in traces.items()}
    plan = allocate(graph, scores["float16"], macs=config.macs, coupling=config.coupling)
    pruned = shrink_network(lab, dense, scores["float16"], plan)

    tuned = finetune(lab, seed, pruned.network, config.finetune, dense)
    int8 = train_int8(lab, seed, tuned.apply, tuned.variables, config.int8)

    full, small = count_cost(graph), count_cost(graph, plan)
    return SeedResult(
        stages={
            "dense": Stage(accuracy(lab, dense.apply, dense.variables), full),
            "pruned": Stage(accuracy(lab, tuned.apply, pruned.network.variables), small),
            "finetuned": Stage(accuracy(lab, tuned.apply, tuned.variables), small),
            "int8": Stage(accuracy(lab, int8.apply, int8.variables), small._replace(bytes=int8.bytes)),
        },
        scores=scores,
        sem=hessian_scores(graph, dense.variables, traces["float32"].sem),
        plan=plan,
        masked_error=pruned.masked_error,
    )


def write_results(lab: Lab, results: Sequence[SeedResult]) -> None:
    """Plans, scores, summary and report of the run; the first seed's stand for the others in the plots."""
    run, first = lab.run, results[0]
    for seed, result in enumerate(results):
        save_plan(result.plan, run.file(f"seed{seed}/plan.json"))
    save_plan(first.plan, run.file("plan.json"))
    write_scores(run, first.scores, first.sem, Course(lab, 0, "trace_float32").convergence())
    checks = {"masked_minus_shrunk": max(result.masked_error for result in results)}
    summary = summarise([result.stages for result in results], seconds={"total": run.seconds()}, checks=checks)
    run.write_json("summary.json", summary)
    write_report(run.path)


def check_config(config: Config, dataset: Dataset) -> None:
    """Everything that can be wrong with the settings, before any work starts."""
    count = len(dataset.x_train)
    if config.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {config.seeds}")
    if not 1 <= config.trace_examples <= count:
        raise ValueError(f"--trace-examples {config.trace_examples} is not between 1 and the {count} training images")
    if config.num_probes < 2:
        raise ValueError(f"--num-probes must be at least 2, got {config.num_probes}")
    phases = {"--dense": config.dense, "--finetune": config.finetune, "--int8": config.int8}
    check_phases(dataset, phases, taught=("--finetune",))


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    dataset = load_dataset(config.data)
    check_config(config, dataset)
    network = network_for(dataset, config.model, shortcut=config.shortcut, widths=config.widths)
    # Any scores allow the same range, so a target that is out of reach shows at once.
    graph = network.graph()
    allocate(graph, random_scores(graph, key=jax.random.key(0)), macs=config.macs, coupling=config.coupling)
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        results = [run_seed(lab, config, network, seed) for seed in range(config.seeds)]
        write_results(lab, results)
        progress.console.print(stage_table(run.read_json("summary.json")))
        progress.note(f"report: {run.path / 'report.html'}")


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, {"default": ("", Config())}, arguments, name="quickstart")


if __name__ == "__main__":
    sys.exit(command())
