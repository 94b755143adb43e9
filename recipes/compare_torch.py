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

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from ehap_jax.curvature import channel_trace, gauss_newton_trace, is_kernel, rademacher
from ehap_jax.pruning import (
    Scores,
    hessian_scores,
    mask_variables,
    shrink,
    shrink_variables,
)
from ehap_jax.quant import INT8, fake_quant, to_integer
from ehap_jax.training import Progress, RunDirectory
from interop.forms import RESNET, to_torch_axes
from interop.parity import (
    Arrays,
    Pair,
    gradient_pair,
    hessian_vector_pair,
    jax_batch,
    logits_pair,
    pair,
    relative,
    torch_batch,
    torch_images,
    torch_logits,
    trace_pair,
)
from interop.to_torch import to_torch
from recipes.ranking import kept_overlap, spearman
from recipes.torch_job import PRECISION, Config, Job, prepare
from recipes.torch_limits import beyond_limits, limits
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


def pruned_accuracies(job: Job, criteria: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """Test accuracy after pruning in both frameworks, and how far their logits differ."""
    from interop.torch_models import load

    rows = []
    forward = jax.jit(job.nets.apply)
    with job.progress.stage("pruned accuracy", len(criteria) * len(job.config.ratios)) as advance:
        for ratio in job.config.ratios:
            for criterion, scores in criteria.items():
                plan = job.plan(scores, ratio)
                ours = np.asarray(forward(mask_variables(job.nets.variables, plan), job.test))
                module = load(to_torch(shrink_variables(job.nets.variables, plan), plan))
                theirs = torch_logits(module, job.test)
                rows.append(
                    {
                        "kept_channels": ratio,
                        "criterion": criterion,
                        **job.accuracies(ours, theirs),
                        "logits_max_abs": float(np.abs(ours - theirs).max()),
                    }
                )
                advance()
    return rows


def compare_method(job: Job, jax_scores: Scores, torch_scores: Scores) -> list[dict[str, Any]]:
    """Ranking and pruning in each framework by its own scores, where `interop.reference.union` has them; else nothing.

    PyTorch starts from the full network and its scores, and knows nothing of JAX's graph, plan or weights.
    """
    nets, config = job.nets, job.config
    if config.coupling != "union" or nets.info.form is not RESNET:
        return []
    import torch

    from interop.reference.union import prune_union

    names = {path: nets.info.form.key_at(path).removesuffix(".weight") for path in torch_scores.values}
    names = {path: name for path, name in names.items() if name != "linear"}
    own = {name: torch.from_numpy(torch_scores.values[path]) for path, name in names.items()}
    forward, rows = jax.jit(nets.apply), []
    with job.progress.stage("pruned by each framework", len(config.ratios)) as advance:
        for ratio in config.ratios:
            plan = job.plan(jax_scores, ratio)
            ours = np.asarray(forward(mask_variables(nets.variables, plan), job.test))
            kept = torch_kept(own, ratio)
            theirs = torch_logits(prune_union(nets.module, kept), job.test)
            rows.append(
                {
                    "kept_channels": ratio,
                    "channels_that_differ": sum(
                        len(np.setxor1d(plan.keep.get(path, np.arange(len(own[name]))), kept[name].numpy()))
                        for path, name in names.items()
                    ),
                    "logits_max_abs": float(np.abs(ours - theirs).max()),
                    **job.accuracies(ours, theirs),
                }
            )
            advance()
    return rows


def torch_kept(scores: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """What PyTorch keeps, at most this part of all: what layers at their limit keep beyond it, others give up.

    Scores of exactly zero are of dead channels, which go before those estimated to be negative, as in `allocate`.
    """
    from interop.reference.union import kept_channels

    scores = {name: values.masked_fill(values == 0, -np.inf) for name, values in scores.items()}
    total = sum(len(values) for values in scores.values())
    most = int(ratio * total + 1e-9)
    for asked in range(most, 0, -1):
        kept = kept_channels(scores, asked / total)
        if sum(map(len, kept.values())) <= most:
            return kept
    raise ValueError(f"PyTorch cannot keep as few as {ratio:g} of the channels: every layer keeps some")


def compare_int8(job: Job, scores: Scores) -> list[dict[str, Any]]:
    """Do both run the same integers? The dense network, and the one that keeps the least."""
    nets, ratio = job.nets, min(job.config.ratios)
    plan = job.plan(scores, ratio)
    networks = {1.0: (nets.apply, nets.variables)}
    networks[ratio] = (shrink(nets.apply, plan), shrink_variables(nets.variables, plan))
    rows = []
    with job.progress.stage("INT8 integers", len(networks)) as advance:
        for kept, (apply, variables) in networks.items():
            row: dict[str, Any] = {"kept_channels": kept}
            try:
                row |= _same_integers(job, apply, variables)
            except NotImplementedError as error:
                row["not_comparable"] = str(error)
            rows.append(row)
            advance()
    return rows


def _same_integers(job: Job, apply: Any, variables: Any) -> dict[str, Any]:
    from interop.torch_integer import IntegerModule

    images = job.test[: job.config.int8_images]
    quantized = fake_quant(apply, rules=INT8)
    observe = jax.jit(partial(quantized.apply, update=True))
    _, ranges = observe(variables, quantized.init(variables, job.train[:1]), job.train)
    integers = to_integer(quantized, variables, ranges, example=images)
    module = IntegerModule(integers, images.shape[1:])
    ours, logits = jax.device_get(jax.jit(lambda network, x: (network.tensors(x), network(x)))(integers, images))
    theirs = {name: value.numpy() for name, value in module.tensors(torch_images(images)).items()}
    logits_torch = torch_logits(module, images)
    return {
        "integers": int(sum(value.size for value in ours.values())),
        "integers_that_differ": int(sum(np.sum(ours[name] != theirs[name]) for name in ours)),
        "logits_that_differ": int(np.sum(logits != logits_torch)),
        **job.accuracies(logits, logits_torch),
    }


def measure(framework: str, checkpoint: Path, layout: str, images, labels, probes: int) -> dict[str, Any]:
    """Time and memory of a trace; meant for a process of its own, whose precision it sets. Memory in MiB."""
    with jax.default_matmul_precision(PRECISION):
        return _measure(framework, checkpoint, layout, images, labels, probes)


def _measure(framework: str, checkpoint: Path, layout: str, images, labels, probes: int) -> dict[str, Any]:
    nets = pair(checkpoint, layout)
    before = _memory()["now"]
    if framework == "JAX":
        batch = jax_batch(images, labels)
        key, precision = jax.random.key(0), jax.config.jax_default_matmul_precision  # pyright: ignore

        def trace() -> None:
            estimate = channel_trace(nets.loss, nets.variables["params"], batch, key=key, num_probes=probes)
            jax.block_until_ready(estimate.mean)
    else:
        import torch

        from interop.reference.trace import fixed_trace, rademacher_probes

        torch.set_float32_matmul_precision(PRECISION)
        torch.backends.cudnn.allow_tf32 = False
        precision = torch.get_float32_matmul_precision()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module = nets.module.to(device)
        drawn = list(rademacher_probes(module, probes, seed=0))
        x, y = (tensor.to(device) for tensor in torch_batch(images, labels))

        def trace() -> None:
            fixed_trace(module, x, y, drawn)  # checks its products, and so waits for them

    seconds, cpu_seconds = [], []
    for _ in range(2):
        started, cpu_started = time.perf_counter(), time.process_time()
        trace()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    where, on_device = _device_peak(framework)
    return {
        "device": where,
        "precision": precision,
        "first_call_seconds": seconds[0],
        "seconds_per_probe": seconds[1] / probes,
        "cpu_seconds_per_probe": cpu_seconds[1] / probes,
        "memory_before": before,
        "peak_memory": _memory()["peak"] if on_device is None else on_device,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
    }


def _device_peak(framework: str) -> tuple[str, float | None]:
    """The device that was measured, and the most memory it had in use, in MiB; None on a CPU."""
    if framework == "JAX":
        device = jax.devices()[0]
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return str(device.device_kind), None if peak is None else peak / 2**20
    import torch

    if not torch.cuda.is_available():
        return "cpu", None
    return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**20


def _memory() -> dict[str, float]:
    """Resident memory of this process in MiB, now and at most (`ru_maxrss` counts the parent's, too, on Linux)."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(lines[entry].split()[0]) / 1024 for name, entry in (("now", "VmRSS"), ("peak", "VmHWM"))}
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return {"now": peak, "peak": peak}


def compare_cost(job: Job) -> dict[str, Any]:
    """`measure` for each framework, one after the other, each in a fresh process; or why it could not be measured."""
    config, cost = job.config, {}
    with job.progress.stage("time and memory", 2) as advance:
        for framework in ("JAX", "PyTorch"):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                arguments = (config.checkpoint, config.layout, job.train, job.labels, config.same_probes)
                try:
                    cost[framework] = pool.submit(measure, framework, *arguments).result()
                except (RuntimeError, MemoryError, OSError) as error:  # it died, or found too little memory
                    cost[framework] = {"not_measured": f"{type(error).__name__}: {error}"}
            advance()
    return cost


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
