"""The whole method on real images, offline, in minutes on two CPU cores.

Trains a small CIFAR-style ResNet on scikit-learn's handwritten digits; measures the Hessian trace of every channel in
float32, bfloat16 and float16 with the same probes (EHAP, arXiv 2306.07030) for the report; prunes the channel groups
that cost least to remove per multiply-accumulate (docs/removal_costs.md) and recalibrates BatchNorm; proves masked ==
shrunk; fine-tunes; trains for INT8; runs the integers, in JAX and, where onnx is installed, as ``model.onnx`` in ONNX
Runtime. "int8" in the report is the network in integers. `recipes.ehap digits` prunes by the traces, as the paper does.

    python -m recipes.quickstart                # three seeds, about five minutes
    python -m recipes.quickstart --seeds 1

Expect 99 % dense, fine-tuned and in INT8 at 45 % of the MACs, and nearly 90 % before fine-tuning
(``results/quickstart.json``). Every seed's folder holds its fine-tuned network, which ``recipes.trace`` and
``recipes.quantize`` take on; the first seed's is in the run itself.
A killed run continues with ``--resume`` and ends in the same numbers. The test split is evaluated once per stage, for
the table; no step of a run reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

from ehap_jax import Scores, count_cost, hessian_scores
from ehap_jax.data import Dataset, load_dataset
from ehap_jax.graph.structure import Coupling
from ehap_jax.report import stage_table, write_report
from ehap_jax.training import Deadline, Progress
from recipes.command import TrainingOptions, run_command
from recipes.criteria import Course, ScoreConfig, probed_trace
from recipes.int8 import train_int8
from recipes.integers import int8_onnx, integer_network, onnx_error, run_integers, write_onnx
from recipes.lab import Lab, Phase, accuracy, check_phases, train, training_batch
from recipes.network import Network, network_for, save_network
from recipes.pruned import PruneConfig, check_pruning, finetune, prune_network
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
    """Training images, not augmented, in the batch of traces and removal costs."""
    num_probes: int = 64
    macs: float = 0.45
    """Fraction of the multiply-accumulates that is kept."""
    coupling: Coupling = "group"

    def pruning(self) -> PruneConfig:
        """By removal costs per multiply-accumulate."""
        scores = ScoreConfig(examples=self.trace_examples)
        return PruneConfig(budget="macs", keep=self.macs, coupling=self.coupling, scores=scores)


class SeedResult(NamedTuple):
    """Per stage the test accuracy and the cost, and what the report draws."""

    stages: dict[str, Stage]
    scores: dict[str, Scores]
    sem: Scores
    network: Network
    checks: dict[str, float]


def run_seed(lab: Lab, config: Config, network: Network, seed: int) -> SeedResult:
    """The method, from initialisation to INT8, for one seed."""
    initial = network.architecture.initialise(seed)
    dense = network._replace(variables=train(lab, "dense", seed, network.train_apply, initial, config.dense))

    graph = dense.graph()
    batch = training_batch(lab.dataset, config.trace_examples)
    settings = {p: ScoreConfig(probes=config.num_probes, compute=p, microbatch=None) for p in POLICIES}
    traces = {p: probed_trace(lab, seed, dense.apply, dense.variables, batch, settings[p]) for p in POLICIES}
    scores = {policy: hessian_scores(graph, dense.variables, trace) for policy, trace in traces.items()}
    pruned = prune_network(lab, seed, dense, graph, config.pruning())
    tuned = finetune(lab, seed, pruned.network, config.finetune, dense)
    save_network(lab.run, tuned, f"seed{seed}")
    int8 = train_int8(lab, seed, tuned.apply, tuned.variables, config.int8)
    integers = integer_network(lab, int8)
    checks = {"masked_minus_shrunk": pruned.masked_error}
    if find_spec("onnx") and find_spec("onnxruntime"):
        model = int8_onnx(lab, seed, tuned, int8)
        write_onnx(lab, model, f"seed{seed}/model.onnx")
        checks["onnx_minus_integers"] = onnx_error(lab, model, integers)

    full, small = count_cost(graph), count_cost(graph, pruned.plan)
    return SeedResult(
        stages={
            "dense": Stage(accuracy(lab, dense.apply, dense.variables), full),
            "pruned": Stage(accuracy(lab, tuned.apply, pruned.network.variables), small),
            "finetuned": Stage(accuracy(lab, tuned.apply, tuned.variables), small),
            "int8": Stage(accuracy(lab, run_integers, integers), small._replace(bytes=int8.bytes)),
        },
        scores=scores,
        sem=hessian_scores(graph, dense.variables, traces["float32"].sem),
        network=tuned,
        checks=checks,
    )


def write_results(lab: Lab, results: Sequence[SeedResult]) -> None:
    """Network, scores, summary and report of the run; the first seed's stand for the others in the plots."""
    run, first = lab.run, results[0]
    save_network(run, first.network)
    write_scores(run, first.scores, first.sem, Course(lab, 0, "trace_float32").convergence())
    checks = {name: max(result.checks[name] for result in results) for name in first.checks}
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
    if not 0 < config.macs <= 1:
        raise ValueError(f"--macs is a fraction in (0, 1], got {config.macs}")
    phases = {"--dense": config.dense, "--finetune": config.finetune, "--int8": config.int8}
    check_phases(dataset, phases, taught=("--finetune",))


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    dataset = load_dataset(config.data)
    check_config(config, dataset)
    network = network_for(dataset, config.model, shortcut=config.shortcut, widths=config.widths)
    check_pruning(dataset, network.graph(), config.pruning())
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        results = [run_seed(lab, config, network, seed) for seed in range(config.seeds)]
        write_results(lab, results)
        progress.console.print(stage_table(run.read_json("summary.json")))
        progress.note(f"report: {run.path / 'report.html'}")
        images = len(dataset.x_train)
        progress.note(f"next: python -m recipes.quantize short {run.path} --data {config.data} --train-images {images}")


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, {"default": ("", Config())}, arguments, name="quickstart")


if __name__ == "__main__":
    sys.exit(command())
