"""A small hand-written network with conv, BatchNorm, ReLU, a residual sum, pooling and dense; how to calibrate one."""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax

from ehap_jax.quant import INT8, fake_quant
from tests.pruning.invariant import jit

CHANNELS = 4


def conv(x, kernel, stride=1):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(x, p):
    p = {name: v.reshape(1, 1, 1, -1) for name, v in p.items()}
    return (x - p["mean"]) * (lax.rsqrt(p["var"] + 1e-5) * p["gamma"]) + p["beta"]


def apply(variables, x):
    """(N, 6, 6, 3) -> (N, 5)."""
    x = jax.nn.relu(batch_norm(conv(x, variables["stem"]["kernel"]), variables["bn0"]))
    y = jax.nn.relu(batch_norm(conv(x, variables["a"]["kernel"]), variables["bn1"]))
    y = batch_norm(conv(y, variables["b"]["kernel"]), variables["bn2"])
    x = jax.nn.relu(x + y).mean(axis=(1, 2))
    return x @ variables["head"]["kernel"] + variables["head"]["bias"][None]


def in_16_bits(dtype):
    """(function, variables, x): two dense layers that compute in ``dtype``, and a gate that stays in floating point."""

    def function(v, x):
        y = jax.nn.relu(x.astype(dtype) @ v["a"].astype(dtype)) @ v["b"].astype(dtype)
        return y * x[:, :3].astype(dtype)

    keys = jax.random.split(jax.random.key(0), 3)
    variables = {"a": jax.random.normal(keys[0], (6, 8)), "b": jax.random.normal(keys[1], (8, 3))}
    return function, variables, jax.random.normal(keys[2], (5, 6))


def make_variables(seed=0, gamma_sign=False):
    keys = iter(jax.random.split(jax.random.key(seed), 32))

    def kernel(*shape):
        return {"kernel": jax.random.normal(next(keys), shape) * (2 / shape[0] / shape[1] / shape[-2]) ** 0.5}

    def norm():
        gamma = jax.random.uniform(next(keys), (CHANNELS,), minval=0.5, maxval=1.5)
        if gamma_sign:
            gamma = gamma * jnp.array([1.0, -1.0, 1.0, -1.0])
        return {
            "gamma": gamma,
            "beta": 0.3 * jax.random.normal(next(keys), (CHANNELS,)),
            "mean": 0.3 * jax.random.normal(next(keys), (CHANNELS,)),
            "var": jax.random.uniform(next(keys), (CHANNELS,), minval=0.5, maxval=1.5),
        }

    c = CHANNELS
    return {
        "stem": kernel(3, 3, 3, c),
        "a": kernel(3, 3, c, c),
        "b": kernel(3, 3, c, c),
        "bn0": norm(),
        "bn1": norm(),
        "bn2": norm(),
        "head": {
            "kernel": jax.random.normal(next(keys), (c, 5)) * c**-0.5,
            "bias": 0.1 * jax.random.normal(next(keys), (5,)),
        },
    }


def make_images(seed=1, n=3):
    return jax.random.normal(jax.random.key(seed), (n, 6, 6, 3))


quantise_once = cache(fake_quant)


@cache
def compiled(quantized, update):
    return jit(partial(quantized.apply, update=update))


def calibrate(function, variables, x, rules=INT8):
    """(quantized, its ranges after one batch)."""
    quantized = quantise_once(function, rules)
    return quantized, compiled(quantized, True)(variables, quantized.init(variables, x), x)[1]


def run(quantized, variables, qstate, x):
    """Logits with the ranges as they are."""
    return compiled(quantized, False)(variables, qstate, x)[0]
