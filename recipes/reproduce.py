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

from ehap_jax.data import limit_training
from ehap_jax.report import write_comparison
from ehap_jax.training import Deadline, RunDirectory
from recipes import compare_criteria, compare_precision, pretrain
from recipes.cells import CellsConfig, check_cells
from recipes.command import TrainingOptions, run_command
from recipes.criteria import ScoreConfig
from recipes.lab import Phase
from recipes.network import load_data, load_network
from recipes.pruned import TargetConfig, check_target

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
    precision: TargetConfig = field(default_factory=lambda: TargetConfig(keep=0.1))
    """How networks are pruned that compare precisions; fine-tuning and seeds are those of the cells."""
    cells: CellsConfig = field(default_factory=CellsConfig)
    """The comparison of criteria."""


def paper(model: str, channels: float) -> Config:
    """The paper's settings for a network: its fraction of the channels, 300 epochs, INT8 training."""
    return Config(
        pretrain=pretrain.VARIANTS[model][1],
        precision=TargetConfig(budget="channels", keep=channels),
        cells=compare_criteria.VARIANTS["paper"][1].cells,
    )


VARIANTS = {
    "cpu": (
        "from a trained checkpoint, one short epoch of fine-tuning on a part of the training images",
        Config(
            train_images=10_000,
            precision=TargetConfig(keep=0.25, scores=ScoreConfig(examples=64, probes=30)),
            cells=CellsConfig(finetune=Phase(epochs=1, learning_rate=0.05, warmup=0.2)),
        ),
    ),
    "resnet32": ("the paper's thin ResNet-32 on CIFAR-10", paper("resnet32", 0.230)),
    "resnet56": ("the paper's thin ResNet-56 on CIFAR-10", paper("resnet56", 0.191)),
    "wrn28-8": ("the paper's post-activation WRN-28-8 on CIFAR-10", paper("wrn28-8", 0.240)),
}


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    check_parts(config)
    run = options.create_run(config, "report")

    def part(name: str, recipe: Callable[[Any, TrainingOptions], None], settings: Any) -> None:
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
        # A part that was stopped before its first network has a result, and nothing to draw.
        drawn = [run.path / name for name in found if (run.path / name / "summary.json").exists()]
        if drawn:
            write_comparison(drawn, run.file("report.html"))


def check_parts(config: Config) -> None:
    """Everything that a part would find wrong when its turn comes, before any work starts.

    Raises:
        ValueError: naming the option, or the target that is out of reach.
    """
    if config.dense is None:
        network, dataset = pretrain.prepare(replace(config.pretrain, data=config.data))
        dataset = limit_training(dataset, config.train_images)
    else:
        network = load_network(config.dense)
        dataset = load_data(network, config.data, config.train_images)
    check_target(dataset, network.graph(), config.precision, "--precision", "hessian")
    check_cells(config.cells, network, dataset)


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
