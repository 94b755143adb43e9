"""Back from shrunk variables to full size."""

from __future__ import annotations

import jax

from ehap_jax.graph.rules.elementwise import expand as spread_axis
from ehap_jax.graph.trace import path_name
from ehap_jax.pruning.plan import PruningPlan, check_fits


def expand_variables(variables, plan: PruningPlan):
    """Shrunk ``variables`` at full size, zero where channels are gone: the inverse of ``shrink_variables``.

    ``expand_variables(shrink_variables(v, plan), plan) == mask_variables(v, plan)``, so that a network fine-tuned at
    its small size can be scored, pruned further or exported as a masked one.

    Raises KeyError or ValueError (path and both shapes) where the variables are not those the plan leaves.
    """
    check_fits(variables, {path: plan.shrunk_shape(path) for path in plan.shapes}, "plan's shrunk network")

    def spread(path, leaf):
        for axis, kept in plan.slices.get(path_name(path), {}).items():
            leaf = spread_axis(leaf, axis, kept, None, plan.shapes[path_name(path)][axis])
        return leaf

    return jax.tree_util.tree_map_with_path(spread, variables)
