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
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ehap_jax.curvature import channel_trace, gauss_newton_trace, is_kernel, rademacher
from ehap_jax.pruning import (
    Scores,
    hessian_scores,
    mask_variables,
    shrink,
    shrink_variables,
)
from ehap_jax.quant import INT8, fake_quant, to_integer
from ehap_jax.report import score_scatter
from ehap_jax.training import Progress, RunDirectory
from interop.compare import LIMITS
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME = (
    "logits_max_abs",
    "predictions_that_differ",
    "gradient_relative",
    "hessian_vector_relative",
    "trace_relative",
)
"""The figures with a limit, those of `interop.compare`."""

VANISHED_AFTER = 20
"""The published scale of probe i is 2^(16 - 8i), which float32 rounds to 0 from i = 21 on."""

MEANING = {
    "identity": "JAX against PyTorch on the same weights, images and probes. relative: ‖JAX - PyTorch‖ / ‖PyTorch‖ "
    "over all elements; max_abs: the largest difference. limits: what is allowed.",
    "scores": "HAP's score of every output channel from the same probes in both. spearman: rank correlation over all "
    "channels; kept_overlap: for every kept fraction of channels, intersection over union of the kept channels.",
    "schedule": "Per number of probes, against the reference ranking: fixed weighs all probes alike (JAX), published "
    "weighs probe i by 2^(16 - 8i) as the released code does (PyTorch, the same probes). In float32 throughout, so "
    "that the schedule is the only difference. same_kept_as_fixed: overlap of the two.",
    "reference": "exact: the trace without probes (the Gauss-Newton trace, proven equal to the Hessian's); "
    "probes: many equally weighted probes, drawn independently of those compared.",
    "pruned": "Test accuracy right after pruning, without fine-tuning, per criterion and kept fraction of channels. "
    "JAX runs the masked network, PyTorch the shrunk one; logits_max_abs is the largest difference between the two.",
    "int8": "The dense network and the one pruned most, in INT8 with ranges from the training images, no training: "
    "every quantised activation of the compared test images as `to_integer` and `interop.torch_integer` compute it. "
    "not_comparable: what has no integer form in one of the two.",
    "method": "Under union coupling of a post-activation ResNet: each framework ranks and prunes by itself, from its "
    "own scores of the same probes (`interop.reference.union`). channels_that_differ: kept by one of the two only.",
    "cost": "Each framework in a process of its own, the same images, float32 products as precise as for the figures "
    "above (`precision`): first_call_seconds compiles, the others are from the second call. On a machine that "
    "others use (load_average above the number of cores) compare the CPU seconds. not_measured: why there are none. "
    "Memory in MiB of resident memory (on a GPU, of its memory); memory_before has both frameworks imported.",
}


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
    limits = {name: LIMITS[name] for name in SAME} | {"pruned_logits_max_abs": LIMITS["logits_max_abs"]}
    limits["int8_integers_that_differ"] = 0
    if method:
        limits |= {"method_channels_that_differ": 0, "method_logits_max_abs": LIMITS["logits_max_abs"]}
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
        "limits": limits,
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


def beyond_limits(document: Mapping[str, Any]) -> list[str]:
    """The names of the figures that are beyond their limits (NaN included)."""
    found = {name: document["identity"][name] for name in SAME}
    found |= _worst(document)
    return [name for name, value in found.items() if not value <= document["limits"][name]]


def _worst(document: Mapping[str, Any]) -> dict[str, float]:
    """The limited figures that several rows have; those of INT8 and of the method only where they were compared."""
    int8 = [row["integers_that_differ"] for row in document["int8"] if "not_comparable" not in row]
    worst = {"pruned_logits_max_abs": _largest(document["pruned"], "logits_max_abs")}
    if document["method"]:
        figures = ("channels_that_differ", "logits_max_abs")
        worst |= {f"method_{figure}": _largest(document["method"], figure) for figure in figures}
    return worst | ({"int8_integers_that_differ": sum(int8)} if int8 else {})


def _largest(rows: Sequence[Mapping[str, Any]], figure: str) -> float:
    return float(np.max([row[figure] for row in rows]))  # NaN where one is


def tables(document: Mapping[str, Any]) -> list[Table]:
    """The comparison for people to read."""
    beyond, limits = beyond_limits(document), document["limits"]
    name = document["checkpoint"]["file"]
    same = Table("JAX against PyTorch", "found", "at most", title=f"{name}: the same numbers?", title_justify="left")
    found = document["identity"] | _worst(document)
    for figure, limit in limits.items():
        value = f"{found[figure]:.3g}{' !' if figure in beyond else ''}" if figure in found else "not comparable"
        same.add_row(figure.replace("_", " "), value, f"{limit:g}")
    identity, scores = document["identity"], document["scores"]
    same.add_row("accuracy", f"{identity['accuracy_jax']:.2%} | {identity['accuracy_torch']:.2%}", "")
    same.add_row("scores, Spearman", f"{scores['spearman']:.6f}", "")
    for ratio, overlap in scores["kept_overlap"].items():
        same.add_row(f"kept channels in common, {ratio} kept", f"{overlap:.4f}", "")

    ratios = list(scores["kept_overlap"])
    title = f"Against the {document['reference']} ranking: probes weighed alike | as published"
    ranking = Table("probes", "Spearman", *[f"kept in common, {r} kept" for r in ratios], title=title)
    ranking.title_justify = "left"
    for row in document["schedule"]:
        fixed, published = row["fixed"], row["published"]
        cells = [f"{fixed['spearman']:.4f} | {published['spearman']:.4f}"]
        cells += [f"{fixed['kept_overlap'][r]:.3f} | {published['kept_overlap'][r]:.3f}" for r in ratios]
        ranking.add_row(str(row["probes"]), *cells)

    pruned = Table("kept channels", "criterion", "JAX", "PyTorch", title="Accuracy after pruning, not fine-tuned")
    pruned.title_justify = "left"
    for row in document["pruned"]:
        pruned.add_row(f"{row['kept_channels']:g}", row["criterion"], *_accuracies(row))

    method = Table("kept channels", "kept by one only", "logits", "JAX", "PyTorch", title="Ranked and pruned by each")
    method.title_justify = "left"
    for row in document["method"]:
        cells = (str(row["channels_that_differ"]), f"{row['logits_max_abs']:.3g}", *_accuracies(row))
        method.add_row(f"{row['kept_channels']:g}", *cells)

    int8 = Table("kept channels", "integers", "differ", "accuracy, JAX", "PyTorch", title="INT8, not trained")
    int8.title_justify = "left"
    for row in document["int8"]:
        if "not_comparable" in row:
            int8.add_row(f"{row['kept_channels']:g}", f"not comparable: {row['not_comparable']}")
            continue
        integers = (f"{row['integers']:,}", str(row["integers_that_differ"]))
        int8.add_row(f"{row['kept_channels']:g}", *integers, *_accuracies(row))

    cost = Table("", *document["cost"], title="Cost of a trace, each in a process of its own", title_justify="left")
    devices = [each.get("device") or f"not measured: {each['not_measured']}" for each in document["cost"].values()]
    cost.add_row("device", *devices)
    for key, what in (
        ("seconds_per_probe", "seconds per probe"),
        ("cpu_seconds_per_probe", "CPU seconds per probe"),
        ("first_call_seconds", "first call, s"),
        ("memory_before", "memory before, MiB"),
        ("peak_memory", "peak memory, MiB"),
        ("load_average", "load average meanwhile"),
    ):
        cost.add_row(what, *[f"{each[key]:.4g}" if key in each else "" for each in document["cost"].values()])
    return [same, ranking, pruned, *([method] if method.rows else []), int8, *([cost] if document["cost"] else [])]


def _accuracies(row: Mapping[str, Any]) -> list[str]:
    return [f"{row[f'accuracy_{framework}']:.2%}" for framework in ("jax", "torch")]


def schedule_figure(document: Mapping[str, Any]) -> Figure:
    """Agreement with the reference over the number of probes, for both schedules."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'ehap-jax[report]'") from error
    rows = document["schedule"]
    ratio = list(document["scores"]["kept_overlap"])[-1]
    figure = Figure(figsize=(8.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title in zip(panels, ("Spearman of all scores", f"kept channels in common, {ratio} kept"), strict=True):
        for schedule, colour, label in (
            ("fixed", "#0072B2", "probes weighed alike"),
            ("published", "#D55E00", "published schedule"),
        ):
            values = [
                row[schedule]["spearman"] if axes is panels[0] else row[schedule]["kept_overlap"][ratio] for row in rows
            ]
            axes.plot([row["probes"] for row in rows], values, marker="o", markersize=4, color=colour, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("probes")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"Agreement with the {document['reference']} ranking", x=0.01, ha="left", fontsize=10)
    return figure


def write_results(run: RunDirectory, document: dict[str, Any], both: Mapping[str, Scores], console: Console) -> None:
    """The table on the screen and as text, the JSON file and the two plots."""
    shown = tables(document)
    for table in shown:
        console.print(table)
    plain = Console(record=True, width=110, file=StringIO())
    for table in shown:
        plain.print(table)
    run.write_text("comparison.txt", plain.export_text())
    run.write_json("comparison.json", document)
    scatter = score_scatter(both["PyTorch"].values, both["JAX"].values, ("PyTorch", "JAX"))
    for name, figure in (("schedule.png", schedule_figure(document)), ("scores.png", scatter)):
        partial = run.file(f".{name}")
        figure.savefig(partial, dpi=150, format="png")
        partial.replace(run.file(name))


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
        write_results(run, document, both, Console())
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
