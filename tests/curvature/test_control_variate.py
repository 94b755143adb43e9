"""Exact where proven, control variate elsewhere: unbiased against dense float64 Hessians, and less variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import t as student

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    Policy,
    channel_trace,
    control_variate,
    fingerprint,
    gauss_newton_trace,
    load_trace,
    second_derivative,
    softmax_cross_entropy,
    squared_error,
    variance_reduction,
)
from ehap_jax.curvature.residual_loss import ResidualLoss

KEY = jax.random.key(3)
PROBES = 64


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conv(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def smooth(activation):
    def model(p, x):
        return activation(activation(conv(x, p["first"])).mean((1, 2)) @ p["second"]) @ p["last"]

    return model, {"first": normal(1, 3, 3, 2, 3), "second": normal(2, 3, 4), "last": normal(3, 4, 3)}


def squeeze_excite(p, x):
    h = jax.nn.relu(conv(x, p["conv"]))
    gate = jax.nn.sigmoid(jax.nn.relu(h.mean((1, 2)) @ p["squeeze"]) @ p["excite"])
    return (h * gate[:, None, None, :]).mean((1, 2)) @ p["last"]


def attention(p, x):
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = (tokens @ p[name] for name in ("query", "key", "value"))
    weights = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2))
    return (weights @ v).mean(1) @ p["last"]


NETWORKS = {
    "gelu": smooth(jax.nn.gelu),
    "silu": smooth(jax.nn.silu),
    "squeeze-excite": (
        squeeze_excite,
        {
            "conv": normal(4, 3, 3, 2, 3),
            "squeeze": normal(5, 3, 2),
            "excite": normal(6, 2, 3),
            "last": normal(7, 3, 3),
        },
    ),
    "attention": (
        attention,
        {
            "query": normal(8, 2, 3),
            "key": normal(9, 2, 3),
            "value": normal(10, 2, 3),
            "last": normal(11, 3, 3),
        },
    ),
}
EXACT = {
    "gelu": {"last"},
    "silu": {"last"},
    "squeeze-excite": {"last"},
    "attention": {"value", "last"},
}
BATCH = (normal(12, 4, 3, 3, 2), jnp.array([0, 2, 1, 0], jnp.int32))


def cross_entropy(model):
    def loss(p, batch):
        logits = model(p, batch[0]).astype(jnp.float32)
        return (jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, batch[1][:, None], 1)[:, 0]).mean()

    return loss


def dense_traces(loss, params, batch):
    """{path: (channels,)} from the dense float64 Hessian of each kernel."""
    with enable_x64():
        floating = lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else x  # noqa: E731
        params, batch = jax.tree.map(floating, (params, batch))
        found = {}
        for path, kernel in params.items():
            hessian = jax.hessian(lambda k, path=path: loss({**params, path: k}, batch))(kernel)
            channels = kernel.shape[-1]
            matrix = np.asarray(hessian).reshape(-1, channels, kernel.size // channels, channels)
            found[path] = np.einsum("icic->c", matrix)
        return found


def double_loss(model):
    """The same in whatever precision the parameters have."""

    def loss(p, batch):
        logits = model(p, batch[0])
        return (jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, batch[1][:, None], 1)[:, 0]).mean()

    return loss


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    model, params = NETWORKS[request.param]
    return request.param, model, cross_entropy(model), params, dense_traces(double_loss(model), params, BATCH)


def test_unbiased_and_exact_where_proven(network):
    name, model, loss, params, truth = network
    found = channel_trace(loss, params, BATCH, key=KEY, num_probes=PROBES, method="auto", model=model)
    methods = {path: "exact" if path in EXACT[name] else "control_variate" for path in params}
    assert found.methods() == methods
    z = []
    for path, exact in truth.items():
        mean, sem = np.asarray(found.mean[path]), np.asarray(found.sem[path])
        if methods[path] == "exact":
            np.testing.assert_allclose(mean, exact, rtol=2e-5, atol=1e-6)
            assert (sem == 0).all()
        else:
            dead = sem == 0  # a hidden unit that is off for every example
            np.testing.assert_allclose(mean[dead], exact[dead], atol=1e-6)
            z += list((mean - exact)[~dead] / sem[~dead])
    # Student's t; by Bonferroni's inequality chance exceeds this once in 10,000 runs, however channels are correlated.
    assert np.max(np.abs(z)) < student.isf(1e-4 / 2 / len(z), PROBES - 1)


def test_the_residual_is_the_rest_of_the_hessian(network):
    """H = G + R in float64, to rounding; R is zero where that is proven."""
    name, model, _, params, truth = network
    with enable_x64():
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        batch = (jnp.asarray(BATCH[0], jnp.float64), BATCH[1])
        exact = gauss_newton_trace(model, double, batch, policy=Policy("float64"), on_unproven="gauss_newton")
    rest = dense_traces(ResidualLoss(model, softmax_cross_entropy), params, BATCH)
    for path, total in truth.items():
        np.testing.assert_allclose(np.asarray(exact.mean[path]) + rest[path], total, rtol=1e-10, atol=1e-12)
        assert (np.abs(rest[path]).max() < 1e-12) == (path in EXACT[name])


@pytest.mark.parametrize("name", ["gelu", "squeeze-excite"])
def test_variance_reduction_is_that_of_the_estimates(name):
    model, params = NETWORKS[name]
    loss = cross_entropy(model)
    found = variance_reduction(loss, params, BATCH, model=model, key=KEY, num_probes=PROBES)
    assert found.keys() == params.keys()
    if name == "gelu":
        assert min(found.values()) > 1
    plain, controlled = (
        channel_trace(loss, params, BATCH, key=KEY, num_probes=PROBES, method=method, model=model)
        for method in ("hutchinson", "control_variate")
    )
    path = min(found, key=lambda p: found[p])
    before, after = (np.square(np.asarray(estimate.sem[path])).sum() for estimate in (plain, controlled))
    assert found[path] == pytest.approx(before / after, rel=1e-5)
    assert plain.methods() == dict.fromkeys(params, "hutchinson")


def test_resume_and_saving(tmp_path):
    model, params = NETWORKS["gelu"]
    loss = cross_entropy(model)
    options = {"key": KEY, "method": "auto", "model": model, "probes_per_step": 2}
    whole = channel_trace(loss, params, BATCH, num_probes=6, save_to=tmp_path / "trace.npz", **options)
    half = channel_trace(loss, params, BATCH, num_probes=3, **options)
    resumed = channel_trace(loss, params, BATCH, num_probes=6, state=half.state, **options)
    again = channel_trace(loss, params, BATCH, num_probes=6, save_to=tmp_path / "trace.npz", **options)
    for other in (resumed, again):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole.mean, other.mean))
        assert whole.total() == other.total() and whole.layer() == other.layer()
    assert whole.layer().keys() == params.keys()
    total = sum(float(np.asarray(x, np.float64).sum()) for x in whole.mean.values())
    assert whole.total() == pytest.approx(total, rel=1e-6)


def piecewise(p, x):
    return jax.nn.relu(conv(x, p["first"])).mean((1, 2)) @ p["last"]


PIECEWISE = {"first": normal(13, 3, 3, 2, 4), "last": normal(14, 4, 3)}


def test_everything_proven_needs_no_probes():
    loss = cross_entropy(piecewise)
    found = channel_trace(loss, PIECEWISE, BATCH, key=KEY, num_probes=5, method="auto", model=piecewise)
    exact = gauss_newton_trace(piecewise, PIECEWISE, BATCH)
    assert found.methods() == dict.fromkeys(PIECEWISE, "exact")
    for path in PIECEWISE:
        np.testing.assert_array_equal(found.mean[path], exact.mean[path])


@pytest.fixture
def exact_parts(monkeypatch):
    """The options of every call of `gauss_newton_trace` by `channel_trace`."""
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return gauss_newton_trace(*args, **options)

    monkeypatch.setattr(control_variate, "gauss_newton_trace", counted)
    return calls


@pytest.mark.parametrize("proven", [True, False])
def test_what_is_saved_has_the_exact_part(proven, exact_parts, tmp_path):
    model, params = (piecewise, PIECEWISE) if proven else NETWORKS["gelu"]
    seen, file = [], tmp_path / "trace.npz"
    options = {"key": KEY, "num_probes": 2, "method": "auto", "model": model, "save_to": file}
    first, again = (
        channel_trace(cross_entropy(model), params, BATCH, progress=lambda *at: seen.append(at), **options)
        for _ in range(2)
    )
    assert len(exact_parts) == 1
    assert seen == [(4, 4)] if proven else [(4, 4), (2, 2)]
    assert again.methods() == first.methods() and again.known.keys() == params.keys()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first.mean, again.mean))
    of = {name: options[name] for name in ("key", "num_probes", "method", "model")}
    made_from = fingerprint(cross_entropy(model), params, BATCH, **of)
    assert load_trace(file, params, made_from).total() == first.total()
    with pytest.raises(ValueError, match="these differ: method "):
        channel_trace(cross_entropy(model), params, BATCH, **options | {"method": "control_variate"})
    with pytest.raises(ValueError, match="these differ: weights "):
        channel_trace(cross_entropy(model), params | {"last": 2 * params["last"]}, BATCH, **options)
    assert len(exact_parts) == 1


def test_the_exact_part_is_computed_as_was_asked_for(exact_parts):
    mesh = jax.make_mesh((1,), ("data",))
    options = {"microbatch": 3, "memory_budget": 10**6, "mesh": mesh}
    channel_trace(
        cross_entropy(piecewise), PIECEWISE, BATCH, key=KEY, num_probes=1, method="auto", model=piecewise, **options
    )
    assert {name: exact_parts[0][name] for name in options} == options


@pytest.mark.parametrize("head", [squared_error, second_derivative(lambda z, t: jnp.square(z - t).sum())])
def test_other_heads(head):
    model, params = NETWORKS["gelu"]
    batch = (BATCH[0], normal(15, 4, 3))

    def loss(p, batch):
        return jnp.square(model(p, batch[0]) - batch[1]).sum(1).mean()

    truth = dense_traces(loss, params, batch)
    found = channel_trace(loss, params, batch, key=KEY, num_probes=PROBES, method="auto", model=model, head=head)
    for path, exact in truth.items():
        bound = 4.5 * np.asarray(found.sem[path]) + 1e-4 * np.abs(exact).max()
        assert (np.abs(np.asarray(found.mean[path]) - exact) < bound).all()


def test_half_precision():
    model, params = NETWORKS["gelu"]
    options = {"key": KEY, "num_probes": 8, "method": "auto", "model": model}
    full, half = (
        channel_trace(cross_entropy(model), params, BATCH, policy=Policy(compute), **options)
        for compute in ("float32", "float16")
    )
    for path in params:
        scale = np.abs(np.asarray(full.mean[path])).max()
        np.testing.assert_allclose(half.mean[path], full.mean[path], atol=0.05 * scale, rtol=0)


def test_errors():
    model, params = NETWORKS["gelu"]
    loss = cross_entropy(model)
    common = {"key": KEY, "num_probes": 2}
    with pytest.raises(ValueError, match="needs the model beside the loss"):
        channel_trace(loss, params, BATCH, method="auto", **common)
    with pytest.raises(ValueError, match="method must be one of hutchinson, control_variate, auto"):
        channel_trace(loss, params, BATCH, method="exact", model=model, **common)
    with pytest.raises(ValueError, match="must compute the same loss"):
        channel_trace(lambda p, b: 2 * loss(p, b), params, BATCH, method="auto", model=model, **common)
    with pytest.raises(ValueError, match="second_derivative"):
        channel_trace(
            loss, params, BATCH, method="auto", model=model, head=lambda z, y: softmax_cross_entropy(z), **common
        )
    with pytest.raises(ValueError, match="at least 2 probes"):
        variance_reduction(loss, params, BATCH, model=model, key=KEY, num_probes=1)
    exact = gauss_newton_trace(model, params, BATCH, on_unproven="gauss_newton")
    with pytest.raises(ValueError, match="exact"):
        channel_trace(loss, params, BATCH, state=exact.state, **common)
