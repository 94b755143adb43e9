"""In what a layer is summed unless somebody says otherwise: int8 operands, or the same integers in float32.

On a CPU that is a matter of speed. float32 time over int8 time in ``results/int8_latency.json`` (``python -m
benchmarks.int8_latency --only convolutions``: 3x3 convolutions of 16 images of 32x32, JAX 0.10.2, two cores of an AMD
EPYC), by input channels:

    3: 0.79   8: 0.38   12: 0.36   16: 0.23   18: 0.90   20: 1.19   24: 1.26   32: 1.46   64: 1.50   128: 1.10

Elsewhere it is one of compiling at all: for NVIDIA GPUs XLA has no convolution of int8 to int32, since cuDNN returns
int8 or float32 (jax #7637), and grouped ones of int8 were found to be wrong (openxla/xla #49123). Products of int8
matrices it has. Nothing was measured there.
"""

from __future__ import annotations

from typing import Literal

from ehap_jax.quant.fold import Site

Execution = Literal["int8", "float32"]

INT8_FROM_CHANNELS = 20
"""Fewest input channels of a convolution (per group) at which int8 is faster on a CPU."""


def default_execution(site: Site, parts: tuple[int, ...], backend: str) -> Execution:
    """``parts``: of how many input channels float32 sums each exactly, none where it sums not even one of them so.

    On a CPU dense layers, which are small here, are left to float32, and nothing is cut.
    """
    convolution = site.node.name == "conv_general_dilated"
    if backend != "cpu":
        return "float32" if convolution and parts else "int8"
    many = convolution and sum(parts) >= INT8_FROM_CHANNELS
    return "float32" if len(parts) == 1 and not many else "int8"
