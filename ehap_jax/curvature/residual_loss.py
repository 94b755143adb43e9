"""The loss whose Hessian is what the Gauss-Newton matrix leaves of another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ehap_jax.curvature.heads import (
    inputs_and_targets,
    second_derivative,
    shares_of,
    softmax_cross_entropy,
    squared_error,
)

__all__ = ["Remainder", "ResidualLoss", "WithoutPenalty", "mean_head_loss", "residual_loss", "without_penalty"]

PyTree = Any


@dataclass(frozen=True)
class ResidualLoss:
    """``mean over examples of sum_k stop_gradient(dl/dz_k) * z_k``: its Hessian is H - G.

    Two of the same model and head are equal, so what was compiled for one serves the other.
    """

    model: Callable[[PyTree, PyTree], jax.Array]
    head: Callable

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        logits, head, targets, shares = _parts(self.model, self.head, params, batch)
        slopes = jax.vmap(jax.grad(_example_loss(head)))(logits, *targets)
        return (shares.reshape(-1, *[1] * (logits.ndim - 1)) * jax.lax.stop_gradient(slopes) * logits).sum()


@dataclass(frozen=True)
class Remainder:
    """``loss - penalty - head's loss + ResidualLoss``: its Hessian is H - G, whatever ``loss`` has beside the head's.

    Attributes:
      loss: the user's.
      penalty: what of it is known besides, a function of the parameters, or None.
      residual: of the model and the head.
    """

    loss: Callable[[PyTree, PyTree], jax.Array]
    penalty: Callable[[PyTree], jax.Array] | None
    residual: ResidualLoss

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        known = mean_head_loss(self.residual.model, self.residual.head, params, batch)
        rest = without_penalty(self.loss, self.penalty, params, batch)
        return rest.astype(known.dtype) - known + self.residual(params, batch)


@dataclass(frozen=True)
class WithoutPenalty:
    """``loss - penalty``."""

    loss: Callable[[PyTree, PyTree], jax.Array]
    penalty: Callable[[PyTree], jax.Array]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        return without_penalty(self.loss, self.penalty, params, batch)


def without_penalty(loss: Callable, penalty: Callable | None, params: PyTree, batch: PyTree) -> jax.Array:
    """The value of ``loss`` less that of ``penalty``, if there is one."""
    value = jnp.asarray(loss(params, batch))
    return value if penalty is None else value - penalty(params).astype(value.dtype)


def residual_loss(method: str, model: Callable[[PyTree, PyTree], jax.Array] | None, head: Callable) -> ResidualLoss:
    """What ``method`` leaves to probes; a ValueError where there is no model."""
    if model is None:
        raise ValueError(f'method="{method}" needs the model beside the loss: model=, a function (params, x) -> logits')
    return ResidualLoss(model, head)


def mean_head_loss(model: Callable, head: Callable, params: PyTree, batch: PyTree) -> jax.Array:
    """The mean loss of ``head`` on the model's logits."""
    logits, head, targets, shares = _parts(model, head, params, batch)
    return (shares * jax.vmap(_example_loss(head))(logits, *targets)).sum()


def _parts(
    model: Callable, head: Callable, params: PyTree, batch: PyTree
) -> tuple[jax.Array, Callable, tuple, jax.Array]:
    """Logits, the head of one example, its targets and the examples' shares; floating point in float32 at least."""
    x, targets = inputs_and_targets(batch)
    logits = model(params, x)
    sums = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    cast = lambda t: t.astype(sums) if jnp.issubdtype(t.dtype, jnp.floating) else t  # noqa: E731
    head, targets, shares = shares_of(head, jax.tree.map(cast, targets), logits.shape[0], sums)
    return logits.astype(sums), head, targets, shares


def _example_loss(head: Callable) -> Callable[..., jax.Array]:
    """The loss of one example, of which ``head`` is a square root of the Hessian."""
    if head is softmax_cross_entropy:
        return _cross_entropy
    if head is squared_error:
        return lambda logits, target: jnp.square(logits - target).sum()
    if isinstance(head, second_derivative):
        return head.loss
    raise ValueError(
        "a control variate needs the loss of one example besides the square root of its Hessian: use "
        f"head=second_derivative(loss) instead of {getattr(head, '__name__', head)!r}"
    )


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Of a label, or of a probability for each class."""
    if label.ndim == 0:
        return jax.nn.logsumexp(logits) - logits[label]
    label = label.astype(logits.dtype)
    return label.sum() * jax.nn.logsumexp(logits) - label @ logits
