"""How fast INT8 is: dense and pruned, in float32 and in integers, in ONNX Runtime and in JAX.

    python -m benchmarks.int8_latency                        # everything, then results/int8_latency.json
    python -m benchmarks.int8_latency --only convolutions    # where XLA is faster in int8 than in float32

`networks`: ResNet-20 of a base width (13, 16, 32), 32x32 images, drawn weights: dense float32, pruned float32 and
pruned INT8 (half of the multiply-accumulates, random scores, group coupling; widths free and rounded to 16), at batch 1
and 64, with 1 and 2 threads. A time is the median of repeated calls, in milliseconds; every figure of a row is taken in
one process, one after the other. JAX runs on all cores of the process, whatever the number of threads of the row, so
its times are under `jax` once per batch. `bytes` are sizes of ONNX files.
`convolutions`: a 3x3 convolution of int8 arrays in XLA, with int8 operands and with the same integers in float32, by
number of input channels: what `ehap_jax.quant.integer_speed` rests on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.onnx_parity import FAST, drawn_variables
from ehap_jax import allocate, fake_quant, random_scores, shrink, shrink_variables, to_integer, to_onnx, trace_graph
from ehap_jax.models import eval_apply, make_model
from ehap_jax.training.run_directory import versions

WIDTHS, BATCHES, THREADS, ROUND_TO = (13, 16, 32), (1, 64), (1, 2), (1, 16)
CHANNELS = (3, 8, 12, 16, 18, 20, 24, 32, 64, 128)
IMAGE = (32, 32, 3)


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after two that do not count."""
    times = []
    for number in range(repeats + 2):
        started = time.perf_counter()
        call()
        if number >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return median(times)


def session(model, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def quantised(apply: Callable, variables):
    """(quantized, ranges of four drawn images)."""
    quantized = fake_quant(apply)
    x = jax.random.normal(jax.random.key(1), (4, *IMAGE))
    observe = jax.jit(partial(quantized.apply, update=True), compiler_options=FAST)
    return quantized, observe(variables, quantized.init(variables, x), x)[1]


def measure(name: str, apply: Callable, variables, int8: bool, repeats: int) -> dict[str, Any]:
    """One network in one precision: file size, and milliseconds by batch and threads."""
    example = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
    if int8:
        quantized, ranges = quantised(apply, variables)
        model = to_onnx(quantized, variables, ranges, example=example, dynamic_batch=True)
        network: Any = to_integer(quantized, variables, ranges, example=example)
        run = jax.jit(lambda network, x: network(x))
    else:
        model = to_onnx(apply, variables, example=example, dynamic_batch=True)
        network, run = variables, jax.jit(apply)
    found: dict[str, Any] = {"network": name, "precision": "int8" if int8 else "float32", "bytes": model.ByteSize()}
    for batch in BATCHES:
        x = np.asarray(jax.random.normal(jax.random.key(2), (batch, *IMAGE)))
        for threads in THREADS:
            runtime = session(model, threads)
            found[f"onnxruntime_batch{batch}_threads{threads}"] = milliseconds(
                lambda runtime=runtime, x=x: runtime.run(None, {"x": x}), repeats
            )
        found[f"jax_batch{batch}"] = milliseconds(lambda x=x: jax.block_until_ready(run(network, x)), repeats)
    return found


def networks(widths: tuple[int, ...], macs: float, repeats: int) -> list[dict[str, Any]]:
    """Dense and pruned networks of every base width."""
    rows = []
    for width in widths:
        model = make_model("resnet20", 10, widths=(width, 2 * width, 4 * width))
        apply, variables = eval_apply(model), drawn_variables(model, 0)
        dense = f"resnet20 width {width}"
        for int8 in (False, True):
            rows.append(measure(dense, apply, variables, int8, repeats))
            print(json.dumps(rows[-1]), flush=True)
        graph = trace_graph(apply)(variables, jnp.zeros((1, *IMAGE)))
        scores = random_scores(graph, key=jax.random.key(0))
        for multiple in ROUND_TO:
            if multiple > width:
                continue
            plan = allocate(graph, scores, macs=macs, coupling="group", round_to=multiple)
            small, function = shrink_variables(variables, plan), shrink(apply, plan)
            for int8 in (False, True):
                name = f"{dense}, {macs:.0%} of the MACs, widths in multiples of {multiple}"
                rows.append(measure(name, function, small, int8, repeats))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def convolutions(repeats: int) -> list[dict[str, float]]:
    """Milliseconds of a 3x3 convolution on 16 images of 32x32, by input channels."""
    rows = []
    drawn = np.random.default_rng(0)
    for channels in CHANNELS:
        x = jnp.asarray(drawn.integers(-128, 128, (16, 32, 32, channels)), jnp.int8)
        kernel = jnp.asarray(drawn.integers(-127, 128, (3, 3, channels, max(channels, 8))), jnp.int8)
        row: dict[str, float] = {"input_channels": channels}
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

            row[name] = milliseconds(lambda run=run, x=x, kernel=kernel: jax.block_until_ready(run(x, kernel)), repeats)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("networks", "convolutions"))
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the multiply-accumulates that is kept")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("results/int8_latency.json"))
    options = parser.parse_args(arguments)
    document: dict[str, Any] = {"versions": versions(), "repeats": options.repeats}
    if options.output.exists():
        document = {**json.loads(options.output.read_text(encoding="utf-8")), **document}
    if options.only != "networks":
        document["convolutions"] = convolutions(options.repeats)
    if options.only != "convolutions":
        document["networks"] = networks(tuple(options.widths), options.macs, options.repeats)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.output.with_suffix(".partial")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
