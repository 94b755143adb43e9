"""The main job in a few lines: trace, prune, shrink and quantise a function, with what every installation has."""

import jax
import jax.numpy as jnp

import ehap_jax as ehap


def apply(v, x):
    return jax.nn.relu(x @ v["one"]) @ v["two"]


def loss(v, batch):
    return jnp.mean(apply(v, batch) ** 2)


keys = jax.random.split(jax.random.key(0), 4)
variables = {"one": jax.random.normal(keys[0], (6, 8)), "two": jax.random.normal(keys[1], (8, 3))}
x = jax.random.normal(keys[2], (32, 6))

graph = ehap.trace_graph(apply)(variables, x)
trace = ehap.channel_trace(loss, variables, x, key=keys[3], num_probes=4)
plan = ehap.allocate(graph, ehap.hessian_scores(graph, variables, trace), macs=0.5)
small, weights = ehap.shrink(apply, plan), ehap.shrink_variables(variables, plan)
masked = apply(ehap.mask_variables(variables, plan), x)
assert weights["one"].shape == (6, 4), weights["one"].shape
assert jnp.allclose(small(weights, x), masked, atol=1e-5)

quantized = ehap.fake_quant(small)
_, ranges = quantized.apply(weights, quantized.init(weights, x), x, update=True)
integers = ehap.to_integer(quantized, weights, ranges, example=x)
assert jnp.abs(integers(x) - masked).max() < 0.03 * jnp.abs(masked).max()
