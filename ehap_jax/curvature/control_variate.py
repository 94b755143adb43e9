"""The exact Gauss-Newton trace as control variate: Hutchinson's probes on what is left of the Hessian.

For a loss ``mean of l(z, target)``, z = model(params, x), the Hessian is ``H = G + R`` with the Gauss-Newton matrix G,
whose traces `gauss_newton_trace` knows without noise, and ``R = mean of sum_k dl/dz_k * Hess z_k``. R is itself a
Hessian: that of `ResidualLoss`, in which the factors dl/dz are held constant. So the estimator needs no machinery of
its own: exact traces of G, plus Hutchinson's of R. Where the graph proves R's block zero, nothing is left to estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ehap_jax.curvature.gauss_newton import gauss_newton_trace
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.problem import Axes, Batches, batch_size
from ehap_jax.curvature.residual_loss import mean_head_loss, residual_loss
from ehap_jax.curvature.tapped_model import unproven_kernels

__all__ = ["METHODS", "Split", "split_curvature"]

PyTree = Any

METHODS = ("hutchinson", "control_variate", "auto")


class Split(NamedTuple):
    """What is left to estimate, and what is known.

    Attributes:
      loss: the Hessian of which is left to estimate.
      left: the paths of the leaves for which it is not zero.
      known: ``{path: (channels,)}``, exact, to be added to the estimate.
    """

    loss: Callable[[PyTree, PyTree], jax.Array]
    left: frozenset[str]
    known: dict[str, jax.Array]


def split_curvature(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    model: Callable[[PyTree, PyTree], jax.Array] | None,
    head: Callable,
    method: str,
    known: Mapping[str, jax.Array] | None,
    policy: Policy,
    microbatch: int | None,
    select: Callable[[str, jax.Array], bool],
    channel_axis: Axes | Mapping[str, Axes],
    memory_budget: int | None,
    mesh: Mesh | None,
    progress: Callable[[int, int], None] | None,
) -> Split:
    """The known part of the channel traces of ``loss`` by ``method``, one of `METHODS` but ``"hutchinson"``.

    Args:
      known: the known part from an earlier run, which is then not computed again.

    Raises:
      ValueError: no model; a head whose loss is not known; ``loss`` is not the mean of the head's loss on the model's
        logits, with both values; what `gauss_newton_trace` lists.
    """
    rest = residual_loss(method, model, head)
    _require_agreement(loss, rest.model, head, params, batch)
    traces = known
    if traces is None:
        exact = gauss_newton_trace(
            rest.model,
            params,
            batch,
            head=head,
            policy=policy,
            microbatch=microbatch,
            select=select,
            channel_axis=channel_axis,
            memory_budget=memory_budget,
            on_unproven="gauss_newton",
            # It is not divided between processes: each computes all of it.
            mesh=mesh if jax.process_count() == 1 else None,
            progress=progress,
        )
        traces = exact.state.moments.mean["channel"]
    left = frozenset(traces)
    if method == "auto":
        left = frozenset(unproven_kernels(rest.model, params, batch, policy=policy, select=select))
    return Split(rest, left, dict(traces))


def _require_agreement(loss, model, head, params, batch) -> None:
    """``loss`` must be the head's mean loss of the model, or G would be of another function than H."""
    first = batch[0] if isinstance(batch, Batches) else batch
    few = jax.tree.map(lambda leaf: jnp.asarray(leaf)[: min(8, batch_size(first))], first)
    given, own = float(loss(params, few)), float(mean_head_loss(model, head, params, few))
    if abs(given - own) > 1e-3 * max(abs(given), abs(own), 1e-6):
        name = getattr(head, "__name__", repr(head))
        raise ValueError(
            f"on the first examples the loss is {given:.6g} but the mean of {name} on the model's logits is {own:.6g}: "
            "model= and head= must compute the same loss, or the Gauss-Newton matrix is of another function"
        )
