"""Costs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from ehap_jax.graph import count_cost, trace_graph
from ehap_jax.pruning import PruningPlan


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def conv(x, w, groups=1, stride=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


VARIABLES = {
    "params": {
        "c1": struct(3, 3, 3, 8),
        "c2": struct(3, 3, 8, 6),
        "depth": struct(3, 3, 1, 6),
        "head": struct(6, 10),
        "bias": struct(10),
    },
    "stats": {"mean": struct(8, dtype=jnp.float16)},
}


def apply(v, x):
    p = v["params"]
    h = conv(x, p["c1"]) - v["stats"]["mean"].astype(jnp.float32)[None, None, None]
    h = jax.nn.relu(conv(jax.nn.relu(h), p["c2"], stride=2))
    return conv(h, p["depth"], groups=6).sum((1, 2)) @ p["head"] + p["bias"][None]


@pytest.fixture(scope="module")
def graph():
    return trace_graph(apply)(VARIABLES, struct(1, 8, 8, 3))


def by_hand(first, second):
    params = 27 * first + 9 * first * second + 9 * second + second * 10 + 10
    macs = 64 * 27 * first + 16 * 9 * first * second + 16 * 9 * second + second * 10
    return params, macs, 4 * params + 2 * first


def test_full(graph):
    assert tuple(count_cost(graph)) == by_hand(8, 6)


@pytest.mark.parametrize("coupling", ["group", "union"])
def test_under_a_plan(graph, coupling):
    keep = {"params/c1": [0, 2, 7], "params/c2": [1, 5], "params/depth": [1, 5]}
    plan = PruningPlan.from_keep(graph, keep, coupling=coupling)
    assert tuple(count_cost(graph, plan)) == by_hand(3, 2)


def test_macs_scale_with_the_batch():
    one, four = (count_cost(trace_graph(apply)(VARIABLES, struct(n, 8, 8, 3))) for n in (1, 4))
    assert four.macs == 4 * one.macs and four.params == one.params


def test_batched_products_count_their_batch():
    graph = trace_graph(lambda w, x: jnp.einsum("bhij,hjk->bhik", x, w))(struct(3, 5, 7), struct(2, 3, 4, 5))
    assert count_cost(graph).macs == 2 * 3 * 4 * 5 * 7


def test_calls_with_rules_of_their_own_are_counted_once():
    block = jax.checkpoint(lambda x, w: jax.nn.relu(x @ w))
    graph = trace_graph(lambda w, x: block(x, w))(struct(3, 5), struct(2, 3))
    assert count_cost(graph).macs == 2 * 3 * 5


def test_cost_of_a_network_with_an_untaught_primitive_needs_no_structure():
    graph = trace_graph(lambda w, x: jnp.linalg.cholesky(x @ w))(struct(3, 3), struct(3, 3))
    assert tuple(count_cost(graph)) == (9, 27, 36)
