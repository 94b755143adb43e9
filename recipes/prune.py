"""Prune a dense network by any criterion, at once or step by step, and fine-tune what is left.

By default the channel groups go that cost least to remove per unit of the budget, and BatchNorm's statistics are
estimated again (docs/removal_costs.md). The variants named after networks prune as EHAP does (arXiv 2306.07030):
Hessian scores, union coupling, a fraction of the channels that keeps about 10 % of the parameters, then 300 epochs with
learning rate 0.0512 and weight decay 5e-4.

    python -m recipes.prune short resnet20.th --data npz:cifar10.npz --prune.budget macs --prune.keep 0.5
    python -m recipes.prune short runs/pretrain --data digits --prune.criterion magnitude --prune.steps 4
    python -m recipes.prune resnet32 runs/pretrain                               # CIFAR-10 through TFDS, a GPU

Expect the budget to be met within one channel group, and the shrunk network to equal the masked one to 1e-5 of its
largest logit. Nothing has been measured with the paper's settings yet. Writes ``plan.json``, ``network.json`` and
``network.npz`` (``recipes.quantize`` goes on from here), ``scores.npz``, ``summary.json``, ``metrics.jsonl``,
``report.html`` and, where PyTorch and safetensors are installed, ``model/``, the network for others: weights under
PyTorch's names, plan, model card.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ehap_jax.graph import count_cost
from ehap_jax.report import stage_table, write_report
from ehap_jax.training import Deadline, Progress
from recipes.command import TrainingOptions, run_command
from recipes.criteria import ScoreConfig
from recipes.lab import Lab, Phase, accuracy, check_phases
from recipes.model_directory import write_model_directory
from recipes.network import load_data, load_network, save_network
from recipes.pruned import PruneConfig, check_pruning, finetune, paper_pruning, prune_network
from recipes.summary import Stage, negative, summarise, write_scores


@dataclass(frozen=True)
class Config:
    """Prune and fine-tune."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of recipes.pretrain."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    seed: int = 0
    prune: PruneConfig = field(default_factory=PruneConfig)
    finetune: Phase = field(default_factory=lambda: Phase(epochs=300, learning_rate=0.0512, weight_decay=5e-4))


def paper(channels: float) -> Config:
    """The paper's settings with its kept fraction of the channels: traces by 300 probes."""
    return Config(prune=paper_pruning(budget="channels", keep=channels, scores=ScoreConfig(estimator="probes")))


VARIANTS = {
    "short": (
        "minutes: half of the parameters, two epochs",
        Config(train_images=10_000, finetune=Phase(epochs=2, learning_rate=0.05, warmup=0.2)),
    ),
    "resnet32": ("the paper's ResNet-32 on CIFAR-10: 77.0 % of the channels go", paper(0.230)),
    "resnet56": ("the paper's ResNet-56 on CIFAR-10: 80.9 % of the channels go", paper(0.191)),
    "wrn28-8": ("the paper's WRN-28-8 on CIFAR-10: 76.0 % of the channels go", paper(0.240)),
}


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    dense = load_network(config.dense)
    dataset = load_data(dense, config.data, config.train_images)
    check_phases(dataset, {"--finetune": config.finetune}, taught=("--finetune",))
    graph = dense.graph()
    check_pruning(dataset, graph, config.prune)
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        pruned = prune_network(lab, config.seed, dense, graph, config.prune)
        tuned = finetune(lab, config.seed, pruned.network, config.finetune, dense)
        save_network(run, tuned)

        cost = count_cost(graph, pruned.plan)
        stages = {
            "dense": Stage(accuracy(lab, dense.apply, dense.variables), count_cost(graph)),
            "pruned": Stage(accuracy(lab, tuned.apply, pruned.network.variables), cost),
            "finetuned": Stage(accuracy(lab, tuned.apply, tuned.variables), cost),
        }
        write_model_directory(lab, config.seed, tuned, stages)
        checks = {
            "masked_minus_shrunk": pruned.masked_error,
            "negative_scores": negative(pruned.scores),
            "validation_accuracy": accuracy(lab, tuned.apply, tuned.variables, "val"),
        }
        seconds = {"total": run.seconds()}
        write_scores(run, {pruned.scores.criterion: pruned.scores})
        run.write_json("summary.json", summarise([stages], seconds=seconds, checks=checks))
        write_report(run.path)
        progress.console.print(stage_table(run.read_json("summary.json")))
        progress.note(f"report: {run.path / 'report.html'}")


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="prune")


if __name__ == "__main__":
    sys.exit(command())
