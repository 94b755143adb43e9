"""Networks that exchange values over a named axis: masked == shrunk, under the axis that they are trained with."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import channel_groups, channel_structure, trace_graph
from ehap_jax.pruning import allocate, magnitude_scores, mask_variables, shrink, shrink_variables


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name="batch")(x))
        return nn.Dense(3)(x.mean((1, 2)))


MODEL = Normalised()
X = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))


@pytest.fixture(scope="module")
def network():
    variables = MODEL.init(jax.random.key(1), X[0], False)
    graph = trace_graph(partial(MODEL.apply, train=False))(variables, X[0])
    return variables, allocate(graph, magnitude_scores(graph, variables), channels=0.5)


def train(variables, x):
    return MODEL.apply(variables, x, True, mutable=["batch_stats"])


@pytest.mark.slow
def test_cross_replica_normalisation(network):
    variables, plan = network
    along = partial(jax.vmap, in_axes=(None, 0), axis_name="batch")
    full, state = along(train)(mask_variables(variables, plan), X)
    small, small_state = along(shrink(train, plan))(shrink_variables(variables, plan), X)
    np.testing.assert_allclose(small, full, rtol=1e-5, atol=1e-6)
    kept = plan.keep["params/Conv_0/kernel"]
    assert 0 < len(kept) < 6
    for name in ("mean", "var"):
        before = state["batch_stats"]["BatchNorm_0"][name][:, np.asarray(kept)]
        np.testing.assert_allclose(small_state["batch_stats"]["BatchNorm_0"][name], before, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_axis_that_is_not_bound_is_explained(network):
    with pytest.raises(NameError, match=r"unbound axis name: batch.*this where the axis is bound"):
        trace_graph(train)(network[0], X[0])


@pytest.mark.parametrize("tiled", [False, True])
def test_gathered_values_keep_their_channels(tiled):
    w = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    graphs = []

    def apply(w, x):
        return jax.lax.all_gather(jax.nn.relu(x @ w["a"]), "batch", axis=0, tiled=tiled).sum(0) @ w["b"]

    def traced(x):
        graphs.append(trace_graph(apply)(w, x))
        return x

    jax.vmap(traced, axis_name="batch")(jnp.ones((2, 5, 3)))
    assert channel_structure(graphs[0]).kernel_axes == {"a": 1, "b": 1}
    assert [group.slices for group in channel_groups(graphs[0])] == [{("a", 1): (i,), ("b", 0): (i,)} for i in range(4)]


def test_channels_that_are_gathered_stay():
    w = {"a": jnp.ones((3, 4)), "b": jnp.ones((8, 2))}
    graphs = []

    def apply(w, x):
        return jax.lax.all_gather(jax.nn.relu(x @ w["a"]), "batch", axis=1, tiled=True) @ w["b"]

    def traced(x):
        graphs.append(trace_graph(apply)(w, x))
        return x

    jax.vmap(traced, axis_name="batch")(jnp.ones((2, 5, 3)))
    assert not channel_groups(graphs[0])
    assert "gathered from all participants" in channel_structure(graphs[0]).why_fixed("a")
