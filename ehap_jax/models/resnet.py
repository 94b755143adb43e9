"""CIFAR residual networks of He et al. 2015 (arXiv 1512.03385, section 4.2), with the names PyTorch users know.

`shortcut="A"` is the parameter-free shortcut (every second pixel, zero channels on both sides, as in akamaster's
pretrained networks); `shortcut="B"` is a 1x1 convolution and BatchNorm (EHAP's thin ResNet-32 and ResNet-56).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ehap_jax.models.layers import batch_norm, classifier_head, convolution


def parameter_free_shortcut(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Option A: every `stride`-th pixel, and zero channels on both sides up to `features`."""
    missing = features - x.shape[-1]
    if missing < 0:
        raise ValueError(f"shortcut 'A' cannot narrow {x.shape[-1]} channels to {features}; use shortcut='B'")
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, ReLU after the sum: (N, H, W, C) -> (N, H/stride, W/stride, features)."""

    features: int
    stride: int
    shortcut: str
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype, width, stride = self.dtype, self.features, self.stride
        y = convolution(x, width, 3, stride, dtype=dtype, name="conv1")
        y = nn.relu(batch_norm(y, train, dtype=dtype, name="bn1"))
        y = convolution(y, width, 3, dtype=dtype, name="conv2")
        y = batch_norm(y, train, dtype=dtype, name="bn2")
        if stride != 1 or x.shape[-1] != width:
            if self.shortcut == "A":
                x = parameter_free_shortcut(x, width, stride)
            else:
                x = convolution(x, width, 1, stride, dtype=dtype, name="downsample_conv")
                x = batch_norm(x, train, dtype=dtype, name="downsample_bn")
        return nn.relu(y + x)


class ResNet(nn.Module):
    """ResNet for small images: 3x3 stem, three stages of n blocks, global mean, dense head. Depth is 6n + 2.

    Parameter paths read `params/conv1/kernel`, `params/layer1_0/conv1/kernel`, `params/layer2_0/bn2/scale`,
    `params/linear/bias`. Kernels are HWIO, images NHWC.

    Args:
        depth: 8, 14, 20, 26, 32, 44, 56, 110, ... (6n + 2).
        num_classes: number of logits.
        shortcut: "A" (parameter-free) or "B" (1x1 convolution and BatchNorm), where a block changes shape.
        widths: channels of the three stages.
        stem: channels of the first convolution; None for `widths[0]`.
        dtype: dtype of the computation (`jnp.bfloat16`, `jnp.float16`); the parameters stay float32 and the head
            computes in float32. None: the dtype of parameters and input.

    Raises:
        ValueError: depth is not 6n + 2, the shortcut is unknown, or there are not three positive widths.

    Example:
        >>> model = ResNet(depth=8, num_classes=10, widths=(4, 8, 16))
        >>> x = jnp.zeros((2, 8, 8, 1))
        >>> variables = jax.jit(model.init)(jax.random.key(0), x)
        >>> jax.jit(model.apply)(variables, x).shape
        (2, 10)
    """

    depth: int
    num_classes: int
    shortcut: str = "A"
    widths: tuple[int, ...] = (16, 32, 64)
    stem: int | None = None
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, 32, 44, 56, 110, ...), not {self.depth}")
        if self.shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' (parameter-free) or 'B' (1x1 convolution), not {self.shortcut!r}")
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ValueError(f"widths must be three positive numbers of channels, not {self.widths}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = convolution(x, self.stem or self.widths[0], 3, dtype=self.dtype, name="conv1")
        x = nn.relu(batch_norm(x, train, dtype=self.dtype, name="bn1"))
        for stage, width in enumerate(self.widths):
            for block in range((self.depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = ResidualBlock(width, stride, self.shortcut, self.dtype, name=name)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return classifier_head(x, self.num_classes, dtype=self.dtype)
