"""Time and memory of a trace in JAX and in PyTorch, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ehap_jax.curvature import channel_trace
from interop.parity import Pair, jax_batch, pair, torch_batch
from recipes.torch_comparison.job import PRECISION, Job


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


def measure(
    framework: str, checkpoint: Path, layout: str, images: np.ndarray, labels: np.ndarray, probes: int
) -> dict[str, Any]:
    """Time and memory of a trace; meant for a process of its own, whose precision it sets. Memory in MiB."""
    with jax.default_matmul_precision(PRECISION):
        nets = pair(checkpoint, layout)
        before = _memory()["now"]
        trace, precision = (_jax_trace if framework == "JAX" else _torch_trace)(nets, images, labels, probes)
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


def _jax_trace(nets: Pair, images: np.ndarray, labels: np.ndarray, probes: int) -> tuple[Callable[[], None], str]:
    """What computes a trace in JAX and waits for it, and the precision of its products."""
    batch, key = jax_batch(images, labels), jax.random.key(0)

    def trace() -> None:
        estimate = channel_trace(nets.loss, nets.variables["params"], batch, key=key, num_probes=probes)
        jax.block_until_ready(estimate.mean)

    return trace, jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _torch_trace(nets: Pair, images: np.ndarray, labels: np.ndarray, probes: int) -> tuple[Callable[[], None], str]:
    """The same in PyTorch, on a GPU where it sees one."""
    import torch

    from interop.reference.trace import fixed_trace, rademacher_probes

    torch.set_float32_matmul_precision(PRECISION)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = nets.module.to(device)
    drawn = list(rademacher_probes(module, probes, seed=0))
    x, y = (tensor.to(device) for tensor in torch_batch(images, labels))

    def trace() -> None:
        fixed_trace(module, x, y, drawn)  # checks its products, and so waits for them

    return trace, torch.get_float32_matmul_precision()


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
