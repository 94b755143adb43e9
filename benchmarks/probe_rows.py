"""The rows of `benchmarks.channel_trace`: what is measured, on which network, and how many operations it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.trained import mean_loss
from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.models import eval_apply, init_variables, make_model

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("resnet8", {"widths": (4, 4, 8)}),
    "resnet32": ("resnet32", {}),
    "resnet56": ("resnet56", {}),
    "wrn28-8": ("ehap-wrn28-8", {}),
}
"""What a row calls a network, and how the zoo makes it: with 1x1 convolutions as shortcuts, as EHAP's are."""

TORCH = ("torch-affine", "torch-vectorised", "torch-published", "torch-func", "torch-compile")
OURS = ("ehap", "ehap-devices")
VARIANTS = (*OURS, *TORCH)
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


def planned(preset: str) -> list[Row]:
    """The rows of a preset, the most telling first.

    `cpu` is ResNet-32 at batch 128, and at 512 in chunks, as larger ones leave the caches; then ResNet-56, and WRN-28-8
    with 16 images, as with 128 a probe takes minutes. Few rows are in 16 bits, for which CPUs lack instructions.
    """
    if preset == "quick":
        pairs = [(v, "float32") for v in (*OURS, "torch-vectorised")] + [
            ("ehap", "float16"),
            ("torch-func", "bfloat16"),
        ]
        rows = [Row(v, p, "tiny", 4, 8) for v, p in pairs]
        return [*rows, *(Row(v, "float32", side=8) for v in PEAKS)]
    if preset == "cpu":
        order = [(v, "float32") for v in (*OURS, "torch-affine", "torch-vectorised", "torch-published")]
        rows = [Row(v, p, "resnet32", 128) for v, p in order]
        rows.append(Row("ehap-devices", "float32", "resnet32", 128, chunk=16))
        rows += [Row(v, "float32") for v in PEAKS]
        late = [("torch-func", "float32"), *((v, "bfloat16") for v in ("ehap", "torch-affine", "torch-vectorised"))]
        late.append(("ehap", "float16"))
        rows += [Row(v, p, "resnet32", 128) for v, p in late]
        rows += [Row("ehap", "float32", "resnet32", 512, chunk=128)]
        rows += [Row("ehap-devices", "float32", "resnet32", 512, chunk=16)]
        rows += [Row(v, "float32", "resnet32", 512) for v in ("torch-affine", "torch-vectorised")]
        rows.append(Row("torch-compile", "float32", "resnet32", 128))
        rows += [Row(v, "bfloat16") for v in PEAKS]
        large = [("resnet56", 128), ("wrn28-8", 16)]
        return [*rows, *(Row(v, "float32", n, b) for n, b in large for v in (*OURS, "torch-affine"))]
    rows = [Row(v, p) for p in PRECISIONS for v in PEAKS]
    rows += [Row("ehap", p, n, b) for n, b in ON_GPU for p in PRECISIONS]
    rows += [Row(v, p, n, b) for v in TORCH for n, b in ON_GPU for p in PRECISIONS]
    return rows
