"""Exact traces against dense float64 Hessians, on small networks of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    Batches,
    Policy,
    expected_agreement,
    gauss_newton,
    gauss_newton_trace,
    second_derivative,
    softmax_cross_entropy,
    squared_error,
)
from ehap_jax.curvature.heads import root_times
from ehap_jax.curvature.problem import path_name
from ehap_jax.curvature.taps import Site

DOUBLE = Policy("float64")


@pytest.fixture(params=["_chunk", "_whole_chunk"])
def chunk_function(request, monkeypatch):
    """The way of a CPU, several compiled functions, and that of an accelerator, one."""
    monkeypatch.setattr(gauss_newton, "_chunk_function", lambda leaves: getattr(gauss_newton, request.param))


def conv(x, w, stride=1, padding="SAME", groups=1, dilation=1, lhs_dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        padding,
        lhs_dilation=(lhs_dilation, lhs_dilation),
        rhs_dilation=(dilation, dilation),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def norm(p, x):
    return x * p["scale"].reshape((1,) * (x.ndim - 1) + (-1,)) + p["bias"].reshape((1,) * (x.ndim - 1) + (-1,))


def plain(p, x):
    h = jax.nn.relu(norm(p["n1"], conv(x, p["w1"])))
    h = jax.nn.relu(conv(h, p["w2"], stride=2, padding=((1, 0), (0, 2))))
    h = jax.nn.relu(conv(h, p["w3"], dilation=2))
    return h.mean((1, 2)) @ p["out"] + p["b"][None]


def residual_a(p, x):
    h = jax.nn.relu(conv(x, p["w1"]))
    y = conv(jax.nn.relu(conv(h, p["w2"], stride=2)), p["w3"])
    y = jax.nn.relu(y + jnp.pad(h[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 1))))
    return y.mean((1, 2)) @ p["out"]


def residual_b(p, x):
    h = jax.nn.relu(conv(x, p["w1"]))
    y = conv(jax.nn.relu(conv(h, p["w2"], stride=2)), p["w3"])
    y = jax.nn.relu(norm(p["n3"], y) + conv(h, p["short"], stride=2))
    return y.mean((1, 2)) @ p["out"]


def preactivation(p, x):
    h = conv(x, p["w1"])
    for i in (2, 3):
        h = h + conv(jax.nn.relu(norm(p["n1"], h)), p[f"w{i}"])
    return jax.nn.relu(h).mean((1, 2)) @ p["out"]


def max_pool(p, x):
    h = jax.nn.relu(conv(x, p["w1"], padding="VALID"))
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = jax.nn.leaky_relu(h.reshape(x.shape[0], -1) @ p["fc"])
    return jnp.clip(h, -1, 1) @ p["out"]


def depthwise(p, x):
    h = jax.nn.relu6(conv(x, p["w1"]))
    h = jax.nn.relu(conv(h, p["depth"], groups=4))
    h = jax.nn.relu(conv(h, p["grouped"], groups=2))
    return h.mean((1, 2)) @ p["out"]


def concat(p, x):
    h = jax.nn.relu(conv(x, p["w1"]))
    h = jnp.concatenate([h, jax.nn.relu(conv(h, p["w2"]))], axis=-1)
    h = jnp.concatenate([h, conv(h, p["w3"])], axis=-1)
    return h.mean((1, 2)) @ p["out"]


def shared(p, x):
    """One kernel on two parallel branches, plainly on one and transposed on the other."""
    h = conv(x, p["w1"])
    a = jax.nn.relu(conv(h, p["w2"]))
    b = jnp.abs(conv(-2 * h, p["w2"], stride=1, dilation=2))
    flipped = jnp.abs(conv(h, jnp.transpose(p["w2"], (0, 1, 3, 2)) * p["scale"][None, None, None]))
    return (a - b + flipped).mean((1, 2)) @ p["out"]


def tokens(p, x):
    """Dense layers on leading axes, a kernel read from the right, several output axes, an embedding."""
    t = x.reshape(x.shape[0], 25, 2)
    h = jax.nn.relu(jnp.einsum("btc,chd->bthd", t, p["heads"]) + p["place"][None, :, None])
    h = jax.nn.relu(jnp.einsum("of,btf->bto", p["left"], h.reshape(*h.shape[:2], -1)))
    h = jnp.maximum(jnp.einsum("btf,tfo->bto", h, p["own"]), 0)
    return h.mean(1) @ p["out"] * p["gain"][0, None]


def upsampled(p, x):
    """An input dilation, a checkpointed part and another layout."""

    def inside(w, h):
        return jax.nn.relu(conv(h, w, lhs_dilation=2, padding=((1, 1), (2, 0))))

    h = jax.checkpoint(inside)(p["w1"], x)
    h = jax.lax.conv_general_dilated(
        jnp.transpose(h, (0, 3, 1, 2)), p["w2"], (2, 1), "SAME", dimension_numbers=("NCHW", "IOHW", "NCHW")
    )
    return jax.nn.relu(h).mean((2, 3)) @ p["out"]


NETWORKS = {
    "plain": (plain, dict(w1=(3, 3, 2, 3), n1=3, w2=(3, 3, 3, 3), w3=(2, 2, 3, 2), out=(2, 4), b=4), {}),
    "residual A": (residual_a, dict(w1=(3, 3, 2, 2), w2=(3, 3, 2, 4), w3=(3, 3, 4, 4), out=(4, 3)), {}),
    "residual B": (
        residual_b,
        dict(w1=(3, 3, 2, 2), w2=(3, 3, 2, 3), w3=(3, 3, 3, 3), n3=3, short=(1, 1, 2, 3), out=(3, 3)),
        {},
    ),
    "pre-activation": (
        preactivation,
        dict(w1=(3, 3, 2, 3), n1=3, w2=(3, 3, 3, 3), w3=(3, 3, 3, 3), out=(3, 3)),
        {},
    ),
    "max-pool": (max_pool, dict(w1=(2, 2, 2, 3), fc=(12, 5), out=(5, 3)), {}),
    "depthwise": (
        depthwise,
        dict(w1=(1, 1, 2, 4), depth=(3, 3, 1, 4), grouped=(2, 2, 2, 6), out=(6, 3)),
        {},
    ),
    "concat": (concat, dict(w1=(3, 3, 2, 2), w2=(3, 3, 2, 2), w3=(1, 1, 4, 3), out=(7, 3)), {}),
    "shared": (shared, dict(w1=(3, 3, 2, 3), w2=(3, 3, 3, 3), scale=3, out=(3, 3)), {}),
    "tokens": (
        tokens,
        dict(heads=(2, 2, 3), place=(25, 3), left=(4, 6), own=(25, 4, 3), out=(3, 4), gain=(1, 4)),
        {"left": 0},
    ),
    "upsampled": (upsampled, dict(w1=(3, 3, 2, 3), w2=(3, 4, 2, 2), out=(4, 3)), {"w2": 1}),
}


def make(name, double=True):
    """The network, its parameters and a batch of 5 images with labels, in float64."""
    model, shapes, axes = NETWORKS[name]
    rng = np.random.default_rng(sorted(NETWORKS).index(name))
    dtype = jnp.float64 if double else jnp.float32

    def leaf(shape):
        if isinstance(shape, int):
            return {
                "scale": jnp.asarray(1 + rng.normal(size=shape) / 5, dtype),
                "bias": jnp.asarray(rng.normal(size=shape) / 5, dtype),
            }
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])) * 1.5, dtype)

    params = {path: leaf(shape) for path, shape in shapes.items()}
    for path in ("scale", "b"):
        if path in params:
            params[path] = params[path]["scale"]
    x = jnp.asarray(rng.normal(size=(5, 5, 5, 2)), dtype)
    return model, params, x, axes


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def dense_traces(model, params, x, labels, loss, axes):
    """Traces of the diagonal blocks of the dense Hessian of the mean loss, by path and output channel."""
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    kernels = {path: leaf for path, leaf in named if leaf.ndim >= 2}
    ends = np.cumsum([leaf.size for leaf in kernels.values()])[:-1].tolist()

    def of_vector(vector):
        parts = zip(kernels.items(), jnp.split(vector, ends), strict=True)
        new = {path: part.reshape(leaf.shape) for (path, leaf), part in parts}
        leaves = [new.get(path, leaf) for path, leaf in named]
        return jax.vmap(loss)(model(jax.tree.unflatten(jax.tree.structure(params), leaves), x), labels).mean()

    vector = jnp.concatenate([leaf.ravel() for leaf in kernels.values()])
    H = jax.jit(jax.hessian(of_vector))(vector)
    found = {}
    for (path, leaf), diagonal in zip(kernels.items(), np.split(np.diag(H), ends), strict=True):
        axis = axes.get(path, -1) % leaf.ndim
        found[path] = diagonal.reshape(leaf.shape).sum(tuple(a for a in range(leaf.ndim) if a != axis))
    return found


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def case(request):
    with enable_x64():
        model, params, x, axes = make(request.param)
        labels = jnp.arange(5, dtype=jnp.int32) % 3
        truth = dense_traces(model, params, x, labels, cross_entropy, axes)
    return request.param, model, params, x, labels, axes, truth


def close(trace, truth, rtol=1e-10):
    for path, expected in truth.items():
        scale = np.abs(expected).max() or 1.0
        np.testing.assert_allclose(np.asarray(trace.mean[path]), expected, rtol=rtol, atol=rtol * scale, err_msg=path)


def test_equals_the_dense_hessian(case, chunk_function):
    _, model, params, x, labels, axes, truth = case
    with enable_x64():
        trace = gauss_newton_trace(model, params, (x, labels), policy=DOUBLE, channel_axis=axes)
        close(trace, truth)
        assert all(np.abs(t).max() > 0 for t in truth.values())
        assert trace.count == 0
        np.testing.assert_allclose(trace.total(), sum(t.sum() for t in truth.values()), rtol=1e-10)
        assert trace.total_sem() == 0


def small(p, x):
    """Two dense layers: quick to compile."""
    return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["out"]


def smooth(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["out"]


@pytest.fixture(scope="module")
def dense():
    """Float64 parameters of `small`, 7 examples with labels, and the exact trace."""
    rng = np.random.default_rng(8)
    with enable_x64():
        params = {
            "w": jnp.asarray(rng.normal(size=(4, 5))),
            "b": jnp.asarray(rng.normal(size=5)),
            "out": jnp.asarray(rng.normal(size=(5, 3))),
        }
        x, labels = jnp.asarray(rng.normal(size=(7, 4))), jnp.asarray(rng.integers(0, 3, 7), jnp.int32)
        return params, x, labels, gauss_newton_trace(small, params, x, policy=DOUBLE)


def test_every_chunking_gives_the_same(dense):
    params, x, _, whole = dense
    with enable_x64():
        for microbatch in (1, 3, 100):
            trace = gauss_newton_trace(small, params, x, policy=DOUBLE, microbatch=microbatch)
            close(trace, {path: np.asarray(whole.mean[path]) for path in ("w", "out")}, 1e-13)
        options = {"classes": 3, "key": jax.random.key(1), "policy": DOUBLE}
        one = gauss_newton_trace(small, params, x, **options)
        other = gauss_newton_trace(small, params, x, microbatch=2, **options)
        close(other, {path: np.asarray(one.mean[path]) for path in ("w", "out")}, 1e-13)


def needs(monkeypatch, *arguments, **options):
    """Examples of the first chunk, and the bytes that its program needs by the compiler."""
    seen = []

    def chunk(plan, leaves, x, *rest):
        found = gauss_newton._whole_chunk.lower(plan, leaves, x, *rest).compile().memory_analysis()
        seen.append((len(x), found.temp_size_in_bytes + found.output_size_in_bytes))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gauss_newton, "_chunk_function", lambda leaves: chunk)
        gauss_newton_trace(*arguments, **options)
    return seen[0]


@pytest.mark.parametrize("name", ["plain", "depthwise", "max-pool"])
def test_what_is_chosen_fits_the_memory_budget(monkeypatch, name):
    model, params, x, axes = make(name, double=False)
    several = (model, params, jnp.tile(x, (3, 1, 1, 1)))
    together, most = needs(monkeypatch, *several, channel_axis=axes, microbatch=15)
    budget = most // 3
    examples, found = needs(monkeypatch, *several, channel_axis=axes, memory_budget=budget)
    assert 1 < examples < together == 15 and found <= budget < most
    with pytest.raises(ValueError, match=rf"memory_budget={budget}: 15 examples at a time need .* microbatch=\d+ fits"):
        gauss_newton_trace(*several, channel_axis=axes, microbatch=15, memory_budget=budget)
    with pytest.raises(ValueError, match="memory_budget=9: 1 example needs about"):
        gauss_newton_trace(*several, channel_axis=axes, memory_budget=9)


@pytest.mark.parametrize("head", [softmax_cross_entropy, squared_error])
@pytest.mark.parametrize("options", [{}, {"classes": 2, "key": jax.random.key(0)}])
def test_a_thousand_classes_need_no_square_matrix(monkeypatch, head, options):
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.normal(size=(3, 1000)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    examples, found = needs(monkeypatch, lambda p, x: x @ p["w"], params, x, head=head, **options)
    assert examples == 4 and found < 4 * 1000**2 * 4 / 10


@pytest.mark.parametrize("draw", ["signs", "labels"])
def test_random_combinations_are_unbiased(dense, draw):
    """Within 5 of their own standard errors for every channel, which chance exceeds once in 200,000 runs."""
    params, x, _, exact = dense
    with enable_x64():
        trace = gauss_newton_trace(
            small, params, x, classes=400, draw=draw, key=jax.random.key(0), policy=DOUBLE, microbatch=7
        )
    assert trace.count == 400
    for path in ("w", "out"):
        error = np.abs(np.asarray(trace.mean[path]) - np.asarray(exact.mean[path]))
        sem, scale = np.asarray(trace.sem[path]), np.asarray(exact.mean[path]).max()
        assert (error <= 5 * sem + 1e-12 * scale).all()
        assert 1e-3 * scale < sem.max() < 0.2 * scale
    assert abs(trace.total() - exact.total()) <= 5 * trace.total_sem()


@pytest.mark.parametrize("head", [softmax_cross_entropy, squared_error])
def test_combinations_of_columns_are_those_of_the_root(head):
    """The way without the root, against the root of the dense Hessian that it is tested for."""
    rng = np.random.default_rng(6)
    with enable_x64():
        z = jnp.asarray(3 * rng.normal(size=6))
        root = head(z)
        v = jnp.asarray(rng.choice([-1.0, 1.0], (4, root.shape[-1])))
        found, signs = root_times(head, z, (), v)
        np.testing.assert_allclose(found, v @ root.T, atol=1e-15)
        assert signs.tolist() == [1.0] * root.shape[-1]


def test_one_combination_is_reproducible_and_has_no_standard_error(dense):
    params, x, _, _ = dense
    with enable_x64():
        runs = [
            gauss_newton_trace(small, params, x, classes=np.int64(1), key=jax.random.key(seed), policy=DOUBLE)
            for seed in (0, 0, 1)
        ]
    first, again, other = (np.asarray(run.mean["w"]) for run in runs)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert np.isnan(runs[0].sem["w"]).all()


@pytest.mark.parametrize(
    ("head", "loss", "outputs"),
    [
        (softmax_cross_entropy, cross_entropy, 2),
        (squared_error, lambda z, t: ((z - t.astype(z.dtype)) ** 2).sum(), 1),
    ],
)
def test_a_head_with_one_column_is_exact_too(dense, head, loss, outputs):
    """Two classes, or one number: one column, and yet nothing is random."""
    params, x, labels, _ = dense
    labels = labels % 2
    with enable_x64():
        params = {**params, "out": params["out"][:, :outputs]}
        trace = gauss_newton_trace(small, params, (x, labels), head=head, policy=DOUBLE)
        close(trace, dense_traces(small, params, x, labels, loss, {}))
    assert trace.total_sem() == 0 and set(trace.layer_sem().values()) == {0.0}
    assert all((np.asarray(trace.sem[path]) == 0).all() for path in ("w", "out"))
    assert expected_agreement(trace, params)[:2] == (1.0, 1.0)
    one = gauss_newton_trace(small, params, x[:1], head=head, policy=Policy(), microbatch=1)  # nothing to be coupled to
    assert one.total_sem() == 0


def test_many_classes_go_in_several_passes():
    rng = np.random.default_rng(9)
    with enable_x64():
        params = {"w": jnp.asarray(rng.normal(size=(3, 2))), "out": jnp.asarray(rng.normal(size=(2, 40)))}
        x, labels = jnp.asarray(rng.normal(size=(2, 3))), jnp.zeros(2, jnp.int32)

        def model(p, x):
            return jnp.abs(x @ p["w"]) @ p["out"]

        trace = gauss_newton_trace(model, params, (x, labels), policy=DOUBLE)
        close(trace, dense_traces(model, params, x, labels, cross_entropy, {}))


HEADS = {
    "squared error": (squared_error, lambda z, t: ((z - t.astype(z.dtype)) ** 2).sum()),
    "second derivative": (
        second_derivative(lambda z, t: (1 + t.astype(z.dtype)) * jax.nn.logsumexp(z) - 0.3 * z[0] * z[1]),
        lambda z, t: (1 + t.astype(z.dtype)) * jax.nn.logsumexp(z) - 0.3 * z[0] * z[1],
    ),
    "a user's own": (
        lambda z, t: jnp.sqrt(jnp.exp(z))[:, None] * jnp.eye(3, dtype=z.dtype),
        lambda z, t: jnp.exp(z).sum() + t.astype(z.dtype) * z[0],
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_other_heads_equal_the_dense_hessian(dense, name):
    head, loss = HEADS[name]
    params, x, labels, _ = dense
    with enable_x64():
        truth = dense_traces(small, params, x, labels, loss, {})
        close(gauss_newton_trace(small, params, (x, labels), head=head, policy=DOUBLE), truth)


def test_the_root_of_the_softmax_hessian():
    """Exact also where probabilities vanish, and finite always."""
    with enable_x64():
        for logits in (
            [0.0, 0.0, 0.0],
            [1.0, -2.0, 0.5, 3.0],
            [0.0, 800.0, -800.0],
            [-40.0, 40.0, 39.0, -41.0],
            [1.0, 2.0],
        ):
            z = jnp.asarray(logits)
            S, p = (np.asarray(jax.jit(f)(z)) for f in (softmax_cross_entropy, jax.nn.softmax))
            assert S.shape == (len(logits), len(logits) - 1)
            np.testing.assert_allclose(S @ S.T, np.diag(p) - np.outer(p, p), atol=1e-16)
            # relative accuracy of every variance, even the smallest
            np.testing.assert_allclose((S**2).sum(1), p * (1 - p), rtol=1e-6 if max(logits) < 100 else 1, atol=1e-300)


def test_gauss_newton_where_it_is_not_the_hessian(dense):
    """A smooth network is refused with the reason; asked for, G is J^T H_out J exactly."""
    params, x, _, _ = dense
    with enable_x64():
        with pytest.raises(ValueError, match=r"1 of 2 kernels(.|\n)*w: tanh is not known to be piecewise linear at"):
            gauss_newton_trace(smooth, params, x, policy=DOUBLE)
        trace = gauss_newton_trace(smooth, params, x, policy=DOUBLE, on_unproven="gauss_newton")
        p = np.asarray(jax.nn.softmax(smooth(params, x)))
        J = np.asarray(jax.jit(jax.jacobian(smooth))(params, x)["w"])
        H_out = np.stack([np.diag(row) - np.outer(row, row) for row in p])
        truth = np.einsum("nkij,nkl,nlij->j", J, H_out, J) / 7
        np.testing.assert_allclose(trace.mean["w"], truth, rtol=1e-10)
        only = gauss_newton_trace(smooth, params, x, policy=DOUBLE, select=lambda path, _: path == "out")
        assert only.mean["w"] is None
        np.testing.assert_allclose(only.mean["out"], trace.mean["out"], rtol=1e-12)


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-5), ("float16", 0.02), ("bfloat16", 0.1)])
def test_precision(dense, compute, tolerance):
    """Weights and cotangents that leave float16's range are scaled; sums are in float32."""
    params, x, _, exact = dense
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))
    trace = gauss_newton_trace(small, *single, policy=Policy(compute))
    assert trace.mean["w"].dtype == jnp.float32
    close(trace, {path: np.asarray(exact.mean[path]) for path in ("w", "out")}, tolerance)


def test_float16_lowers_its_scale_where_it_overflows(dense, chunk_function):
    params, x, _, exact = dense
    scales = {"w": 0.01, "b": 0.01, "out": 100.0}
    scaled = {path: np.asarray(leaf) * scales[path] for path, leaf in params.items()}
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (scaled, x))
    low = gauss_newton_trace(small, *single, policy=Policy("float16", loss_scale=2.0**15))
    assert low.rejected > 0
    expected = {"w": np.asarray(exact.mean["w"]) * 1e4, "out": np.asarray(exact.mean["out"]) * 1e-4}
    close(low, expected, 0.02)


def test_batches_of_other_forms(dense):
    params, x, labels, exact = dense
    with enable_x64():
        several = Batches([(x[:4], labels[:4]), (x[4:], labels[4:])])
        for batch in ((x,), [x, labels], {"image": x, "label": labels}, {"x": x}, several):
            close(
                gauss_newton_trace(small, params, batch, policy=DOUBLE),
                {path: np.asarray(exact.mean[path]) for path in ("w", "out")},
                1e-14,
            )


def centred(p, x):
    return (x - x.mean(0, keepdims=True)) @ p["w"] @ p["out"]


def running_sum(p, x):
    return jnp.cumsum(x, 0) @ p["w"] @ p["out"]


ERRORS = {
    "coupled examples": (centred, {}, ValueError, "not independent"),
    "coupled examples, one by one": (centred, {"microbatch": 1}, ValueError, "not independent"),
    "coupled to the example before": (running_sum, {"microbatch": 1}, ValueError, "not independent"),
    "no key": (small, {"classes": 2}, ValueError, "need a key"),
    "no classes": (small, {"classes": 0}, ValueError, "classes must be"),
    "labels of another head": (
        small,
        {"classes": 1, "key": jax.random.key(0), "draw": "labels", "head": squared_error},
        ValueError,
        "needs head=softmax_cross_entropy",
    ),
    "combinations of an indefinite head": (
        small,
        {"classes": 1, "key": jax.random.key(0), "head": second_derivative(lambda z: z[0] * z[1])},
        ValueError,
        "may be indefinite",
    ),
    "two outputs": (lambda p, x: (small(p, x), x), {}, TypeError, "one floating-point array"),
    "no example axis": (lambda p, x: small(p, x).sum(), {}, TypeError, "one floating-point array"),
    "a head of another shape": (small, {"head": lambda z: jnp.eye(2)}, ValueError, "the head must return"),
    "logits with tokens": (lambda p, x: small(p, x)[:, None], {}, ValueError, "logits of one example"),
    "nothing selected": (small, {"select": lambda path, leaf: False}, ValueError, "no parameter is selected"),
    "half a class": (small, {"classes": 1.0}, ValueError, "classes must be"),
    "true classes": (small, {"classes": True}, ValueError, "classes must be"),
    "no target": (small, {"head": lambda z, t: z}, ValueError, r"the 0 targets of the batch, but takes \(z, t\)"),
    "no target for a loss": (small, {"head": second_derivative(lambda z, t: z @ t)}, ValueError, r"takes \(z, t\)"),
    "microbatch": (small, {"microbatch": 0}, ValueError, "at least 1"),
    "no memory": (small, {"memory_budget": -5}, ValueError, "must be positive"),
    "overflow": (small, {"head": lambda z: jnp.full((3, 1), jnp.inf)}, FloatingPointError, "is not finite in float32"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(dense, name):
    model, options, error, message = ERRORS[name]
    params, x, _, _ = dense
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))
    with pytest.raises(error, match=message):
        gauss_newton_trace(model, *single, **options)


def test_a_leaf_that_is_not_finite_is_named(dense):
    params, x, _, _ = dense
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (params, x))
    holed = np.where(np.arange(7)[:, None] == 3, np.nan, x)
    for wrong, batch, policy, message in (
        ({**params, "b": params["b"] * np.inf}, x, Policy(), "params leaf 'b' holds NaN or infinity$"),
        (params, {"x": holed}, Policy(), "batch leaf 'x' holds NaN or infinity$"),
        (params, holed, Policy(), "batch holds NaN or infinity$"),
        ({**params, "b": params["b"] * 1e6}, x, Policy("float16"), "params leaf 'b' holds NaN or infinity in float16$"),
    ):
        with pytest.raises(ValueError, match=message):
            gauss_newton_trace(small, wrong, batch, policy=policy)


def test_compiled_once(dense):
    """A second call with the same function and shapes traces nothing."""
    params, x, _, _ = dense
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))
    traced = []

    def counted(p, x):
        traced.append(1)
        return small(p, x)

    for _ in range(2):
        gauss_newton_trace(counted, *single)
        count = len(traced)
        traced.clear()
    assert count == 0


def test_identical_kernels_share_a_compilation(monkeypatch):
    """Those of one shape, stride and padding; every compilation traces the squares once."""
    traced, squares = [], Site.squares

    def counted(site, *arguments):
        traced.append(site.kernel_shape)
        return squares(site, *arguments)

    monkeypatch.setattr(Site, "squares", counted)
    rng = np.random.default_rng(12)
    shapes = {"a": (3, 3, 7, 7), "b": (3, 3, 7, 7), "c": (3, 3, 7, 7), "half": (3, 3, 7, 7), "out": (7, 3)}
    params = {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}

    def model(p, x):
        for path in "abc":
            x = jax.nn.relu(conv(x, p[path]))
        return conv(x, p["half"], stride=2).mean((1, 2)) @ p["out"]

    gauss_newton_trace(model, params, jnp.asarray(rng.normal(size=(2, 4, 4, 7)), jnp.float32))
    assert sorted(traced) == [(3, 3, 7, 7), (3, 3, 7, 7), (7, 3)]


@pytest.mark.parametrize("classes", ["all", 2])
def test_a_stopped_run_goes_on_from_its_file(tmp_path, classes):
    rng = np.random.default_rng(5)
    params = {
        "a": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
    }
    x, file = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32), tmp_path / "trace.npz"

    def model(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    def run(**options):
        key = jax.random.key(1)
        return gauss_newton_trace(model, params, x, classes=classes, key=key, microbatch=2, save_every=0, **options)

    def stop(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(save_to=file, progress=stop)
    seen = []
    resumed, whole = run(save_to=file, progress=lambda *at: seen.append(at)), run()
    assert seen == [(6, 7), (7, 7)]
    for one in (resumed, run(save_to=file)):
        for name in params:
            np.testing.assert_array_equal(one.mean[name], whole.mean[name])
            np.testing.assert_array_equal(one.sem[name], whole.sem[name])
    file.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(save_to=file, progress=stop)
    options = {"classes": classes, "key": jax.random.key(1), "microbatch": 3, "save_to": file}
    other = gauss_newton_trace(model, params, x, **options)  # goes on in other chunks
    for name in params:
        np.testing.assert_allclose(other.mean[name], whole.mean[name], rtol=1e-6)
    with pytest.raises(ValueError, match="weights"):
        gauss_newton_trace(model, {**params, "a": 2 * params["a"]}, x, microbatch=2, save_to=file)
    with pytest.raises(ValueError, match="probes"):
        gauss_newton_trace(model, params, x, classes=3, key=jax.random.key(1), microbatch=2, save_to=file)
    with pytest.raises(FileNotFoundError, match="save_to"):
        run(save_to=tmp_path / "missing" / "trace.npz")
