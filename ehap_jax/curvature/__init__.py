"""Curvature of a loss: Hessian-vector products and the trace of every output channel's Hessian block."""

from ehap_jax.curvature.agreement import Agreement, agreement_of_scores, expected_agreement
from ehap_jax.curvature.channel_trace import channel_trace, probe_channel_products
from ehap_jax.curvature.estimate import TraceEstimate, TraceState
from ehap_jax.curvature.fisher_vp import fisher_vp
from ehap_jax.curvature.gauss_newton import gauss_newton_trace
from ehap_jax.curvature.gnvp import gnvp
from ehap_jax.curvature.heads import (
    centred_logits,
    second_derivative,
    softened_softmax,
    softmax_cross_entropy,
    squared_error,
    weighted,
)
from ehap_jax.curvature.hvp import hvp, linearized_hvp
from ehap_jax.curvature.linear_operator import as_linear_operator
from ehap_jax.curvature.memory import ProductMemory, product_memory
from ehap_jax.curvature.piecewise_linear import piecewise_linear_kernels
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probes import is_kernel, rademacher
from ehap_jax.curvature.problem import Batches
from ehap_jax.curvature.removal_costs import RemovalCosts, removal_costs
from ehap_jax.curvature.saved_trace import TraceFingerprint, fingerprint, load_trace, save_trace
from ehap_jax.curvature.stopping import VarianceParts, expected_misplaced, split_variance, stable_decision
from ehap_jax.curvature.variance_reduction import variance_reduction

__all__ = [
    "Agreement",
    "Batches",
    "Policy",
    "ProductMemory",
    "RemovalCosts",
    "TraceEstimate",
    "TraceFingerprint",
    "TraceState",
    "VarianceParts",
    "agreement_of_scores",
    "as_linear_operator",
    "centred_logits",
    "channel_trace",
    "expected_agreement",
    "expected_misplaced",
    "fingerprint",
    "fisher_vp",
    "gauss_newton_trace",
    "gnvp",
    "hvp",
    "is_kernel",
    "linearized_hvp",
    "load_trace",
    "piecewise_linear_kernels",
    "probe_channel_products",
    "product_memory",
    "rademacher",
    "removal_costs",
    "save_trace",
    "second_derivative",
    "softened_softmax",
    "softmax_cross_entropy",
    "split_variance",
    "squared_error",
    "stable_decision",
    "variance_reduction",
    "weighted",
]
