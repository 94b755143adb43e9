"""Masked networks: full shapes, zeros where channels are pruned."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._paths import path_name
from ehap_jax.pruning.implant import tap_mask
from ehap_jax.pruning.plan import PruningPlan, check_fits


def mask_variables(variables, plan: PruningPlan):
    """``variables`` with every slice of what is pruned set to zero, shapes unchanged.

    Producers' outputs, the affine parameters after them and the consumers' inputs all become zero, so that a pruned
    channel contributes exactly zero whatever the activation function does at 0. The kernels of implants keep their
    centre tap alone. Training a masked network stays masked if this is applied after every update.

    Raises KeyError or ValueError (path and both shapes) where the plan is for another network.
    """
    check_fits(variables, plan.shapes, "plan")

    def mask(path, leaf):
        name = path_name(path)
        if name in plan.implants:
            taps = tap_mask(leaf.shape, plan.axes[name], plan.implants[name])
            leaf = jnp.where(taps, leaf, jnp.zeros((), leaf.dtype))
        for axis, kept in plan.slices.get(name, {}).items():
            stays = np.isin(np.arange(leaf.shape[axis]), kept)
            stays = stays.reshape([-1 if i == axis else 1 for i in range(leaf.ndim)])
            leaf = jnp.where(stays, leaf, jnp.zeros((), leaf.dtype))
        return leaf

    return jax.tree_util.tree_map_with_path(mask, variables)
