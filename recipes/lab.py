"""What every stage of a recipe works with, and the stages that all of them share: train and evaluate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax.data import Dataset, normalise
from ehap_jax.pruning import PruningPlan, mask_variables
from ehap_jax.training import (
    Checkpoints,
    Deadline,
    EpochMetrics,
    Progress,
    RunDirectory,
    Sink,
    Teacher,
    TrainState,
    all_devices,
    check_finite,
    create_train_state,
    cross_entropy,
    evaluation_inputs,
    fit,
    forward_from_apply,
    low_precision,
    make_epoch,
    make_evaluate,
    sgd_cosine,
    smoothed_cross_entropy,
    training_inputs,
)

CHECKPOINT_SECONDS = 60.0
"""What a kill costs, or an epoch where that takes longer."""


@dataclass(frozen=True)
class Phase:
    """One phase of training: SGD with Nesterov momentum and a cosine learning rate."""

    epochs: int
    learning_rate: float
    """The peak."""
    batch_size: int = 128
    weight_decay: float = 5e-4
    warmup: float = 0.0
    """Epochs over which the learning rate rises from zero."""
    label_smoothing: float = 0.0
    average: float | None = None
    """Decay of a moving average of the weights, which is then the result; such as 0.999."""
    distill: float = 0.0
    """Weight of distillation from the dense network in the loss of a pruned one; such as 0.9."""
    temperature: float = 4.0
    """Of the distillation."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward pass; the weights stay in float32."""


class Lab(NamedTuple):
    """Where a recipe works: data, run directory, progress bars, time limit, and where else metrics go."""

    dataset: Dataset
    run: RunDirectory
    progress: Progress
    deadline: Deadline
    sinks: tuple[Sink, ...] = ()


def check_phases(dataset: Dataset, phases: Mapping[str, Phase], *, taught: Collection[str] = ()) -> None:
    """Everything that can be wrong with the phases, before any work starts.

    Args:
        dataset: to train on.
        phases: by their options, such as "--finetune".
        taught: those that have a teacher to distil from.

    Raises:
        ValueError: naming the option.
    """
    count = len(dataset.x_train)
    for option, phase in phases.items():
        if phase.epochs < 1:
            raise ValueError(f"{option}.epochs must be at least 1, got {phase.epochs}")
        if not 1 <= phase.batch_size <= count:
            raise ValueError(f"{option}.batch-size {phase.batch_size} is not between 1 and the {count} training images")
        if not 0 <= phase.warmup < phase.epochs:
            raise ValueError(f"{option}.warmup must be at least 0 and below the {phase.epochs} epochs: {phase.warmup}")
        if not 0 <= phase.label_smoothing < 1:
            raise ValueError(f"{option}.label-smoothing must be in [0, 1), got {phase.label_smoothing}")
        if phase.average is not None and not 0 <= phase.average < 1:
            raise ValueError(f"{option}.average is a decay in [0, 1), got {phase.average}")
        if not 0 <= phase.distill <= 1 or not phase.temperature > 0:
            raise ValueError(f"{option}.distill must be in [0, 1] and {option}.temperature positive")
        if phase.distill and option not in taught:
            raise ValueError(f"{option}.distill {phase.distill}: this phase has no teacher; leave it at 0")
        if phase.batch_size % jax.device_count():
            devices = jax.device_count()
            raise ValueError(f"{option}.batch-size {phase.batch_size} is not a multiple of the {devices} devices")
        optimizer_of(phase, count)


def train(
    lab: Lab,
    stage: str,
    seed: int,
    apply: Callable,
    variables: dict[str, Any],
    phase: Phase,
    *,
    dense: tuple[Callable, Any] | None = None,
) -> dict[str, Any]:
    """Train ``apply(variables, x) -> (logits, updates)`` on all devices; resumes from the stage's checkpoint.

    Args:
        lab: where.
        stage: names the checkpoints and the metrics.
        seed: of shuffles and augmentation.
        apply: the training function.
        variables: to start from.
        phase: how.
        dense: (function, variables) to distil from where the phase does.

    Raises:
        OutOfTime: the lab's deadline has passed; what was done is saved.
        FloatingPointError, ValueError: training diverged.
    """
    dataset = lab.dataset
    if dense is not None and phase.distill:
        epoch = make_phase(apply, dataset, phase, Teacher(*dense, phase.distill, phase.temperature))
    else:
        epoch = epoch_of(apply, dataset, phase)
    optimizer, key = optimizer_of(phase, len(dataset.x_train)), jax.random.key(1000 + seed)
    state = create_train_state(variables, optimizer, key, average=phase.average is not None)
    directory = lab.run.file(f"seed{seed}/checkpoints/{stage}")
    with lab.progress.stage(f"seed {seed}: {stage}", phase.epochs) as advance, Checkpoints(directory) as saved:

        def on_epoch(number: int, _: TrainState, metrics: EpochMetrics) -> None:
            record = {"seed": seed, "stage": stage, "epoch": number, **metrics._asdict()}
            lab.run.append_metrics(record, identity=("seed", "stage", "epoch"))
            numbers = {name: float(value) for name, value in metrics._asdict().items()}
            for sink in lab.sinks:
                sink(number, {f"seed{seed}/{stage}/{name}": value for name, value in numbers.items()})
            advance(**numbers)

        advance(saved.latest() or 0)
        state = fit(
            epoch,
            state,
            dataset.x_train,
            dataset.y_train,
            epochs=phase.epochs,
            checkpoints=saved,
            checkpoint_seconds=CHECKPOINT_SECONDS,
            on_epoch=on_epoch,
            deadline=lab.deadline,
        )
    # Training binds the variables to its devices; what follows runs on any.
    found = jax.tree.map(jnp.asarray, jax.device_get(state.averaged))
    check_finite(found, f"training {stage} diverged")
    return found


@lru_cache(maxsize=8)
def epoch_of(apply: Callable, dataset: Dataset, phase: Phase) -> Callable:
    """The compiled epoch; that of the same function, data and phase serves all seeds."""
    return make_phase(apply, dataset, phase)


def make_phase(apply: Callable, dataset: Dataset, phase: Phase, teacher: Teacher | None = None) -> Callable:
    """One epoch of a phase, over all devices."""
    forward = forward_from_apply(apply)
    return make_epoch(
        forward if phase.compute == "float32" else low_precision(forward, phase.compute),
        optimizer_of(phase, len(dataset.x_train)),
        training_inputs(dataset),
        batch_size=phase.batch_size,
        num_examples=len(dataset.x_train),
        loss=smoothed_cross_entropy(phase.label_smoothing),
        average=phase.average,
        teacher=teacher,
        mesh=all_devices("data"),
    )


@lru_cache(maxsize=8)
def optimizer_of(phase: Phase, count: int):
    """The phase's optimizer for `count` training images."""
    steps = count // phase.batch_size
    return sgd_cosine(
        phase.learning_rate,
        phase.epochs * steps,
        weight_decay=phase.weight_decay,
        warmup_steps=round(phase.warmup * steps),
    )


@lru_cache(maxsize=8)
def evaluate_of(apply: Callable, dataset: Dataset) -> Callable:
    """The compiled evaluation of ``apply(variables, x) -> logits``."""
    return make_evaluate(apply, evaluation_inputs(dataset))


def accuracy(lab: Lab, apply: Callable, variables: Any, split: str = "test") -> float:
    """Fraction of right answers on the "test" split, or on "val", which is what decisions may rest on."""
    images, labels = getattr(lab.dataset, f"x_{split}"), getattr(lab.dataset, f"y_{split}")
    return evaluate_of(apply, lab.dataset)(variables, images, labels).accuracy


def training_batch(dataset: Dataset, count: int, seed: int | None = None) -> tuple[jax.Array, jax.Array]:
    """`count` training images, not augmented, normalised, with their labels: the first ones, or a seed's choice.

    Raises:
        ValueError: there are not as many training images.
    """
    total = len(dataset.x_train)
    if not 1 <= count <= total:
        raise ValueError(f"{count} images for scores are not between 1 and the {total} training images")
    chosen = np.arange(count) if seed is None else np.sort(np.random.default_rng(seed).permutation(total)[:count])
    images = normalise(jnp.asarray(dataset.x_train[chosen]), dataset.mean, dataset.std)
    return images, jnp.asarray(dataset.y_train[chosen])


@lru_cache(maxsize=8)
def evaluation_loss(apply: Callable) -> Callable:
    """``loss(variables, (images, labels))``, the mean cross-entropy; one per function, as traces compile per loss."""
    return lambda variables, batch: jnp.mean(cross_entropy(apply(variables, batch[0]), batch[1]))


def compare_masked(
    lab: Lab, apply: Callable, variables: Any, plan: PruningPlan, pruned_apply: Callable, pruned: Any
) -> float:
    """Largest difference between the logits of the masked and the shrunk network on validation images.

    Raises ArithmeticError where they differ by more than 1e-5 of the largest logit: then the plan is wrong.
    """
    x = normalise(jnp.asarray(lab.dataset.x_val[:128]), lab.dataset.mean, lab.dataset.std)
    # GPUs round float32 products to 10 bits by default, and differently for other shapes.
    with jax.default_matmul_precision("highest"):
        masked, shrunk = jax.jit(apply)(mask_variables(variables, plan), x), jax.jit(pruned_apply)(pruned, x)
    error = float(jnp.max(jnp.abs(masked - shrunk)) / jnp.max(jnp.abs(masked)))
    if not error <= 1e-5:
        raise ArithmeticError(f"the shrunk network differs from the masked one by {error:.1e} of its largest logit")
    return error
