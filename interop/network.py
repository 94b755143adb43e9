"""The forward pass of any network a checkpoint may hold, as one pure function.

The models in `ehap_jax.models` cover dense networks; a checkpoint can also hold a network that was pruned elsewhere,
with its own width at every convolution and residual sums by index. Such a network needs no class: its structure
is a spec and a few index arrays, and its function is written here once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from interop.forms import FORMS, INDEX_BUFFERS, Form, Part
from interop.spec import HEAD_WIDTH, BlockSpec, InvertedSpec, ResidualSpec, Spec, VGGSpec, ViTSpec, sums

EPSILON = 1e-5
"""PyTorch's default in BatchNorm, which every supported family uses."""

LAYER_NORM_EPSILON = 1e-6
"""What timm's and DeiT's transformers use."""

Apply = Callable[[Any, jax.Array], jax.Array]


def network_function(spec: Spec, indices: Mapping[str, np.ndarray] | None = None) -> Apply:
    """The function `apply(variables, x) -> logits` of a network in eval mode.

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
    if isinstance(spec, VGGSpec):
        return _vgg(spec)
    if isinstance(spec, ViTSpec):
        return _vit(spec)
    form, indices = FORMS[spec.form], dict(indices or {})
    for place, block in sums(spec):
        for buffer in INDEX_BUFFERS:
            key = form.names.key(Part("add", *place, buffer))
            if block.indexed and key not in indices:
                raise KeyError(f"{key} is needed and was not given")
    return _inverted(form, spec, indices) if isinstance(spec, InvertedSpec) else _residual(form, spec, indices)


class _Layers:
    """The layers of one set of variables, by role."""

    def __init__(self, form: Form, variables: Any) -> None:
        self.form, self.params = form, variables["params"]
        self.stats = variables.get("batch_stats", {})

    def conv(self, role: str, x: jax.Array, stride: int = 1, place: tuple[int, int] = (0, 0)) -> jax.Array:
        layer = _get(self.params, self.form.flax.module(role, *place))
        y = convolve(x, layer["kernel"], stride)
        return y + layer["bias"][None, None, None, :] if "bias" in layer else y

    def norm(self, role: str, x: jax.Array, place: tuple[int, int] = (0, 0)) -> jax.Array:
        path = self.form.flax.module(role, *place)
        return batch_norm(x, _get(self.params, path), _get(self.stats, path))

    def dense(self, role: str, x: jax.Array, block: int = 0) -> jax.Array:
        layer = _get(self.params, self.form.flax.module(role, 0, block))
        return x @ layer["kernel"] + layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))

    def layer_norm(self, role: str, x: jax.Array, block: int = 0) -> jax.Array:
        layer = _get(self.params, self.form.flax.module(role, 0, block))
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normal = centred * lax.rsqrt(variance + jnp.asarray(LAYER_NORM_EPSILON, x.dtype))
        return normal * layer["scale"][None, None, :] + layer["bias"][None, None, :]


def _vgg(spec: VGGSpec) -> Apply:
    form = FORMS[spec.form]

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        layers, number = _Layers(form, variables), 0
        for stage, count in enumerate(form.stages, start=1):
            for _ in range(count):
                number += 1
                x = layers.conv(f"conv{number}", x)
                x = jax.nn.relu(layers.norm(f"bn{number}", x) if form.has(f"bn{number}") else x)
            if stage < len(form.stages) or form.has("linear"):
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
        if form.has("mean_linear"):
            return layers.dense("mean_linear", jnp.mean(x, axis=(1, 2)))
        # In PyTorch's order, channels first: a kernel that reads a grid keeps its rows as they are in the file.
        x = grid_means(x, spec.grid).transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        for role, _ in zip(("fc1", "fc2"), spec.hidden, strict=False):
            x = jax.nn.relu(layers.dense(role, x))
        return layers.dense("linear", x)

    return apply


def _residual(form: Form, spec: ResidualSpec, indices: Mapping[str, np.ndarray]) -> Apply:
    def run_block(layers: _Layers, block: BlockSpec, x: jax.Array, place: tuple[int, int]) -> jax.Array:
        branch = source = x
        for index in range(len(form.kernels)):
            stride = block.stride if index == form.strided else 1
            if form.preactivation:
                branch = jax.nn.relu(layers.norm(f"bn{index + 1}", branch, place))
                source = branch if index == 0 and form.has("projection") else source
                branch = layers.conv(f"conv{index + 1}", branch, stride, place)
            else:
                branch = layers.norm(f"bn{index + 1}", layers.conv(f"conv{index + 1}", branch, stride, place), place)
                branch = jax.nn.relu(branch) if index + 1 < len(form.kernels) else branch
        residual = x[:, :: block.stride, :: block.stride, :]
        if block.shortcut is not None:
            residual = layers.conv(form.shortcut, source, block.stride, place)
            if form.has("shortcut_bn"):
                residual = layers.norm("shortcut_bn", residual, place)
        if block.indexed:
            first, second = (indices[form.names.key(Part("add", *place, buffer))] for buffer in INDEX_BUFFERS)
            branch = scatter_channels(branch, first, block.outputs)
            residual = scatter_channels(residual, second, block.outputs)
        elif residual.shape[-1] < block.branch:
            pad = (block.branch - residual.shape[-1]) // 2
            residual = jnp.pad(residual, ((0, 0), (0, 0), (0, 0), (pad, pad)))
        total = branch + residual
        return total if form.preactivation else jax.nn.relu(total)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        layers = _Layers(form, variables)
        x = layers.conv("stem_conv", x, 2 if spec.stem_size == 7 else 1)
        if form.has("stem_bn"):
            x = jax.nn.relu(layers.norm("stem_bn", x))
        if spec.stem_size == 7:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for number, stage in enumerate(spec.blocks, start=1):
            for position, block in enumerate(stage):
                x = run_block(layers, block, x, (number, position))
        if form.has("final_bn"):
            x = jax.nn.relu(layers.norm("final_bn", x))
        if form.has("final_affine"):
            x = layers.norm("final_affine", x)
        return layers.dense("linear", jnp.mean(x, axis=(1, 2)))

    return apply


def _inverted(form: Form, spec: InvertedSpec, indices: Mapping[str, np.ndarray]) -> Apply:
    def apply(variables: Any, x: jax.Array) -> jax.Array:
        layers = _Layers(form, variables)

        def layer(role: str, x: jax.Array, stride: int = 1, block: int = 0) -> jax.Array:
            return layers.norm(f"{role}_bn", layers.conv(f"{role}_conv", x, stride, (0, block)), (0, block))

        x = jax.nn.relu6(layer("first_depthwise", jax.nn.relu6(layer("stem", x, 2))))
        x = layer("first_project", x)
        for number, block in enumerate(spec.blocks):
            branch = jax.nn.relu6(layer("expand", x, 1, number))
            branch = jax.nn.relu6(layer("depthwise", branch, block.stride, number))
            branch = layer("project", branch, 1, number)
            if block.indexed:
                first, second = (indices[form.names.key(Part("add", 0, number, buffer))] for buffer in INDEX_BUFFERS)
                branch = scatter_channels(branch, first, block.outputs)
                x = scatter_channels(x, second, block.outputs)
            x = branch + x if block.residual else branch
        x = jax.nn.relu6(layer("last", x))
        return layers.dense("linear", jnp.mean(x, axis=(1, 2)))

    return apply


def _vit(spec: ViTSpec) -> Apply:
    form, side = FORMS[spec.form], isqrt(spec.tokens - 1)

    def attend(layers: _Layers, x: jax.Array, block: int) -> jax.Array:
        fused = layers.dense("qkv", x, block)
        q, k, v = jnp.moveaxis(fused.reshape(*x.shape[:2], 3, spec.heads[block], HEAD_WIDTH), 2, 0)
        weights = jax.nn.softmax(jnp.einsum("nqhd,nkhd->nhqk", q * HEAD_WIDTH**-0.5, k), axis=-1)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, v)
        return layers.dense("attention_out", mixed.reshape(*x.shape[:2], -1), block)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        if x.shape[1:3] != (side * spec.patch,) * 2:
            raise ValueError(f"the transformer is for images of {side * spec.patch} pixels, got {x.shape[1:3]}")
        layers = _Layers(form, variables)
        params = layers.params
        patches = lax.conv_general_dilated(
            x, params["patch_conv"]["kernel"], (spec.patch,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = patches.reshape(x.shape[0], -1, spec.width) + params["patch_conv"]["bias"][None, None, :]
        start = jnp.broadcast_to(params["tokens"]["cls_token"], (x.shape[0], 1, spec.width))
        x = jnp.concatenate([start, x], axis=1) + params["tokens"]["pos_embed"]
        for block in range(spec.depth):
            x = x + attend(layers, layers.layer_norm("attention_ln", x, block), block)
            hidden = layers.dense("fc1", layers.layer_norm("mlp_ln", x, block), block)
            x = x + layers.dense("fc2", jax.nn.gelu(hidden, approximate=False), block)
        return layers.dense("linear", layers.layer_norm("final_ln", x)[:, 0])

    return apply


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """PyTorch's Conv2d(padding=kernel // 2) on (N, H, W, C) and an (h, w, in / groups, out) kernel."""
    pads = [(size // 2, size // 2) for size in kernel.shape[:2]]
    layout, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1] // kernel.shape[2]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=layout, feature_group_count=groups
    )


def batch_norm(x: jax.Array, affine: Mapping[str, jax.Array], moments: Mapping[str, jax.Array]) -> jax.Array:
    """BatchNorm with frozen statistics over the last axis."""
    scale = affine["scale"] * lax.rsqrt(moments["var"] + jnp.asarray(EPSILON, moments["var"].dtype))
    return (x - moments["mean"][None, None, None, :]) * scale[None, None, None, :] + affine["bias"][None, None, None, :]


def grid_means(x: jax.Array, grid: int) -> jax.Array:
    """PyTorch's AdaptiveAvgPool2d(grid) on (N, H, W, C), where grid divides H and W: (N, grid, grid, C).

    Raises:
        ValueError: it does not divide them.
    """
    rows, columns = x.shape[1] // grid, x.shape[2] // grid
    if (rows * grid, columns * grid) != x.shape[1:3]:
        raise ValueError(
            f"a {grid}×{grid} grid of means needs features it divides, these are {x.shape[1]}×{x.shape[2]}"
        )
    if rows == columns == 1:
        return x
    return x.reshape(x.shape[0], grid, rows, grid, columns, x.shape[3]).mean((2, 4))


def scatter_channels(x: jax.Array, positions: np.ndarray, channels: int) -> jax.Array:
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
