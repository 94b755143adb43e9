"""Is it the same method as in PyTorch, and what did the published half-precision schedule do to it?

    python -m recipes.compare_torch resnet20.th --data npz:cifar10.npz --images 64 --probes 1 10 100

Takes any checkpoint that `interop.from_torch` reads and answers, JAX beside PyTorch: are logits, gradient,
Hessian-vector product and channel traces the same numbers; do the scores rank and prune the same channels; how
accurate is the pruned network in both; are the integers of the INT8 network the same; how long does a probe take and
how much memory. It also repeats the schedule of EHAP's released mixed-precision code (arXiv 2306.07030), whose probe i
carries the weight 2^(16 - 8i), and says what that does to the ranking. Writes a table, `comparison.json` and two plots
to a run directory, and exits with status 1 where a figure is beyond its limit.

JAX runs on its default device, PyTorch on the CPU; time and memory of PyTorch are measured on a GPU where it sees one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import tyro

from ehap_jax.pruning import Scores
from ehap_jax.training import Progress, RunDirectory, check_output
from recipes.command import Missed, reported
from recipes.torch_comparison.cost import compare_cost
from recipes.torch_comparison.identity import compare_identity
from recipes.torch_comparison.integers import compare_int8
from recipes.torch_comparison.job import PRECISION, Config, Job, prepare
from recipes.torch_comparison.limits import beyond_limits, limits
from recipes.torch_comparison.pruning import compare_method, pruned_accuracies
from recipes.torch_comparison.published_schedule import (
    compare_schedules,
    fixed_scores,
    published_scores,
    reference_scores,
)
from recipes.torch_comparison.report import MEANING, write_results
from recipes.torch_comparison.scores import agreement


@dataclass(frozen=True)
class CommandLine(Config):
    """Compare a PyTorch checkpoint in JAX and in PyTorch: numbers, scores, pruned accuracy, time and memory."""

    output: Path = Path("runs/compare_torch")
    """Run directory."""
    overwrite: bool = False
    """Delete an earlier run of that name first."""


def main(config: Config, output: Path, overwrite: bool) -> list[str]:
    """Compare and write; returns what is beyond its limit."""
    started = time.perf_counter()
    if config.cost:  # leave the memory of a GPU to the processes that are measured
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with Progress() as progress, jax.default_matmul_precision(PRECISION):
        job = prepare(config, progress)
        run = RunDirectory.create(output, config, overwrite=overwrite)
        identity, both = compare_identity(job)
        how, reference = reference_scores(job)
        fixed = fixed_scores(job)
        published, first_weight = published_scores(job, reference.norms)
        last = max(fixed)
        criteria = {
            "reference": reference,
            f"fixed, {last} probes": fixed[last],
            f"published, {last} probes": published[last],
        }
        method = compare_method(job, both["JAX"], both["PyTorch"])
        document = {
            **subject(job, run, reference),
            "identity": identity,
            "limits": limits(method),
            "scores": agreement(job, both["JAX"], both["PyTorch"]),
            "reference": how,
            "schedule": compare_schedules(job, fixed, published, reference),
            "weight_of_the_first_published_probe": first_weight,
            "pruned": pruned_accuracies(job, criteria),
            "method": method,
            "int8": compare_int8(job, reference),
            "cost": {},
            "meaning": MEANING,
            "seconds": round(time.perf_counter() - started, 1),
        }
        if config.cost:
            run.write_json("comparison.json", document)  # stands, whatever becomes of the processes
            document |= {"cost": compare_cost(job), "seconds": round(time.perf_counter() - started, 1)}
        write_results(run, document, both)
        progress.note(f"written to {run.path}")
    return beyond_limits(document)


def subject(job: Job, run: RunDirectory, scores: Scores) -> dict[str, Any]:
    """Of what and with what a comparison is, without the folders of the machine."""
    config, info = job.config, job.nets.info
    kind, _, path = config.data.partition(":")
    names = {"checkpoint": config.checkpoint.name, "data": f"{kind}:{Path(path).name}" if path else kind}
    return {
        "config": run.read_json("config.json") | names,
        "versions": run.read_json("versions.json") | {"torch": version("torch")},
        "checkpoint": {
            "file": config.checkpoint.name,
            "layout": info.layout,
            "depth": info.depth,
            "shortcut": info.shortcut,
            "classes": info.num_classes,
            "channels_scored": sum(map(len, scores.values.values())),
        },
    }


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run. Status 1: a figure is beyond its limit; 2: a setting that cannot work."""
    line = tyro.cli(CommandLine, args=arguments)
    config = Config(**{field.name: getattr(line, field.name) for field in fields(Config)})

    def work() -> None:
        check_output(line.output, overwrite=line.overwrite)
        try:
            beyond = main(config, line.output, line.overwrite)
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        if beyond:
            raise Missed(f"beyond the limit: {', '.join(beyond)}")

    return reported(work, "compare_torch", line.output, resumable=False)


if __name__ == "__main__":
    sys.exit(command())
