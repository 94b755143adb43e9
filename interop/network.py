"""The forward pass of any residual network a checkpoint may hold, as one pure function.

The models in `ehap_jax.models` cover dense networks; a checkpoint can also hold a network that was pruned elsewhere,
with its own width at every convolution and residual sums by index. Such a network needs no class: its structure
is a `ResNetSpec` and a few index arrays, and its function is written here once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from interop.layouts import flax_module
from interop.spec import ResNetSpec

EPSILON = 1e-5
"""PyTorch's default in BatchNorm, which every supported family uses."""


def residual_network(
    spec: ResNetSpec, indices: Mapping[str, np.ndarray] | None = None
) -> Callable[[Any, jax.Array], jax.Array]:
    """The function `apply(variables, x) -> logits` of a residual network in eval mode.

    Args:
        spec: the widths.
        indices: "layer1.0.branch_index" -> positions of the branch's channels in the block's sum, likewise
            "…residual_index"; needed for blocks whose spec is `indexed`.

    Returns:
        apply(variables, x): x is (N, H, W, channels) float, logits are (N, num_classes); variables have the paths
        of `ehap_jax.models` ("params/layer1_0/conv1/kernel", …).

    Raises:
        KeyError: indices are missing for an indexed block.
    """
    indices = dict(indices or {})
    for number, stage in enumerate(spec.blocks, start=1):
        for position, block in enumerate(stage):
            for buffer in ("branch_index", "residual_index"):
                if block.indexed and f"layer{number}.{position}.{buffer}" not in indices:
                    raise KeyError(f"layer{number}.{position}.{buffer} is needed and was not given")

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        params, stats = variables["params"], variables["batch_stats"]

        def unit(x: jax.Array, conv: str, norm: str, stage: int, block: int, stride: int) -> jax.Array:
            kernel = _get(params, flax_module(conv, stage, block))["kernel"]
            affine = _get(params, flax_module(norm, stage, block))
            moments = _get(stats, flax_module(norm, stage, block))
            return batch_norm(convolve(x, kernel, stride), affine, moments)

        x = jax.nn.relu(unit(x, "stem_conv", "stem_bn", 0, 0, 1))
        for number, stage in enumerate(spec.blocks, start=1):
            for position, block in enumerate(stage):
                branch = jax.nn.relu(unit(x, "conv1", "bn1", number, position, block.stride))
                branch = unit(branch, "conv2", "bn2", number, position, 1)
                residual = x[:, :: block.stride, :: block.stride, :]
                if block.shortcut is not None:
                    residual = unit(x, "shortcut_conv", "shortcut_bn", number, position, block.stride)
                name = f"layer{number}.{position}"
                if block.indexed:
                    branch = place(branch, indices[f"{name}.branch_index"], block.outputs)
                    residual = place(residual, indices[f"{name}.residual_index"], block.outputs)
                elif residual.shape[-1] < block.branch:
                    pad = (block.branch - residual.shape[-1]) // 2
                    residual = jnp.pad(residual, ((0, 0), (0, 0), (0, 0), (pad, pad)))
                x = jax.nn.relu(branch + residual)
        head = _get(params, flax_module("linear"))
        return jnp.mean(x, axis=(1, 2)) @ head["kernel"] + head["bias"][None, :]

    return apply


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """PyTorch's Conv2d(padding=kernel // 2) on (N, H, W, C) and an (h, w, in, out) kernel."""
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(x: jax.Array, affine: Mapping[str, jax.Array], moments: Mapping[str, jax.Array]) -> jax.Array:
    """BatchNorm with frozen statistics over the last axis."""
    scale = affine["scale"] * jax.lax.rsqrt(moments["var"] + jnp.asarray(EPSILON, moments["var"].dtype))
    return (x - moments["mean"][None, None, None, :]) * scale[None, None, None, :] + affine["bias"][None, None, None, :]


def place(x: jax.Array, positions: np.ndarray, channels: int) -> jax.Array:
    """(…, k) -> (…, channels): channel i of x goes to positions[i], every other channel is zero.

    A gather from x with one zero channel appended, which graph rules follow and gradients pass through.
    """
    source = np.full(channels, x.shape[-1], dtype=np.int32)
    source[np.asarray(positions)] = np.arange(x.shape[-1], dtype=np.int32)
    if np.array_equal(source, np.arange(channels)) and channels == x.shape[-1]:
        return x
    padded = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, 1),))
    return jnp.take(padded, source, axis=-1)


def _get(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree
