"""A network small enough to draw: stem, one residual block, dense head."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {"stem": (3, 3, 3, 6), "a1": (3, 3, 6, 5), "a2": (3, 3, 5, 6), "bias": (6,), "head": (6, 3)}


def structs():
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


def variables(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(0.4 * rng.normal(size=s), jnp.float32) for n, s in SHAPES.items()}


def images(seed=1, count=2):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, 4, 4, 3)), jnp.float32)


def conv(x, w, groups=1, stride=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def apply(v, x):
    x = jax.nn.relu(conv(x, v["stem"]))
    branch = conv(jax.nn.relu(conv(x, v["a1"])), v["a2"]) + v["bias"][None, None, None]
    return jax.nn.relu(x + branch).mean((1, 2)) @ v["head"]
