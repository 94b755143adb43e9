"""Exact traces against dense float64 Hessians, on small networks of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import (
    Batches,
    Policy,
    gauss_newton,
    gauss_newton_trace,
    second_derivative,
    squared_error,
)
from ehap_jax.curvature.taps import Site
from tests.curvature.dense_hessians import (
    DOUBLE,
    NETWORKS,
    close,
    conv,
    cross_entropy,
    dense_traces,
    make,
    small,
    smooth,
)


@pytest.fixture(params=["_chunk", "_whole_chunk"])
def chunk_function(request, monkeypatch):
    """The way of a CPU, several compiled functions, and that of an accelerator, one."""
    monkeypatch.setattr(gauss_newton, "_chunk_function", lambda leaves: getattr(gauss_newton, request.param))


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def case(request):
    with enable_x64():
        model, params, x, axes = make(request.param)
        labels = jnp.arange(5, dtype=jnp.int32) % 3
        truth = dense_traces(model, params, x, labels, cross_entropy, axes)
    return request.param, model, params, x, labels, axes, truth


@pytest.mark.slow
def test_equals_the_dense_hessian(case, chunk_function):
    _, model, params, x, labels, axes, truth = case
    with enable_x64():
        trace = gauss_newton_trace(model, params, (x, labels), policy=DOUBLE, channel_axis=axes)
        close(trace, truth)
        assert all(np.abs(t).max() > 0 for t in truth.values())
        assert trace.count == 0
        np.testing.assert_allclose(trace.total(), sum(t.sum() for t in truth.values()), rtol=1e-10)
        assert trace.total_sem() == 0


@pytest.mark.slow
def test_every_chunking_gives_the_same(two_layers):
    params, x, _, whole = two_layers
    with enable_x64():
        for microbatch in (1, 3, 100):
            trace = gauss_newton_trace(small, params, x, policy=DOUBLE, microbatch=microbatch)
            close(trace, {path: np.asarray(whole.mean[path]) for path in ("w", "out")}, 1e-13)
        options = {"classes": 3, "key": jax.random.key(1), "policy": DOUBLE}
        one = gauss_newton_trace(small, params, x, **options)
        other = gauss_newton_trace(small, params, x, microbatch=2, **options)
        close(other, {path: np.asarray(one.mean[path]) for path in ("w", "out")}, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["signs", "labels"])
def test_random_combinations_are_unbiased(two_layers, draw):
    """Within 5 of their own standard errors for every channel, which chance exceeds once in 200,000 runs."""
    params, x, _, exact = two_layers
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


@pytest.mark.slow
def test_one_combination_is_reproducible_and_has_no_standard_error(two_layers):
    params, x, _, _ = two_layers
    with enable_x64():
        runs = [
            gauss_newton_trace(small, params, x, classes=np.int64(1), key=jax.random.key(seed), policy=DOUBLE)
            for seed in (0, 0, 1)
        ]
    first, again, other = (np.asarray(run.mean["w"]) for run in runs)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert np.isnan(runs[0].sem["w"]).all()


@pytest.mark.slow
def test_gauss_newton_where_it_is_not_the_hessian(two_layers):
    """A smooth network is refused with the reason; asked for, G is J^T H_out J exactly."""
    params, x, _, _ = two_layers
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


@pytest.mark.slow
@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-5), ("float16", 0.02), ("bfloat16", 0.1)])
def test_precision(two_layers, compute, tolerance):
    """Weights and cotangents that leave float16's range are scaled; sums are in float32."""
    params, x, _, exact = two_layers
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))
    trace = gauss_newton_trace(small, *single, policy=Policy(compute))
    assert trace.mean["w"].dtype == jnp.float32
    close(trace, {path: np.asarray(exact.mean[path]) for path in ("w", "out")}, tolerance)


@pytest.mark.slow
def test_float16_lowers_its_scale_where_it_overflows(two_layers, chunk_function):
    params, x, _, exact = two_layers
    scales = {"w": 0.01, "b": 0.01, "out": 100.0}
    scaled = {path: np.asarray(leaf) * scales[path] for path, leaf in params.items()}
    single = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (scaled, x))
    low = gauss_newton_trace(small, *single, policy=Policy("float16", loss_scale=2.0**15))
    assert low.rejected > 0
    expected = {"w": np.asarray(exact.mean["w"]) * 1e4, "out": np.asarray(exact.mean["out"]) * 1e-4}
    close(low, expected, 0.02)


def test_batches_of_other_forms(two_layers):
    params, x, labels, exact = two_layers
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
def test_errors(two_layers, name):
    model, options, error, message = ERRORS[name]
    params, x, _, _ = two_layers
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), (params, x))
    with pytest.raises(error, match=message):
        gauss_newton_trace(model, *single, **options)


def test_a_leaf_that_is_not_finite_is_named(two_layers):
    params, x, _, _ = two_layers
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


def test_compiled_once(two_layers):
    """A second call with the same function and shapes traces nothing."""
    params, x, _, _ = two_layers
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


@pytest.mark.slow
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


@pytest.mark.slow
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
