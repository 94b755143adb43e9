"""A small conv + BatchNorm (eval mode) + residual network, its loss, and its dense float64 Hessian."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ehap_jax._compat import enable_x64
from ehap_jax.curvature.problem import path_name


def params_and_batch():
    """Float32 parameters (biases and statistics included) and 6 examples with labels."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    def norm(channels):
        return {
            "scale": normal(channels, scale=0.2) + 1,
            "bias": normal(channels, scale=0.3),
            "mean": normal(channels, scale=0.3),
            "var": jnp.abs(normal(channels)) + 0.5,
        }

    params = {
        "conv1": {"kernel": normal(3, 3, 2, 3, scale=0.4)},
        "norm1": norm(3),
        "conv2": {"kernel": normal(3, 3, 3, 3, scale=0.3)},
        "norm2": norm(3),
        "dense": {"kernel": normal(3, 4, scale=0.6), "bias": normal(4, scale=0.1)},
    }
    batch = {"image": normal(6, 5, 5, 2), "label": jnp.asarray(rng.integers(0, 4, 6), jnp.int32)}
    return params, batch


def _per_channel(x):
    return x[None, None, None, :]


def _norm(p, x):
    scale = p["scale"] * jax.lax.rsqrt(p["var"] + 1e-3)
    return (x - _per_channel(p["mean"])) * _per_channel(scale) + _per_channel(p["bias"])


def _conv(kernel, x):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def logits(params, x):
    """A smooth network, so that its Hessian is more than Gauss-Newton."""
    h = jnp.tanh(_norm(params["norm1"], _conv(params["conv1"]["kernel"], x)))
    h = jax.nn.silu(h + _norm(params["norm2"], _conv(params["conv2"]["kernel"], h)))
    return h.mean((1, 2)) @ params["dense"]["kernel"] + params["dense"]["bias"][None, :]


def loss(params, batch):
    """Mean cross-entropy, the softmax in float32 at least."""
    y = logits(params, batch["image"])
    y = jax.nn.log_softmax(y.astype(y.dtype if y.dtype == jnp.float64 else jnp.float32))
    return -jnp.take_along_axis(y, batch["label"][:, None], axis=1).mean()


@functools.cache
def dense_hessian():
    """The Hessian over all kernel weights in float64, with the path and output channel of every row.

    Returns ``(H, rows)``: H ``(n, n)``; rows a list of ``(path, channel)``. Rows follow the tree's order.
    """
    with enable_x64():
        params, batch = as_float64(params_and_batch())
        named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
        kernels = [(path, leaf) for path, leaf in named if leaf.ndim >= 2]
        sizes = np.cumsum([leaf.size for _, leaf in kernels])[:-1].tolist()

        def of_vector(w):
            parts = jnp.split(w, sizes)
            new = {path: x.reshape(leaf.shape) for (path, leaf), x in zip(kernels, parts, strict=True)}
            leaves = [new.get(path, leaf) for path, leaf in named]
            return loss(jax.tree.unflatten(jax.tree.structure(params), leaves), batch)

        H = np.asarray(jax.jit(jax.hessian(of_vector))(jnp.concatenate([leaf.ravel() for _, leaf in kernels])))
    rows = [(path, i % leaf.shape[-1]) for path, leaf in kernels for i in range(leaf.size)]
    return H, rows


def as_float64(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x), jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def channels_of(rows):
    """``{(path, channel): rows of it}``."""
    found = {}
    for i, label in enumerate(rows):
        found.setdefault(label, []).append(i)
    return found
