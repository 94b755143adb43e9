"""EHAP from beginning to end: train, trace in half precision, prune, fine-tune, train in INT8, run the integers.

EHAP (arXiv 2306.07030): 300 epochs of training, 300 probes on 512 images in float16, about 10 % of the parameters
kept, 300 epochs of fine-tuning, 30 epochs of INT8 training.

    python -m recipes.ehap resnet32 --max-minutes 25                   # CIFAR-10 through TFDS, a GPU; then --resume
    python -m recipes.ehap resnet56 --dense runs/pretrain
    python -m recipes.ehap digits                                      # minutes on two CPU cores

Nothing has been measured with the paper's settings yet: they need a GPU and CIFAR-10. On the digits,
``results/quickstart.json`` has 99 % dense, fine-tuned and in INT8, at 45 % of the MACs and in other settings.

Writes one report over all seeds; "int8" in it is the network in integers. Every seed's folder holds its plan and its
fine-tuned network, which ``recipes.quantize`` takes on, and, where PyTorch and safetensors are installed, ``model/``
for others: the weights as INT8 training left them, in float and under PyTorch's names, plan, model card, and, where
onnx is installed, the integers as ``model.onnx``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from ehap_jax.data import limit_training, load_dataset
from ehap_jax.graph import count_cost
from ehap_jax.report import stage_table, write_report
from ehap_jax.training import Deadline, Progress
from recipes.command import TrainingOptions, run_command
from recipes.criteria import ScoreConfig
from recipes.int8 import Int8Network, train_int8
from recipes.integers import int8_onnx, integer_network, run_integers
from recipes.lab import Lab, Phase, accuracy, check_phases, train
from recipes.model_directory import write_model_directory
from recipes.network import Network, load_data, load_network, network_for, save_network, save_plan
from recipes.pruned import PruneConfig, Pruned, check_pruning, finetune, paper_pruning, prune_network
from recipes.summary import Stage, summarise, write_scores


@dataclass(frozen=True)
class Config:
    """The whole of EHAP."""

    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    dense: Path | None = None
    """Start from this checkpoint or run directory, for all seeds; None trains one per seed."""
    model: str = "resnet32"
    shortcut: str | None = "B"
    widths: tuple[int, ...] | None = None
    """Channels of the stages of a ResNet; None for the model's own."""
    seeds: int = 3
    """How many seeds, starting from 0."""
    pretrain: Phase = field(default_factory=lambda: Phase(epochs=300, learning_rate=0.05, weight_decay=1e-3))
    prune: PruneConfig = field(default_factory=paper_pruning)
    finetune: Phase = field(default_factory=lambda: Phase(epochs=300, learning_rate=0.0512, weight_decay=5e-4))
    int8: Phase = field(default_factory=lambda: Phase(epochs=30, learning_rate=1e-4, weight_decay=5e-4))


def paper(model: str, channels: float) -> Config:
    """The paper's settings: its network, its fraction of the channels, float16 probes."""
    scores = ScoreConfig(estimator="probes", compute="float16")
    return Config(model=model, prune=paper_pruning(budget="channels", keep=channels, scores=scores))


VARIANTS = {
    "resnet32": ("the paper's thin ResNet-32 on CIFAR-10", paper("resnet32", 0.230)),
    "resnet56": ("the paper's thin ResNet-56 on CIFAR-10", paper("resnet56", 0.191)),
    "wrn28-8": ("the paper's post-activation WRN-28-8 on CIFAR-10", paper("ehap-wrn28-8", 0.240)),
    "digits": (
        "a small ResNet-8 on handwritten digits, in minutes",
        Config(
            data="digits",
            model="resnet8",
            widths=(16, 32, 64),
            pretrain=Phase(epochs=30, learning_rate=0.1, batch_size=64, warmup=1),
            prune=paper_pruning(keep=0.25, scores=ScoreConfig(256, estimator="probes", probes=64, compute="float16")),
            finetune=Phase(epochs=40, learning_rate=0.1, batch_size=64, warmup=1),
            int8=Phase(epochs=8, learning_rate=0.01, batch_size=64, warmup=1),
        ),
    ),
}


class SeedResult(NamedTuple):
    """Per stage the test accuracy and the cost, and the pruned network."""

    stages: dict[str, Stage]
    pruned: Pruned


def run_seed(lab: Lab, config: Config, network: Network, seed: int) -> SeedResult:
    """The method for one seed."""
    dense = network
    if config.dense is None:
        initial = network.architecture.initialise(seed)
        dense = network._replace(variables=train(lab, "dense", seed, network.train_apply, initial, config.pretrain))
    graph = dense.graph()
    pruned = prune_network(lab, seed, dense, graph, config.prune)
    tuned = finetune(lab, seed, pruned.network, config.finetune, dense)
    save_network(lab.run, tuned, f"seed{seed}")
    int8 = train_int8(lab, seed, tuned.apply, tuned.variables, config.int8)

    small = count_cost(graph, pruned.plan)
    stages = {
        "dense": Stage(accuracy(lab, dense.apply, dense.variables), count_cost(graph)),
        "pruned": Stage(accuracy(lab, tuned.apply, pruned.network.variables), small),
        "finetuned": Stage(accuracy(lab, tuned.apply, tuned.variables), small),
        "int8": Stage(accuracy(lab, run_integers, integer_network(lab, int8)), small._replace(bytes=int8.bytes)),
    }
    write_int8(lab, seed, tuned, int8, stages["int8"])
    return SeedResult(stages, pruned)


def write_int8(lab: Lab, seed: int, tuned: Network, int8: Int8Network, integers: Stage) -> None:
    """`model/` of a seed: the weights that INT8 training left, in float, and where onnx is installed the integers."""
    trained = tuned._replace(variables=int8.variables["variables"])
    in_float = Stage(accuracy(lab, trained.apply, trained.variables), count_cost(trained.graph()))
    onnx = int8_onnx(lab, seed, trained, int8) if find_spec("onnx") else None
    stages = {"int8_float": in_float, "int8": integers}
    write_model_directory(lab, seed, trained, stages, f"seed{seed}", onnx=onnx)


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    if config.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {config.seeds}")
    if config.dense is None:
        dataset = limit_training(load_dataset(config.data), config.train_images)
        check_phases(dataset, {"--pretrain": config.pretrain})
        network = network_for(dataset, config.model, shortcut=config.shortcut, widths=config.widths)
    else:
        network = load_network(config.dense)
        dataset = load_data(network, config.data, config.train_images)
    check_phases(dataset, {"--finetune": config.finetune, "--int8": config.int8}, taught=("--finetune",))
    check_pruning(dataset, network.graph(), config.prune)
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        results = [run_seed(lab, config, network, seed) for seed in range(config.seeds)]

        first = results[0].pruned
        save_plan(first.plan, run.file("plan.json"))
        write_scores(run, {config.prune.scores.compute: first.scores})
        checks = {"masked_minus_shrunk": max(result.pruned.masked_error for result in results)}
        seconds = {"total": run.seconds()}
        summary = summarise([result.stages for result in results], seconds=seconds, checks=checks)
        run.write_json("summary.json", summary)
        write_report(run.path)
        progress.console.print(stage_table(summary))
        progress.note(f"report: {run.path / 'report.html'}")


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="ehap")


if __name__ == "__main__":
    sys.exit(command())
