"""Losses per example: cross-entropy, with label smoothing, and distillation from a teacher."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy per example in nats, in float32 or wider: (N, K), (N,) -> (N,)."""
    return optax.softmax_cross_entropy_with_integer_labels(_at_least_float32(logits), labels)


def smoothed_cross_entropy(smoothing: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`loss(logits, labels)` against `(1 - smoothing) onehot + smoothing / K` (Szegedy et al. 2016, section 7).

    Raises:
        ValueError: `smoothing` is not in [0, 1).

    Example:
        >>> loss = smoothed_cross_entropy(0.1)
        >>> loss(jnp.zeros((2, 4)), jnp.array([0, 3])).round(3).tolist()
        [1.3860000371932983, 1.3860000371932983]
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"label smoothing must be in [0, 1), not {smoothing}")

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        uniform = -jnp.mean(jax.nn.log_softmax(_at_least_float32(logits)), axis=-1)
        return (1 - smoothing) * cross_entropy(logits, labels) + smoothing * uniform

    return loss if smoothing else cross_entropy


class Teacher(NamedTuple):
    """A network to learn from: `apply(variables, x) -> logits` on the same augmented images.

    The loss is `(1 - weight)` of that of the labels and `weight` of `distillation_loss`.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    weight: float = 0.9
    temperature: float = 4.0


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """`T² KL(softmax(teacher / T) ‖ softmax(logits / T))` per example (Hinton et al. 2015, arXiv 1503.02531).

    Example:
        >>> z = jnp.array([[1.0, 2.0, 3.0]])
        >>> distillation_loss(z, z + 5.0, 4.0).tolist()
        [0.0]
    """
    ours = jax.nn.log_softmax(_at_least_float32(logits) / temperature)
    theirs = jax.nn.log_softmax(_at_least_float32(teacher_logits) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def _at_least_float32(logits: jax.Array) -> jax.Array:
    return logits.astype(jnp.float32) if jnp.finfo(logits.dtype).bits < 32 else logits
