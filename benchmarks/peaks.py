"""The most FLOP/s that a matrix product and a 3x3 convolution reach on this device, in JAX and in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from benchmarks.measure import about, least, torch_device, torch_provenance
from benchmarks.probe_rows import Row


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
