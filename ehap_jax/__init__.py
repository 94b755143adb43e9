"""Channel pruning guided by the Hessian and INT8 quantisation-aware training, as pure JAX function transforms."""

from ehap_jax.graph import (
    ChannelGroup,
    Cost,
    Graph,
    UnknownPrimitiveError,
    channel_groups,
    count_cost,
    trace_graph,
)
from ehap_jax.pruning import (
    PruningPlan,
    Scores,
    allocate,
    hessian_scores,
    magnitude_scores,
    mask_variables,
    random_scores,
    shrink,
    shrink_variables,
)

__all__ = [
    "ChannelGroup",
    "Cost",
    "Graph",
    "PruningPlan",
    "Scores",
    "UnknownPrimitiveError",
    "allocate",
    "channel_groups",
    "count_cost",
    "hessian_scores",
    "magnitude_scores",
    "mask_variables",
    "random_scores",
    "shrink",
    "shrink_variables",
    "trace_graph",
]
__version__ = "0.1.0"
