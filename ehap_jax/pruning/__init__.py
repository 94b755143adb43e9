"""Scores, budgets, plans, masks and shrunk functions."""

from ehap_jax.pruning.allocate import OutOfReachError, allocate
from ehap_jax.pruning.expand import expand_variables
from ehap_jax.pruning.group_scores import (
    GroupScores,
    group_fisher_scores,
    group_magnitude_scores,
    group_taylor_scores,
)
from ehap_jax.pruning.implant import Implant, zero_implants
from ehap_jax.pruning.latency import LatencyTable, WidthGrid
from ehap_jax.pruning.latency_measurement import measure_latency
from ehap_jax.pruning.mask import mask_variables
from ehap_jax.pruning.plan import PruningPlan
from ehap_jax.pruning.recalibrate import recalibrate
from ehap_jax.pruning.schedule import Pruned, cubic, kept_fractions, linear, prune_iteratively
from ehap_jax.pruning.scores import (
    Scores,
    fisher_scores,
    hessian_scores,
    magnitude_scores,
    norm_scale_scores,
    random_scores,
    taylor_scores,
)
from ehap_jax.pruning.shrink import shrink, shrink_variables

__all__ = [
    "GroupScores",
    "Implant",
    "LatencyTable",
    "OutOfReachError",
    "Pruned",
    "PruningPlan",
    "Scores",
    "WidthGrid",
    "allocate",
    "cubic",
    "expand_variables",
    "fisher_scores",
    "group_fisher_scores",
    "group_magnitude_scores",
    "group_taylor_scores",
    "hessian_scores",
    "kept_fractions",
    "linear",
    "magnitude_scores",
    "mask_variables",
    "measure_latency",
    "norm_scale_scores",
    "prune_iteratively",
    "random_scores",
    "recalibrate",
    "shrink",
    "shrink_variables",
    "taylor_scores",
    "zero_implants",
]
