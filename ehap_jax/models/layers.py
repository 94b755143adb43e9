"""The layers all models here are made of, with PyTorch's padding, BatchNorm constants and He's initialisation.

Each helper is called inside a compact Linen module and gives the layer the name it is called with.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5


def convolution(
    x: jax.Array, features: int, size: int, stride: int = 1, *, dtype: Any, name: str, use_bias: bool = False
) -> jax.Array:
    """A square convolution padded by `size // 2` on every side, as in PyTorch, whatever the stride."""
    pad = size // 2
    layer = nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        kernel_init=he_normal,
        dtype=dtype,
        name=name,
    )
    return layer(x)


def batch_norm(x: jax.Array, train: bool, *, dtype: Any, name: str) -> jax.Array:
    """BatchNorm with PyTorch's defaults (its momentum 0.1 is 0.9 here).

    With a 16-bit `dtype` statistics and normalisation are in float32 and the result in `dtype`. The running variance
    is that of the batch; PyTorch's is larger by n / (n - 1), n the number of values behind it.
    """
    layer = nn.BatchNorm(
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=BATCH_NORM_EPSILON,
        name=name,
    )
    y = layer(_widened(x, dtype))
    return y if dtype is None else y.astype(dtype)


def classifier_head(x: jax.Array, num_classes: int, *, dtype: Any, name: str = "linear") -> jax.Array:
    """Logits from features (N, F). With a 16-bit `dtype` the head computes in float32."""
    x = _widened(x, dtype)
    layer = nn.Dense(num_classes, kernel_init=he_normal, dtype=None if dtype is None else x.dtype, name=name)
    return layer(x)


def _widened(x: jax.Array, dtype: Any) -> jax.Array:
    """In float32 where `dtype` asks for 16 bits; as it is otherwise."""
    return x.astype(jnp.float32) if dtype is not None and jnp.finfo(dtype).bits < 32 else x
