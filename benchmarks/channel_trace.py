"""What one probe of a channel trace costs, here and in PyTorch, in one run on one device.

    python -m benchmarks.channel_trace                    # the rows meant for this device, CPU or GPU
    python -m benchmarks.channel_trace --max-minutes 10   # a part of them; the same command goes on from there
    python -m benchmarks.channel_trace --quick --out /tmp/quick.json      # a tiny network: does it run?

`ehap` is `channel_trace` as a user calls it. `float32` is JAX's matmul precision "highest" (in PyTorch: TF32 off),
`tf32` JAX's default (in PyTorch: TF32 on), the same as `float32` on a CPU and therefore left out there; `bfloat16` and
`float16` are policies (in PyTorch: autocast; for `torch-func` the network cast). PyTorch's rows are the functions of
`interop.reference.products` on the same weights: `torch-published` as EHAP's released code does it, `torch-vectorised`
the same without its host loop, `torch-func` jvp of grad, `torch-compile` that through `torch.compile`. `peak` is the
most FLOP/s that a matrix product and a 3x3 convolution reach here, the better of JAX and PyTorch.

Every row runs in a process of its own and is written when it is done; rows that are there already (of this device and
these sizes) are not run again. One that takes longer than its limit, or fails, is written as that. ms are the median
over probes, after the first. `compile` is tracing and compilation by JAX's own clock; for PyTorch it is what the first
probe took beyond a later one, with the gradient's graph before it. FLOP/s count convolutions and matrix products of
the way that is used (see `PASSES`), without what rematerialisation repeats. Memory: on a GPU the allocator's peak; on a
CPU the largest resident memory of the process, of which `before` was there before the network, and which for JAX holds
the compiler too; `needed` is what the compiler says that the trace itself needs. Weights and images are random numbers:
the speed does not depend on them. Rows of a machine that others use show it in `load_average` and CPU seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import fresh_process, least, peak_memory, provenance, read_results, write_results
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

TORCH = ("torch-published", "torch-vectorised", "torch-func", "torch-compile")
VARIANTS = ("ehap", *TORCH)
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
PEAKS = ("peak-jax", "peak-torch")

PASSES = {
    "linearize": (5, 4),
    "jvp": (7, 5),
    "remat": (7, 5),
    "torch-published": (6, 3),
    "torch-vectorised": (6, 3),
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


def measure_ehap(row: Row, seconds: float, probes: int) -> dict[str, Any]:
    """Probes until there are ``probes`` of them or ``seconds`` have passed, after the first chunk."""
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
    device = jax.devices()[0]
    step = 1 if device.platform == "cpu" else min(16, probes)  # a chunk on an accelerator linearises anew
    options: dict[str, Any] = {"policy": policy, "microbatch": row.chunk or None}
    began = time.perf_counter()
    spent["compile"] = 0.0
    memory = product_memory(loss, variables, batch, **options)
    marks: list[tuple[int, float, float]] = []

    def progress(done: int, _: int) -> None:
        marks.append((done, time.perf_counter(), time.process_time()))
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
        **provenance(),
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


def measure_torch(row: Row, seconds: float, probes: int) -> dict[str, Any]:
    """The same weights, images and labels; probes drawn beforehand."""
    import torch

    from interop import to_torch
    from interop.reference import products
    from interop.reference.trace import rademacher_probes
    from interop.torch_models import load

    device = torch_device(row.precision)
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
        step = products.functional_products(model, images, targets, half=half, compiled=row.variant == "torch-compile")
    else:
        make = {"torch-published": products.published_products, "torch-vectorised": products.vectorised_products}
        step = make[row.variant](model, images, targets, half=half)
    marks: list[tuple[int, float, float]] = []
    while len(marks) <= probes and (len(marks) < 3 or marks[-1][1] - marks[0][1] < seconds):
        step(drawn[len(marks) % len(drawn)])
        wait()
        marks.append((len(marks) + 1, time.perf_counter(), time.process_time()))
    on_gpu = device.type == "cuda"
    found = per_probe(marks)
    return {
        **found,
        "flop_per_probe": flop_per_probe(row.variant, forward, first),
        "compile_seconds": max(marks[0][1] - began - found["ms"] / 1e3, 0.0),
        "first_seconds": marks[0][1] - began,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_memory(),
        "memory_before_gb": 0.0 if on_gpu else before,
        **torch_provenance(device),
    }


def torch_device(precision: str) -> Any:
    """Where PyTorch computes, with TF32 switched as the precision asks."""
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def torch_provenance(device: Any) -> dict[str, Any]:
    """`provenance`, of PyTorch's device: JAX is kept off the accelerator here, as it would take its memory."""
    import torch

    found = provenance()
    if device.type == "cuda":
        name = {"backend": "gpu", "kind": torch.cuda.get_device_name(), "count": torch.cuda.device_count()}
        found["versions"]["device"] = name
    found["versions"]["packages"]["torch"] = torch.__version__
    return found


def measure_peak(row: Row, seconds: float, _: int) -> dict[str, Any]:
    """FLOP/s of the fastest of a few matrix products and 3x3 convolutions, the images 32x32."""
    if row.variant == "peak-jax":
        run, about = jax_operations(row.precision)
    else:
        run, about = torch_operations(row.precision)
    on_cpu = about["versions"]["device"]["backend"] == "cpu"
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
        **about,
    }


def jax_operations(precision: str) -> tuple[Callable[..., Callable[[], Any]], dict[str, Any]]:
    """(operation, sizes) -> a call that waits for the result; and where it runs."""
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

    return make, provenance()


def torch_operations(precision: str) -> tuple[Callable[..., Callable[[], Any]], dict[str, Any]]:
    """As `jax_operations`."""
    import torch

    device = torch_device(precision)
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


def measure(row: Row, seconds: float, probes: int) -> dict[str, Any]:
    """The row with what was measured."""
    how = measure_ehap if row.variant == "ehap" else measure_torch if row.variant in TORCH else measure_peak
    return {**asdict(row), **how(row, seconds, probes)}


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
        order = [("ehap", "float32"), *((v, "float32") for v in TORCH[1::-1])]
        rows = [Row(v, p, "resnet32", 128) for v, p in order]
        rows += [Row(v, "float32") for v in PEAKS]
        late = [("torch-func", "float32"), ("ehap", "bfloat16"), ("torch-vectorised", "bfloat16"), ("ehap", "float16")]
        rows += [Row(v, p, "resnet32", 128) for v, p in late]
        rows.append(Row("ehap", "float32", "resnet32", 512, chunk=128))
        rows.append(Row("torch-vectorised", "float32", "resnet32", 512))
        rows.append(Row("torch-compile", "float32", "resnet32", 128))
        return [*rows, *(Row(v, "bfloat16") for v in PEAKS)]
    rows = [Row(v, p) for p in PRECISIONS for v in PEAKS]
    rows += [Row("ehap", p, n, b) for n, b in ON_GPU for p in PRECISIONS]
    rows += [Row(v, p, n, b) for v in TORCH for n, b in ON_GPU for p in PRECISIONS]
    return rows


def device_of(about: dict[str, Any]) -> tuple[Any, ...]:
    """Rows are compared where this is equal."""
    return (about["versions"]["device"]["kind"], about["cpu"], about["cores"])


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what takes several of them: shares of the device's peaks, times as fast, shares of memory."""
    return [row if "failed" in row or row["variant"] in PEAKS else {**row, **beside(row, rows)} for row in rows]


def beside(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row beside the others of its device."""
    others = [other for other in rows if "failed" not in other and device_of(other) == device_of(row)]
    flops = row["flop_per_probe"] / row["ms"] * 1e3
    found: dict[str, Any] = {"flops": flops}
    peaks = [other for other in others if other["variant"] in PEAKS and other["precision"] == row["precision"]]
    for what in ("matmul", "conv") if peaks else ():
        found[f"of_{what}_peak"] = flops / max(peak[f"{what}_flops"] for peak in peaks)
    if row["variant"] != "ehap":
        return found
    alike = [other for other in others if all(other[k] == row[k] for k in ("network", "batch", "side"))]
    found["times_as_fast_as"] = {
        other["variant"]: other["ms"] / row["ms"]
        for other in alike
        if other["variant"] in TORCH and other["precision"] == row["precision"]
    }
    for other in alike:
        base = (other["variant"], other["precision"], other["chunk"]) == ("ehap", "float32", row["chunk"])
        if base and row["precision"] != "float32":
            found["times_as_fast_as"]["ehap float32"] = other["ms"] / row["ms"]
            for memory in ("needed_gb", "peak_memory_gb"):
                found[f"{memory}_of_float32"] = row[memory] / other[memory]
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'row':<52}{'ms/probe':>10}{'n':>4}{'CPU ms':>10}{'peak GB':>9}{'compile s':>11}"
        f"{'GFLOP/s':>10}{'of matmul':>11}{'of conv':>9}  times as fast as"
    ]
    for row in rows:
        name = Row(**{k: row[k] for k in Row.__dataclass_fields__}).name
        if "failed" in row:
            lines.append(f"{name:<52}{row['failed']}")
        elif row["variant"] in PEAKS:
            lines.append(
                f"{name:<52}matmul {row['matmul_flops'] / 1e9:.0f} GFLOP/s, convolution {row['conv_flops'] / 1e9:.0f}"
            )
        else:
            shares = [f"{row[k]:.0%}" if k in row else "-" for k in ("of_matmul_peak", "of_conv_peak")]
            ratios = ", ".join(f"{k} {v:.2f}" for k, v in row.get("times_as_fast_as", {}).items())
            lines.append(
                f"{name:<52}{row['ms']:>10.1f}{row['probes']:>4}{row['cpu_ms']:>10.0f}{row['peak_memory_gb']:>9.2f}"
                f"{row['compile_seconds']:>11.1f}{row['flops'] / 1e9:>10.0f}{shares[0]:>11}{shares[1]:>9}  {ratios}"
            )
    return "\n".join(lines)


def run_row(row: Row, given: argparse.Namespace, here: dict[str, Any], limit: float) -> dict[str, Any]:
    """In a process of its own; what was not done in ``limit`` seconds, or failed, says so."""
    line = ["--one", json.dumps(asdict(row)), "--seconds", str(given.seconds), "--probes", str(given.probes)]
    off = {"JAX_PLATFORMS": "cpu"} if row.variant in (*TORCH, "peak-torch") else None
    try:
        return fresh_process("benchmarks.channel_trace", line, off, limit)
    except subprocess.TimeoutExpired:
        return {**asdict(row), "failed": f"not done in {limit:.0f} s", **here}
    except RuntimeError as error:
        return {**asdict(row), "failed": str(error).rpartition("} ")[2] or str(error), **here}


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
    parser.add_argument("--row-seconds", type=float, default=240.0, help="after which a row is given up")
    parser.add_argument("--max-minutes", type=float, help="stop then; the same command goes on from there")
    parser.add_argument("--again", action="store_true", help="also the rows that failed before")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        row = json.loads(given.one)
        print(json.dumps(measure(Row(**row), given.seconds, given.probes) if row else provenance()))
        return
    if given.quick and given.out == parser.get_default("out"):
        parser.error("--quick needs an --out of its own: its numbers are no results")
    if given.seconds <= 0 or given.row_seconds <= 0 or given.probes < 2:
        parser.error("--seconds and --row-seconds must be positive and --probes at least 2")
    deadline = Deadline(given.max_minutes)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    here = fresh_process("benchmarks.channel_trace", ["--one", "null"])  # this process leaves the device alone
    on_cpu = here["versions"]["device"]["backend"] == "cpu"
    rows = planned("quick" if given.quick else given.preset or ("cpu" if on_cpu else "gpu"))
    wanted = {"variant": given.variants, "precision": given.precisions, "network": given.networks}
    rows = [r for r in rows if all(not w or not getattr(r, k) or getattr(r, k) in w for k, w in wanted.items())]
    kept = read_results(given.out).get("rows", [])
    for row in rows:
        mine = [k for k in kept if asdict(row).items() <= k.items() and device_of(k) == device_of(here)]
        if any("failed" not in k or not given.again for k in mine):
            continue
        left = 60 * (deadline.minutes_left() or np.inf)
        found = run_row(row, given, here, min(given.row_seconds, left)) if not deadline.passed else {"failed": ""}
        if "failed" in found and deadline.passed:
            print(f"the time is over before {row.name}; the same command goes on from there")
            break
        kept = compare([*(k for k in kept if k not in mine), found])
        write_results(given.out, {"rows": kept})
        print(table([next(k for k in kept if asdict(row).items() <= k.items())]).splitlines()[-1], flush=True)
    print(table(k for k in kept if device_of(k) == device_of(here)))


if __name__ == "__main__":
    main()
