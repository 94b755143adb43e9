"""Where XLA is faster with int8 operands than with the same integers in float32.

Measured by ``python -m benchmarks.int8_latency --only convolutions`` (3x3 convolutions of 16 images of 32x32, JAX 0.10,
two cores of a Xeon with AVX-512 VNNI, shared with other work). float32 time over int8 time, by input channels:

    3: 1.0   8: 0.4   12: 0.6   16: 0.2   18: 0.2   20: 1.5   24: 2.1   32: 2.2   64: 2.2   128: 1.7
"""

from __future__ import annotations

from ehap_jax.quant.fold import Site

INT8_FROM_CHANNELS = {"cpu": 20}
"""Fewest input channels of a convolution (per group) at which int8 is faster, by backend; others always use int8."""


def faster_in_int8(site: Site, backend: str) -> bool:
    """Whether the table says so. On a CPU dense layers, which are small here, are left to float32."""
    if backend not in INT8_FROM_CHANNELS:
        return True
    if site.node.name != "conv_general_dilated":
        return False
    channels = site.kernel.shape[site.node.params["dimension_numbers"].rhs_spec[1]]
    return channels >= INT8_FROM_CHANNELS[backend]
