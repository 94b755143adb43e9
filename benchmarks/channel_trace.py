"""What one probe of a channel trace costs, here and in PyTorch, in one run on one device.

    python -m benchmarks.channel_trace                    # the rows meant for this device, CPU or GPU
    python -m benchmarks.channel_trace --max-minutes 10   # a part of them; the same command goes on from there
    python -m benchmarks.channel_trace --quick --out /tmp/quick.json      # a tiny network: does it run?

`ehap` is `channel_trace` as a user calls it. `float32` is JAX's matmul precision "highest" (in PyTorch: TF32 off),
`tf32` JAX's default (in PyTorch: TF32 on), the same as `float32` on a CPU and therefore left out there; `bfloat16` and
`float16` are policies (in PyTorch: autocast; for `torch-func` the network cast). PyTorch's rows are the functions of
`interop.reference.products` on the same weights, with one thread per core that the process may use: `torch-published`
as EHAP's released code does it, `torch-vectorised` the same without its host loop, `torch-affine` that with BatchNorm
as multiplication and addition, `torch-func` jvp of grad, `torch-compile` that through `torch.compile`. `peak` is the
most FLOP/s that a matrix product and a 3x3 convolution reach here, the better of JAX and PyTorch.

Every row runs in a process of its own, without caches of compiled programs, and is written when it is done; rows that
are there already (of this device, these sizes and these versions of JAX and PyTorch) are not run again. One that
fails, or takes longer than its limits, is written as that, with the reason: `--row-seconds` count from when the first
probe is done, `--first-seconds` bound what comes before. ms are the median over probes, after the first; on an
accelerator, in both, the host waits once per 16 probes, and the first 16 are not counted. `compile` is tracing and
compilation by JAX's own clock; for PyTorch it is what the first probes took beyond later ones, with the gradient's
graph before them. FLOP/s count convolutions and matrix products of the way that is used (see `PASSES`), without what
rematerialisation repeats. Memory: on a GPU the allocator's peak; on a CPU the largest resident memory of the process,
of which `before` was there before the network, and which for JAX holds the compiler too; `needed` is what the compiler
says that the trace itself needs. Weights and images are random numbers: the speed does not depend on them.

`times_as_fast_as` and `fastest_pytorch` are made of the rows that are comparable: device, versions of JAX and PyTorch
and flags of XLA are the same where both record them. On a CPU the ratios are of CPU time and, beside it, of wall-clock
time; the commits and load averages of both rows stand with them. 16 bits are compared with our `float32` and `tf32`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import (
    ProcessFailed,
    fresh_process,
    least,
    peak_memory,
    provenance,
    read_results,
    write_results,
)
from benchmarks.trained import mean_loss
from ehap_jax.curvature import Policy, channel_trace, product_memory
from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.models import eval_apply, init_variables, make_model
from ehap_jax.training import Deadline

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("resnet8", {"widths": (4, 4, 8)}),
    "resnet32": ("resnet32", {}),
    "resnet56": ("resnet56", {}),
    "wrn28-8": ("ehap-wrn28-8", {}),
}
"""What a row calls a network, and how the zoo makes it: with 1x1 convolutions as shortcuts, as EHAP's are."""

TORCH = ("torch-affine", "torch-vectorised", "torch-published", "torch-func", "torch-compile")
VARIANTS = ("ehap", *TORCH)
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
PEAKS = ("peak-jax", "peak-torch")

PASSES = {
    "linearize": (5, 4),
    "jvp": (7, 5),
    "remat": (7, 5),
    "torch-published": (6, 3),
    "torch-vectorised": (6, 3),
    "torch-affine": (6, 3),
    "torch-func": (9, 3),
    "torch-compile": (9, 3),
}
"""(a, b): a probe takes a forward passes of the network less b times its first convolution, which needs less.

Counted in convolutions, x' and d' the derivatives along v of what a kernel w reads and of the cotangent d of what it
writes. Along v forward: x' * w, x * v. Backward: d' and d through the transposes of w and v. `linearize`: these and
x' * v. `jvp`: a forward and a backward pass without weight gradients more. PyTorch's double backward: the four, and the
weight gradients (d, x') and (d', x); its jvp of grad: both in place of x' * v, and the gradient's own.
The first convolution reads the images: there x' = 0, and nothing goes further back (but PyTorch computes some of it).
"""

BASES = {"tf32": ("float32",), "bfloat16": ("float32", "tf32"), "float16": ("float32", "tf32")}
"""Which of our own precisions another one is compared with."""

UNCACHED = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "JAX_TRACEBACK_FILTERING": "off",  # which would end the errors with a line of its own
}
"""The environment of every row: what it finds compiled, it does not have to compile."""

ON_GPU = [(n, b) for n in ("resnet32", "resnet56", "wrn28-8") for b in (128, 512)]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      variant: one of `VARIANTS` or `PEAKS`. precision: one of `PRECISIONS`. network: of `NETWORKS`; "" for peaks.
      batch: images. side: their height and width. chunk: `microbatch`, 0 for none.
    """

    variant: str
    precision: str
    network: str = ""
    batch: int = 0
    side: int = 32
    chunk: int = 0

    @property
    def name(self) -> str:
        size = f"{self.network} {self.batch}x{self.side}" if self.network else f"{self.side}"
        return f"{self.variant} {self.precision} {size}{f' chunks of {self.chunk}' if self.chunk else ''}"


class _Enough(Exception):
    """Raised between two probes to end a trace."""


def loss_and_start(row: Row) -> tuple[Callable, Any, tuple[jax.Array, jax.Array], float, float]:
    """The loss, variables and batch; FLOP of a forward pass of the batch, and of its first convolution."""
    name, options = NETWORKS[row.network]
    model = make_model(name, 10, shortcut="B", **options)
    shape = (row.side, row.side, 3)
    variables = init_variables(model, jax.random.key(0), shape)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(row.batch, *shape)), jnp.float32)
    batch = (x, jnp.arange(row.batch, dtype=jnp.int32) % 10)
    apply = eval_apply(model)
    forward = count_cost(trace_graph(apply)(variables, x[:1])).macs
    first = variables["params"]["conv1"]["kernel"].size * row.side**2
    return mean_loss(apply), variables, batch, 2.0 * forward * row.batch, 2.0 * first * row.batch


def flop_per_probe(way: str, forward: float, first: float) -> float:
    """Of convolutions and matrix products; see `PASSES`."""
    whole, less = PASSES[way]
    return whole * forward - less * first


def probes_between_waits(platform: str, probes: int) -> int:
    """An accelerator computes several before the host waits for it; a linearised gradient serves all of them."""
    return 1 if platform == "cpu" else min(16, probes)


def measure_ehap(row: Row, seconds: float, probes: int, *, started: Callable[[], Any], gpu: bool) -> dict[str, Any]:
    """Probes until there are ``probes`` of them or ``seconds`` have passed, after the first chunk."""
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
    options: dict[str, Any] = {"policy": policy, "microbatch": row.chunk or None}
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


def torch_device(precision: str, gpu: bool) -> Any:
    """Where PyTorch computes, with TF32 switched as the precision asks and a thread for every core it may use.

    Raises:
      RuntimeError: a GPU was asked for, and PyTorch sees none.
    """
    import torch

    if gpu and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about() -> dict[str, Any]:
    """`provenance`, with the version of PyTorch where it is installed."""
    found = provenance()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["versions"]["packages"]["torch"] = importlib.metadata.version("torch")
    return found


def torch_provenance(device: Any) -> dict[str, Any]:
    """`about`, of PyTorch's device: JAX is kept off the accelerator here, as it would take its memory."""
    import torch

    found = {**about(), "torch_threads": torch.get_num_threads()}
    if device.type == "cuda":
        name = {"backend": "gpu", "kind": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
        found["versions"]["device"] = name
    return found


def measure_peak(row: Row, seconds: float, _: int, *, started: Callable[[], Any], gpu: bool) -> dict[str, Any]:
    """FLOP/s of the fastest of a few matrix products and 3x3 convolutions, the images 32x32."""
    if row.variant == "peak-jax":
        run, where = jax_operations(row.precision, gpu)
    else:
        run, where = torch_operations(row.precision, gpu)
    started()
    on_cpu = where["versions"]["device"]["backend"] == "cpu"
    small = row.side < 32
    sizes = (64,) if small else (1024, 2048) if on_cpu else (4096, 8192)
    shapes = ((2, 8),) if small else ((16, 64), (16, 256)) if on_cpu else ((256, 128), (256, 256), (256, 512))
    matmul = {f"{n}x{n}": 2 * n**3 / least(run("matmul", n, n), seconds / 10)["seconds"] for n in sizes}
    conv = {
        f"{batch}x{row.side}x{row.side}x{c}": 2 * batch * row.side**2 * 9 * c * c / least(call, seconds / 10)["seconds"]
        for batch, c in shapes
        for call in [run("conv", batch, c, row.side)]
    }
    return {
        "matmul": matmul,
        "conv": conv,
        "matmul_flops": max(matmul.values()),
        "conv_flops": max(conv.values()),
        **where,
    }


def jax_operations(precision: str, gpu: bool) -> tuple[Callable[..., Callable[[], Any]], dict[str, Any]]:
    """(operation, sizes) -> a call that waits for the result; and where it runs."""
    if gpu and jax.default_backend() == "cpu":
        raise RuntimeError("JAX sees no GPU")
    if precision == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    dtype = precision if precision in ("bfloat16", "float16") else "float32"

    def make(operation: str, n: int, c: int, side: int = 0) -> Callable[[], Any]:
        shapes = ((n, n), (n, n)) if operation == "matmul" else ((n, side, side, c), (3, 3, c, c))
        a, b = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes))

        @jax.jit
        def run(a, b):
            if operation == "matmul":
                return a @ b
            return jax.lax.conv_general_dilated(a, b, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        return lambda: jax.block_until_ready(run(a, b))

    return make, about()


def torch_operations(precision: str, gpu: bool) -> tuple[Callable[..., Callable[[], Any]], dict[str, Any]]:
    """As `jax_operations`."""
    import torch

    device = torch_device(precision, gpu)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)

    def make(operation: str, n: int, c: int, side: int = 0) -> Callable[[], Any]:
        shapes = ((n, n), (n, n)) if operation == "matmul" else ((n, c, side, side), (c, c, 3, 3))
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        if operation == "conv":
            a, b = (value.to(memory_format=torch.channels_last) for value in (a, b))

        def run() -> None:
            torch.matmul(a, b) if operation == "matmul" else torch.nn.functional.conv2d(a, b, padding=1)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    return make, torch_provenance(device)


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
    how = measure_ehap if row.variant == "ehap" else measure_torch if row.variant in TORCH else measure_peak
    return {**asdict(row), **how(row, seconds, probes, started=started, gpu=gpu)}


def planned(preset: str) -> list[Row]:
    """The rows of a preset, the most telling first.

    `cpu` is ResNet-32 at batch 128, and at 512 in four chunks, as larger ones leave the caches. ResNet-56 and WRN-28-8
    are left out: a probe of the latter takes minutes there. So do many in 16 bits, for which CPUs lack instructions.
    """
    if preset == "quick":
        pairs = [("ehap", "float32"), ("torch-vectorised", "float32"), ("ehap", "float16"), ("torch-func", "bfloat16")]
        rows = [Row(v, p, "tiny", 4, 8) for v, p in pairs]
        return [*rows, *(Row(v, "float32", side=8) for v in PEAKS)]
    if preset == "cpu":
        order = [(v, "float32") for v in ("ehap", "torch-affine", "torch-vectorised", "torch-published")]
        rows = [Row(v, p, "resnet32", 128) for v, p in order]
        rows += [Row(v, "float32") for v in PEAKS]
        late = [("torch-func", "float32"), *((v, "bfloat16") for v in ("ehap", "torch-affine", "torch-vectorised"))]
        late.append(("ehap", "float16"))
        rows += [Row(v, p, "resnet32", 128) for v, p in late]
        rows.append(Row("ehap", "float32", "resnet32", 512, chunk=128))
        rows += [Row(v, "float32", "resnet32", 512) for v in ("torch-affine", "torch-vectorised")]
        rows.append(Row("torch-compile", "float32", "resnet32", 128))
        return [*rows, *(Row(v, "bfloat16") for v in PEAKS)]
    rows = [Row(v, p) for p in PRECISIONS for v in PEAKS]
    rows += [Row("ehap", p, n, b) for n, b in ON_GPU for p in PRECISIONS]
    rows += [Row(v, p, n, b) for v in TORCH for n, b in ON_GPU for p in PRECISIONS]
    return rows


PACKAGES = ("jax", "jaxlib", "torch")


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of one device, and of the same versions and flags as far as both record them."""
    ours, theirs = (setting_of(row) for row in (one, other))
    return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def setting_of(row: dict[str, Any]) -> dict[str, Any]:
    """What must be equal where rows are compared."""
    versions = row["versions"]
    recorded = {name: versions.get("packages", {}).get(name) for name in PACKAGES} | {"flags": row.get("xla_flags")}
    device = {"device": versions["device"]["kind"], "cpu": row["cpu"], "cores": row["cores"]}
    return device | {name: value for name, value in recorded.items() if value is not None}


DERIVED = ("flops", "of_matmul_peak", "of_conv_peak", "times_as_fast_as", "fastest_pytorch")
EARLIER = ("needed_gb_of_float32", "peak_memory_gb_of_float32")
"""What earlier files have beside the measurements, which now stands with the ratios."""


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what takes several of them: shares of the device's peaks, times as fast, shares of memory."""
    rows = [{name: value for name, value in row.items() if name not in (*DERIVED, *EARLIER)} for row in rows]
    return [row if "failed" in row or row["variant"] in PEAKS else {**row, **beside(row, rows)} for row in rows]


def beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row beside the others that are comparable; of several alike, the last one."""
    others = [other for other in rows if "failed" not in other and comparable(other, row)]
    flops = row["flop_per_probe"] / row["ms"] * 1e3
    found: dict[str, Any] = {"flops": flops}
    peaks = [other for other in others if other["variant"] in PEAKS and other["precision"] == row["precision"]]
    for what in ("matmul", "conv") if peaks else ():
        found[f"of_{what}_peak"] = flops / max(peak[f"{what}_flops"] for peak in peaks)
    if row["variant"] != "ehap":
        return found
    alike = [other for other in others if all(other[k] == row[k] for k in ("network", "batch", "side"))]
    pytorch = {o["variant"]: o for o in alike if o["variant"] in TORCH and o["precision"] == row["precision"]}
    ours = [o for o in alike if o["variant"] == "ehap" and o["chunk"] == row["chunk"]]
    bases = {f"ehap {o['precision']}": o for o in ours if o["precision"] in BASES.get(row["precision"], ())}
    found["times_as_fast_as"] = {
        **{name: times_as_fast(row, other) for name, other in pytorch.items()},
        **{name: times_as_fast(row, other) | memory_of(row, other) for name, other in bases.items()},
    }
    if pytorch:
        clock = clocks(row)[0]
        name = min(pytorch, key=lambda name: pytorch[name][clock])
        found["fastest_pytorch"] = {"variant": name, "by": clock, **found["times_as_fast_as"][name]}
    return found


def clocks(row: dict[str, Any]) -> tuple[str, ...]:
    """The first one is what compares best: on a CPU, other programs disturb its own clock less than the wall's."""
    return ("cpu_ms", "ms") if row["versions"]["device"]["backend"] == "cpu" else ("ms",)


def times_as_fast(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many times the time of ``row`` the other took, by every clock; and of what, and how busy the machine was."""
    both = (row, other)
    return {
        **{clock: other[clock] / row[clock] for clock in clocks(row)},
        "commits": [(one["versions"].get("git") or {}).get("commit") for one in both],
        "load_averages": [one["load_average"] for one in both],
    }


def memory_of(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Shares of the other's memory, and the products that needed them; nothing where a product is not recorded."""
    products = [one.get("product") for one in (row, other)]
    if None in products:
        return {}
    shares = {f"of_{memory}": row[memory] / other[memory] for memory in ("needed_gb", "peak_memory_gb")}
    return {**shares, "products": products}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as text."""
    head = (
        f"{'row':<52}{'ms/probe':>10}{'n':>4}{'CPU ms':>10}{'peak GB':>9}{'compile s':>11}"
        f"{'GFLOP/s':>10}{'of matmul':>11}{'of conv':>9}"
    )
    return "\n".join([head, *(line for row in rows for line in lines_of(row))])


def lines_of(row: dict[str, Any]) -> list[str]:
    """A row as text, and below it a line for every ratio."""
    name = Row(**{k: row[k] for k in Row.__dataclass_fields__}).name
    if "failed" in row:
        return [f"{name:<52}{row['failed']}"]
    if row["variant"] in PEAKS:
        peaks = [row[f"{what}_flops"] / 1e9 for what in ("matmul", "conv")]
        return [f"{name:<52}matmul {peaks[0]:.0f} GFLOP/s, convolution {peaks[1]:.0f}"]
    shares = [f"{row[k]:.0%}" if k in row else "-" for k in ("of_matmul_peak", "of_conv_peak")]
    lines = [
        f"{name:<52}{row['ms']:>10.1f}{row['probes']:>4}{row['cpu_ms']:>10.0f}{row['peak_memory_gb']:>9.2f}"
        f"{row['compile_seconds']:>11.1f}{row['flops'] / 1e9:>10.0f}{shares[0]:>11}{shares[1]:>9}"
    ]
    lines += [f"    times as fast as {other}: {ratio_line(r)}" for other, r in row.get("times_as_fast_as", {}).items()]
    if "fastest_pytorch" in row:
        best = row["fastest_pytorch"]
        lines.append(f"    PyTorch's fastest is {best['variant']}: {ratio_line(best)}")
    return lines


def ratio_line(ratio: dict[str, Any]) -> str:
    """As in "1.21 by CPU, 0.98 by wall clock (commits 1234567, 89abcde; load 0.6, 1.1)"."""
    names = {"cpu_ms": "CPU", "ms": "wall clock"}
    times = ", ".join(f"{ratio[clock]:.2f} by {name}" for clock, name in names.items() if clock in ratio)
    commits = ", ".join((commit or "unknown")[:7] for commit in ratio["commits"])
    loads = ", ".join(f"{load:.1f}" for load in ratio["load_averages"])
    text = f"{times} (commits {commits}; load {loads})"
    if "products" in ratio:
        text += f", memory {ratio['of_needed_gb']:.2f} by the compiler, {ratio['of_peak_memory_gb']:.2f} at the peak"
        text += f" ({' against '.join(ratio['products'])})"
    return text


def run_row(row: Row, given: argparse.Namespace, here: dict[str, Any], gpu: bool, left: float) -> dict[str, Any]:
    """In a process of its own; what was not done in time, or failed, says so."""
    line = ["--one", json.dumps(asdict(row)), "--seconds", str(given.seconds), "--probes", str(given.probes)]
    line += ["--row-seconds", str(given.row_seconds), *(["--gpu"] if gpu else [])]
    apart = UNCACHED | ({"JAX_PLATFORMS": "cpu"} if row.variant in (*TORCH, "peak-torch") else {})
    limit = min(given.first_seconds + given.row_seconds, left)
    try:
        return fresh_process("benchmarks.channel_trace", line, apart, limit)
    except subprocess.TimeoutExpired:
        reason = f"not done in {limit:.0f} s"
    except ProcessFailed as error:
        reason = f"ended with status {error.status}: {error.reason}"
        if error.status == -signal.SIGALRM:
            reason = f"not done in {given.row_seconds:g} s after the first probe"
    return {**asdict(row), "failed": reason, **here}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/channel_trace.json"))
    parser.add_argument("--preset", choices=("cpu", "gpu"), help="which rows; by default those for this device")
    parser.add_argument("--quick", action="store_true", help="a tiny network, for a look at whether it runs")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *PEAKS), help="of the preset's rows, these")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="of the preset's rows, these")
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), help="of the preset's rows, these")
    parser.add_argument("--seconds", type=float, default=15.0, help="of measuring per row, after the first probe")
    parser.add_argument("--probes", type=int, default=32, help="per row at most")
    parser.add_argument("--row-seconds", type=float, default=240.0, help="after the first probe, then it is given up")
    parser.add_argument("--first-seconds", type=float, default=1800.0, help="for what comes before, compilation too")
    parser.add_argument("--max-minutes", type=float, help="stop then; the same command goes on from there")
    parser.add_argument("--again", action="store_true", help="also the rows that failed before")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        row = json.loads(given.one)
        limit = partial(signal.setitimer, signal.ITIMER_REAL, given.row_seconds)  # its signal ends the process
        done = measure(Row(**row), given.seconds, given.probes, started=limit, gpu=given.gpu) if row else about()
        print(json.dumps(done))
        return
    if given.quick and given.out == parser.get_default("out"):
        parser.error("--quick needs an --out of its own: its numbers are no results")
    if min(given.seconds, given.row_seconds, given.first_seconds) <= 0 or given.probes < 2:
        parser.error("--seconds, --row-seconds and --first-seconds must be positive and --probes at least 2")
    deadline = Deadline(given.max_minutes)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    here = fresh_process("benchmarks.channel_trace", ["--one", "null"])  # this process leaves the device alone
    gpu = given.preset == "gpu" or here["versions"]["device"]["backend"] != "cpu"
    rows = planned("quick" if given.quick else given.preset or ("gpu" if gpu else "cpu"))
    wanted = {"variant": given.variants, "precision": given.precisions, "network": given.networks}
    rows = [r for r in rows if all(not w or not getattr(r, k) or getattr(r, k) in w for k, w in wanted.items())]
    kept = compare(read_results(given.out).get("rows", []))
    begun = 0
    for row in rows:
        mine = [k for k in kept if asdict(row).items() <= k.items() and comparable(k, here)]
        if any("failed" not in k or not given.again for k in mine):
            continue
        over = f"the time is over before {row.name}; the same command goes on from there"
        if deadline.passed:
            print(over)
            break
        found = run_row(row, given, here, gpu, 60 * (deadline.minutes_left() or np.inf))
        # One that had all of the time to itself would not be done the next time either.
        if "failed" in found and deadline.passed and begun:
            print(over)
            break
        begun += 1
        kept = compare([*(k for k in kept if k not in mine), found])
        write_results(given.out, {"rows": kept})
        print("\n".join(lines_of(kept[-1])), flush=True)
    write_results(given.out, {"rows": kept})
    print(table(k for k in kept if comparable(k, here)))


if __name__ == "__main__":
    main()
