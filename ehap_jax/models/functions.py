"""From a Linen model with a `train` argument to pure functions of its variables."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


@partial(jax.jit, static_argnums=(0, 2))
def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]) -> Any:
    """Fresh float32 variables `{"params": ..., "batch_stats": ...}` for images of shape (height, width, channels).

    Compiled once per model and shape, so the second seed costs nothing.

    Example:
        >>> from ehap_jax.models import ResNet
        >>> variables = init_variables(ResNet(8, 10, widths=(1, 1, 2)), jax.random.key(0), (8, 8, 1))
        >>> variables["params"]["layer3_0"]["conv1"]["kernel"].shape
        (3, 3, 1, 2)
    """
    return model.init(key, jnp.zeros((1, *image_shape), jnp.float32))


def eval_apply(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """The pure evaluation function `apply(variables, x) -> logits`: running statistics, nothing mutated."""

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        return model.apply(variables, x, train=False)  # pyright: ignore[reportReturnType]

    return apply


def train_apply(model: nn.Module) -> Callable[[Any, jax.Array], tuple[jax.Array, dict[str, Any]]]:
    """The pure training function `apply(variables, x) -> (logits, {"batch_stats": ...})`: batch statistics."""

    def apply(variables: Any, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        logits, state = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, dict(state)

    return apply
