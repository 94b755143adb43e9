"""The exact Gauss-Newton trace as control variate: Hutchinson's probes on what is left of the Hessian.

For a loss ``mean of l(z, target)``, z = model(params, x), the Hessian is ``H = G + R`` with the Gauss-Newton matrix G,
whose traces `gauss_newton_trace` knows without noise, and ``R = mean of sum_k dl/dz_k * Hess z_k``. R is itself a
Hessian: that of `ResidualLoss`, in which the factors dl/dz are held constant. So the estimator needs no machinery of
its own: exact traces of G, plus Hutchinson's of R. Where the graph proves R's block zero, nothing is left to estimate.

The loss is the user's, and may have more in it than the head: terms of the parameters alone (weight decay) are read
off its graph, and their traces are exact where their Hessian is diagonal. Whether anything else is left is tried on the
whole batch, by the product of the Hessians' difference with a random direction; where it is not zero, it is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ehap_jax.curvature.derivative_rules import false_rules
from ehap_jax.curvature.gauss_newton import gauss_newton_trace
from ehap_jax.curvature.heads import inputs_and_targets, square_shares
from ehap_jax.curvature.penalty import Penalty, diagonal_traces, penalty_of
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.problem import Axes, Batches, Layout, Problem, layout_of, prepare
from ehap_jax.curvature.residual_loss import (
    Remainder,
    ResidualLoss,
    WithoutPenalty,
    mean_head_loss,
    residual_loss,
    without_penalty,
)
from ehap_jax.curvature.tapped_model import require_logits, unproven_kernels
from ehap_jax.graph import trace_graph

__all__ = ["METHODS", "Split", "split_curvature"]

PyTree = Any

METHODS = ("hutchinson", "control_variate", "auto")


TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
"""Up to this part of its length, a leaf's product with the loss's Hessian may differ from that with the head's."""


class Split(NamedTuple):
    """What is left to estimate, and what is known.

    Attributes:
      loss: the Hessian of which is left to estimate.
      left: the paths of the leaves for which it is not zero.
      known: ``{path: (channels,)}``, exact, to be added to the estimate.
      method: ``"control_variate"``; ``"hutchinson"`` where no Gauss-Newton traces are known of ``left``.
    """

    loss: Callable[[PyTree, PyTree], jax.Array]
    left: frozenset[str]
    known: dict[str, jax.Array]
    method: str


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
      ValueError: no model; a head whose loss is not known; with ``"control_variate"``, a derivative rule in the model
        that is not its function's derivative; what `gauss_newton_trace` lists.
      TypeError: the model does not return one floating-point array.
    """
    rest = residual_loss(method, model, head)
    first = batch[0] if isinstance(batch, Batches) else batch
    logits = require_logits(rest.model, params, first)
    square_shares(head, batch, math.prod(logits.shape[1:]), policy.sums)
    false_rules = _false_rules(rest.model, params, first)
    if false_rules and method != "auto":
        raise ValueError(f"{false_rules[0]}: the Hessian is not Gauss-Newton and residual; use another method")
    wide = Policy("float64" if any(x.dtype == jnp.float64 for x in jax.tree.leaves(params)) else "float32")
    layout = layout_of(params, wide, select, channel_axis)
    penalty = penalty_of(loss, params, first)
    of_penalty = None if penalty is None else diagonal_traces(penalty, layout, wide.cast(params))
    if of_penalty is None:
        penalty, of_penalty = None, {}
    problem = prepare(
        loss,
        params,
        batch,
        policy=wide,
        select=select,
        channel_axis=channel_axis,
        microbatch=microbatch,
        check_loss=False,
    )
    differing = _differing(loss, penalty, rest, problem)
    left = frozenset(layout.paths)
    if method == "auto":
        left = differing | frozenset(unproven_kernels(rest.model, params, batch, policy=policy, select=select))
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
        found = exact.state.moments.mean["channel"]
        traces = {
            path: sum(
                part[path] for part in ({} if false_rules and path in left else found, of_penalty) if path in part
            )
            for path in layout.paths
        }
        traces = {path: jnp.asarray(x, policy.sums) for path, x in traces.items() if not isinstance(x, int)}
    if false_rules:
        return Split(loss if penalty is None else WithoutPenalty(loss, penalty), left, dict(traces), "hutchinson")
    return Split(Remainder(loss, penalty, rest) if differing else rest, left, dict(traces), "control_variate")


def _false_rules(model, params, first) -> list[str]:
    """Functions in the model with a derivative rule that is not their derivative, each with its source line."""
    graph = trace_graph(model, on_unknown="freeze")(params, inputs_and_targets(first)[0])
    return false_rules(graph)


def _differing(loss, penalty: Penalty | None, rest: ResidualLoss, problem: Problem) -> frozenset[str]:
    """The leaves whose block of the Hessian of ``loss - penalty`` is not that of the head's loss.

    On the whole batch, by the product with one direction of independent normal numbers: that is zero only where the
    rows of the difference are. Rows that are not may be so between leaves; each of their leaves is tried alone.
    """
    probed, _ = problem.layout.split(problem.leaves)
    rng = np.random.default_rng(1)
    v = {path: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for path, leaf in probed.items()}
    rows = _different_rows(loss, penalty, rest, problem, v)
    if len(probed) == 1:
        return rows

    def alone(path: str) -> frozenset[str]:
        return _different_rows(loss, penalty, rest, problem, jax.tree.map(jnp.zeros_like, v) | {path: v[path]})

    return frozenset(path for path in rows if path in alone(path))


def _different_rows(loss, penalty: Penalty | None, rest: ResidualLoss, problem: Problem, v) -> frozenset[str]:
    """The leaves at which the product of v with the difference of the two Hessians is not zero."""
    layout, leaves, chunks, weights = problem
    wanted, difference = (jax.tree.map(jnp.zeros_like, v) for _ in range(2))
    for examples, weight in zip(chunks, weights, strict=True):
        of_loss, of_difference = _difference(loss, penalty, rest, layout, leaves, v, examples)
        wanted = {path: wanted[path] + weight * Hv for path, Hv in of_loss.items()}
        difference = {path: difference[path] + weight * Hv for path, Hv in of_difference.items()}
    length, error = ({p: float(jnp.sqrt(jnp.vdot(x, x))) for p, x in found.items()} for found in (wanted, difference))
    tolerance, total = TOLERANCE[layout.policy.compute], max(length.values())
    return frozenset(p for p in error if not error[p] <= tolerance * (length[p] + tolerance * total))


@partial(jax.jit, static_argnames=("loss", "penalty", "rest", "layout"))
def _difference(loss, penalty: Penalty | None, rest: ResidualLoss, layout: Layout, leaves, v, examples):
    """The products of v with the Hessian of ``loss - penalty``, and with its difference from the head's, by path."""
    probed, others = layout.split(leaves)

    def product(function):
        gradient = jax.grad(lambda p: function(layout.join(p, others), examples).astype(layout.policy.sums))
        return jax.jvp(gradient, (probed,), (v,))[1]

    of_loss = product(partial(without_penalty, loss, penalty))
    of_head = product(partial(mean_head_loss, rest.model, rest.head))
    return of_loss, jax.tree.map(lambda a, b: a - b, of_loss, of_head)
