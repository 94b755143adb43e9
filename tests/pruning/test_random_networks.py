"""masked == shrunk on random programs of many kinds of operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ehap_jax.graph import channel_groups, channel_structure, trace_graph
from ehap_jax.pruning import PruningPlan
from tests.pruning.invariant import assert_invariant, normal

pytestmark = pytest.mark.slow

ROWS = 3


def dense(u, v, n, param):
    return u @ param(u.shape[1], 2 + n)


def fitted(operation):
    """A binary operation; the second operand goes through a dense layer where the widths differ."""

    def apply(u, v, n, param):
        return operation(u, v if v.shape == u.shape else v @ param(v.shape[1], u.shape[1]))

    return apply


def attention(u, v, n, param):
    q, k = (w @ param(w.shape[1], 4) for w in (u, v))
    heads = [jnp.reshape(h, (ROWS, 2, 2)) for h in (q, k, q)]
    p = jax.nn.softmax(jnp.einsum("ihd,jhd->hij", *heads[:2]), axis=-1)
    return jnp.einsum("hij,jhd->ihd", p, heads[2]).reshape(ROWS, 4)


def unpacked(u, v, n, param):
    """One kernel for several values, along any factor of its output axis."""
    h = (u @ param(u.shape[1], 12)).reshape(ROWS, *((3, 2, 2), (2, 3, 2), (2, 2, 3))[n % 3])
    a, b, c = jnp.moveaxis(h, 1 + n % 3, 0)
    return (a * jax.nn.sigmoid(b) + c).reshape(ROWS, 4)


def shuffle(u, v, n, param):
    even = u[:, : u.shape[1] // 2 * 2]
    return even.reshape(ROWS, 2, -1).swapaxes(1, 2).reshape(even.shape) if even.size else u


def scan(u, v, n, param):
    w, b = param(u.shape[1], u.shape[1]), param(2, u.shape[1])
    return jax.lax.scan(lambda h, c: (jnp.tanh(h @ w + c[None]), None), u, b)[0]


OPERATIONS = {
    "dense": dense,
    "dense again": dense,
    "add": fitted(jnp.add),
    "add again": fitted(jnp.add),
    "subtract": fitted(jnp.subtract),
    "multiply": fitted(jnp.multiply),
    "maximum": fitted(jnp.maximum),
    "gate": fitted(lambda u, v: u * jax.nn.sigmoid(v)),
    "select": fitted(lambda u, v: jnp.where(v > 0, u, 0.5 * v)),
    "concatenate": lambda u, v, n, param: jnp.concatenate([u, v], axis=1)[:, :7],
    "relu": lambda u, v, n, param: jax.nn.relu(u),
    "gelu": lambda u, v, n, param: jax.nn.gelu(u),
    "relu6": lambda u, v, n, param: jax.nn.relu6(u),
    "sigmoid": lambda u, v, n, param: jax.nn.sigmoid(u),
    "scale": lambda u, v, n, param: u * param(u.shape[1])[None],
    "bias": lambda u, v, n, param: u + param(u.shape[1])[None],
    "constant": lambda u, v, n, param: u * jnp.linspace(0.5, 1.5, u.shape[1])[None],
    "reverse": lambda u, v, n, param: u[:, ::-1],
    "permute": lambda u, v, n, param: u[:, np.random.default_rng(n).permutation(u.shape[1])],
    "roll": lambda u, v, n, param: jnp.roll(u, 1, axis=1),
    "take": lambda u, v, n, param: u[:, : max(1, u.shape[1] - n)],
    "stride": lambda u, v, n, param: u[:, ::2],
    "pad": lambda u, v, n, param: jnp.pad(u, ((0, 0), (n % 2, 1))),
    "softmax": lambda u, v, n, param: jax.nn.softmax(u, axis=1),
    "centre": lambda u, v, n, param: u - u.mean(1, keepdims=True),
    "repeat": lambda u, v, n, param: jnp.repeat(u, 2, axis=1)[:, :6],
    "tile": lambda u, v, n, param: jnp.tile(u, (1, 2))[:, :6],
    "flatten": lambda u, v, n, param: jnp.broadcast_to(u.reshape(1, -1) @ param(u.size, 3), (ROWS, 3)),
    "attention": attention,
    "scan": scan,
    "remat": lambda u, v, n, param: jax.checkpoint(lambda u, w: jax.nn.silu(u @ w))(u, param(u.shape[1], 3)),
    "mean of rows": lambda u, v, n, param: u.mean(0, keepdims=True) + u,
    "outer": lambda u, v, n, param: (u[:, :, None] * v[:, None, :]).reshape(ROWS, -1)[:, : 6 + n],
    "unpacked": unpacked,
    "shuffle": shuffle,
    "maximum of pairs": lambda u, v, n, param: (
        (u @ param(u.shape[1], 6)).reshape(ROWS, *((2, 3)[:: 1 - n % 2 * 2])).max(1)
    ),
    "sum of channels": lambda u, v, n, param: u.sum(1, keepdims=True) * v,
}
step = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5), st.integers(0, 5), st.integers(0, 4))


def run(program, x, param):
    values = [x @ param(x.shape[1], 5)]
    for name, a, b, n in program:
        u, v = values[-1 - a % len(values)], values[-1 - b % len(values)]
        values.append(OPERATIONS[name](u, v, n, param))
    return sum(v @ param(v.shape[1], 2) for v in values[-3:])


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    program=st.lists(step, min_size=3, max_size=8),
    seed=st.integers(0, 3),
    coupling=st.sampled_from(["group", "union"]),
)
def test_random_programs(program, seed, coupling):
    rng = np.random.default_rng(seed)
    shapes = []

    def declare(*shape):
        shapes.append(shape)
        return jnp.zeros(shape)

    x = normal(ROWS, 4)
    jax.eval_shape(lambda x: run(program, x, declare), x)
    variables = {f"w{i:02}": jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for i, s in enumerate(shapes)}

    def apply(v, x):
        leaves = iter(sorted(v))
        return run(program, x, lambda *shape: v[next(leaves)])

    graph = trace_graph(apply)(variables, x)
    keep = random_keep(graph, coupling, rng)
    if keep:
        assert_invariant(apply, variables, x, plan=PruningPlan.from_keep(graph, keep, coupling=coupling))


def random_keep(graph, coupling, rng):
    """What is left of every kernel when a random third of the groups is gone, one output channel at least."""
    axes = channel_structure(graph, coupling).kernel_axes
    keep = {path: set(range(graph.leaves[path].shape[axis])) for path, axis in axes.items()}
    for group in channel_groups(graph, coupling=coupling):
        smaller = {path: keep[path] - set(indices) for path, indices in group.producers.items()}
        if rng.random() < 0.4 and all(smaller.values()):
            keep.update(smaller)
    return {p: sorted(kept) for p, kept in keep.items() if len(kept) < graph.leaves[p].shape[axes[p]]}
