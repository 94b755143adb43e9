"""The exact Gauss-Newton trace as control variate: Hutchinson's probes on what is left of the Hessian.

For a loss ``mean of l(z, target)``, z = model(params, x), the Hessian is ``H = G + R`` with the Gauss-Newton matrix G,
whose traces `gauss_newton_trace` knows without noise, and ``R = mean of sum_k dl/dz_k * Hess z_k``. R is itself a
Hessian: that of `ResidualLoss`, in which the factors dl/dz are held constant. So the estimator needs no machinery of
its own: exact traces of G, plus Hutchinson's of R. Where the graph proves R's block zero, nothing is left to estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ehap_jax.curvature.gauss_newton import gauss_newton_trace
from ehap_jax.curvature.heads import inputs_and_targets, second_derivative, softmax_cross_entropy, squared_error
from ehap_jax.curvature.precision import Policy
from ehap_jax.curvature.problem import Batches, batch_size
from ehap_jax.curvature.tapped_model import unproven_kernels

__all__ = ["METHODS", "ResidualLoss", "Split", "split_curvature"]

PyTree = Any

METHODS = ("hutchinson", "control_variate", "auto")


@dataclass(frozen=True)
class ResidualLoss:
    """``mean over examples of sum_k stop_gradient(dl/dz_k) * z_k``: its Hessian is H - G.

    Two of the same model and head are equal, so what was compiled for one serves the other.
    """

    model: Callable[[PyTree, PyTree], jax.Array]
    head: Callable

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        logits, targets = _logits_and_targets(self.model, params, batch)
        slopes = jax.vmap(jax.grad(_example_loss(self.head)))(logits, *targets)
        return (jax.lax.stop_gradient(slopes) * logits).sum() / logits.shape[0]


def mean_head_loss(model: Callable, head: Callable, params: PyTree, batch: PyTree) -> jax.Array:
    """The mean loss of ``head`` on the model's logits."""
    logits, targets = _logits_and_targets(model, params, batch)
    return jax.vmap(_example_loss(head))(logits, *targets).mean()


def _logits_and_targets(model: Callable, params: PyTree, batch: PyTree) -> tuple[jax.Array, tuple]:
    """Both in float32 at least; integer targets as they are."""
    x, targets = inputs_and_targets(batch)
    logits = model(params, x)
    sums = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    cast = lambda t: t.astype(sums) if jnp.issubdtype(t.dtype, jnp.floating) else t  # noqa: E731
    return logits.astype(sums), jax.tree.map(cast, targets)


def _example_loss(head: Callable) -> Callable[..., jax.Array]:
    """The loss of one example, of which ``head`` is a square root of the Hessian."""
    if head is softmax_cross_entropy:
        return lambda logits, label: jax.nn.logsumexp(logits) - logits[label]
    if head is squared_error:
        return lambda logits, target: jnp.square(logits - target).sum()
    if isinstance(head, second_derivative):
        return head.loss
    raise ValueError(
        "a control variate needs the loss of one example besides the square root of its Hessian: use "
        f"head=second_derivative(loss) instead of {getattr(head, '__name__', head)!r}"
    )


class Split(NamedTuple):
    """What is left to estimate, and what is known.

    Attributes:
      loss: the Hessian of which is left to estimate.
      select: the leaves for which it is not zero.
      known: ``{path: (channels,)}``, exact, to be added to the estimate.
    """

    loss: Callable[[PyTree, PyTree], jax.Array]
    select: Callable[[str, jax.Array], bool]
    known: dict[str, jax.Array]


def split_curvature(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree,
    *,
    model: Callable[[PyTree, PyTree], jax.Array] | None,
    head: Callable,
    method: str,
    policy: Policy,
    microbatch: int | None,
    select: Callable[[str, jax.Array], bool],
    channel_axis: int | Mapping[str, int],
) -> Split:
    """The known part of the channel traces of ``loss`` by ``method``, one of `METHODS` but ``"hutchinson"``.

    Raises:
      ValueError: no model; a head whose loss is not known; ``loss`` is not the mean of the head's loss on the model's
        logits, with both values; what `gauss_newton_trace` lists.
    """
    if model is None:
        raise ValueError(f'method="{method}" needs the model beside the loss: model=, a function (params, x) -> logits')
    _require_agreement(loss, model, head, params, batch)
    known = gauss_newton_trace(
        model,
        params,
        batch,
        head=head,
        policy=policy,
        microbatch=microbatch,
        select=select,
        channel_axis=channel_axis,
        on_unproven="gauss_newton",
    )
    left = frozenset(known.state.moments.mean["channel"])
    if method == "auto":
        left = frozenset(unproven_kernels(model, params, batch, policy=policy, select=select))
    return Split(ResidualLoss(model, head), lambda path, leaf: path in left, dict(known.state.moments.mean["channel"]))


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
