"""The loss whose Hessian is what the Gauss-Newton matrix leaves of another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ehap_jax.curvature.heads import inputs_and_targets, second_derivative, softmax_cross_entropy, squared_error

__all__ = ["ResidualLoss", "mean_head_loss", "residual_loss"]

PyTree = Any


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


def residual_loss(method: str, model: Callable[[PyTree, PyTree], jax.Array] | None, head: Callable) -> ResidualLoss:
    """What ``method`` leaves to probes; a ValueError where there is no model."""
    if model is None:
        raise ValueError(f'method="{method}" needs the model beside the loss: model=, a function (params, x) -> logits')
    return ResidualLoss(model, head)


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
