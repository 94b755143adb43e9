"""Fake quantisation of any traced function: numerics, rules, observers, folding, the transform."""

from ehap_jax.quant.fake_quant import (
    Quantized,
    QuantizedKernel,
    fake_quant,
    quantize_weights,
    quantized_bytes,
)
from ehap_jax.quant.numerics import (
    Grid,
    asymmetric_grid,
    dequantise,
    fake_quantise,
    quantise,
    signed_grid,
    symmetric_grid,
)
from ehap_jax.quant.observers import RangeState, check_calibrated, empty_range, freeze_ranges, observe
from ehap_jax.quant.rules import INT4_WEIGHTS, INT8, QuantRule, match_rules

__all__ = [
    "INT4_WEIGHTS",
    "INT8",
    "Grid",
    "QuantRule",
    "Quantized",
    "QuantizedKernel",
    "RangeState",
    "asymmetric_grid",
    "check_calibrated",
    "dequantise",
    "empty_range",
    "fake_quant",
    "fake_quantise",
    "freeze_ranges",
    "match_rules",
    "observe",
    "quantise",
    "quantize_weights",
    "quantized_bytes",
    "signed_grid",
    "symmetric_grid",
]
