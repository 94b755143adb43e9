"""Stochastic gradient descent as the papers use it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def sgd_cosine(
    learning_rate: float,
    total_steps: int,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    warmup_steps: int = 0,
    decay_norms: bool = True,
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum, PyTorch's weight decay, and a cosine from `learning_rate` to zero.

    Weight decay adds `weight_decay * w` to the gradient before the momentum, as torch.optim.SGD does.

    Args:
        learning_rate: the peak.
        total_steps: updates until the rate is zero.
        momentum: of the Nesterov average.
        weight_decay: of every parameter, or of kernels alone.
        warmup_steps: updates over which the rate rises linearly from zero first.
        decay_norms: False leaves parameters of rank below 2 (biases, BatchNorm) undecayed.

    Raises:
        ValueError: a number is outside its range.

    Example:
        >>> optimizer = sgd_cosine(0.1, total_steps=1000, warmup_steps=100)
    """
    if learning_rate <= 0:
        raise ValueError(f"learning_rate must be positive, not {learning_rate}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps ({warmup_steps}) must be at least 0 and below total_steps ({total_steps})")
    if not 0 <= momentum < 1 or weight_decay < 0:
        raise ValueError(f"momentum {momentum} must be in [0, 1) and weight_decay {weight_decay} at least 0")
    mask = None if decay_norms else _is_matrix
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(_cosine(learning_rate, total_steps, warmup_steps), momentum=momentum, nesterov=True),
    )


def _cosine(peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Linear from 0 to `peak`, then `peak * (1 + cos(pi t)) / 2`; optax's own fail under strict dtype promotion."""

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        done = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        rate = peak * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return jnp.where(step < warmup_steps, peak * step / max(warmup_steps, 1), rate)

    return schedule


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
