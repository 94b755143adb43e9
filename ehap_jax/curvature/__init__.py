"""Curvature of a loss: Hessian-vector products and the trace of every output channel's Hessian block."""

from ehap_jax.curvature.channel_trace import TraceEstimate, TraceState, channel_trace, probe_channel_products
from ehap_jax.curvature.hvp import hvp
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.probes import is_kernel, rademacher

__all__ = [
    "Policy",
    "TraceEstimate",
    "TraceState",
    "channel_trace",
    "hvp",
    "is_kernel",
    "probe_channel_products",
    "rademacher",
]
