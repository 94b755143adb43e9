"""The papers' claims on one network, in one resumable command: train, compare precisions, compare criteria, INT8.

    python -m recipes.reproduce cpu resnet20.th --data npz:cifar10.npz --max-minutes 60   # two CPU cores
    python -m recipes.reproduce resnet32 --max-minutes 25                                 # a GPU; then --resume
    python -m recipes.reproduction runs/*/reproduction.json                               # the table of all claims

EHAP (arXiv 2306.07030) and HAP (arXiv 2101.08940): traces in float16 prune like those in float32, and the Hessian
prunes better than magnitude and chance. Each part is a run directory of its own recipe inside this one.
``reproduction.json`` and ``report.html`` hold what is finished, also when the run was stopped;
``recipes.reproduction`` makes the table of claims.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ehap_jax.data import limit_training, load_dataset
from ehap_jax.report import write_comparison
from ehap_jax.training import Deadline, RunDirectory
from recipes import compare_criteria, compare_precision, pretrain
from recipes.cells import CellsConfig
from recipes.command import RunOptions, run_command
from recipes.criteria import ScoreConfig
from recipes.lab import Phase, check_phases
from recipes.network import load_network
from recipes.pruned import PruneConfig

PARTS = {
    "pretrain": "summary.json",
    "precision": "precision.json",
    "criteria": "comparison.json",
}
"""The run directories inside the run, and the file of each that holds its result."""


@dataclass(frozen=True)
class Config:
    """The papers' claims on one network. Data and training images of the parts are those given here."""

    dense: Annotated[Path | None, tyro.conf.Positional] = None
    """A checkpoint or run directory to start from; None trains a dense network first."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images for what follows the dense training."""
    pretrain: tyro.conf.Suppress[pretrain.Config] = field(default_factory=pretrain.Config)
    precision: PruneConfig = field(default_factory=lambda: PruneConfig(keep=0.1))
    """How networks are pruned that compare precisions; fine-tuning and seeds are those of the cells."""
    cells: CellsConfig = field(default_factory=CellsConfig)
    """The comparison of criteria."""


def paper(model: str, channels: float) -> Config:
    """The paper's settings for a network: its fraction of the channels, 300 epochs, INT8 training."""
    return Config(
        pretrain=pretrain.VARIANTS[model][1],
        precision=PruneConfig(budget="channels", keep=channels),
        cells=compare_criteria.VARIANTS["paper"][1].cells,
    )


VARIANTS = {
    "cpu": (
        "from a trained checkpoint, one short epoch of fine-tuning on a part of the training images",
        Config(
            train_images=10_000,
            precision=PruneConfig(keep=0.25, scores=ScoreConfig(examples=64, probes=30)),
            cells=CellsConfig(finetune=Phase(epochs=1, learning_rate=0.05, warmup=0.2)),
        ),
    ),
    "resnet32": ("the paper's thin ResNet-32 on CIFAR-10", paper("resnet32", 0.230)),
    "resnet56": ("the paper's thin ResNet-56 on CIFAR-10", paper("resnet56", 0.191)),
    "wrn28-8": ("the paper's post-activation WRN-28-8 on CIFAR-10", paper("wrn28-8", 0.240)),
}


def main(config: Config, options: RunOptions) -> None:
    deadline = Deadline(options.max_minutes)
    # What every part would find missing in the end is found missing here, before a directory is made.
    network = None if config.dense is None else load_network(config.dense)
    dataset = load_dataset(config.data, normalisation=network and network.architecture.normalisation)
    check_phases(limit_training(dataset, config.train_images), cells_finetune=config.cells.finetune)
    run = RunDirectory.create(options.output, config, resume=options.resume, overwrite=options.overwrite)

    def part(name: str, recipe: Callable[[Any, RunOptions], None], settings: Any) -> None:
        started = (run.path / name).exists()
        recipe(settings, replace(options, output=run.path / name, resume=started, max_minutes=deadline.minutes_left()))

    try:
        dense = config.dense
        if dense is None:
            dense = run.path / "pretrain"
            if not (dense / PARTS["pretrain"]).exists():
                part("pretrain", pretrain.main, replace(config.pretrain, data=config.data))
                deadline.check("the dense network trained")
        cells, data, images = config.cells, config.data, config.train_images
        precision = compare_precision.Config(
            dense, data, images, seeds=cells.seeds, prune=config.precision, finetune=cells.finetune
        )
        part("precision", compare_precision.main, precision)
        deadline.check("the precisions compared")
        part("criteria", compare_criteria.main, compare_criteria.Config(dense, data, images, cells))
    finally:
        found = collect(run.path)
        run.write_json("reproduction.json", found)
        if found:
            write_comparison([run.path / name for name in found], run.file("report.html"))


def collect(directory: Path) -> dict[str, Any]:
    """Per part that has a result: its configuration, versions and result."""
    found: dict[str, Any] = {}
    for name, file in PARTS.items():
        part = RunDirectory(directory / name)
        if (part.path / file).exists():
            config = part.read_json("config.json")
            # Names of files and data sets, without the folders of the machine.
            config |= {key: config[key].rsplit("/", 1)[-1] for key in ("dense", "data") if key in config}
            found[name] = {
                "config": config,
                "versions": part.read_json("versions.json"),
                "result": part.read_json(file),
            }
    return found


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="reproduce")


if __name__ == "__main__":
    sys.exit(command())
