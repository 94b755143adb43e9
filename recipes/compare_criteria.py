"""Does the Hessian prune better than magnitude and chance, once the network is fine-tuned?

EHAP (arXiv 2306.07030) and HAP (arXiv 2101.08940) compare criteria at a few fractions of the parameters. Here every
criterion prunes the same dense network to the same fractions, is fine-tuned alike, over several seeds, beside the
dense network fine-tuned alike; the Hessian's go on to INT8 training.

    python -m recipes.compare_criteria short resnet20.th --data npz:cifar10.npz     # two CPU cores, hours
    python -m recipes.compare_criteria paper runs/pretrain --data tfds:cifar10      # a GPU, the paper's fine-tuning

With the short setting the networks have not recovered: differences say which criterion is quicker to recover, not
which is better in the end (``results/REPRODUCTION.md``). Writes ``comparison.json``, ``comparison.txt`` and
``accuracy.png``; every finished cell is kept in ``cells/``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from recipes.cells import CellsConfig, compare_cells
from recipes.command import TrainingOptions, run_command
from recipes.criteria import ScoreConfig
from recipes.lab import Phase
from recipes.pruned import paper_pruning


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
        "the paper's 300 probes and fine-tuning: 300 epochs, then 30 of INT8",
        Config(
            cells=CellsConfig(
                prune=paper_pruning(scores=ScoreConfig(estimator="probes")),
                finetune=Phase(epochs=300, learning_rate=0.0512, weight_decay=5e-4),
                int8=Phase(epochs=30, learning_rate=1e-4, weight_decay=5e-4),
            )
        ),
    ),
}


def main(config: Config, options: TrainingOptions) -> None:
    compare_cells(config, options, name="comparison", plot="accuracy.png", cost="params")


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="compare_criteria")


if __name__ == "__main__":
    sys.exit(command())
