"""A dense network from scratch, with the papers' settings: where everything else starts.

EHAP (arXiv 2306.07030) trains 300 epochs with batch 128, learning rate 0.05, weight decay 1e-3, Nesterov momentum and
a cosine; the named configurations are those settings.

    python -m recipes.pretrain resnet32                          # CIFAR-10 through TFDS, a GPU
    python -m recipes.pretrain digits                            # handwritten digits, minutes on two CPU cores
    python -m recipes.pretrain resnet56 --data npz:cifar10.npz --phase.epochs 30 --max-minutes 25

Expect 99 % on the digits (``results/quickstart.json``: 99.16 ± 0.28 % over three seeds on two CPU cores); nothing has
been measured with the paper's settings yet, which need a GPU and CIFAR-10. Writes ``network.json`` and ``network.npz``
(other recipes start from this directory), ``summary.json``, ``metrics.jsonl`` and ``report.html``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from ehap_jax.data import Dataset, limit_training, load_dataset
from ehap_jax.graph import count_cost
from ehap_jax.report import write_report
from ehap_jax.training import Deadline, Progress
from recipes.command import TrainingOptions, run_command
from recipes.lab import Lab, Phase, accuracy, check_phases, train
from recipes.network import Network, network_for, save_network
from recipes.summary import Stage, summarise


@dataclass(frozen=True)
class Config:
    """Train a dense network."""

    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    model: str = "resnet32"
    """See `ehap_jax.models.known_models`."""
    shortcut: str | None = "B"
    """Of a ResNet: "A" (parameter-free) or "B" (1x1 convolution); None for other models."""
    widths: tuple[int, ...] | None = None
    """Channels of the stages of a ResNet; None for the model's own."""
    seed: int = 0
    phase: Phase = field(default_factory=lambda: Phase(epochs=300, learning_rate=0.05, weight_decay=1e-3))


VARIANTS = {
    "resnet32": ("EHAP's thin ResNet-32, 0.467 M parameters", Config(model="resnet32")),
    "resnet56": ("EHAP's thin ResNet-56, 0.856 M parameters", Config(model="resnet56")),
    "wrn28-8": ("EHAP's post-activation WRN-28-8, 23.4 M parameters", Config(model="ehap-wrn28-8")),
    "digits": (
        "a small ResNet-8 on handwritten digits",
        Config(
            data="digits",
            model="resnet8",
            widths=(16, 32, 64),
            phase=Phase(epochs=30, learning_rate=0.1, batch_size=64, warmup=1),
        ),
    ),
}


def prepare(config: Config) -> tuple[Network, Dataset]:
    """The network to begin with and its data; every setting is checked before any work starts.

    Raises:
        ValueError: naming the option.
    """
    dataset = limit_training(load_dataset(config.data), config.train_images)
    check_phases(dataset, {"--phase": config.phase})
    return network_for(dataset, config.model, config.seed, shortcut=config.shortcut, widths=config.widths), dataset


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    initial, dataset = prepare(config)
    run = options.create_run(config, "report")
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        variables = train(lab, "dense", config.seed, initial.train_apply, initial.variables, config.phase)
        network = initial._replace(variables=variables)
        save_network(run, network)
        stages = {"dense": Stage(accuracy(lab, network.apply, variables), count_cost(network.graph()))}
        validation = {"validation_accuracy": accuracy(lab, network.apply, variables, "val")}
        seconds = {"total": run.seconds()}
        run.write_json("summary.json", summarise([stages], seconds=seconds, checks=validation))
        write_report(run.path)
        progress.note(f"test accuracy {stages['dense'].accuracy:.4f}; report: {run.path / 'report.html'}")


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="pretrain")


if __name__ == "__main__":
    sys.exit(command())
