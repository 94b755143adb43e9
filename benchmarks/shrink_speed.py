"""How fast the structure engine is, and what its networks run at.

    python -m benchmarks.shrink_speed                      # everything, then results/shrink_speed.json
    python -m benchmarks.shrink_speed --only plain         # or tracing, coupling, latency
    python -m benchmarks.shrink_speed --max-minutes 8      # fewer repeats where time runs out, and parts left for later
    python -m benchmarks.shrink_speed --quick              # small networks, few repeats: does it run?

Four parts. `tracing`: seconds to trace and to group ResNet-110 and a Vision Transformer of 12 layers. `plain`: compile
time and step time (loss, gradient and update of a training step; and evaluation) of a shrunk network against the same
widths written as a plain Linen model, run alternately. `coupling`: latency of the dense network, of one shrunk under
group coupling and of one shrunk under union coupling to the same fraction of MACs. `latency`: a table of layer
latencies is measured on this device (kept beside the results), and the networks that `allocate(latency=...)` and
`allocate(macs=...)` make of it are timed end to end against the dense one.

Times are the median and the least over repeats, in seconds, networks taken in turns so that a change of the machine's
load meets all alike. Weights are random: speed does not depend on them. With `--max-minutes` rounds end when the time
is over, after three at least, and no further part is begun (exit status 3); `--resume` does the parts that are missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.measure import provenance, read_results, write_results
from ehap_jax.graph import channel_groups, count_cost, trace_graph
from ehap_jax.models import ResNet, eval_apply, init_variables, make_model, train_apply
from ehap_jax.models.layers import batch_norm, classifier_head, convolution
from ehap_jax.pruning import (
    LatencyTable,
    OutOfReachError,
    PruningPlan,
    Scores,
    allocate,
    magnitude_scores,
    measure_latency,
    shrink,
    shrink_variables,
)
from ehap_jax.training.deadline import Deadline, OutOfTime

PARTS = ("tracing", "plain", "coupling", "latency")


class ViT(nn.Module):
    """ViT-Ti/4 for 32x32 images: 12 layers, width 192, 3 heads."""

    layers: int = 12
    width: int = 192

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (4, 4), strides=(4, 4))(x).reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=3)(y, y)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class PlainResNet(nn.Module):
    """A post-activation ResNet with projection shortcuts, every width of its own: what one would write by hand.

    inner: width of the first convolution of every block. streams: width of the stem and of the three stages.
    """

    inner: tuple[int, ...]
    streams: tuple[int, int, int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(
            batch_norm(convolution(x, self.streams[0], 3, dtype=None, name="conv1"), train, dtype=None, name="bn1")
        )
        for number, width in enumerate(self.inner):
            blocks = len(self.inner) // 3
            stage, first = number // blocks, number % blocks == 0
            stride, out, name = (
                (2 if stage and first else 1),
                self.streams[stage],
                f"layer{stage + 1}_{number % blocks}",
            )
            y = convolution(x, width, 3, stride, dtype=None, name=f"{name}_conv1")
            y = nn.relu(batch_norm(y, train, dtype=None, name=f"{name}_bn1"))
            y = batch_norm(
                convolution(y, out, 3, dtype=None, name=f"{name}_conv2"), train, dtype=None, name=f"{name}_bn2"
            )
            if stage and first:
                x = convolution(x, out, 1, stride, dtype=None, name=f"{name}_down")
                x = batch_norm(x, train, dtype=None, name=f"{name}_down_bn")
            x = nn.relu(y + x)
        return classifier_head(jnp.mean(x, axis=(1, 2)), 10, dtype=None)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int, deadline: Deadline) -> dict[str, dict[str, float]]:
    """Median and least seconds of every call; one round of all of them after another, three rounds at least."""
    for call in calls.values():
        seconds(call)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(repeats):
        if done >= 3 and deadline.passed:
            break
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: {"median": float(np.median(t)), "least": min(t), "rounds": len(t)} for name, t in taken.items()}


def compiled(function: Callable, *args) -> tuple[Callable, dict[str, float]]:
    """The compiled function, and the seconds to trace and to compile it."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    middle = time.perf_counter()
    done = lowered.compile()
    return done, {"trace": middle - start, "compile": time.perf_counter() - middle}


def images(batch: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 32, 32, 3)), jnp.float32)


def resnet(depth: int) -> tuple[ResNet, Any, Any]:
    model = make_model(f"resnet{depth}", 10, shortcut="B")
    assert isinstance(model, ResNet)
    variables = init_variables(model, jax.random.key(0), (32, 32, 3))
    return model, variables, trace_graph(eval_apply(model))(variables, images(1))


def measure_tracing(quick: bool) -> dict[str, Any]:
    cases = {"resnet110": make_model("resnet20" if quick else "resnet110", 10), "vit-12": ViT(2 if quick else 12)}
    found = {}
    for name, model in cases.items():
        variables = jax.eval_shape(model.init, jax.random.key(0), images(1))
        start = time.perf_counter()
        graph = trace_graph(model.apply)(variables, images(1))
        traced = time.perf_counter()
        groups = channel_groups(graph)
        grouped = time.perf_counter()
        union = channel_groups(graph, coupling="union")
        found[name] = {
            "trace": traced - start,
            "group": grouped - traced,
            "union": time.perf_counter() - grouped,
            "groups": len(groups),
            "union_groups": len(union),
            "nodes": sum(1 for _ in graph.body.walk()),
        }
    return found


def training_step(apply: Callable) -> Callable:
    def step(variables, x, labels):
        def loss(params):
            logits, state = apply({**variables, "params": params}, x)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean(), state

        grads, state = jax.grad(loss, has_aux=True)(variables["params"])
        return {**state, "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)}

    return step


def even_plan(graph, fraction: float) -> PruningPlan:
    """Group coupling keeps every writer of a stream equal, so that a plain model of the same widths exists."""
    variables = {path: np.random.default_rng(1).normal(size=v.shape) for path, v in graph.leaves.items()}
    return allocate(graph, magnitude_scores(graph, variables), macs=fraction, coupling="group", ranking="isomorphic")


def widths(plan: PruningPlan, path: str) -> int:
    return plan.shrunk_shape(path)[plan.axes[path]]


def measure_plain(quick: bool, batch: int, repeats: int, deadline: Deadline) -> dict[str, Any]:
    depth = 8 if quick else 56
    model, variables, graph = resnet(depth)
    plan = even_plan(graph, 0.4)
    blocks = [f"layer{s}_{b}" for s in (1, 2, 3) for b in range((depth - 2) // 6)]
    plain = PlainResNet(
        tuple(widths(plan, f"params/{block}/conv1/kernel") for block in blocks),
        tuple(widths(plan, f"params/layer{s}_0/conv2/kernel") for s in (1, 2, 3)),  # pyright: ignore[reportArgumentType]
    )
    small, x = shrink_variables(variables, plan), images(batch)
    labels = jnp.arange(batch) % 10
    own = plain.init(jax.random.key(0), x[:1])
    assert sum(a.size for a in jax.tree.leaves(own)) == sum(a.size for a in jax.tree.leaves(small)), (
        "not the same network"
    )
    found: dict[str, Any] = {"network": f"resnet{depth}", "batch": batch, "cost": count_cost(graph, plan)._asdict()}
    sides = {
        "shrunk": (shrink(eval_apply(model), plan), shrink(train_apply(model), plan), small),
        "plain": (eval_apply(plain), train_apply(plain), own),
    }
    for what, position, make in (("evaluation", 0, lambda f: f), ("training", 1, training_step)):
        calls, compile_times = {}, {}
        for name, side in sides.items():
            args = (side[2], x) if what == "evaluation" else (side[2], x, labels)
            runs = [compiled(make(side[position]), *args) for _ in range(1 if quick else 3)]
            calls[name] = partial(runs[-1][0], *args)
            compile_times[name] = {k: min(run[1][k] for run in runs) for k in runs[0][1]}
        times = in_turns(calls, repeats, deadline)
        found[what] = {
            "seconds": times,
            "compile": compile_times,
            "shrunk_over_plain": {k: times["shrunk"][k] / times["plain"][k] for k in ("median", "least")},
            "compile_shrunk_over_plain": compile_times["shrunk"]["compile"] / compile_times["plain"]["compile"],
        }
    return found


def time_plans(model, variables, plans: Mapping[str, PruningPlan], batch: int, repeats: int, deadline: Deadline):
    """Seconds of an evaluation of the dense network and of what every plan leaves of it."""
    x = images(batch)
    dense, _ = compiled(eval_apply(model), variables, x)
    calls: dict[str, Callable] = {"dense": partial(dense, variables, x)}
    for name, plan in plans.items():
        small = shrink_variables(variables, plan)
        run, _ = compiled(shrink(eval_apply(model), plan), small, x)
        calls[name] = partial(run, small, x)
    times = in_turns(calls, repeats, deadline)
    return {name: {**t, "over_dense": t["median"] / times["dense"]["median"]} for name, t in times.items()}


def measure_coupling(quick: bool, batch: int, repeats: int, deadline: Deadline) -> dict[str, Any]:
    model, variables, graph = resnet(8 if quick else 56)
    scores = magnitude_scores(graph, variables)
    found = {}
    for fraction in (0.5,) if quick else (0.25, 0.5, 0.75):
        plans = {
            coupling: allocate(graph, scores, macs=fraction, coupling=coupling)  # pyright: ignore[reportArgumentType]
            for coupling in ("group", "union")
        }
        costs = {name: count_cost(graph, plan)._asdict() for name, plan in plans.items()}
        timed = time_plans(model, variables, plans, batch, repeats, deadline)
        found[f"macs={fraction:g}"] = {"seconds": timed, "cost": costs}
    return {"network": f"resnet{model.depth}", "batch": batch, "full_cost": count_cost(graph)._asdict(), "plans": found}


def budget_plans(graph, scores: Scores, table: LatencyTable, fractions) -> tuple[dict[str, PruningPlan], dict]:
    """Plans for every fraction of MACs and of latency, and why there is none where the latency is out of reach."""
    plans, unreachable = {f"macs={f:g}": allocate(graph, scores, macs=f) for f in fractions}, {}
    for fraction in fractions:
        try:
            plans[f"latency={fraction:g}"] = allocate(graph, scores, latency=fraction, latency_table=table)
        except OutOfReachError as error:  # small layers may take as long with fewer channels
            unreachable[f"latency={fraction:g}"] = str(error)
    return plans, unreachable


def measure_budget(quick: bool, batch: int, repeats: int, cache: Path, deadline: Deadline) -> dict[str, Any]:
    model, variables, _ = resnet(8 if quick else 20)
    graph = trace_graph(eval_apply(model))(variables, images(batch))
    table = measure_latency(
        graph,
        fractions=(0.5, 1.0) if quick else (0.25, 0.5, 0.75, 1.0),
        repeats=3 if quick else 10,
        cache=cache,
        progress=lambda done, every: print(f"layer {done + 1} of {every}", flush=True),
    )
    scores = magnitude_scores(graph, variables)
    plans, unreachable = budget_plans(graph, scores, table, (0.7, 0.4))
    return {
        "network": f"resnet{model.depth}",
        "batch": batch,
        "device": table.device,
        "unreachable": unreachable,
        "seconds": time_plans(model, variables, plans, batch, repeats, deadline),
        "macs": {name: count_cost(graph, plan).macs / count_cost(graph).macs for name, plan in plans.items()},
    }


def table(results: Mapping[str, Any]) -> str:
    lines = []
    for name, row in results.get("tracing", {}).items():
        if name in ("resnet110", "vit-12"):
            lines.append(
                f"{name:10} trace {row['trace']:6.2f} s  group {row['group']:6.2f} s  union {row['union']:6.2f} s  "
                f"({row['nodes']} nodes, {row['groups']} groups)"
            )
    for what in ("evaluation", "training"):
        row = results.get("plain", {}).get(what)
        if row is not None:
            times, built = row["seconds"], row["compile"]
            lines.append(
                f"{what:10} shrunk {times['shrunk']['median']:.4f} s  plain {times['plain']['median']:.4f} s  ratio "
                f"{row['shrunk_over_plain']['median']:.3f} (least: {row['shrunk_over_plain']['least']:.3f})  compile "
                f"{built['shrunk']['compile']:.2f} s / {built['plain']['compile']:.2f} s, trace "
                f"{built['shrunk']['trace']:.2f} s / {built['plain']['trace']:.2f} s"
            )
    parts = dict(results.get("coupling", {}).get("plans", {}))
    if "latency" in results:
        parts["latency target"] = results["latency"]
    for name, part in parts.items():
        for network, row in part["seconds"].items():
            lines.append(f"{name:14} {network:12} {1e3 * row['median']:9.2f} ms  {row['over_dense']:.3f} of dense")
        lines += [f"{name:14} {network}: out of reach" for network in part.get("unreachable", {})]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/shrink_speed.json"))
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small networks, for a look at whether it runs")
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--resume", action="store_true", help="leave out the parts that --out has")
    options = parser.parse_args()
    quick, batch, repeats, deadline = options.quick, options.batch, options.repeats, Deadline(options.max_minutes)
    if quick and options.out == Path("results/shrink_speed.json"):
        parser.error("--quick needs an --out of its own: its numbers are no results")
    measure: dict[str, Callable[[], dict[str, Any]]] = {
        "tracing": lambda: measure_tracing(quick),
        "plain": lambda: measure_plain(quick, batch, repeats, deadline),
        "coupling": lambda: measure_coupling(quick, batch, repeats, deadline),
        "latency": lambda: measure_budget(quick, batch, repeats, options.out.with_suffix(".layers.json"), deadline),
    }
    results = read_results(options.out)
    wanted = PARTS if options.only is None else (options.only,)
    try:
        for part in (p for p in wanted if not (options.resume and p in results)):
            deadline.check(f"{', '.join(results) or 'no part'} measured; go on with --resume")
            results[part] = {**measure[part](), **provenance()}
            write_results(options.out, results)
    except OutOfTime as stopped:
        print(table(results))
        print(stopped, file=sys.stderr)
        sys.exit(3)
    print(table(results))


if __name__ == "__main__":
    main()
