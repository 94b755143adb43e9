"""Where the time of one probe goes: its convolutions one by one, and what is left.

    python -m benchmarks.probe_parts                       # ResNet-32, batch 128, then results/probe_parts.json
    python -m benchmarks.probe_parts --quick --out /tmp/parts.json

A probe on a linearised gradient is five convolutions for every kernel (benchmarks/probe_rows.py, `PASSES`): x' * w,
x * v and x' * v forward, and two backward through the transpose. For every size of kernel in the network the script
times one forward and one backward alone, in seconds; then two pairs that one wider convolution could compute: the
sum x' * w + x * v with inputs and kernels side by side (`sum`), and x' * w, x' * v with the kernels side by side
(`both`), each as two convolutions and as one. Then the whole compiled step, and the sum of its parts. Beside them
stands the gradient alone, as one program and as two (`ehap_jax.training.make_epoch` takes two on a CPU), and the bytes
that a linearisation keeps, beside those of `jax.linearize(jax.grad(loss), params)`.

Least of repeated calls, on the wall clock and (where the device is a CPU) on the CPU clock of the process, all threads
together, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import least, provenance, write_results
from benchmarks.probe_rows import NETWORKS, Row, loss_and_start
from ehap_jax.curvature import Policy
from ehap_jax.curvature.probe_loop import (
    Run,
    add_linear_chunk,
    begin,
    blank_state,
    linearizations,
    linearize_chunk,
)
from ehap_jax.curvature.probes import is_kernel
from ehap_jax.curvature.problem import prepare
from ehap_jax.curvature.taps import Site


def size_of(site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What sites of one cost share: shapes of input, kernel and output."""
    return (site.node.inputs[1 - site.kernel].shape, site.kernel_shape, site.node.outputs[0].shape)


def time_site(site: Site, seconds: float) -> dict[str, Any]:
    """One use of a kernel alone, and the two pairs."""
    x_shape, w_shape, y_shape = size_of(site)
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (x_shape, x_shape, w_shape, w_shape, y_shape)
    x, other, w, v, d = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    apply = site.apply

    def backward(d, w):
        (found,) = jax.linear_transpose(lambda x: apply(x, w), x)(d)
        return found

    found: dict[str, Any] = {
        "input": x_shape,
        "kernel": w_shape,
        "output": y_shape,
        "forward": timed(apply, (x, w), seconds),
        "backward": timed(backward, (d, w), seconds),
    }
    if site.node.name != "conv_general_dilated" or site.node.params["feature_group_count"] != 1:
        return found
    dims = site.node.params["dimension_numbers"]
    features, (out, inner) = dims.lhs_spec[1], dims.rhs_spec[:2]

    def convolve(x, w):
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        return jax.lax.conv_general_dilated(x, w, **{name: site.node.params[name] for name in names})

    def sum_apart(x, other, w, v):
        return convolve(x, w) + convolve(other, v)

    def sum_as_one(x, other, w, v):
        return convolve(jnp.concatenate([x, other], features), jnp.concatenate([w, v], inner))

    def both_apart(x, w, v):
        return convolve(x, w), convolve(x, v)

    def both_as_one(x, w, v):
        return tuple(jnp.split(convolve(x, jnp.concatenate([w, v], out)), 2, dims.out_spec[1]))

    pairs = {"sum": ((sum_apart, sum_as_one), (x, other, w, v)), "both": ((both_apart, both_as_one), (x, w, v))}
    for name, (ways, arguments) in pairs.items():
        apart, as_one = (timed(way, arguments, seconds) for way in ways)
        found[name] = {"apart": apart, "as_one": as_one}
    return found


def time_gradient(
    loss: Callable, variables: Any, batch: Any, seconds: float
) -> dict[str, dict[str, float] | dict[str, dict[str, float]]]:
    """The loss, and its gradient as one program and as two: what the second reads, the first has written."""
    ahead = jax.jit(lambda p, batch: jax.vjp(lambda p: loss(p, batch), p))
    back = jax.jit(lambda backward, one: backward(one)[0])

    def apart() -> Any:
        value, backward = ahead(variables, batch)
        return back(backward, jnp.ones_like(value))

    return {
        "forward": timed(loss, (variables, batch), seconds),
        "gradient": {"as_one": timed(jax.grad(loss), (variables, batch), seconds), "apart": least(apart, seconds)},
    }


def kept_bytes(row: Row) -> dict[str, dict[str, int]]:
    """What is kept of the linearised gradient, here and by JAX, in single and in half precision."""
    found = {}
    for precision in ("float32", "float16"):
        loss, variables, batch, _, _ = loss_and_start(row)
        policy = Policy(precision)
        problem = prepare(loss, variables, batch, policy=policy, select=is_kernel, channel_axis=-1, microbatch=None)
        one = blank_state(Run(loss, problem, "linearize"), jax.random.key(0), policy).loss_scale
        arguments = (loss, problem.layout, None, problem.leaves, problem.chunks[0], one)
        ours = jax.eval_shape(linearize_chunk, *arguments)
        low = jax.tree.map(partial(lower, precision), variables)
        images, labels = batch

        def linearized(params, low, images, labels, loss=loss):
            return jax.linearize(jax.grad(lambda p: loss({**low, "params": p}, (images, labels))), params)

        plain = jax.eval_shape(linearized, low["params"], low, images.astype(precision), labels)
        found[precision] = {
            name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
            for name, kept in (("ours", ours.kept), ("jax", plain))
        }
    return found


def lower(precision: str, x: jax.Array) -> jax.Array:
    return x.astype(precision) if jnp.issubdtype(x.dtype, jnp.floating) else x


def timed(function: Callable, arguments: tuple, seconds: float) -> dict[str, float]:
    run = jax.jit(function)
    return least(lambda: run(*arguments), seconds)


def measure(row: Row, seconds: float) -> dict[str, Any]:
    """The step, and every size of kernel in it."""
    loss, variables, batch, _, _ = loss_and_start(row)
    problem = prepare(
        loss, variables, batch, policy=Policy(), select=is_kernel, channel_axis=-1, microbatch=row.chunk or None
    )
    state = blank_state(Run(loss, problem, "linearize"), jax.random.key(0), Policy())
    (linear, *_) = linearizations(Run(loss, problem, "linearize"), state)
    v, found = begin(problem.layout, None, problem.leaves, state)
    scales = (state.loss_scale, state.probe_scale)
    step = (problem.layout, None, linear, v, problem.weights[0], scales, found)
    whole = least(lambda: add_linear_chunk(*step), seconds)
    sites = linear.taps.sites
    counts = Counter(size_of(site) for site in sites)
    kinds = {size_of(site): site for site in sites}
    first = size_of(sites[0])
    parts = []
    for size, site in kinds.items():
        row_of = {"uses": counts[size], **time_site(site, seconds / 10), "reads_images": size == first}
        parts.append(row_of)
        print(line(row_of), flush=True)
    return {
        "network": row.network,
        "batch": row.batch,
        "step": whole,
        "parts": parts,
        **sums(parts, whole),
        **time_gradient(loss, variables, batch, seconds / 3),
        "kept_bytes": kept_bytes(row),
        **provenance(),
    }


def sums(parts: list[dict[str, Any]], whole: dict[str, float]) -> dict[str, Any]:
    """Seconds of all convolutions of a probe if each took what it takes alone, and of what remains."""
    found = {}
    for clock in whole:
        alone = saved = 0.0
        for part in parts:
            forward, backward = (1, 0) if part["reads_images"] else (3, 2)
            alone += part["uses"] * (forward * part["forward"][clock] + backward * part["backward"][clock])
            if "sum" in part and not part["reads_images"]:
                # The sum is merged backward; forward x * v alone is needed as well, so there x' * w and x' * v are.
                for pair in ("sum", "both"):
                    saved += part["uses"] * max(part[pair]["apart"][clock] - part[pair]["as_one"][clock], 0.0)
        found[clock] = {"alone": alone, "rest": whole[clock] - alone, "merged_would_save": saved}
    return {"sums": found}


def line(part: dict[str, Any]) -> str:
    def milliseconds(found: dict[str, float]) -> str:
        return f"{1e3 * found['cpu_seconds']:.1f}"

    text = f"{part['uses']:3d} of {part['input']} by {part['kernel']}: "
    text += ", ".join(f"{name} {milliseconds(part[name])}" for name in ("forward", "backward"))
    for pair in ("sum", "both"):
        if pair in part:
            text += f"; {pair} {', as one '.join(milliseconds(part[pair][way]) for way in ('apart', 'as_one'))}"
    return f"{text} CPU ms"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="resnet32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring the step; a tenth for every part")
    parser.add_argument("--quick", action="store_true", help="a tiny network, for a look at whether it runs")
    parser.add_argument("--out", type=Path, default=Path("results/probe_parts.json"))
    given = parser.parse_args(arguments)
    if given.quick and given.out == parser.get_default("out"):
        parser.error("--quick needs an --out of its own: its numbers are no results")
    row = Row("ehap", "float32", given.network, given.batch)
    if given.quick:
        row = Row("ehap", "float32", "tiny", 4, 8)
    found = measure(row, 0.1 if given.quick else given.seconds)
    write_results(given.out, found)
    shown = {name: found[name] for name in ("step", "forward", "gradient", "kept_bytes")}
    print(json.dumps({**shown, **found["sums"]}, indent=1))


if __name__ == "__main__":
    main()
