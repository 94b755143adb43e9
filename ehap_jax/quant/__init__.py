"""Quantisation of any traced function: numerics, rules, observers, folding, fake and real integers, ONNX."""

from ehap_jax.quant.fake_quant import Quantized, fake_quant, rounded_activations
from ehap_jax.quant.integer import Certificate, IntegerNetwork, to_integer
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
from ehap_jax.quant.onnx_export import save_onnx, to_onnx
from ehap_jax.quant.onnx_session import OnnxSession, onnx_session, sums_saturate
from ehap_jax.quant.rules import HAWQ, INT4_WEIGHTS, INT8, QuantRule, match_rules
from ehap_jax.quant.weights import QuantizedKernel, quantize_weights, quantized_bytes

__all__ = [
    "HAWQ",
    "INT4_WEIGHTS",
    "INT8",
    "Certificate",
    "Grid",
    "IntegerNetwork",
    "OnnxSession",
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
    "onnx_session",
    "quantise",
    "quantize_weights",
    "quantized_bytes",
    "range_parameters",
    "rounded_activations",
    "save_onnx",
    "sums_saturate",
    "symmetric_grid",
    "to_integer",
    "to_onnx",
    "with_range_parameters",
]
