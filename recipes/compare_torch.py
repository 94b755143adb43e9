"""Is it the same method as in PyTorch, and what did the published half-precision schedule do to it?

    python -m recipes.compare_torch resnet20.th --data npz:cifar10.npz --images 64 --probes 1 10 100

Takes any checkpoint that `interop.from_torch` reads and answers, JAX beside PyTorch: are logits, gradient,
Hessian-vector product and channel traces the same numbers; do the scores rank and prune the same channels; how
accurate is the pruned network in both; are the integers of the INT8 network the same; how long does a probe take and
how much memory. Then it repeats the schedule of
EHAP's released mixed-precision code (arXiv 2306.07030), whose probe i carries the weight 2^(16 - 8i), and says what
that does to the ranking. Writes a table, `comparison.json` and two plots to a run directory, and exits with status 1
where a figure is beyond its limit.

JAX runs on its default device, PyTorch on the CPU; time and memory of PyTorch are measured on a GPU where it sees one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from ehap_jax.curvature import channel_trace, gauss_newton_trace, is_kernel, rademacher
from ehap_jax.pruning import Scores, hessian_scores
from ehap_jax.training import Progress, RunDirectory
from interop.forms import to_torch_axes
from interop.parity import (
    Arrays,
    Pair,
    gradient_pair,
    hessian_vector_pair,
    logits_pair,
    relative,
    torch_batch,
    trace_pair,
)
from recipes.ranking import kept_overlap, spearman
from recipes.torch_cost import compare_cost
from recipes.torch_integers import compare_int8
from recipes.torch_job import PRECISION, Config, Job, prepare
from recipes.torch_limits import beyond_limits, limits
from recipes.torch_pruning import compare_method, pruned_accuracies
from recipes.torch_report import MEANING, write_results

VANISHED_AFTER = 20
"""The published scale of probe i is 2^(16 - 8i), which float32 rounds to 0 from i = 21 on."""


def compare_identity(job: Job) -> tuple[dict[str, Any], dict[str, Scores]]:
    """Are they the same numbers? Also the scores of both from the same probes."""
    nets, seed = job.nets, job.config.seed
    ours, theirs = logits_pair(nets, job.test)
    answers, expected = ours.argmax(axis=1), theirs.argmax(axis=1)
    seeds = [seed + i for i in range(job.config.same_probes)]
    traces = trace_pair(nets, job.train, job.labels, seeds)
    identity = {
        "logits_max_abs": float(np.abs(ours - theirs).max()),
        "predictions_that_differ": int(np.sum(answers != expected)),
        "gradient_relative": relative(*gradient_pair(nets, job.train, job.labels)),
        "hessian_vector_relative": relative(*hessian_vector_pair(nets, job.train, job.labels, seed)),
        "trace_relative": relative(*traces),
        **job.accuracies(ours, theirs),
    }
    by_path = {_path(nets, name): value for name, value in traces[0].items() if name in traces[1]}
    scores = hessian_scores(job.graph, nets.variables, by_path)
    return identity, {"JAX": scores, "PyTorch": torch_scores(nets, traces[1], scores.norms)}


def torch_scores(nets: Pair, traces: Arrays, norms: Mapping[str, np.ndarray]) -> Scores:
    """The reference's own scores, computed by PyTorch from its traces, under JAX's paths."""
    import torch

    from interop.reference.trace import ReferenceTrace

    reference = ReferenceTrace(
        {name: torch.from_numpy(np.asarray(value))[None] for name, value in traces.items()}, torch.ones(1)
    )
    found = reference.sensitivity(nets.module)
    return Scores({_path(nets, name): value.double().numpy() for name, value in found.items()}, norms, "hessian")


def reference_scores(job: Job) -> tuple[str, Scores]:
    """How the reference was found, and its scores."""
    config, nets = job.config, job.nets
    if config.reference != "probes":
        try:
            with job.progress.stage("exact trace", 1) as advance:
                trace = gauss_newton_trace(nets.apply, nets.variables, job.batch)
                advance()
            return "exact", hessian_scores(job.graph, nets.variables, trace)
        except ValueError:
            if config.reference == "exact":
                raise
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    with job.progress.stage("reference probes", 1) as advance:
        trace = channel_trace(
            nets.loss, nets.variables["params"], job.batch, key=key, num_probes=config.reference_probes
        )
        advance()
    return f"{config.reference_probes} probes", hessian_scores(job.graph, nets.variables, trace)


def fixed_scores(job: Job) -> dict[int, Scores]:
    """Number of probes -> scores, every probe weighing the same: each estimate goes on from the one before."""
    params, state, found = job.nets.variables["params"], None, {}
    counts = sorted(set(job.config.probes))
    with job.progress.stage("fixed schedule", counts[-1]) as advance:
        done = 0
        for count in counts:
            key = jax.random.key(job.config.seed)
            trace = channel_trace(job.nets.loss, params, job.batch, key=key, num_probes=count, state=state)
            state, found[count] = trace.state, hessian_scores(job.graph, job.nets.variables, trace)
            advance(count - done)
            done = count
    return found


def published_scores(job: Job, norms: Mapping[str, np.ndarray]) -> tuple[dict[int, Scores], float]:
    """Number of probes -> scores by the published schedule in PyTorch from the same probes; the first one's weight.

    Later probes than `VANISHED_AFTER` have the scale 0 and are not computed: they add exact zeros.
    """
    from interop.reference.trace import published_trace

    counts = sorted(set(job.config.probes))
    computed = min(counts[-1], VANISHED_AFTER)
    with job.progress.stage("published schedule", computed) as advance:

        def probes():
            for i in range(computed):
                yield same_probe(job, i)
                advance()

        trace = published_trace(job.nets.module, *torch_batch(job.train, job.labels), probes())
    found = {}
    for count in counts:
        means = {name: (p[:count].double().sum(dim=0) / count).numpy() for name, p in trace.products.items()}
        found[count] = torch_scores(job.nets, means, norms)
    return found, float(trace.weights[0] / trace.weights.sum())


def same_probe(job: Job, index: int) -> dict[str, Any]:
    """Probe `index` of `channel_trace` as PyTorch tensors."""
    import torch

    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(job.nets.variables["params"])
    }
    kernels = {path: leaf for path, leaf in leaves.items() if is_kernel(path, leaf)}
    drawn = rademacher(jax.random.fold_in(jax.random.key(job.config.seed), index), kernels)
    named = {
        job.nets.info.form.key_at(f"params/{path}"): np.ascontiguousarray(to_torch_axes(np.asarray(v)))
        for path, v in drawn.items()
    }
    return {name: torch.from_numpy(named[name]) for name, p in job.nets.module.named_parameters() if name in named}


def agreement(job: Job, found: Scores, expected: Scores) -> dict[str, Any]:
    """Rank correlation and the overlap of the kept channels at every ratio."""
    plans = {ratio: (job.plan(found, ratio), job.plan(expected, ratio)) for ratio in job.config.ratios}
    return {
        "spearman": spearman(found, expected),
        "kept_overlap": {f"{ratio:g}": kept_overlap(*both) for ratio, both in plans.items()},
    }


def compare(job: Job) -> tuple[dict[str, Any], dict[str, Scores]]:
    """Everything but the cost, as plain numbers for JSON, and the scores of both frameworks for the plot."""
    config = job.config
    with job.progress.stage("same numbers", 1) as advance:
        identity, both = compare_identity(job)
        advance()
    how, reference = reference_scores(job)
    fixed = fixed_scores(job)
    published, first_weight = published_scores(job, reference.norms)
    schedule = [
        {
            "probes": count,
            "fixed": agreement(job, fixed[count], reference),
            "published": agreement(job, published[count], reference),
            "same_kept_as_fixed": agreement(job, published[count], fixed[count])["kept_overlap"],
        }
        for count in fixed
    ]
    last = max(fixed)
    criteria = {
        "reference": reference,
        f"fixed, {last} probes": fixed[last],
        f"published, {last} probes": published[last],
    }
    info = job.nets.info
    method = compare_method(job, both["JAX"], both["PyTorch"])
    document = {
        "checkpoint": {
            "file": config.checkpoint.name,
            "layout": info.layout,
            "depth": info.depth,
            "shortcut": info.shortcut,
            "classes": info.num_classes,
            "channels_scored": int(sum(len(values) for values in reference.values.values())),
        },
        "identity": identity,
        "limits": limits(method),
        "scores": agreement(job, both["JAX"], both["PyTorch"]),
        "reference": how,
        "schedule": schedule,
        "weight_of_the_first_published_probe": first_weight,
        "pruned": pruned_accuracies(job, criteria),
        "method": method,
        "int8": compare_int8(job, reference),
        "cost": {},
        "meaning": MEANING,
    }
    return document, both


def main(config: Config, output: Path, overwrite: bool) -> list[str]:
    """Compare and write; returns what is beyond its limit."""
    started = time.perf_counter()
    if config.cost:  # leave the memory of a GPU to the processes that are measured
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with Progress() as progress, jax.default_matmul_precision(PRECISION):
        job = prepare(config, progress)
        run = RunDirectory.create(output, config, overwrite=overwrite)
        document, both = compare(job)
        document = {
            "config": run.read_json("config.json")
            | {"checkpoint": config.checkpoint.name, "data": file_name(config.data)},
            "versions": run.read_json("versions.json") | {"torch": version("torch")},
            **document,
            "seconds": round(time.perf_counter() - started, 1),
        }
        if config.cost:
            run.write_json("comparison.json", document)  # stands, whatever becomes of the processes
            document |= {"cost": compare_cost(job), "seconds": round(time.perf_counter() - started, 1)}
        write_results(run, document, both)
        progress.note(f"written to {run.path}")
    return beyond_limits(document)


@dataclass(frozen=True)
class CommandLine(Config):
    """Compare a PyTorch checkpoint in JAX and in PyTorch: numbers, scores, pruned accuracy, time and memory."""

    output: Path = Path("runs/compare_torch")
    """Run directory."""
    overwrite: bool = False
    """Delete an earlier run of that name first."""


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse and run. Status 1: a figure is beyond its limit; 2: a setting that cannot work."""
    line = tyro.cli(CommandLine, args=arguments)
    config = Config(**{field.name: getattr(line, field.name) for field in fields(Config)})
    try:
        beyond = main(config, line.output, line.overwrite)
    except (ValueError, KeyError, OSError, ImportError) as error:
        print(f"compare_torch: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    if beyond:
        print(f"compare_torch: beyond the limit: {', '.join(beyond)}", file=sys.stderr)
    return int(bool(beyond))


def file_name(data: str) -> str:
    """The data set without the folder it lies in."""
    kind, _, path = data.partition(":")
    return f"{kind}:{Path(path).name}" if path else kind


def _path(nets: Pair, name: str) -> str:
    """The variable path of a parameter with PyTorch's name."""
    return nets.info.form.path_of(name)


if __name__ == "__main__":
    sys.exit(command())
