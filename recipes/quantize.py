"""Prune, fine-tune, fold, calibrate, train in INT8: and then run the integers, in JAX and in ONNX Runtime.

EHAP (arXiv 2306.07030, section 4.4): symmetric weights per channel, asymmetric activations, BatchNorm folded. Ranges
from 512 training images, then quantisation-aware training with SGD and a cosine from 1e-3, its ranges frozen after
40 % of it. Beside it post-training quantisation: the same ranges, no training.

INT8 training is training: it can make a network better than it was, which says nothing about its rounding. So the
control, ``float_trained``, is the float network trained on alike, for as long, on the same batches in the same order,
its BatchNorm frozen likewise, without the rounding. The gate compares the integers with it; differences from the float
network of before are reported beside.

    python -m recipes.quantize cifar runs/prune                           # goes on from recipes.prune
    python -m recipes.quantize short resnet20.th --data npz:cifar10.npz   # a checkpoint; prunes it first

Writes ``summary.json`` (float, fake-quantised and integer accuracies side by side), ``differences.json`` (how many
integers differ between fake quantisation, `to_integer` and ONNX Runtime, and by how much), ``report.html``, and per
seed ``float.onnx`` and the trained network for others in ``model/``: weights under PyTorch's names, plan, INT8 as
``model.onnx``, model card. Where PyTorch or safetensors is not installed, that is ``int8.onnx`` alone.

Exits with status 1, when all is written, where the accuracy of the integers is more than 0.3 points from that of the
control in the mean over seeds, or ONNX Runtime computed other integers than JAX.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ehap_jax import INT8, fake_quant, onnx_session
from ehap_jax.data import normalise
from ehap_jax.graph import Cost, count_cost
from ehap_jax.quant import IntegerNetwork, rounded_activations
from ehap_jax.report import stage_table, write_report
from ehap_jax.training import Deadline, Progress
from recipes.command import Missed, TrainingOptions, run_command
from recipes.int8 import Int8Network, calibrate, int8_network, train_int8
from recipes.integers import float_onnx, int8_onnx, integer_network, run_integers, test_inputs, write_onnx
from recipes.lab import Lab, Phase, accuracy, check_phases, train
from recipes.model_directory import write_model_directory
from recipes.network import Network, load_data, load_network, save_network
from recipes.pruned import PruneConfig, check_pruning, finetune, prune_network
from recipes.summary import Stage, summarise

POINTS = 0.3
"""Largest mean difference of accuracy, in percentage points, between the integers and the control."""

ONNX, BATCH = "qat: integer and ONNX Runtime", 256
"""The pair of implementations that have to agree in every integer; test images that ONNX Runtime is given at once."""


@dataclass(frozen=True)
class Config:
    """Quantise a network to INT8 and run it in integers."""

    network: Annotated[Path, tyro.conf.Positional] = tyro.MISSING
    """A PyTorch or safetensors checkpoint, or the run directory of recipes.pretrain or recipes.prune."""
    data: str = "tfds:cifar10"
    """"tfds:NAME", "npz:PATH", "folder:PATH" or "digits"."""
    train_images: int | None = None
    """Use only so many of the training images."""
    seeds: int = 3
    calibration_images: int = 512
    compared_images: int = 128
    """Test images on which every integer is compared."""
    prune: PruneConfig = field(default_factory=PruneConfig)
    """How a network that is not pruned yet is pruned first; --prune.keep 1 leaves it whole."""
    finetune: Phase = field(default_factory=lambda: Phase(epochs=60, learning_rate=0.05))
    """Of a network pruned here."""
    qat: Phase = field(default_factory=lambda: Phase(epochs=20, learning_rate=1e-3, weight_decay=1e-4))
    observed: float = 0.4
    """Share of the training that moves the ranges; then they are frozen."""
    onnx: bool = True
    """Write ONNX files and run them; needs the packages onnx and onnxruntime, --no-onnx does not."""


VARIANTS = {
    "short": (
        "minutes: one epoch of everything",
        Config(train_images=5_000, finetune=Phase(1, learning_rate=0.02), qat=Phase(1, learning_rate=1e-3)),
    ),
    "cifar": ("CIFAR-10, a GPU: 60 epochs of fine-tuning, 20 in INT8", Config()),
}


class SeedResult(NamedTuple):
    """Per stage accuracy and cost; per pair of implementations what differs."""

    stages: dict[str, Stage]
    differences: dict[str, dict[str, Any]]


class Measured(NamedTuple):
    """One quantised network: its stages, how fake quantisation and integers differ, and the integers."""

    stages: dict[str, Stage]
    difference: dict[str, float]
    integers: dict[str, jax.Array]


class Onnx(NamedTuple):
    """What ONNX Runtime makes of it: accuracy, how its integers differ from JAX's, and the INT8 file, unwritten.

    With the difference stands whether sums of 8-bit products saturate on this processor, and the session's options.
    """

    accuracy: float
    difference: dict[str, Any]
    model: Any


def run_seed(lab: Lab, seed: int, dense: Network, config: Config) -> SeedResult:
    """From the dense (or pruned) network to integers, for one seed."""
    network = prepare(lab, seed, dense, config)
    quantized = fake_quant(network.apply, rules=INT8)
    ranges = calibrate(lab, quantized, network.variables, config.calibration_images)
    untrained = int8_network(lab, quantized, network.variables, ranges)
    trained = train_int8(
        lab, seed, network.apply, network.variables, config.qat, calibrated=ranges, observed=config.observed
    )
    control = train_float(lab, seed, network, config.qat)
    cost = count_cost(network.graph())
    stages = {
        "float": Stage(accuracy(lab, network.apply, network.variables), cost),
        "float_trained": Stage(accuracy(lab, network.apply, control), cost),
    }
    differences: dict[str, dict[str, Any]] = {}
    onnx = None
    for name, found in (("ptq", untrained), ("qat", trained)):
        measured = measure(lab, found, cost, config.compared_images)
        stages |= {f"{name}_{kind}": stage for kind, stage in measured.stages.items()}
        differences[f"{name}: fake and integer"] = measured.difference
        if config.onnx and name == "qat":
            runtime = run_onnx(lab, seed, network, found, measured.integers, config.compared_images)
            stages["qat_onnx"] = Stage(runtime.accuracy, stages["qat_integer"].cost)
            differences[ONNX] = runtime.difference
            onnx = runtime.model
    small = network._replace(variables=trained.variables["variables"])
    stages["qat_float"] = Stage(accuracy(lab, small.apply, small.variables), cost)
    of_model = {name: stage for name, stage in stages.items() if name.startswith("qat")}
    written = write_model_directory(lab, seed, small, of_model, f"seed{seed}", onnx=onnx)
    if written is None and onnx is not None:
        write_onnx(lab, onnx, f"seed{seed}/int8.onnx")
    return SeedResult(stages, differences)


def prepare(lab: Lab, seed: int, network: Network, config: Config) -> Network:
    """The network to quantise: as it is, or pruned and fine-tuned."""
    if network.plan is not None or config.prune.keep == 1:
        return network
    pruned = prune_network(lab, seed, network, network.graph(), config.prune)
    tuned = finetune(lab, seed, pruned.network, config.finetune, network)
    save_network(lab.run, tuned, f"seed{seed}")
    return tuned


def train_float(lab: Lab, seed: int, network: Network, phase: Phase) -> dict[str, Any]:
    """The control: the weights after `train_int8` without its rounding."""

    def frozen(variables, x):
        return network.apply(variables, x), {}

    return train(lab, "float_trained", seed, frozen, network.variables, phase)


def measure(lab: Lab, int8: Int8Network, cost: Cost, compared: int) -> Measured:
    """Accuracy as fake-quantised and as integers, and the integers that differ between the two."""
    weights, ranges = int8.variables["variables"], int8.variables["ranges"]
    integers = integer_network(lab, int8)
    cost = cost._replace(bytes=int8.bytes)
    x = normalise(jnp.asarray(lab.dataset.x_test[:compared]), lab.dataset.mean, lab.dataset.std)
    fake = jax.jit(partial(rounded_activations, int8.quantized))(weights, ranges, x)
    real = jax.jit(integer_tensors)(integers, x)
    stages = {
        "fake": Stage(accuracy(lab, int8.apply, int8.variables), cost),
        "integer": Stage(accuracy(lab, run_integers, integers), cost),
    }
    return Measured(stages, compare_tensors(fake, {name: real[name] for name in fake}), real)


def integer_tensors(network: IntegerNetwork, x: jax.Array) -> dict[str, jax.Array]:
    """Every quantised activation."""
    return network.tensors(x)


def compare_tensors(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """How many integers differ, their share, and by how much at most (in steps of the grid, LSB)."""
    apart = [np.abs(np.asarray(one[name], np.int64) - np.asarray(other[name], np.int64)) for name in one]
    differ, total = sum(int(np.sum(a > 0)) for a in apart), sum(a.size for a in apart)
    return {"differ": differ, "of": total, "rate": differ / total, "largest_lsb": max(int(a.max()) for a in apart)}


def run_onnx(
    lab: Lab, seed: int, network: Network, int8: Int8Network, integers: Mapping[str, Any], compared: int
) -> Onnx:
    """Write the float file, and run the INT8 one."""
    write_onnx(lab, float_onnx(lab, seed, network), f"seed{seed}/float.onnx")
    whole = int8_onnx(lab, seed, network, int8)
    dataset, runtime = lab.dataset, onnx_session(whole).runtime
    right = 0
    for start in range(0, len(dataset.x_test), BATCH):
        x = test_inputs(lab, start, start + BATCH)
        (logits,) = runtime.run(None, {"x": x})
        right += int(np.sum(np.argmax(logits, axis=1) == dataset.y_test[start : start + BATCH]))
    exposed = onnx_session(int8_onnx(lab, seed, network, int8, expose=True))
    names = [out.name.removesuffix("/out") for out in exposed.runtime.get_outputs()]
    theirs = dict(zip(names, exposed.runtime.run(None, {"x": test_inputs(lab, 0, compared)}), strict=True))
    difference = compare_tensors(integers, {name: theirs[name] for name in integers}) | exposed.document()
    return Onnx(right / len(dataset.x_test), difference, whole)


def check_config(config: Config, lab_images: int) -> None:
    """What can be wrong with the settings beside the phases."""
    if config.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {config.seeds}")
    if not 1 <= config.calibration_images <= lab_images:
        raise ValueError(f"--calibration-images must be between 1 and the {lab_images} training images")
    if not 0 < config.observed <= 1:
        raise ValueError(f"--observed must be in (0, 1], got {config.observed}")
    if config.compared_images < 1:
        raise ValueError(f"--compared-images must be at least 1, got {config.compared_images}")


def main(config: Config, options: TrainingOptions) -> None:
    deadline = Deadline(options.max_minutes)
    dense = load_network(config.network)
    dataset = load_data(dense, config.data, config.train_images)
    check_phases(dataset, {"--finetune": config.finetune, "--qat": config.qat}, taught=("--finetune",))
    check_config(config, len(dataset.x_train))
    if config.prune.keep != 1 and dense.plan is None:
        check_pruning(dataset, dense.graph(), config.prune)
    run = options.create_run(config, "report", *(("onnx",) if config.onnx else ()))
    with Progress() as progress:
        lab = Lab(dataset, run, progress, deadline, options.sinks(config))
        results = [run_seed(lab, seed, dense, config) for seed in range(config.seeds)]
        stages = [result.stages for result in results]
        checks = {
            f"points_from_{base}_{stage}": points_apart(stages, stage, base)
            for base in ("float", "float_trained")
            for stage in stages[0]
            if stage != base
        }
        seconds = {"total": run.seconds()}
        run.write_json("differences.json", [result.differences for result in results])
        run.write_json("summary.json", summarise(stages, seconds=seconds, checks=checks))
        write_report(run.path)
        progress.console.print(stage_table(run.read_json("summary.json")))
        lost = points_apart(stages, "qat_integer", "float_trained")
        progress.note(f"integers after training: {lost:.2f} points from the float network trained alike")
    missed = misses(lost, [result.differences for result in results])
    if missed:
        raise Missed("; ".join(missed))


def points_apart(seeds: Sequence[Mapping[str, Stage]], stage: str, base: str) -> float:
    """Mean over seeds of the absolute difference of two stages' accuracies, in percentage points."""
    return 100 * mean(abs(stages[stage].accuracy - stages[base].accuracy) for stages in seeds)


def misses(points: float, differences: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What the recipe promises and did not reach, in words.

    Args:
        points: mean difference between the accuracies of integers and control, in percentage points.
        differences: of every seed, by pair of implementations.
    """
    found = []
    if not points <= POINTS + 1e-9:
        found.append(f"the integers are {points:.2f} points from float training, beyond {POINTS}")
    for seed, of_seed in enumerate(differences):
        if ONNX in of_seed and of_seed[ONNX]["differ"]:
            apart = of_seed[ONNX]
            found.append(
                f"seed {seed}: {apart['differ']} of {apart['of']} integers differ between JAX and ONNX Runtime"
            )
    return found


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    return run_command(main, VARIANTS, arguments, name="quantize")


if __name__ == "__main__":
    sys.exit(command())
