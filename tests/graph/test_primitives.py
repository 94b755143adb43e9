"""Every kind of primitive: it occurs, and a network with it masks and shrinks alike or keeps its axes whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ehap_jax.graph import RULES, channel_groups, channel_structure, trace_graph
from ehap_jax.pruning import PruningPlan, mask_variables, shrink, shrink_variables
from tests.pruning.invariant import close, jit, normal

ROWS, WIDTH = 4, 6
EXPERTS = normal(2, WIDTH, WIDTH, seed=4)
ORDER = np.array([3, 5, 0, 1, 4, 2])


def dense_rows(h):
    """(ROWS, WIDTH) as (1, rows, 2, WIDTH)."""
    return h.reshape(1, 2, 2, WIDTH)


@jax.custom_vjp
def scaled(h):
    return jnp.sin(h)


scaled.defvjp(lambda h: (jnp.sin(h), h), lambda h, ct: (2.0 * ct * jnp.cos(h),))


def order():
    """Made where it is used: what a custom rule closes over is an input of it."""
    return (5 * jnp.arange(WIDTH) + 2) % WIDTH


@jax.custom_vjp
def permuted(h):
    return h[:, order()]


permuted.defvjp(lambda h: (h[:, order()], None), lambda _, ct: (jnp.zeros_like(ct).at[:, order()].add(ct),))


def pooled(h):
    return lax.reduce_window(dense_rows(h), -jnp.inf, lax.max, (1, 1, 2, 1), (1, 1, 2, 1), "VALID")


def group_norm(h):
    grouped = h.reshape(ROWS, 3, 2)
    mean = grouped.mean(-1, keepdims=True)
    variance = (grouped**2).mean(-1, keepdims=True) - mean**2
    return ((grouped - mean) * lax.rsqrt(variance + 1e-3)).reshape(ROWS, WIDTH)


# Primitives that a channel axis passes, and a function of (rows, channels) in which they occur.
PASS = {
    "transpose": lambda h: jnp.tanh(h.T).T,
    "squeeze expand_dims broadcast_in_dim": lambda h: jnp.squeeze(h[:, None, :] * jnp.ones((1, 1, WIDTH)), 1),
    "reshape rsqrt integer_pow": group_norm,
    "rev": lambda h: h[:, ::-1],
    "concatenate slice": lambda h: jnp.concatenate([h[:, 3:], h[:, :3]], axis=1),
    "split": lambda h: jnp.concatenate(jnp.split(h, [2], axis=1)[::-1], axis=1),
    "dynamic_slice dynamic_update_slice": lambda h: lax.dynamic_update_slice(
        h, lax.dynamic_slice(h, (1, 0), (2, WIDTH)), (0, 0)
    ),
    "pad": lambda h: jnp.pad(h, ((0, 0), (1, 1)))[:, 1:-1],
    "reduce_sum": lambda h: h - h.sum(0, keepdims=True),
    "reduce_max reduce_min reduce_prod": lambda h: h + (h.max(0) * h.min(0) * jnp.prod(h, 0))[None],
    "argmax argmin": lambda h: h * (jnp.argmax(h, 0) - jnp.argmin(h, 0)).astype(h.dtype)[None],
    "reduce_window_sum": lambda h: lax.reduce_window(
        dense_rows(h), 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"
    ).reshape(ROWS, WIDTH),
    "reduce_window_max": lambda h: lax.reduce_window(
        dense_rows(h), -jnp.inf, lax.max, (1, 2, 1, 1), (1, 1, 1, 1), "SAME"
    ).reshape(ROWS, WIDTH),
    "cumsum": lambda h: jnp.cumsum(h, axis=0),
    "cumprod cummax": lambda h: jnp.cumprod(h, axis=0) + lax.cummax(h, axis=0),
    "gather": lambda h: h[jnp.array([2, 0, 0, 3])],
    "gather sin": lambda h: jnp.sin(h[:, jnp.array([3, -1, 2, 0, 0, 1])]),
    "gather iota": lambda h: h[:, 5 - jnp.arange(6)],
    "gather sub": lambda h: jnp.take(h, np.array([5, 1, 7, 0, 1, 6]), axis=1, mode="fill", fill_value=0) - h[:, ::-1],
    "gather div": lambda h: jnp.take(h.T, np.array([5, 9, 0]), axis=0, mode="clip").repeat(2, axis=0).T / 2.0,
    "scatter-add": lambda h: jnp.zeros_like(h).at[jnp.array([1, 1, 0, 3])].add(h),
    "scatter": lambda h: jnp.zeros_like(h).at[:, ORDER - 6].set(jnp.sin(h)),
    "scatter-add slice": lambda h: h.T.at[jnp.array([4, 1, 4])].add(h[:, :3].T).T,
    "iota eq select_n": lambda h: jnp.where(lax.broadcasted_iota(jnp.int32, h.shape, 0) == 1, h, 2.0 * h),
    "convert_element_type": lambda h: h.astype(jnp.float16).astype(jnp.float32),
    "clamp": lambda h: lax.clamp(-0.5, h, 0.5),
    "logistic mul": lambda h: h * lax.logistic(h),
    "exp log1p tanh erf": lambda h: jnp.log1p(jnp.exp(h)) + jnp.tanh(h) * lax.erf(h),
    "max min abs sign neg": lambda h: jnp.maximum(h, 0.0) + jnp.minimum(abs(h), 1.0) * -jnp.sign(h),
    "sin cos div sub": lambda h: (jnp.sin(h) - h) / (2.0 + jnp.cos(h)),
    "pow sort": lambda h: jnp.sort((h**2) ** 1.5, axis=0),
    "random_bits": lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape).astype(h.dtype),
    "custom_jvp_call": jax.nn.relu,
    "custom_vjp_call": scaled,
    "custom_vjp_call gather": permuted,
    "checkpoint": jax.checkpoint(lambda h: jnp.sin(jnp.sin(h))),
    "scan": lambda h: lax.scan(lambda c, x: (c + x, c * x), jnp.zeros_like(h), jnp.stack([h, h]))[1].sum(0),
    "dot_general": lambda h: jnp.einsum("rc,sc->rs", h, h) @ h,
    "ragged_dot_general": lambda h: lax.ragged_dot(h, EXPERTS, jnp.array([1, 3], jnp.int32)),
    "stop_gradient optimization_barrier": lambda h: lax.optimization_barrier(lax.stop_gradient(h)) + h,
    "stack unstack": lambda h: sum(jnp.unstack(jnp.stack([h, jnp.sin(h)], axis=1), axis=1)),
    "top_k": lambda h: lax.top_k(h, 1, axis=0)[0] * h,
    "complex": lambda h: lax.real(lax.complex(h, jnp.sin(h)) ** 2),
    "scatter-mul scatter-min scatter-max": lambda h: (
        h.at[jnp.array([0, 2])].multiply(2.0).at[jnp.array([1])].min(h[:1]).at[jnp.array([3])].max(h[:1])
    ),
    "reduce": lambda h: h * lax.reduce(h, 0.0, lambda a, b: a + jnp.sin(b), (0,))[None],
    "reduce_window": lambda h: (
        h
        * lax.reduce_window(
            dense_rows(lax.stop_gradient(h)), 0.0, lambda a, b: a + jnp.sin(b), (1, 2, 1, 1), (1, 1, 1, 1), "SAME"
        ).reshape(ROWS, WIDTH)
    ),
    "debug_callback": lambda h: (jax.debug.callback(lambda seen: None, h), h)[1],
    "select_and_scatter_add": jax.grad(lambda h: jnp.square(pooled(h)).sum()),
    "tile": lambda h: jnp.tile(h, (1, 2))[:, :WIDTH],
}
# Primitives that read across the channel axis, or are not followed: the axis stays whole, and it is said why.
STAY = {
    "cumsum": lambda h: jnp.cumsum(h, axis=1),
    "argmax": lambda h: h * jnp.argmax(h, axis=1, keepdims=True).astype(h.dtype),
    "reduce_max": lambda h: h * h.max(1, keepdims=True),
    "reduce_window_max": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME"),
    "gather": lambda h: h[:, jnp.argsort(h[0])],
    "scatter-add": lambda h: h.at[:, jnp.argsort(h[0])[:2]].add(1.0),
    "dynamic_slice": lambda h: lax.dynamic_slice(h, (0, jnp.argmax(h[0])), (ROWS, 2)),
    "sort": lambda h: jnp.sort(h, axis=1),
    "top_k": lambda h: lax.top_k(h, 2)[0],
    "reduce": lambda h: h * lax.reduce(h, 0.0, lambda a, b: a + jnp.sin(b), (1,))[:, None],
    "unstack": lambda h: jnp.unstack(h, axis=1)[0][:, None] * h,
    "scan": lambda h: lax.scan(lambda c, x: (c + x, c * x), jnp.zeros(ROWS), h.T)[1].T,
    "while": lambda h: lax.while_loop(lambda c: c.sum() < 10.0, lambda c: jnp.abs(c) + 1.0, h),
    "cond": lambda h: lax.cond(h.sum() > 0, jnp.sin, jnp.cos, h),
    "sqrt": lambda h: jnp.sqrt(h**2),
    "pow": lambda h: (h**2) ** 0.25,
    "ragged_dot_general": lambda h: lax.ragged_dot(
        X, normal(WIDTH, 3, WIDTH, seed=5), jnp.abs(h).sum(0).astype(jnp.int32)
    ),
    "scatter": lambda h: jnp.zeros((ROWS, WIDTH)).at[:, jnp.array([1, 9, 3, 0, 2, 4])].set(h),
}


def network(function):
    def apply(v, x):
        h = function(x @ v["in"])
        return jnp.tanh(h) @ v["out"][: h.shape[1]] if h.shape[1] < WIDTH else jnp.tanh(h) @ v["out"]

    return apply


VARIABLES = {"in": normal(3, WIDTH, seed=1), "out": normal(WIDTH, 2, seed=2)}
X = normal(ROWS, 3, seed=3)


def names_in(graph):
    return {node.name for node in graph.body.walk()}


@pytest.mark.parametrize("names", PASS)
def test_channels_pass(names):
    graph = trace_graph(network(PASS[names]))(VARIABLES, X)
    written = {"squeeze", "expand_dims", "broadcast_in_dim", "iota", "stop_gradient", "eq"}
    for name in set(names.split()) - written:
        assert name in names_in(graph) or name.replace("checkpoint", "remat2") in names_in(graph), name
    groups = [group for group in channel_groups(graph) if "in" in group.producers]
    assert groups, "the channel axis does not pass"
    size = len(groups[0].producers["in"])
    keep = sorted(i for group in groups if 0 not in group.producers["in"] for i in group.producers["in"])
    plan = PruningPlan.from_keep(graph, {"in": keep})
    assert len(keep) == WIDTH - size
    apply = network(PASS[names])

    @jit
    def both(v, x):
        def loss(v, f):
            y = f(v, x)
            return jnp.sum(jnp.sin(y)), y

        full = jax.grad(loss, has_aux=True)(mask_variables(v, plan), apply)
        small = jax.grad(loss, has_aux=True)(shrink_variables(v, plan), shrink(apply, plan))
        return (shrink_variables(full[0], plan), full[1]), small

    wanted, found = both(VARIABLES, X)
    assert np.isfinite(jax.tree.leaves(found)[0]).all()
    close(found, wanted)


@pytest.mark.parametrize("name", STAY)
def test_channels_stay(name):
    graph = trace_graph(network(STAY[name]))(VARIABLES, X)
    assert name in names_in(graph)
    assert not any("in" in group.producers for group in channel_groups(graph))
    assert channel_structure(graph).why_fixed("in")


def test_pooling_whose_gradient_meets_an_argument_stays():
    def apply(v, x, slopes):
        return jax.vjp(pooled, x @ v["in"])[1](slopes)[0] @ v["out"]

    graph = trace_graph(apply)(VARIABLES, X, normal(1, 2, 1, WIDTH))
    assert "select_and_scatter_add" in names_in(graph)
    assert channel_groups(graph) == ()
    assert "maximum pooling of a value that cannot shrink" in channel_structure(graph).why_fixed("in")


def test_an_index_per_row_keeps_the_axis_of_a_single_row():
    def first(h):
        return h * jax.vmap(lambda row, i: jnp.take(row, i))(h, jnp.full(len(h), 2))[:, None]

    graph = trace_graph(network(first))(VARIABLES, X[:1])
    (gather,) = (node for node in graph.body.walk() if node.name == "gather")
    assert gather.params["dimension_numbers"].operand_batching_dims == (0,)
    assert channel_groups(graph) == () and "gather" in channel_structure(graph).why_fixed("in")


def test_every_rule_is_registered_once_and_is_complete():
    assert all(callable(rule.propagate) for rule in RULES.values())
    wanted = (
        "conv_general_dilated dot_general select_n clamp broadcast_in_dim reshape transpose squeeze rev concatenate "
        "split slice dynamic_slice pad reduce_sum reduce_max reduce_min reduce_prod argmax reduce_window_sum "
        "reduce_window_max cumsum gather scatter-add iota convert_element_type random_bits while cond"
    )
    assert set(wanted.split()) <= set(RULES)
