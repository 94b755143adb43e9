"""How fast INT8 is: dense and pruned, in float32 and in integers, in ONNX Runtime and in JAX.

    python -m benchmarks.int8_latency --max-minutes 8        # goes on where it stopped; results/int8_latency.json
    python -m benchmarks.int8_latency --only convolutions    # where XLA is faster in int8 than in float32

`networks`: ResNet-20 of a base width (13, 16, 32, 64), 32x32 images, drawn weights: dense and pruned (half of the
multiply-accumulates, random scores, group coupling; widths free and in multiples of 8 and 16), each in float32 and
INT8, at batch 1 and 64, with 1 and 2 threads. A time is the median of repeated calls, in milliseconds, of as many as
fit into `--seconds` (5 at least); the two precisions take turns, so that what else the machine does slows both. JAX
runs on all cores of the process, whatever the number of threads of the row, so its times are under `jax` once per
batch. `bytes` are sizes of ONNX files. `goals` are the ratios that matter, with what is asked of them.
`convolutions`: a 3x3 convolution of int8 arrays in XLA, with int8 operands and with the same integers in float32, by
number of input channels: what `ehap_jax.quant.integer_speed` rests on. Sessions are those of `onnx_session`, which rows
name. Every row keeps on what, how busy it was, and with which versions it was measured; in earlier files that stands at
the top, once, for the rows that do not say it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.measure import provenance, read_results, write_results
from benchmarks.onnx_parity import FAST, drawn_variables
from ehap_jax import (
    allocate,
    fake_quant,
    onnx_session,
    random_scores,
    shrink,
    shrink_variables,
    to_integer,
    to_onnx,
    trace_graph,
)
from ehap_jax.models import eval_apply, make_model
from ehap_jax.pruning import OutOfReachError
from ehap_jax.quant import OnnxSession
from ehap_jax.training import Deadline

WIDTHS, BATCHES, THREADS, ROUND_TO = (16, 32, 64, 13), (1, 64), (1, 2), (1, 8, 16)
FASTER = {16: 2.0, 32: 3.0, 64: 3.0}
"""How many times faster than ONNX Runtime's own float32 its INT8 should be, by base width."""
FASTER_PRUNED = 4.0
"""The same for a pruned INT8 network against the dense float32 one."""
CHANNELS = (3, 8, 12, 16, 18, 20, 24, 32, 64, 128)
IMAGE = (32, 32, 3)


def milliseconds(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each call, in turns, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    while (done := len(next(iter(times.values())))) < 7 or time.perf_counter() - started < seconds * len(calls):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begun) * 1e3)
        if done == 1:
            started = time.perf_counter()
    return {name: median(found[2:]) for name, found in times.items()}


def session(model, threads: int) -> OnnxSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnx_session(model, options=options)


def quantised(apply: Callable, variables):
    """(quantized, ranges of four drawn images)."""
    quantized = fake_quant(apply)
    x = jax.random.normal(jax.random.key(1), (4, *IMAGE))
    observe = jax.jit(partial(quantized.apply, update=True), compiler_options=FAST)
    return quantized, observe(variables, quantized.init(variables, x), x)[1]


class Runnable(NamedTuple):
    """A network in one precision: the ONNX model, and the function that JAX runs with its weights."""

    model: Any
    run: Callable
    weights: Any


def runnables(apply: Callable, variables) -> dict[str, Runnable]:
    """In float32 and in INT8."""
    example = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
    quantized, ranges = quantised(apply, variables)
    return {
        "float32": Runnable(to_onnx(apply, variables, example=example, dynamic_batch=True), jax.jit(apply), variables),
        "int8": Runnable(
            to_onnx(quantized, variables, ranges, example=example, dynamic_batch=True),
            jax.jit(lambda network, x: network(x)),
            to_integer(quantized, variables, ranges, example=example),
        ),
    }


def measure(apply: Callable, variables, seconds: float) -> dict[str, dict[str, Any]]:
    """By precision: file size, how its sessions were made, and milliseconds by batch and threads."""
    both = runnables(apply, variables)
    found: dict[str, dict[str, Any]] = {name: {"bytes": one.model.ByteSize()} for name, one in both.items()}
    for batch in BATCHES:
        x = np.asarray(jax.random.normal(jax.random.key(2), (batch, *IMAGE)))
        calls: dict[str, dict[str, Callable[[], Any]]] = {}
        for threads in THREADS:
            sessions = {name: session(one.model, threads) for name, one in both.items()}
            calls[f"onnxruntime_batch{batch}_threads{threads}"] = {
                name: partial(made.runtime.run, None, {"x": x}) for name, made in sessions.items()
            }
            for name, made in sessions.items():
                found[name] |= made.document()
        calls[f"jax_batch{batch}"] = {
            name: lambda one=one, x=x: jax.block_until_ready(one.run(one.weights, x)) for name, one in both.items()
        }
        for what, pair in calls.items():
            for name, time_taken in milliseconds(pair, seconds).items():
                found[name][what] = time_taken
    return found


def networks(width: int, macs: float) -> Iterator[tuple[str, Callable[[], tuple[Callable, Any]]]]:
    """Name of, and how to make, the dense network of a base width and the pruned ones."""
    model = make_model("resnet20", 10, widths=(width, 2 * width, 4 * width))
    apply, variables = eval_apply(model), drawn_variables(model, 0)
    yield "dense", lambda: (apply, variables)
    for multiple in ROUND_TO:

        def pruned(multiple=multiple):
            graph = trace_graph(apply)(variables, jnp.zeros((1, *IMAGE)))
            scores = random_scores(graph, key=jax.random.key(0))
            plan = allocate(graph, scores, macs=macs, coupling="group", round_to=multiple)
            return shrink(apply, plan), shrink_variables(variables, plan)

        yield f"{macs:.0%} of the MACs, widths in multiples of {multiple}", pruned


def measure_networks(options: argparse.Namespace, document: dict[str, Any], deadline: Deadline) -> bool:
    """Everything that the document lacks, written as it comes; whether nothing is missing now."""
    rows: list[dict[str, Any]] = document.setdefault("networks", [])
    done = {(row["width"], row["network"]) for row in rows}
    for width in options.widths:
        for name, make in networks(width, options.macs):
            if (width, name) in done:
                continue
            if deadline.passed:
                return False
            row: dict[str, Any] = {"width": width, "network": name, "seconds": options.seconds, **provenance()}
            try:
                row |= measure(*make(), options.seconds)
            except OutOfReachError as error:  # widths cannot be rounded to so large a multiple
                row["out_of_reach"] = str(error)
            rows.append(row)
            print(json.dumps(row), flush=True)
            document["goals"] = goals(rows)
            write_results(options.output, document)
    return True


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios of ONNX Runtime's times, and what is asked of them."""
    found = []
    measured = [row for row in rows if "int8" in row]
    dense = {row["width"]: row for row in measured if row["network"] == "dense"}
    for row in measured:
        whole = dense.get(row["width"])
        for what in (key for key in row["int8"] if key.startswith("onnxruntime")):
            ratios: dict[str, tuple[float, float | None]] = {}
            if row is whole:
                ratios["float32 / INT8"] = row["float32"][what] / row["int8"][what], FASTER.get(row["width"])
            elif whole is not None:
                ratios["dense float32 / pruned INT8"] = whole["float32"][what] / row["int8"][what], FASTER_PRUNED
                ratios["dense INT8 / pruned INT8"] = whole["int8"][what] / row["int8"][what], 1.0
            for name, (ratio, wanted) in ratios.items():
                met = {} if wanted is None else {"wanted": wanted, "met": ratio >= wanted}
                found.append({"width": row["width"], "network": row["network"], "time": what, name: ratio, **met})
    return found


def convolutions(seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of a 3x3 convolution on 16 images of 32x32, by input channels."""
    rows = []
    drawn = np.random.default_rng(0)
    for channels in CHANNELS:
        x = jnp.asarray(drawn.integers(-128, 128, (16, 32, 32, channels)), jnp.int8)
        kernel = jnp.asarray(drawn.integers(-127, 128, (3, 3, channels, max(channels, 8))), jnp.int8)
        calls: dict[str, Callable[[], Any]] = {}
        for name, dtype, total in (("int8", jnp.int8, jnp.int32), ("float32", jnp.float32, jnp.float32)):

            @jax.jit
            def run(x, kernel, dtype=dtype, total=total):
                y = lax.conv_general_dilated(
                    x.astype(dtype),
                    kernel.astype(dtype),
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    preferred_element_type=total,
                )
                return y.astype(jnp.int32)

            calls[name] = lambda run=run, x=x, kernel=kernel: jax.block_until_ready(run(x, kernel))
        rows.append({"input_channels": channels, **milliseconds(calls, seconds), "seconds": seconds, **provenance()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("networks", "convolutions"))
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the multiply-accumulates that is kept")
    parser.add_argument("--seconds", type=float, default=1.0, help="per time that is measured")
    parser.add_argument("--max-minutes", type=float, help="stop after about so many; the same command goes on")
    parser.add_argument("--output", type=Path, default=Path("results/int8_latency.json"))
    options = parser.parse_args(arguments)
    deadline = Deadline(options.max_minutes)
    document = read_results(options.output)
    finished = options.only == "convolutions" or measure_networks(options, document, deadline)
    if options.only != "networks" and "convolutions" not in document:
        finished = finished and not deadline.passed
        if finished:
            document["convolutions"] = convolutions(options.seconds / 4)
    write_results(options.output, document)
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
