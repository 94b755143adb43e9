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
    activation_grid,
    asymmetric_grid,
    dequantise,
    fake_quantise,
    quantise,
    symmetric_grid,
)
from ehap_jax.quant.observers import (
    QState,
    RangeState,
    check_calibrated,
    empty_range,
    freeze_ranges,
    observe,
    range_parameters,
    with_range_parameters,
)
from ehap_jax.quant.rules import HAWQ, INT4_WEIGHTS, INT8, QuantRule, match_rules

__all__ = [
    "HAWQ",
    "INT4_WEIGHTS",
    "INT8",
    "Grid",
    "QState",
    "QuantRule",
    "Quantized",
    "QuantizedKernel",
    "RangeState",
    "activation_grid",
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
    "range_parameters",
    "symmetric_grid",
    "with_range_parameters",
]
