"""How much accuracy is left at how many multiply-accumulates? The curve over fractions, criteria and seeds.

    python -m recipes.sweep resnet56 runs/pretrain                               # CIFAR-10 through TFDS, a GPU
    python -m recipes.sweep short resnet20.th --data npz:cifar10.npz             # two CPU cores, hours

To beat, from a 93.5 % ResNet-56 on CIFAR-10 without sparse learning (Torch-Pruning): 93.46 % at 47 % of the MACs,
93.36 % at 40 %. Writes ``sweep.json``, ``sweep.txt`` and ``pareto.png``; every finished cell is kept in ``cells/``,
and what was done so far is drawn when the run is stopped.
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
    """Accuracy against cost over kept fractions, criteria and seeds."""

    dense: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of recipes.pretrain."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    cells: CellsConfig = field(default_factory=CellsConfig)


VARIANTS = {
    "short": (
        "two short epochs on a part of the training images, one seed",
        Config(
            train_images=10_000,
            cells=CellsConfig(
                keeps=(0.7, 0.5, 0.3),
                seeds=1,
                prune=paper_pruning(budget="macs", coupling="group"),
                finetune=Phase(epochs=2, learning_rate=0.05, warmup=0.2),
                int8_criteria=(),
            ),
        ),
    ),
    "resnet56": (
        "six fractions of the MACs, three seeds, 100 epochs of fine-tuning",
        Config(
            cells=CellsConfig(
                criteria=("hessian", "magnitude", "taylor", "random"),
                keeps=(0.7, 0.6, 0.5, 0.47, 0.4, 0.3),
                prune=paper_pruning(budget="macs", coupling="group", scores=ScoreConfig(examples=1024)),
                finetune=Phase(epochs=100, learning_rate=0.05),
                int8_criteria=(),
            )
        ),
    ),
}


def main(config: Config, options: TrainingOptions) -> None:
    compare_cells(config, options, name="sweep", plot="pareto.png", cost="macs")


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="sweep")


if __name__ == "__main__":
    sys.exit(command())
