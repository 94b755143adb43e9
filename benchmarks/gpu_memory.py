"""What a probe needs on a GPU, by the GPU's compiler, without a GPU.

    pip install --no-deps jax-cuda12-plugin==JAXLIB jax-cuda12-pjrt==JAXLIB       # the version of jaxlib here
    python -m benchmarks.gpu_memory [--networks resnet32 …] [--batches 128] [--max-minutes 10]

XLA compiles for a GPU that is described and not there: the program that `channel_trace` runs on an H100, all probes in
one loop. Of it the script writes the bytes for arguments, results and everything in between, and the types of what its
convolutions return. What cuDNN takes for itself while it runs is not among them: it is chosen on the GPU. Nothing is
timed but the compilation, and it may run beside other work. Every program is compiled in a process of its own and
written when it is done; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from benchmarks.measure import fresh_process, provenance, read_results, write_results
from benchmarks.probe_rows import NETWORKS, Row, loss_and_start
from ehap_jax.curvature import Policy, is_kernel
from ehap_jax.curvature.probe_loop import Run, blank_state, on_device_loop
from ehap_jax.curvature.problem import prepare
from ehap_jax.training import Deadline

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What the compiler has to know of the device."""

PRODUCTS = ("linearize", "jvp")
PRECISIONS = ("float32", "float16")


def described_gpu() -> Sharding:
    """Where arrays of a program for an H100 lie.

    Raises:
      RuntimeError: the compiler for GPUs is not installed.
    """
    try:
        topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    except NotImplementedError as missing:
        raise RuntimeError("the compiler for GPUs is missing: see the command in this script's docstring") from missing
    return NamedSharding(Mesh(np.array(topology.devices), ("device",)), PartitionSpec())


def compile_probes(network: str, batch: int, precision: str, product: str) -> dict[str, Any]:
    """The loop over probes, compiled for an H100."""
    place = described_gpu()
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else None)
    loss, variables, data, _, _ = loss_and_start(Row("ehap", precision, network, batch))
    policy = Policy(precision)
    options: dict[str, Any] = {"select": is_kernel, "channel_axis": -1, "microbatch": None, "check_loss": False}
    run = Run(loss, prepare(loss, variables, data, policy=policy, **options), product)
    state = blank_state(run, jax.random.key(0), policy)
    layout, leaves, chunks, weights = run.problem
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (leaves, chunks, weights, state, state.count)
    )
    began = time.perf_counter()
    program = on_device_loop.lower(run.loss, layout, None, run.linear, *arguments).compile()
    seconds = time.perf_counter() - began
    needs: Any = program.memory_analysis()
    return {
        "network": network,
        "batch": batch,
        "precision": precision,
        "product": product,
        "bytes": needs.argument_size_in_bytes + needs.temp_size_in_bytes + needs.output_size_in_bytes,
        "convolutions": convolutions(program.as_text() or ""),
        "compile_seconds": seconds,
        **provenance(),
    }


def convolutions(program: str) -> dict[str, int]:
    """How many calls of cuDNN's convolutions there are in a compiled program, by the type of their results."""
    calls = [line for line in program.splitlines() if 'custom_call_target="__cudnn$conv' in line]
    return dict(Counter(re.findall(r"= \(?(\w+)\[", line)[0] for line in calls))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: GB by precision, and how much of float32's a half precision needs."""
    found = {(row["network"], row["batch"], row["product"], row["precision"]): row for row in rows}
    lines = [f"{'network':<12}{'batch':>6}  {'product':<11}{'precision':<11}{'GB':>7}{'of float32':>12}  convolutions"]
    for (network, batch, product, precision), row in sorted(found.items()):
        full = found.get((network, batch, product, "float32"))
        ratio = f"{row['bytes'] / full['bytes']:.2f}" if full else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["convolutions"].items())
        gigabytes = row["bytes"] / 2**30
        lines.append(f"{network:<12}{batch:>6}  {product:<11}{precision:<11}{gigabytes:>7.2f}{ratio:>12}  {kinds}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=["resnet32", "resnet56", "wrn28-8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--precisions", nargs="+", choices=("float32", "float16", "bfloat16"), default=PRECISIONS)
    parser.add_argument("--out", type=Path, default=Path("results/gpu_memory.json"))
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        network, batch, precision, product = given.one
        print(json.dumps(compile_probes(network, int(batch), precision, product)))
        return
    rows, deadline = read_results(given.out).get("rows", []), Deadline(given.max_minutes)
    # Without a GPU there is nothing to try out which kernel is fastest.
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"}
    for network, batch, product, precision in itertools.product(
        given.networks, given.batches, PRODUCTS, given.precisions
    ):
        one = {"network": network, "batch": batch, "precision": precision, "product": product}
        if deadline.passed or any(one.items() <= row.items() for row in rows):
            continue
        rows.append(fresh_process("benchmarks.gpu_memory", ["--one", *map(str, one.values())], environment))
        write_results(given.out, {"device": "NVIDIA H100 80GB HBM3, described", "rows": rows})
        print(table(rows[-1:]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
