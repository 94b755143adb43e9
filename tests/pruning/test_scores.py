"""Scores against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import Scores, hessian_scores, magnitude_scores, random_scores
from tests.pruning.networks import apply, images, variables

KERNELS = {"stem", "a1", "a2", "head"}


@pytest.fixture(scope="module")
def network():
    v = variables()
    return trace_graph(apply)(v, images()), v


def flat(kernel):
    return np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])


def test_hessian_scores_are_mean_curvature_times_squared_norm(network):
    graph, v = network
    rng = np.random.default_rng(0)
    trace = {path: rng.normal(size=v[path].shape[-1]) for path in KERNELS}
    scores = hessian_scores(graph, v, trace)
    assert scores.values.keys() == KERNELS
    for path in KERNELS:
        w = flat(v[path])
        np.testing.assert_allclose(scores.values[path], trace[path] / len(w) * (w**2).sum(0), rtol=1e-12)
        np.testing.assert_allclose(scores.norms[path], (w**2).sum(0), rtol=1e-12)
    assert scores.negative == sum((t < 0).sum() for t in trace.values()) > 0


def test_hessian_scores_find_the_trace_of_the_params_collection(network):
    graph = trace_graph(lambda v, x: apply(v["params"], x))({"params": network[1]}, images())
    trace = {path: np.ones(network[1][path].shape[-1]) for path in KERNELS}
    assert hessian_scores(graph, {"params": network[1]}, trace).values.keys() == {f"params/{k}" for k in KERNELS}


@pytest.mark.parametrize("order", [1, 2])
def test_magnitude_scores_are_means(network, order):
    graph, v = network
    scores = magnitude_scores(graph, v, order=order)
    for path in KERNELS:
        expected = (np.abs(flat(v[path])) ** order).mean(0) ** (1 / order)
        np.testing.assert_allclose(scores.values[path], expected, rtol=1e-12)


def test_random_scores_depend_on_the_key_alone(network):
    graph, _ = network
    a, b, c = (random_scores(graph, key=jax.random.key(k)) for k in (0, 0, 1))
    for path in KERNELS:
        np.testing.assert_array_equal(a.values[path], b.values[path])
        assert (a.values[path] != c.values[path]).any()


def test_bad_input_is_refused(network):
    graph, v = network
    good = {path: np.ones(v[path].shape[-1]) for path in KERNELS}
    with pytest.raises(ValueError, match="order"):
        magnitude_scores(graph, v, order=3)
    with pytest.raises(KeyError, match="a2"):
        hessian_scores(graph, v, {path: t for path, t in good.items() if path != "a2"})
    with pytest.raises(ValueError, match=r"a2 has 6 output channels, but its trace has shape \(5,\)"):
        hessian_scores(graph, v, {**good, "a2": np.ones(5)})
    with pytest.raises(ValueError, match="stem: 1 of 6 scores are not finite"):
        hessian_scores(graph, v, {**good, "stem": np.array([1, 1, np.nan, 1, 1, 1])})
    with pytest.raises(ValueError, match="head: 1 of 3 scores are not finite"):
        magnitude_scores(graph, {**v, "head": v["head"].at[0, 1].set(jnp.nan)})
    with pytest.raises(ValueError, match="not finite"):
        Scores({"a": np.array([np.inf])}, {"a": np.array([1.0])}, "mine")
    with pytest.raises(KeyError, match="stem"):
        magnitude_scores(graph, {p: w for p, w in v.items() if p != "stem"})
    with pytest.raises(ValueError, match=r"a1 has shape \(3, 3, 6, 4\)"):
        magnitude_scores(graph, {**v, "a1": v["a1"][..., :4]})
