"""Measures a row of `benchmarks.channel_trace`: probes here, and in PyTorch."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks.measure import about, peak_memory, torch_device, torch_provenance
from benchmarks.peaks import measure_peak
from benchmarks.probe_rows import OURS, TORCH, Row, flop_per_probe, loss_and_start
from ehap_jax.curvature import Policy, channel_trace, product_memory
from ehap_jax.curvature.devices import DATA, PROBE


class _Enough(Exception):
    """Raised between two probes to end a trace."""


def probes_between_waits(platform: str, probes: int) -> int:
    """An accelerator computes several before the host waits for it; a linearised gradient serves all of them."""
    return 1 if platform == "cpu" else min(16, probes)


def measure_ehap(row: Row, seconds: float, probes: int, *, started: Callable[[], Any], gpu: bool) -> dict[str, Any]:
    """Probes until there are ``probes`` of them or ``seconds`` have passed, after the first chunk."""
    if row.variant == "ehap-devices":
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    device = jax.devices()[0]
    if gpu and device.platform == "cpu":
        raise RuntimeError("JAX sees no GPU")
    spent = {"compile": 0.0}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "compile" in event and "cache" not in event:
            spent["compile"] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    if row.precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    before = peak_memory()
    loss, variables, batch, forward, first = loss_and_start(row)
    policy = Policy(row.precision if row.precision in ("bfloat16", "float16") else "float32")
    step = probes_between_waits(device.platform, probes)
    mesh = jax.make_mesh((jax.device_count(), 1), (DATA, PROBE)) if row.variant == "ehap-devices" else None
    options: dict[str, Any] = {"policy": policy, "microbatch": row.chunk or None, "mesh": mesh}
    began = time.perf_counter()
    spent["compile"] = 0.0
    memory = product_memory(loss, variables, batch, **options)
    marks: list[tuple[int, float, float]] = []

    def progress(done: int, _: int) -> None:
        marks.append((done, time.perf_counter(), time.process_time()))
        if len(marks) == 1:
            started()
        if len(marks) > 2 and marks[-1][1] - marks[0][1] > seconds:
            raise _Enough

    count = step + max(probes, step)
    options |= {"product": memory.product, "probes_per_step": step, "progress": progress}
    with contextlib.suppress(_Enough):
        channel_trace(loss, variables, batch, key=jax.random.key(0), num_probes=count, **options)
    stats = device.memory_stats() or {}
    peak = stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else peak_memory()
    return {
        **per_probe(marks),
        "product": memory.product,
        "flop_per_probe": flop_per_probe(memory.product, forward, first),
        "compile_seconds": min(spent["compile"], marks[0][1] - began),  # one event may hold another
        "first_seconds": marks[0][1] - began,
        "peak_memory_gb": peak,
        "memory_before_gb": 0.0 if "peak_bytes_in_use" in stats else before,
        "needed_gb": memory.needs[memory.product] / 2**30,
        **about(),
    }


def per_probe(marks: list[tuple[int, float, float]]) -> dict[str, Any]:
    """From (probes done, wall clock, CPU clock) at every mark, the first of which is not counted."""
    wall = [1e3 * (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(marks)]
    cpu = [1e3 * (b[2] - a[2]) / (b[0] - a[0]) for a, b in pairwise(marks)]
    return {
        "ms": median(wall),
        "least_ms": min(wall),
        "cpu_ms": median(cpu),
        "probes": marks[-1][0] - marks[0][0],
    }


def measure_torch(row: Row, seconds: float, probes: int, *, started: Callable[[], Any], gpu: bool) -> dict[str, Any]:
    """The same weights, images and labels; probes drawn beforehand."""
    import torch

    from interop import to_torch
    from interop.reference import products
    from interop.reference.trace import rademacher_probes
    from interop.torch_models import load

    device = torch_device(row.precision, gpu)
    before = peak_memory()
    _, variables, (x, labels), forward, first = loss_and_start(row)
    model = load(to_torch(variables)).to(device)
    images = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous().to(device)
    targets = torch.from_numpy(np.array(labels, np.int64)).to(device)
    half = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(row.precision)
    if device.type == "cuda":
        layout = torch.channels_last
        model, images = model.to(memory_format=layout), images.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    drawn = list(rademacher_probes(model, min(4, probes), seed=0))

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    began = time.perf_counter()
    if row.variant in ("torch-func", "torch-compile"):
        compiled = row.variant == "torch-compile"
        run = products.functional_products(model, images, targets, half=half, compiled=compiled)
    else:
        make = {
            "torch-published": products.published_products,
            "torch-vectorised": products.vectorised_products,
            "torch-affine": products.affine_products,
        }
        run = make[row.variant](model, images, targets, half=half)
    step = probes_between_waits(device.type, probes)
    marks: list[tuple[int, float, float]] = []
    done, count = 0, step + max(probes, step)
    while done < count and (len(marks) < 3 or marks[-1][1] - marks[0][1] < seconds):
        for _ in range(min(step, count - done)):
            run(drawn[done % len(drawn)])
            done += 1
        wait()
        marks.append((done, time.perf_counter(), time.process_time()))
        if len(marks) == 1:
            started()
    on_gpu = device.type == "cuda"
    found = per_probe(marks)
    return {
        **found,
        "flop_per_probe": flop_per_probe(row.variant, forward, first),
        "compile_seconds": max(marks[0][1] - began - step * found["ms"] / 1e3, 0.0),
        "first_seconds": marks[0][1] - began,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_memory(),
        "memory_before_gb": 0.0 if on_gpu else before,
        **torch_provenance(device),
    }


def measure(
    row: Row, seconds: float, probes: int, *, started: Callable[[], Any] = lambda: None, gpu: bool = False
) -> dict[str, Any]:
    """The row with what was measured.

    Args:
      row, seconds, probes: what, for how long, and how many times at most.
      started: called after the first probe, or before the first operation of a peak.
      gpu: whether it must run on one.

    Raises:
      RuntimeError: it must, and there is none.
    """
    how = measure_ehap if row.variant in OURS else measure_torch if row.variant in TORCH else measure_peak
    return {**asdict(row), **how(row, seconds, probes, started=started, gpu=gpu)}
