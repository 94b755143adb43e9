"""Wide residual networks, WRN-d-k: Zagoruyko and Komodakis 2016 (arXiv 1605.07146)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ehap_jax.models.layers import batch_norm, classifier_head, convolution


class WideBlock(nn.Module):
    """BatchNorm, ReLU, 3x3 convolution, twice: (N, H, W, C) -> (N, H/stride, W/stride, features).

    Where the shape changes, the 1x1 convolution of the shortcut reads the activated input, as in the original code.
    """

    features: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype = self.dtype
        activated = nn.relu(batch_norm(x, train, dtype=dtype, name="bn1"))
        y = convolution(activated, self.features, 3, self.stride, dtype=dtype, name="conv1")
        y = nn.relu(batch_norm(y, train, dtype=dtype, name="bn2"))
        y = convolution(y, self.features, 3, dtype=dtype, name="conv2")
        if self.stride != 1 or x.shape[-1] != self.features:
            x = convolution(activated, self.features, 1, self.stride, dtype=dtype, name="downsample_conv")
        return y + x


class WideResNet(nn.Module):
    """The true, pre-activation WRN-d-k, without dropout: stem of 16 channels, stages of 16k, 32k and 64k.

    EHAP's network of that name is another one, post-activation: `make_model("ehap-wrn28-8", ...)`.

    Args:
        depth: 6n + 4: 10, 16, 22, 28, 40, ...
        widen: k.
        num_classes: number of logits.
        dtype: dtype of the computation; see `ResNet`.

    Raises:
        ValueError: depth is not 6n + 4, or `widen` is not positive.

    Example:
        >>> model = WideResNet(depth=10, widen=1, num_classes=10)
        >>> jax.jit(model.init_with_output)(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0].shape
        (2, 10)
    """

    depth: int
    widen: int
    num_classes: int
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"a wide ResNet has depth 6n + 4 (10, 16, 22, 28, 40, ...), not {self.depth}")
        if self.widen < 1:
            raise ValueError(f"widen must be at least 1, not {self.widen}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = convolution(x, 16, 3, dtype=self.dtype, name="conv1")
        for stage in range(3):
            width = 16 * 2**stage * self.widen
            for block in range((self.depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                x = WideBlock(width, stride, self.dtype, name=f"layer{stage + 1}_{block}")(x, train)
        x = nn.relu(batch_norm(x, train, dtype=self.dtype, name="bn1"))
        x = jnp.mean(x, axis=(1, 2))
        return classifier_head(x, self.num_classes, dtype=self.dtype)
