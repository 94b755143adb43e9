"""Traces along the axes that the graph prunes, for kernels in every layout, against dense float64 Hessians."""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    channel_trace,
    expected_agreement,
    fingerprint,
    gauss_newton_trace,
    load_trace,
    probe_channel_products,
)
from ehap_jax.curvature.probes import rademacher
from ehap_jax.curvature.problem import path_name
from ehap_jax.graph import channel_structure, trace_graph
from ehap_jax.pruning import hessian_scores
from tests.curvature.dense_hessians import DOUBLE, cross_entropy

KEY = jax.random.key(0)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(x)
        return nn.Dense(3)(x.mean(1))


class AttentionNNX(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 3, 4, decode=False, rngs=rngs)
        self.out = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.out((x + self.attention(x)).mean(1))


class Upsampling(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.ConvTranspose(3, (2, 2), strides=(2, 2), transpose_kernel=True)(x))
        return nn.Dense(3)(nn.relu(nn.Conv(3, (3, 3))(x)).mean((1, 2)))


def channels_first(p, x):
    """OIHW convolutions of square kernels, and a product with (out, in)."""
    for name in ("a", "b"):
        x = jax.nn.relu(jax.lax.conv(x, p[name], (1, 1), "SAME"))
    return jnp.einsum("oi,bi->bo", p["head"], x.mean((2, 3)))


def with_statistics(p, x):
    """Scales and statistics of shape (1, C), as Haiku keeps them, are no kernels."""
    h = (x @ p["params"]["a"] - p["state"]["mean"]) * p["params"]["scale"]
    return jax.nn.relu(h) @ p["params"]["b"]


@dataclass
class Case:
    apply: Any
    variables: Any
    batch: Any
    graph: Any

    def loss(self, variables, batch):
        x, labels = batch
        return jax.vmap(cross_entropy)(self.apply(variables, x), labels).mean()

    def __hash__(self):
        return id(self)


def linen(module):
    def made(x):
        return module.apply, jax.jit(module.init)(KEY, x)

    return made


def flax_nnx(x):
    definition, state = nnx.split(AttentionNNX(nnx.Rngs(0)), nnx.Param)

    def apply(state, x):
        with jax.numpy_dtype_promotion("standard"):  # JAX's own attention promotes float64
            return nnx.merge(definition, state)(x)

    return apply, state


def equinox(x):
    params, static = eqx.partition(eqx.nn.MLP(4, 4, 4, 2, key=KEY), eqx.is_inexact_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params


def written(function, shapes):
    def made(x):
        leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        keys = jax.random.split(KEY, len(leaves))
        drawn = [jax.random.normal(k, shape) for k, shape in zip(keys, leaves, strict=True)]
        return function, jax.tree.unflatten(structure, drawn)

    return made


# What makes the network; the shape of its input; the axis of channels of every kernel; whether no probe is needed.
NETWORKS = {
    "Linen attention": (
        linen(Attention()),
        (2, 3),
        {
            **{f"params/MultiHeadDotProductAttention_0/{p}/kernel": 1 for p in ("query", "key", "value")},
            "params/MultiHeadDotProductAttention_0/out/kernel": 2,
            "params/Dense_0/kernel": 1,
        },
        False,
    ),
    "NNX attention": (
        flax_nnx,
        (2, 3),
        {
            **{f"attention/{p}/kernel": 1 for p in ("query", "key", "value")},
            "attention/out/kernel": 2,
            "out/kernel": 1,
        },
        False,
    ),
    "Equinox": (equinox, (4,), {f"layers/{i}/weight": 0 for i in range(3)}, True),
    "OIHW": (
        written(channels_first, {"a": (3, 3, 2, 2), "b": (3, 3, 2, 2), "head": (3, 3)}),
        (3, 3, 3),
        {"a": 0, "b": 0, "head": 0},
        True,
    ),
    "ConvTranspose": (
        linen(Upsampling()),
        (2, 2, 3),
        {
            "params/ConvTranspose_0/kernel": 2,
            "params/Conv_0/kernel": 3,
            "params/Dense_0/kernel": 1,
        },
        True,
    ),
    "statistics": (
        written(with_statistics, {"params": {"a": (3, 4), "b": (4, 3), "scale": (1, 4)}, "state": {"mean": (1, 4)}}),
        (3,),
        {"params/a": 1, "params/b": 1},
        True,
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    made, shape, _, _ = NETWORKS[request.param]
    with enable_x64():
        x = jax.random.normal(jax.random.key(1), (5, *shape))
        apply, variables = made(x.astype(jnp.float32))
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        labels = jnp.arange(5, dtype=jnp.int32) % 3
        graph = trace_graph(apply)(variables, x[:1])
    return request.param, Case(apply, variables, (x, labels), graph)


def dense_hessian(case, paths):
    """The matrix over the kernels ``paths``, and {path: where in it the kernel lies}."""
    leaves, structure = jax.tree.flatten(case.variables)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(case.variables)]
    ends = np.cumsum([0, *(leaf.size for name, leaf in zip(names, leaves, strict=True) if name in paths)])
    places = dict(zip((name for name in names if name in paths), map(slice, ends[:-1], ends[1:]), strict=True))

    def of_vector(vector):
        changed = [
            vector[places[name]].reshape(leaf.shape) if name in paths else leaf
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return case.loss(jax.tree.unflatten(structure, changed), case.batch)

    kernels = [leaf.ravel() for name, leaf in zip(names, leaves, strict=True) if name in paths]
    return np.asarray(jax.jit(jax.hessian(of_vector))(jnp.concatenate(kernels))), places


def by_path(tree):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_traces_and_scores_are_those_of_the_dense_hessian(case):
    name, network = case
    axes, exact = NETWORKS[name][2:]
    assert channel_structure(network.graph).kernel_axes == axes
    given, options = (network.variables, network.batch), {"graph": network.graph, "policy": DOUBLE}
    weights = by_path(network.variables)
    with enable_x64():
        H, places = dense_hessian(network, axes)
        if exact:
            trace = gauss_newton_trace(network.apply, *given, **options)
            found = np.diag(H)
        else:
            trace = channel_trace(network.loss, *given, key=KEY, num_probes=2, **options)
            probes = [rademacher(jax.random.fold_in(KEY, i), {path: weights[path] for path in axes}) for i in (0, 1)]
            vectors = [np.concatenate([np.ravel(v[path]) for path in places]) for v in probes]
            found = np.mean([v * (H @ v) for v in vectors], 0)
        scores = hessian_scores(network.graph, network.variables, trace)
    assert trace.axes == {path: (axis,) for path, axis in axes.items()}
    mean = by_path(trace.mean)
    assert set(mean) == set(axes) == set(scores.values)
    for path, axis in axes.items():
        others = tuple(a for a in range(weights[path].ndim) if a != axis)
        expected = found[places[path]].reshape(weights[path].shape).sum(others)
        rtol = 1e-4 if name == "NNX attention" else 1e-9  # JAX's own attention takes its softmax in float32
        np.testing.assert_allclose(mean[path], expected, rtol=rtol, atol=rtol * np.abs(expected).max(), err_msg=path)
        factor = (weights[path] ** 2).mean(others)
        np.testing.assert_allclose(scores.values[path], mean[path] * factor, rtol=1e-6)


@pytest.fixture(scope="module")
def transposed():
    """Two products with square kernels stored (out, in), and a batch."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    variables = {"a": draw(4, 4), "b": draw(4, 4), "head": draw(4, 3)}

    def apply(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"].T) @ p["b"].T) @ p["head"]

    x = draw(6, 4)
    return Case(apply, variables, (x, jnp.arange(6, dtype=jnp.int32) % 3), trace_graph(apply)(variables, x))


@pytest.mark.slow
def test_a_trace_along_other_axes_is_refused(transposed):
    graph, variables = transposed.graph, transposed.variables
    last = gauss_newton_trace(transposed.apply, variables, transposed.batch)
    with pytest.raises(ValueError, match=r"a of shape \(4, 4\) .* axis 0, .* along \(1,\); .*graph=graph"):
        hessian_scores(graph, variables, last)
    with pytest.raises(ValueError, match="numbers alone do not tell theirs"):
        hessian_scores(graph, variables, last.mean)
    first = gauss_newton_trace(transposed.apply, variables, transposed.batch, channel_axis={"a": 0, "b": 0})
    by_graph = gauss_newton_trace(transposed.apply, variables, transposed.batch, graph=graph)
    for path, values in hessian_scores(graph, variables, first).values.items():
        np.testing.assert_array_equal(values, hessian_scores(graph, variables, by_graph).values[path])


def test_a_graph_that_does_not_fit_is_refused_before_the_trace(transposed):
    def never(params, batch):
        raise AssertionError("the loss was run")

    def refused(message, variables=transposed.variables, **options):
        with pytest.raises(ValueError, match=message):
            channel_trace(never, variables, transposed.batch, key=KEY, num_probes=1, graph=transposed.graph, **options)

    refused("both graph= and channel_axis=", channel_axis=-1)
    refused("kernel b of the graph has shape .* missing", {"a": transposed.variables["a"]})
    refused(r"kernel a .* of shape \(4, 5\)", transposed.variables | {"a": jnp.ones((4, 5))})
    refused("no parameter is selected", select=lambda path, leaf: False)


@pytest.mark.slow
def test_the_params_collection_alone_fits_the_graph():
    module = nn.Dense(3)
    x = jnp.ones((2, 4))
    variables = module.init(KEY, x)
    graph = trace_graph(module.apply)(variables, x)
    trace = gauss_newton_trace(
        lambda params, x: module.apply({"params": params}, x),
        variables["params"],
        (x, jnp.zeros(2, jnp.int32)),
        graph=graph,
    )
    assert trace.axes == {"kernel": (1,)}
    assert list(hessian_scores(graph, variables, trace).values) == ["params/kernel"]


@pytest.mark.slow
def test_a_number_per_head_and_feature():
    """Several axes, of a kernel with a tap, in both estimators: summed over features they are those of the heads."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    with enable_x64():
        variables = {"heads": draw(2, 3, 4), "stack": draw(3, 4, 5), "out": draw(3, 5, 2)}

        def apply(p, x):
            h = jax.nn.relu(jnp.einsum("bi,ihf->bhf", x, p["heads"]))
            return jnp.einsum("bhg,hgo->bo", jax.nn.relu(jnp.einsum("bhf,hfg->bhg", h, p["stack"])), p["out"])

        x = draw(6, 2)
        case = Case(apply, variables, (x, jnp.arange(6, dtype=jnp.int32) % 2), trace_graph(apply)(variables, x))
        assert channel_structure(case.graph).kernel_axes == {"heads": 1, "stack": 2, "out": 2}
        axes = {"heads": (2, 1), "stack": (0, -1)}
        H, places = dense_hessian(case, variables)
        exact = gauss_newton_trace(apply, variables, case.batch, channel_axis=axes, policy=DOUBLE)
        v = jax.tree.map(lambda leaf: jnp.sign(draw(*leaf.shape)), variables)
        fine, coarse = (
            probe_channel_products(case.loss, variables, v, case.batch, channel_axis=along, policy=DOUBLE)
            for along in (axes, {"heads": 1, "stack": 2})
        )
        scores = hessian_scores(case.graph, variables, exact)
        by_graph = hessian_scores(
            case.graph, variables, gauss_newton_trace(apply, variables, case.batch, graph=case.graph, policy=DOUBLE)
        )
    assert exact.axes == {"heads": (1, 2), "stack": (0, 2), "out": (2,)}
    for path, summed in (("heads", 0), ("stack", 1)):
        truth = np.diag(H)[places[path]].reshape(variables[path].shape).sum(summed)
        np.testing.assert_allclose(exact.mean[path], truth, rtol=1e-10)
        np.testing.assert_allclose(np.asarray(fine[path]).sum(1 - summed), coarse[path], rtol=1e-10)
        np.testing.assert_allclose(scores.values[path], by_graph.values[path], rtol=1e-10)
    assert 0 < expected_agreement(exact, variables).pruned < 12 + 15 + 2


@pytest.mark.slow
def test_axes_are_saved_and_states_do_not_mix(transposed, tmp_path):
    options = {"key": KEY, "num_probes": 2}
    given = (transposed.loss, transposed.variables, transposed.batch)
    path = tmp_path / "trace.npz"
    trace = channel_trace(*given, graph=transposed.graph, save_to=path, **options)
    assert (
        load_trace(path, transposed.variables, fingerprint(*given, graph=transposed.graph, **options)).axes
        == trace.axes
    )
    assert trace.axes == {"a": (0,), "b": (0,), "head": (1,)}
    with pytest.raises(ValueError, match="selection"):
        channel_trace(*given, save_to=path, **options)
    with pytest.raises(ValueError, match=r"the state has the channels of \['a', 'b'\] along other axes"):
        channel_trace(*given, state=trace.state, **options)
