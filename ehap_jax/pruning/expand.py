"""Back from shrunk variables to full size."""

from __future__ import annotations

from ehap_jax.graph.rules.elementwise import expand as spread_axis
from ehap_jax.pruning.implant import map_shrunk
from ehap_jax.pruning.plan import PruningPlan, check_fits


def expand_variables(variables, plan: PruningPlan):
    """Shrunk ``variables`` at full size, zero where channels are gone: the inverse of ``shrink_variables``.

    ``expand_variables(shrink_variables(v, plan), plan) == mask_variables(v, plan)``, so that a network fine-tuned at
    its small size can be scored, pruned further or exported as a masked one.

    Raises KeyError or ValueError (path and both shapes) where the variables are not those the plan leaves.
    """
    check_fits(variables, plan.shrunk_shapes(), "plan's shrunk network")

    def spread(path: str, leaf):
        if path in plan.implants:
            leaf = plan.layout(path).join(leaf, plan.shrunk_shape(path))
        for axis, kept in plan.slices.get(path, {}).items():
            leaf = spread_axis(leaf, axis, kept, None, plan.shapes[path][axis])
        return leaf

    return map_shrunk(spread, variables, plan.implants)
