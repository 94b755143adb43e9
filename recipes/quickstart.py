"""The whole method on real images, offline, in minutes on two CPU cores.

Trains a small CIFAR-style ResNet on scikit-learn's handwritten digits, measures the Hessian trace of every channel in
float32, bfloat16 and float16 with the same probes (EHAP, arXiv 2306.07030), prunes the least sensitive channels,
proves masked == shrunk, fine-tunes, trains with INT8 fake quantisation, and writes a report.

    python -m recipes.quickstart                # three seeds
    python -m recipes.quickstart --seeds 1

A killed run continues with ``--resume`` and ends in the same numbers. The test split is evaluated once per stage, for
the table; no step of a run reads it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn

from ehap_jax import (
    INT8,
    Cost,
    Graph,
    Policy,
    PruningPlan,
    Scores,
    allocate,
    channel_trace,
    count_cost,
    fake_quant,
    hessian_scores,
    mask_variables,
    random_scores,
    shrink,
    shrink_variables,
    trace_graph,
)
from ehap_jax.data import Dataset, load_dataset, normalise
from ehap_jax.graph.structure import Coupling
from ehap_jax.models import eval_apply, init_variables, make_model, train_apply
from ehap_jax.quant import check_calibrated, quantized_bytes
from ehap_jax.report import stage_table, write_report
from ehap_jax.training import (
    Checkpoints,
    EpochMetrics,
    Progress,
    RunDirectory,
    TrainState,
    check_finite,
    create_train_state,
    cross_entropy,
    evaluation_inputs,
    fit,
    forward_from_apply,
    make_epoch,
    make_evaluate,
    sgd_cosine,
    training_inputs,
)

POLICIES = ("float32", "bfloat16", "float16")
STAGES = ("dense", "pruned", "finetuned", "int8")


@dataclass(frozen=True)
class Phase:
    """One phase of training: epochs, and the peak of its cosine learning rate."""

    epochs: int
    learning_rate: float


@dataclass(frozen=True)
class Config:
    """Settings of the quickstart; every one of them is part of ``config.json``."""

    data: str = "digits"
    """"digits" or "npz:PATH"."""
    model: str = "resnet8"
    shortcut: str = "B"
    widths: tuple[int, int, int] = (16, 32, 64)
    seeds: int = 3
    """How many seeds, starting from 0."""
    batch_size: int = 64
    weight_decay: float = 5e-4
    dense: Phase = Phase(epochs=30, learning_rate=0.1)
    finetune: Phase = Phase(epochs=40, learning_rate=0.1)
    int8: Phase = Phase(epochs=8, learning_rate=0.01)
    trace_examples: int = 256
    """Training images in the Hessian batch, not augmented."""
    num_probes: int = 64
    macs: float = 0.45
    """Fraction of the multiply-accumulates that is kept."""
    coupling: Coupling = "group"


class Job(NamedTuple):
    """What every stage needs; the functions are made once, so that what all seeds share compiles once."""

    config: Config
    dataset: Dataset
    model: nn.Module
    apply: Callable
    train_apply: Callable
    loss: Callable
    evaluate: Callable
    run: RunDirectory
    progress: Progress


class SeedResult(NamedTuple):
    """Per stage the test accuracy and the cost, and what the report draws."""

    accuracy: dict[str, float]
    cost: dict[str, Cost]
    scores: dict[str, Scores]
    plan: PruningPlan
    masked_error: float


def run_seed(job: Job, seed: int) -> SeedResult:
    """The method, from initialisation to INT8, for one seed."""
    config, dataset, apply = job.config, job.dataset, job.apply
    example = jnp.zeros((1, *dataset.image_shape))

    initial = init_variables(job.model, jax.random.key(seed), dataset.image_shape)
    dense = train(job, seed, "dense", job.train_apply, initial, config.dense)

    graph = trace_graph(apply)(dense, example)
    scores = {policy: score(job, seed, graph, dense, policy) for policy in POLICIES}
    plan = allocate(graph, scores["float16"], macs=config.macs, coupling=config.coupling)
    pruned_apply, pruned = shrink(apply, plan), shrink_variables(dense, plan)
    masked_error = compare_masked(job, dense, plan, pruned_apply, pruned)

    finetuned = train(job, seed, "finetuned", shrink(job.train_apply, plan), pruned, config.finetune)
    quantized = fake_quant(pruned_apply, rules=INT8)
    int8 = train_int8(job, seed, quantized, finetuned)

    full, small = count_cost(graph), count_cost(graph, plan)
    int8_bytes = quantized_bytes(pruned_apply, int8.variables, example)
    return SeedResult(
        accuracy={
            "dense": test_accuracy(job, apply, dense),
            "pruned": test_accuracy(job, pruned_apply, pruned),
            "finetuned": test_accuracy(job, pruned_apply, finetuned),
            "int8": test_accuracy(job, frozen(quantized), int8._asdict()),
        },
        cost={"dense": full, "pruned": small, "finetuned": small, "int8": small._replace(bytes=int8_bytes)},
        scores=scores,
        plan=plan,
        masked_error=masked_error,
    )


def train(job: Job, seed: int, stage: str, apply: Callable, variables: dict[str, Any], phase: Phase) -> dict[str, Any]:
    """Train ``apply(variables, x) -> (logits, updates)``; resumes from the stage's checkpoint."""
    config, dataset = job.config, job.dataset
    epoch, optimizer = epoch_of(apply, dataset, config, phase)
    state = create_train_state(variables, optimizer, jax.random.key(1000 + seed))
    with job.progress.stage(f"seed {seed}: {stage}", phase.epochs) as advance, checkpoints(job, seed, stage) as saved:

        def on_epoch(number: int, _: TrainState, metrics: EpochMetrics) -> None:
            record = {"seed": seed, "stage": stage, "epoch": number, **metrics._asdict()}
            job.run.append_metrics(record, identity=("seed", "stage", "epoch"))
            advance(loss=float(metrics.loss), accuracy=float(metrics.accuracy))

        advance(saved.latest() or 0)
        state = fit(
            epoch,
            state,
            dataset.x_train,
            dataset.y_train,
            epochs=phase.epochs,
            checkpoints=saved,
            checkpoint_every=max(phase.epochs // 4, 1),
            on_epoch=on_epoch,
        )
    check_finite(state.variables, f"training {stage} diverged")
    return state.variables


@cache
def epoch_of(apply: Callable, dataset: Dataset, config: Config, phase: Phase):
    """The compiled epoch and its optimizer; the dense network's serves all seeds."""
    count = len(dataset.x_train)
    steps = count // config.batch_size
    optimizer = sgd_cosine(
        phase.learning_rate, phase.epochs * steps, weight_decay=config.weight_decay, warmup_steps=steps
    )
    epoch = make_epoch(
        forward_from_apply(apply),
        optimizer,
        training_inputs(dataset),
        batch_size=config.batch_size,
        num_examples=count,
    )
    return epoch, optimizer


def score(job: Job, seed: int, graph: Graph, variables: dict[str, Any], policy: str) -> Scores:
    """Hessian scores of every channel, from probes that are the same for every policy."""
    config, dataset = job.config, job.dataset
    images = normalise(jnp.asarray(dataset.x_train[: config.trace_examples]), dataset.mean, dataset.std)
    batch = (images, jnp.asarray(dataset.y_train[: config.trace_examples]))
    done = 0
    with job.progress.stage(f"seed {seed}: trace {policy}", config.num_probes) as advance:

        def progress(now: int, total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        trace = channel_trace(
            job.loss,
            variables,
            batch,
            key=jax.random.key(2000 + seed),
            num_probes=config.num_probes,
            policy=Policy(policy),
            save_to=job.run.file(f"seed{seed}/trace_{policy}.npz"),
            progress=progress,
        )
    return hessian_scores(graph, variables, trace)


def evaluation_loss(apply: Callable) -> Callable:
    """``loss(variables, (images, labels))``, the mean cross-entropy. Made once per run: traces compile per loss."""
    return lambda variables, batch: jnp.mean(cross_entropy(apply(variables, batch[0]), batch[1]))


def compare_masked(job: Job, dense, plan: PruningPlan, pruned_apply: Callable, pruned) -> float:
    """Largest difference between the logits of the masked and the shrunk network on validation images.

    Raises ArithmeticError where they differ by more than 1e-5 of the largest logit: then the plan is wrong.
    """
    x = normalise(jnp.asarray(job.dataset.x_val[:128]), job.dataset.mean, job.dataset.std)
    masked, shrunk = jax.jit(job.apply)(mask_variables(dense, plan), x), jax.jit(pruned_apply)(pruned, x)
    error = float(jnp.max(jnp.abs(masked - shrunk)) / jnp.max(jnp.abs(masked)))
    if not error <= 1e-5:
        raise ArithmeticError(f"the shrunk network differs from the masked one by {error:.1e} of its largest logit")
    return error


class Int8Variables(NamedTuple):
    """A fake-quantised network: its float variables and the ranges of its activations."""

    variables: dict[str, Any]
    ranges: Any


def train_int8(job: Job, seed: int, quantized, variables: dict[str, Any]) -> Int8Variables:
    """Quantisation-aware training with BatchNorm folded; the first batch sets the ranges, the others move them."""
    ranges = quantized.init(variables, jnp.zeros((1, *job.dataset.image_shape)))

    def apply(everything, x):
        state = {name: value for name, value in everything.items() if name != "ranges"}
        logits, now = quantized.apply(state, everything["ranges"], x, update=True)
        return logits, {"ranges": now}

    found = train(job, seed, "int8", apply, {**variables, "ranges": ranges}, job.config.int8)
    check_calibrated(found["ranges"])
    return Int8Variables({name: value for name, value in found.items() if name != "ranges"}, found["ranges"])


def frozen(quantized) -> Callable:
    """The fake-quantised network with fixed ranges, as ``apply({"variables", "ranges"}, x) -> logits``."""
    return lambda both, x: quantized.apply(both["variables"], both["ranges"], x, update=False)[0]


def test_accuracy(job: Job, apply: Callable, variables) -> float:
    evaluate = job.evaluate if apply is job.apply else make_evaluate(apply, evaluation_inputs(job.dataset))
    return evaluate(variables, job.dataset.x_test, job.dataset.y_test).accuracy


def checkpoints(job: Job, seed: int, stage: str) -> Checkpoints:
    return Checkpoints(job.run.file(f"seed{seed}/checkpoints/{stage}"))


def summarise(config: Config, results: list[SeedResult], seconds: float) -> dict[str, Any]:
    """``summary.json``: per stage accuracy over seeds, and the cost, averaged over seeds."""
    stages = []
    for stage in STAGES:
        accuracies = [result.accuracy[stage] for result in results]
        cost = [result.cost[stage] for result in results]
        stages.append(
            {
                "stage": stage,
                "accuracy": mean(accuracies),
                "accuracy_std": stdev(accuracies) if len(accuracies) > 1 else None,
                "accuracies": accuracies,
                **{name: round(mean(getattr(c, name) for c in cost)) for name in Cost._fields},
            }
        )
    return {
        "stages": stages,
        "seeds": list(range(config.seeds)),
        "seconds": {"total": seconds},
        "checks": {"masked_minus_shrunk": max(result.masked_error for result in results)},
    }


def write_results(job: Job, results: list[SeedResult], seconds: float) -> None:
    """Plans, scores, summary and report of the run; the first seed's stand for the others in the plots."""
    run, first = job.run, results[0]
    for seed, result in enumerate(results):
        save_plan(result.plan, run.file(f"seed{seed}/plan.json"))
    save_plan(first.plan, run.file("plan.json"))
    arrays: dict[str, np.ndarray] = {
        f"{policy}|{path}": values for policy, found in first.scores.items() for path, values in found.values.items()
    }
    partial = run.file(".scores.partial.npz")
    np.savez(partial, **arrays)  # pyright: ignore[reportArgumentType]
    partial.replace(run.file("scores.npz"))
    run.write_json("summary.json", summarise(job.config, results, seconds))
    write_report(run.path)


def save_plan(plan: PruningPlan, path: Path) -> None:
    path.unlink(missing_ok=True)
    plan.save(path)


def check_config(config: Config, dataset: Dataset) -> None:
    """Everything that can be wrong with the settings, before any work starts."""
    count = len(dataset.x_train)
    if config.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {config.seeds}")
    if not 1 <= config.batch_size <= count:
        raise ValueError(f"--batch-size {config.batch_size} is not between 1 and the {count} training images")
    if not 1 <= config.trace_examples <= count:
        raise ValueError(f"--trace-examples {config.trace_examples} is not between 1 and the {count} training images")
    for name in ("dense", "finetune", "int8"):
        if getattr(config, name).epochs < 2:
            raise ValueError(f"--{name}.epochs must be at least 2 (the first one warms up)")


def check_reachable(config: Config, model: nn.Module, dataset: Dataset) -> None:
    """Raise at once where the pruning target is out of reach: any scores allow the same range."""
    example = jnp.zeros((1, *dataset.image_shape))
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
    graph = trace_graph(eval_apply(model))(variables, example)
    allocate(graph, random_scores(graph, key=jax.random.key(0)), macs=config.macs, coupling=config.coupling)


def main(config: Config, output: Path, resume: bool, overwrite: bool) -> None:
    started = time.perf_counter()
    dataset = load_dataset(config.data)
    model = make_model(config.model, dataset.num_classes, shortcut=config.shortcut, widths=config.widths)
    check_config(config, dataset)
    check_reachable(config, model, dataset)
    run = RunDirectory.create(output, config, resume=resume, overwrite=overwrite)
    with Progress() as progress:
        apply = eval_apply(model)
        job = Job(
            config=config,
            dataset=dataset,
            model=model,
            apply=apply,
            train_apply=train_apply(model),
            loss=evaluation_loss(apply),
            evaluate=make_evaluate(apply, evaluation_inputs(dataset)),
            run=run,
            progress=progress,
        )
        results = [run_seed(job, seed) for seed in range(config.seeds)]
        write_results(job, results, time.perf_counter() - started)
        progress.console.print(stage_table(run.read_json("summary.json")))
        progress.note(f"report: {run.path / 'report.html'}")


@dataclass(frozen=True)
class CommandLine(Config):
    """Train, trace, prune, fine-tune and quantise a small ResNet on handwritten digits; writes a report."""

    output: Path = Path("runs/quickstart")
    """Run directory."""
    resume: bool = False
    """Continue a run that was stopped."""
    overwrite: bool = False
    """Delete an earlier run of that name first."""


def command(arguments: list[str] | None = None) -> int:
    """Parse and run; a setting that cannot work is one line on standard error and status 2."""
    line = tyro.cli(CommandLine, args=arguments)
    config = Config(**{field.name: getattr(line, field.name) for field in fields(Config)})
    try:
        main(config, line.output, line.resume, line.overwrite)
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
