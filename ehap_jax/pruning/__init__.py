"""Scores, budgets, plans, masks and shrunk functions."""

from ehap_jax.pruning.allocate import allocate
from ehap_jax.pruning.mask import mask_variables
from ehap_jax.pruning.plan import PruningPlan
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
    "PruningPlan",
    "Scores",
    "allocate",
    "fisher_scores",
    "hessian_scores",
    "magnitude_scores",
    "mask_variables",
    "norm_scale_scores",
    "random_scores",
    "shrink",
    "shrink_variables",
    "taylor_scores",
]
