"""Pre-activation bottleneck ResNets: He et al. 2016 (arXiv 1603.05027), in the form the pruning papers use."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ehap_jax.models.layers import batch_norm, classifier_head, convolution


class PreActivationBottleneck(nn.Module):
    """BatchNorm, ReLU, convolution, three times (1x1, 3x3, 1x1): (N, H, W, C) -> (N, H/stride, W/stride, outputs).

    The 1x1 convolution of the shortcut, where the shape changes, reads the block's raw input and has no BatchNorm.
    """

    features: int
    outputs: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        dtype = self.dtype
        y = nn.relu(batch_norm(x, train, dtype=dtype, name="bn1"))
        y = convolution(y, self.features, 1, dtype=dtype, name="conv1")
        y = nn.relu(batch_norm(y, train, dtype=dtype, name="bn2"))
        y = convolution(y, self.features, 3, self.stride, dtype=dtype, name="conv2")
        y = nn.relu(batch_norm(y, train, dtype=dtype, name="bn3"))
        y = convolution(y, self.outputs, 1, dtype=dtype, name="conv3")
        if self.stride != 1 or x.shape[-1] != self.outputs:
            x = convolution(x, self.outputs, 1, self.stride, dtype=dtype, name="downsample_conv")
        return y + x


class PreResNet(nn.Module):
    """Pre-activation bottleneck ResNet for small images. Depth is 9n + 2: 29, 56, 110, 164, ...

    With the defaults the three stages have 64, 128 and 256 channels, four times those inside the bottlenecks.
    HAP's network of the same name has bottlenecks as wide as the stages: `stem=64, widths=(64, 128, 256),
    expansion=1`.

    Args:
        depth: 9n + 2.
        num_classes: number of logits.
        stem: channels of the first convolution.
        widths: channels inside the bottlenecks of the three stages.
        expansion: channels of a stage over those inside its bottlenecks.
        dtype: dtype of the computation; see `ResNet`.

    Raises:
        ValueError: depth is not 9n + 2, or there are not three positive widths.

    Example:
        >>> model = PreResNet(depth=11, num_classes=10, stem=4, widths=(2, 4, 8))
        >>> jax.jit(model.init_with_output)(jax.random.key(0), jnp.zeros((2, 8, 8, 1)))[0].shape
        (2, 10)
    """

    depth: int
    num_classes: int
    stem: int = 16
    widths: tuple[int, ...] = (16, 32, 64)
    expansion: int = 4
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.depth < 11 or (self.depth - 2) % 9:
            raise ValueError(f"a bottleneck PreResNet has depth 9n + 2 (29, 56, 110, 164, ...), not {self.depth}")
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ValueError(f"widths must be three positive numbers of channels, not {self.widths}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = convolution(x, self.stem, 3, dtype=self.dtype, name="conv1")
        for stage, width in enumerate(self.widths):
            for block in range((self.depth - 2) // 9):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = PreActivationBottleneck(width, width * self.expansion, stride, self.dtype, name=name)(x, train)
        x = nn.relu(batch_norm(x, train, dtype=self.dtype, name="bn"))
        x = jnp.mean(x, axis=(1, 2))
        return classifier_head(x, self.num_classes, dtype=self.dtype)
