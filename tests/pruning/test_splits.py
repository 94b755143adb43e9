"""Axes that are split and merged: which factor keeps the channels, and what is left when a part loses them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import channel_groups, channel_structure, trace_graph
from ehap_jax.pruning import PruningPlan
from tests.pruning.invariant import assert_all_plans, assert_invariant, normal
from tests.pruning.networks import conv

TOKENS, HEADS, FEATURES = 3, 4, 2
WIDTH = HEADS * FEATURES


def drawn(graph):
    return {frozenset((path, axis, i) for (path, axis), i in g.slices.items()) for g in channel_groups(graph)}


def attend(q, k, v):
    """(batch, heads, tokens, features) each."""
    return jax.nn.softmax(q @ k.swapaxes(2, 3), axis=-1) @ v


def fused(order):
    """Query, key and value from one kernel, told apart along an axis that cannot shrink."""
    sizes = {"n": 3, "h": HEADS, "d": FEATURES}

    def apply(w, x):
        qkv = (x @ w["qkv"]).reshape(2, TOKENS, *(sizes[name] for name in order))
        q, k, v = jnp.transpose(qkv, [2 + order.index("n"), 0, 2 + order.index("h"), 1, 2 + order.index("d")])
        return attend(q, k, v).swapaxes(1, 2).reshape(2, TOKENS, WIDTH) @ w["out"]

    return apply


@pytest.mark.parametrize("order", ["nhd", "hnd", "nhd twice"])
def test_heads_of_a_fused_kernel_go_whole(order):
    """The factor of three is unpacked, so the heads keep the channels wherever their factor stands."""
    shapes = {"qkv": (5, 3 * WIDTH), "out": (WIDTH, 5)}
    layer = fused(order[:3])
    apply = layer
    if order == "nhd twice":  # splits of one kind are decided together
        apply = lambda w, x: layer(w, x + layer(w, x))  # noqa: E731
    variables = {name: 0.5 * normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    graph = trace_graph(apply)(variables, normal(2, TOKENS, 5))

    def columns(head):
        at = np.arange(3 * WIDTH).reshape([{"n": 3, "h": HEADS, "d": FEATURES}[name] for name in order[:3]])
        return tuple(int(i) for i in np.sort(at.take(head, order.index("h")).ravel()))

    rows = lambda head: tuple(range(FEATURES * head, FEATURES * (head + 1)))  # noqa: E731
    truth = {frozenset({("qkv", 1, columns(h)), ("out", 0, rows(h))}) for h in range(HEADS)}
    assert {g for g in drawn(graph) if any(path == "qkv" and axis == 1 for path, axis, _ in g)} == truth
    if order == "nhd twice":
        assert_all_plans(apply, variables, normal(2, TOKENS, 5), seeds=(0,), couplings=("group",))


@pytest.mark.slow
def test_heads_of_kernels_with_two_output_axes_meet_a_merged_axis():
    """Value kernels of shape (in, heads, features), an output kernel of shape (heads * features, out)."""
    variables = {name: 0.5 * normal(5, HEADS, FEATURES, seed=i) for i, name in enumerate("qkv")}
    variables["out"] = normal(WIDTH, 2, seed=3)

    def apply(w, x):
        q, k, v = (jnp.einsum("btc,chd->bhtd", x, w[name]) for name in "qkv")
        return attend(q, k, v).swapaxes(1, 2).reshape(2, TOKENS, WIDTH) @ w["out"]

    graph = assert_all_plans(apply, variables, normal(2, TOKENS, 5), seeds=(0,), couplings=("group",))
    groups = [g.slices for g in channel_groups(graph)]
    assert [g["out", 0] for g in groups] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [g["v", 1] for g in groups] == [(h,) for h in range(HEADS)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_pixel_shuffle_keeps_channels(channels_last):
    """Whether pixels or channels stand first in the split axis, a channel goes with all its pixels."""
    variables = {"a": normal(1, 1, 3, 12), "b": normal(3, 3, 3, 2, seed=1)}

    def apply(w, x):
        h = conv(x, w["a"])
        if channels_last:
            h = h.reshape(1, 4, 4, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5)
        else:
            h = h.reshape(1, 4, 4, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return conv(jax.nn.relu(h.reshape(1, 8, 8, 3)), w["b"])

    graph = assert_all_plans(apply, variables, normal(1, 4, 4, 3), seeds=(0,), couplings=("group",))
    pixels = (lambda c: (c, c + 3, c + 6, c + 9)) if channels_last else (lambda c: tuple(range(4 * c, 4 * c + 4)))
    assert drawn(graph) == {frozenset({("a", 3, pixels(c)), ("b", 2, (c,))}) for c in range(3)}


@pytest.mark.slow
def test_the_factor_that_frees_most_channels_keeps_them():
    """Of the factors (2, 2, 3) the first is unpacked, half of the second is squeezed away, the third is free."""
    shapes = {"in": (3, 12), "first": (3, 2), "second": (1, 3, 2)}
    variables = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}

    def apply(w, x):
        a, b = (jnp.squeeze(half, 1) for half in jnp.split((x @ w["in"]).reshape(5, 2, 2, 3), 2, axis=1))
        first, second = jnp.split(a * jnp.cos(b), 2, axis=1)
        return jnp.squeeze(first, 1) @ w["first"] + jnp.einsum("rbc,bco->ro", second, w["second"])

    graph = assert_all_plans(apply, variables, normal(5, 3), seeds=(0,), couplings=("group",))
    truth = {
        frozenset({("in", 1, (c, c + 3, c + 6, c + 9)), ("first", 0, (c,)), ("second", 1, (c,))}) for c in range(3)
    }
    assert drawn(graph) == truth


@pytest.mark.slow
def test_a_channel_without_an_axis_left_cannot_go():
    """One channel of a stream is read as a plain vector: there would be nothing to reshape without it."""
    variables = {"a": normal(3, 4), "b": normal(4, 2, seed=1)}

    def apply(w, x):
        h = x @ w["a"]
        return jnp.tanh(h) @ w["b"] * h[:, 1:2].reshape(-1)[:, None]

    graph = assert_all_plans(apply, variables, normal(5, 3), seeds=(0,), couplings=("group",))
    assert drawn(graph) == {frozenset({("a", 1, (c,)), ("b", 0, (c,))}) for c in (0, 2, 3)}
    structure = channel_structure(trace_graph(lambda w, x: (x @ w).reshape(-1) * 2.0)(normal(3, 1), normal(5, 3)))
    assert "split of an axis" in structure.why_fixed("")


def test_a_branch_that_reads_nothing_any_more():
    """Half of a stream is gone altogether: a convolution over no channels gives zero."""
    shapes = {"in": (1, 1, 3, 8), "up": (1, 1, 4, 6), "out": (10, 2)}
    variables = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}

    def apply(w, x):
        first, second = jnp.split(conv(x, w["in"]), 2, axis=-1)
        return jnp.concatenate([first, jnp.cos(conv(second, w["up"]))], axis=-1).sum((1, 2)) @ w["out"]

    x = normal(2, 4, 4, 3)
    assert_invariant(apply, variables, x, plan=PruningPlan.from_keep(trace_graph(apply)(variables, x), {"in": [0, 2]}))
