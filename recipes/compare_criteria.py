"""Does the Hessian prune better than magnitude and chance, once the network is fine-tuned?

EHAP (arXiv 2306.07030) and HAP (arXiv 2101.08940) compare criteria at a few fractions of the parameters. Here every
criterion prunes the same dense network to the same fractions, is fine-tuned alike, over several seeds, beside the dense
network fine-tuned alike; the Hessian's go on to INT8 training.

    python -m recipes.compare_criteria short resnet20.th --data npz:cifar10.npz     # two CPU cores, about an hour
    python -m recipes.compare_criteria paper runs/pretrain --data tfds:cifar10      # a GPU, the paper's fine-tuning

Expect in the paper's setting that at 10 % of the parameters the Hessian keeps 1-3 points more than magnitude. With the
short one the networks have not recovered, so differences are larger and say less. Writes ``comparison.json``,
``comparison.txt`` and ``accuracy.png``; every finished cell is kept in ``cells/``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ehap_jax.data import limit_training, load_dataset
from ehap_jax.training import Deadline, Progress, RunDirectory
from recipes.cells import CellsConfig, cells_of, cells_table, paired_differences, run_cells, statistics
from recipes.command import RunOptions, run_command
from recipes.curves import accuracy_curves
from recipes.lab import Lab, Phase, accuracy, check_phases
from recipes.network import load_network


@dataclass(frozen=True)
class Config:
    """Compare pruning criteria on one dense network."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of recipes.pretrain."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    cells: CellsConfig = field(default_factory=CellsConfig)


VARIANTS = {
    "short": (
        "minutes on a CPU: two short epochs on a part of the training images",
        Config(
            train_images=10_000,
            cells=CellsConfig(
                finetune=Phase(epochs=2, learning_rate=0.05, warmup=0.2),
                int8=Phase(epochs=1, learning_rate=0.005),
            ),
        ),
    ),
    "paper": (
        "the paper's fine-tuning: 300 epochs, then 30 of INT8",
        Config(
            cells=CellsConfig(
                finetune=Phase(epochs=300, learning_rate=0.0512, weight_decay=5e-4),
                int8=Phase(epochs=30, learning_rate=1e-4, weight_decay=5e-4),
            )
        ),
    ),
}


def main(config: Config, options: RunOptions) -> None:
    deadline = Deadline(options.max_minutes)
    network = load_network(config.dense)
    dataset = load_dataset(config.data, normalisation=network.architecture.normalisation)
    dataset = limit_training(dataset, config.train_images)
    check_phases(dataset, cells_finetune=config.cells.finetune, cells_int8=config.cells.int8)
    cells_of(config.cells)
    run = RunDirectory.create(options.output, config, resume=options.resume, overwrite=options.overwrite)
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline)
        rows = run_cells(lab, network, config.cells)
        start = accuracy(lab, network.apply, network.variables)
        result = {
            "data": dataset.name,
            "train_images": len(dataset.x_train),
            "test_images": len(dataset.x_test),
            "accuracy_start": start,
            "statistics": statistics(rows),
            "differences": paired_differences(rows, config.cells.criteria),
            "rows": rows,
        }
        run.write_json("comparison.json", result)
        run.write_text("comparison.txt", cells_table(result))
        figure = accuracy_curves(result["statistics"], cost="params")
        figure.savefig(run.file("accuracy.png"), dpi=150)
        progress.note((run.path / "comparison.txt").read_text())


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="compare_criteria")


if __name__ == "__main__":
    sys.exit(command())
