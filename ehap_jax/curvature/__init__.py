"""Curvature of a loss: Hessian-vector products and the trace of every output channel's Hessian block."""

from ehap_jax.curvature.channel_trace import channel_trace, probe_channel_products
from ehap_jax.curvature.estimate import TraceEstimate, TraceState
from ehap_jax.curvature.hvp import hvp
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probes import is_kernel, rademacher
from ehap_jax.curvature.problem import Batches
from ehap_jax.curvature.saved_trace import TraceFingerprint, fingerprint, load_trace, save_trace
from ehap_jax.curvature.stopping import VarianceParts, expected_misplaced, split_variance, stable_decision

__all__ = [
    "Batches",
    "Policy",
    "TraceEstimate",
    "TraceFingerprint",
    "TraceState",
    "VarianceParts",
    "channel_trace",
    "expected_misplaced",
    "fingerprint",
    "hvp",
    "is_kernel",
    "load_trace",
    "probe_channel_products",
    "rademacher",
    "save_trace",
    "split_variance",
    "stable_decision",
]
