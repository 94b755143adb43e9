"""Scores against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.graph import trace_graph
from ehap_jax.pruning import (
    Scores,
    fisher_scores,
    hessian_scores,
    magnitude_scores,
    norm_scale_scores,
    random_scores,
    taylor_scores,
)
from tests.pruning.networks import apply, conv, images, variables

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
    with pytest.raises(ValueError, match=r"a2 .* channels along axis 3, but its trace is of shape \(5,\) along \(3,\)"):
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


def squared_error(v, batch):
    x, y = batch
    return jnp.mean(jnp.sum((apply(v, x) - y) ** 2, -1))


@pytest.fixture(scope="module")
def examples(network):
    """(batch, {kernel: Σ g·w of every example and channel}), one gradient at a time."""
    _, v = network
    batch = images(count=4), jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)), jnp.float32)
    gradient = jax.jit(jax.grad(squared_error))
    one = [gradient(v, (batch[0][n : n + 1], batch[1][n : n + 1])) for n in range(4)]
    return batch, {path: np.stack([(flat(g[path]) * flat(v[path])).sum(0) for g in one]) for path in KERNELS}


@pytest.mark.slow
def test_taylor_scores_square_the_gradient_of_a_gate(network, examples):
    graph, v = network
    batch, gates = examples
    scores = taylor_scores(graph, v, squared_error, batch)
    for path in KERNELS:
        np.testing.assert_allclose(scores.values[path], gates[path].mean(0) ** 2, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [None, 3])
def test_fisher_scores_square_per_example(network, examples, microbatch):
    graph, v = network
    batch, gates = examples
    scores = fisher_scores(graph, v, squared_error, batch, microbatch=microbatch)
    for path in KERNELS:
        np.testing.assert_allclose(scores.values[path], 0.5 * (gates[path] ** 2).mean(0), rtol=1e-3, atol=1e-6)


def test_fisher_scores_refuse_ragged_batches(network, examples):
    (x, y), _ = examples
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        fisher_scores(*network, squared_error, (x, y[:3]))
    with pytest.raises(ValueError, match="microbatch"):
        fisher_scores(*network, squared_error, (x, y), microbatch=-1)


def draw(**shapes):
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def test_normalisation_scales_score_their_own_convolution():
    v = draw(stem=(1, 1, 3, 4), stem_scale=(4,), c=(1, 1, 4, 4), c_scale=(4,), last=(1, 1, 4, 5), h=(5, 2))

    def network(v, x):
        x = conv(x, v["stem"]) * v["stem_scale"][None, None, None]
        x = jax.nn.relu(x + conv(x, v["c"]) * v["c_scale"][None, None, None])
        return conv(x, v["last"]).sum((1, 2)) @ v["h"]

    graph = trace_graph(network)(v, images())
    scores = norm_scale_scores(graph, v)
    assert set(scores.values) == {"stem", "c"}, "the last convolution has no factor of its own"
    np.testing.assert_allclose(scores.values["stem"], np.abs(v["stem_scale"]), rtol=1e-6)
    np.testing.assert_allclose(scores.values["c"], np.abs(v["c_scale"]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"matches '\*gamma'"):
        norm_scale_scores(graph, v, scale="*gamma")


def test_normalisation_before_the_activation_scores_the_stream():
    v = draw(stem=(1, 1, 3, 4), c=(1, 1, 4, 4), n_scale=(4,), h=(4, 2))

    def network(v, x):
        x = conv(x, v["stem"])
        return ((x + conv(x, v["c"])) * v["n_scale"][None, None, None]).sum((1, 2)) @ v["h"]

    scores = norm_scale_scores(trace_graph(network)(v, images()), v)
    for path in ("stem", "c"):
        np.testing.assert_allclose(scores.values[path], np.abs(v["n_scale"]), rtol=1e-6)
