"""VGG with BatchNorm for small images (arXiv 1409.1556; the CIFAR form with hidden layers of 512)."""

from typing import Any

import jax
from flax import linen as nn

from ehap_jax.models.layers import batch_norm, classifier_head, convolution, he_normal

_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """VGG-11/13/16/19-BN: five stages of 3x3 convolutions, each ended by a 2x2 maximum, then dense layers.

    The feature map is flattened in (height, width, channel) order. There is no dropout.

    Args:
        depth: 11, 13, 16 or 19.
        num_classes: number of logits.
        widths: channels of the five stages.
        hidden: widths of the dense layers before the logits; `()` for none.
        conv_bias: biases on the convolutions, as torchvision's state dicts have; BatchNorm makes them redundant.
        dtype: dtype of the computation; see `ResNet`.

    Raises:
        ValueError: an unknown depth, not five positive widths, or, when called, images smaller than 32x32.
    """

    depth: int
    num_classes: int
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    hidden: tuple[int, ...] = (512, 512)
    conv_bias: bool = False
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.depth not in _CONVOLUTIONS:
            raise ValueError(f"a VGG has depth {', '.join(map(str, _CONVOLUTIONS))}, not {self.depth}")
        if len(self.widths) != 5 or min(self.widths) < 1:
            raise ValueError(f"widths must be five positive numbers of channels, not {self.widths}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        if min(x.shape[1:3]) < 32:
            raise ValueError(f"VGG halves its images five times and needs 32x32 pixels at least, got {x.shape[1:3]}")
        number = 0
        for width, repeats in zip(self.widths, _CONVOLUTIONS[self.depth], strict=True):
            for _ in range(repeats):
                number += 1
                x = convolution(x, width, 3, dtype=self.dtype, name=f"conv{number}", use_bias=self.conv_bias)
                x = nn.relu(batch_norm(x, train, dtype=self.dtype, name=f"bn{number}"))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for number, width in enumerate(self.hidden, start=1):
            x = nn.relu(nn.Dense(width, kernel_init=he_normal, dtype=self.dtype, name=f"fc{number}")(x))
        return classifier_head(x, self.num_classes, dtype=self.dtype)
