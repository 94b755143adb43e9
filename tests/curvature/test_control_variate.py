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
    weighted,
)
from ehap_jax.curvature.residual_loss import ResidualLoss

pytestmark = pytest.mark.slow

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

        @jax.jit
        def hessians(params, batch):
            return {
                path: jax.hessian(lambda k, path=path: loss({**params, path: k}, batch))(kernel)
                for path, kernel in params.items()
            }

        found = {}
        for path, hessian in hessians(params, batch).items():
            channels, size = params[path].shape[-1], params[path].size
            matrix = np.asarray(hessian).reshape(-1, channels, size // channels, channels)
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
    with pytest.raises(ValueError, match="second_derivative"):
        channel_trace(
            loss, params, BATCH, method="auto", model=model, head=lambda z, y: softmax_cross_entropy(z), **common
        )
    with pytest.raises(ValueError, match="at least 2 probes"):
        variance_reduction(loss, params, BATCH, model=model, key=KEY, num_probes=1)
    exact = gauss_newton_trace(model, params, BATCH, on_unproven="gauss_newton")
    with pytest.raises(ValueError, match="exact"):
        channel_trace(loss, params, BATCH, state=exact.state, **common)


def agrees(found, truth, exact=()):
    """Within the errors stated; without any where nothing was to be estimated."""
    assert {path for path, how in found.methods().items() if how == "exact"} == set(exact)
    for path, expected in truth.items():
        error = 5 * np.asarray(found.sem[path]) + 1e-4 * np.abs(expected).max()
        assert (np.abs(np.asarray(found.mean[path]) - expected) <= error).all(), path


def auto(loss, params, batch, model, **options):
    return channel_trace(loss, params, batch, key=KEY, num_probes=40, method="auto", model=model, **options)


def decayed(kind):
    def loss(p, batch):
        base = double_loss(piecewise)(p, batch)
        if kind == "squares":
            return base + 0.5 * 5e-4 * sum((w**2).sum() for w in p.values())
        if kind == "norm":
            return (base - 3e-3 * -(jnp.linalg.norm(p["first"].ravel()) ** 2)) / 2 + base / 2
        return base + 1e-2 * sum((w**2).sum() for w in p.values()) ** 2  # its Hessian is not diagonal

    return loss


@pytest.mark.parametrize("kind", ["squares", "norm", "not diagonal"])
def test_terms_of_the_parameters_alone_are_counted(kind):
    loss = decayed(kind)
    found = auto(loss, PIECEWISE, BATCH, piecewise)
    agrees(found, dense_traces(loss, PIECEWISE, BATCH), () if kind == "not diagonal" else PIECEWISE)


def test_what_else_the_loss_has_is_estimated():
    """One example of four counts ten times: the first ones alone do not tell."""
    weights = jnp.array([1.0, 1.0, 1.0, 10.0])

    def loss(p, batch):
        logits = piecewise(p, batch[0])
        each = jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, batch[1][:, None], 1)[:, 0]
        return (each * weights.astype(each.dtype)).mean()

    truth = dense_traces(loss, PIECEWISE, BATCH)
    agrees(auto(loss, PIECEWISE, BATCH, piecewise), truth)
    model, params = NETWORKS["gelu"]
    smoothed = lambda p, b: double_loss(model)(p, b) + 0.1 * jnp.square(model(p, b[0])).mean()  # noqa: E731
    agrees(auto(smoothed, params, BATCH, model), dense_traces(smoothed, params, BATCH))
    doubled = lambda p, b: 2 * double_loss(piecewise)(p, b)  # noqa: E731
    agrees(auto(doubled, PIECEWISE, BATCH, piecewise), dense_traces(doubled, PIECEWISE, BATCH))


@pytest.mark.parametrize("mean", ["weights", "examples"])
def test_weights_in_the_batch_are_exact(mean):
    """Padding with the label -1 among them; the same from the exact trace alone."""
    x, labels = BATCH
    batch = {"image": x, "label": labels.at[3].set(-1), "weight": jnp.array([1.0, 0.5, 2.0, 0.0])}

    def loss(p, batch):
        logits = piecewise(p, batch["image"])
        label = jnp.maximum(batch["label"], 0)
        each = jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, label[:, None], 1)[:, 0]
        total = (each * batch["weight"].astype(each.dtype)).sum()
        return total / (batch["weight"].astype(each.dtype).sum() if mean == "weights" else 4)

    truth = dense_traces(loss, PIECEWISE, batch)
    head = weighted(softmax_cross_entropy, mean)
    agrees(auto(loss, PIECEWISE, batch, piecewise, head=head), truth, PIECEWISE)
    exact = gauss_newton_trace(piecewise, PIECEWISE, batch, head=head, microbatch=3)
    for path, expected in truth.items():
        np.testing.assert_allclose(exact.mean[path], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("total", [1.0, 1.5])
def test_soft_labels_are_exact(total):
    batch = (BATCH[0], total * jax.nn.softmax(normal(20, 4, 3)))
    loss = lambda p, b: -(b[1] * jax.nn.log_softmax(piecewise(p, b[0]))).sum(1).mean()  # noqa: E731
    agrees(auto(loss, PIECEWISE, batch, piecewise), dense_traces(loss, PIECEWISE, batch), PIECEWISE)


def scaled_gradient(factor):
    @jax.custom_vjp
    def pass_on(h):
        return h

    pass_on.defvjp(lambda h: (h, None), lambda _, g: (factor * g,))
    return lambda p, x: pass_on(jax.nn.relu(conv(x, p["first"]))).mean((1, 2)) @ p["last"]


@pytest.mark.parametrize("factor", [-1.0, 0.1, 1.0])
def test_a_rule_that_is_not_the_derivative(factor):
    """Gradient reversal and scaling: the Hessian of automatic differentiation, by probes above the rule."""
    model = scaled_gradient(factor)
    loss = double_loss(model)
    truth = dense_traces(loss, PIECEWISE, BATCH)
    agrees(auto(loss, PIECEWISE, BATCH, model), truth, PIECEWISE if factor == 1 else {"last"})
    if factor != 1:
        with pytest.raises(ValueError, match="a derivative rule that is not its derivative"):
            channel_trace(loss, PIECEWISE, BATCH, key=KEY, num_probes=1, method="control_variate", model=model)
        with pytest.raises(ValueError, match="at 1 of 2 kernels"):
            gauss_newton_trace(model, PIECEWISE, BATCH)


def test_errors_of_targets_and_outputs():
    x, labels = BATCH

    def loss(p, batch):
        return jnp.square(piecewise(p, batch[0])).mean()

    def refused(error, message, batch, model=piecewise, **options):
        with pytest.raises(error, match=message):
            gauss_newton_trace(model, PIECEWISE, batch, **options)
        with pytest.raises(error, match=message):
            auto(loss, PIECEWISE, batch, model, **options)

    refused(ValueError, "the label of example 2 is 7, but there are 3 classes.*weighted", (x, labels.at[2].set(7)))
    refused(ValueError, r"head=weighted\(softmax_cross_entropy\)", (x, labels, jnp.ones(4)))
    refused(ValueError, "one floating-point number per example", (x, labels), head=weighted(softmax_cross_entropy))
    refused(
        ValueError, "not finite, or their sum is 0", (x, labels, jnp.zeros(4)), head=weighted(softmax_cross_entropy)
    )
    refused(ValueError, "labels of softmax_cross_entropy are integers", (x, jnp.ones((4, 2))))
    refused(TypeError, r'model\(p, x\)\["logits"\]', BATCH, lambda p, x: {"logits": piecewise(p, x)})
    refused(TypeError, r"model\(p, x\)\[0\]", BATCH, lambda p, x: (piecewise(p, x), x))
    with pytest.raises(ValueError, match="mean must be"):
        weighted(softmax_cross_entropy, "sum")


def test_a_random_key_among_variables_and_in_the_batch(tmp_path):
    """As `nnx.split` gives it of a network with Dropout."""
    params = PIECEWISE | {"rngs": {"key": jax.random.key(0), "count": jnp.uint32(0)}}
    batch = {"image": BATCH[0], "label": BATCH[1], "keys": jax.random.split(jax.random.key(1), 4)}
    loss = lambda p, b: cross_entropy(piecewise)(p, (b["image"], b["label"]))  # noqa: E731
    plain = gauss_newton_trace(piecewise, PIECEWISE, BATCH)
    for number, given in enumerate((batch, {name: batch[name] for name in ("image", "label")})):
        found = auto(loss, params, given, piecewise, microbatch=2, save_to=tmp_path / f"{number}.npz")
        exact = gauss_newton_trace(piecewise, params, given, microbatch=2, save_to=tmp_path / f"exact{number}.npz")
        for path in PIECEWISE:
            np.testing.assert_allclose(found.mean[path], plain.mean[path], rtol=1e-5)
            np.testing.assert_allclose(exact.mean[path], plain.mean[path], rtol=1e-5)
    probed = channel_trace(loss, params, batch, key=KEY, num_probes=2)
    assert set(probed.methods()) == set(PIECEWISE)
