"""Channel pruning guided by the Hessian and INT8 quantisation-aware training, as pure JAX function transforms."""

from ehap_jax.curvature import (
    Policy,
    TraceEstimate,
    channel_trace,
    gauss_newton_trace,
    hvp,
    piecewise_linear_kernels,
)
from ehap_jax.graph import (
    ChannelGroup,
    Cost,
    Graph,
    UnknownPrimitiveError,
    channel_groups,
    count_cost,
    explain,
    trace_graph,
)
from ehap_jax.pruning import (
    PruningPlan,
    Scores,
    allocate,
    fisher_scores,
    hessian_scores,
    magnitude_scores,
    mask_variables,
    norm_scale_scores,
    random_scores,
    shrink,
    shrink_variables,
    taylor_scores,
)
from ehap_jax.quant import INT8, Quantized, QuantRule, fake_quant

__all__ = [
    "INT8",
    "ChannelGroup",
    "Cost",
    "Graph",
    "Policy",
    "PruningPlan",
    "QuantRule",
    "Quantized",
    "Scores",
    "TraceEstimate",
    "UnknownPrimitiveError",
    "allocate",
    "channel_groups",
    "channel_trace",
    "count_cost",
    "explain",
    "fake_quant",
    "fisher_scores",
    "gauss_newton_trace",
    "hessian_scores",
    "hvp",
    "magnitude_scores",
    "mask_variables",
    "norm_scale_scores",
    "piecewise_linear_kernels",
    "random_scores",
    "shrink",
    "shrink_variables",
    "taylor_scores",
    "trace_graph",
]
__version__ = "0.1.0"
