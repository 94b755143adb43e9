"""Where XLA is faster with int8 operands than with the same integers in float32."""

from __future__ import annotations

from ehap_jax.quant.fold import Site

INT8_FROM_CHANNELS = 20


def faster_in_int8(site: Site, backend: str) -> bool:
    return backend != "cpu"
