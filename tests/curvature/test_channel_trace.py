"""channel_trace against the dense float64 Hessian, its own contract, and its errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import Batches, Policy, channel_trace, probe_channel_products, rademacher, squared_error
from ehap_jax.curvature.estimate import PRODUCTS
from ehap_jax.curvature.probe_loop import Run, advance_on_device, first_state
from ehap_jax.curvature.problem import path_name, prepare
from tests.curvature import network

KEY = jax.random.key(7)
KERNELS = ("conv1/kernel", "conv2/kernel", "dense/kernel")


@pytest.fixture(scope="module")
def problem():
    return network.params_and_batch()


@pytest.fixture(scope="module")
def dense():
    return network.dense_hessian()


def by_path(tree):
    return {p: tree[p.split("/")[0]]["kernel"] for p in KERNELS}


def quadratic(p, batch):
    """A quadratic form: its Hessian is ``batch['A'].T @ batch['A']`` averaged over examples."""
    w = p["kernel"].ravel()
    return 0.5 * ((batch @ w).astype(jnp.float32) ** 2).mean()


def quadratic_problem(seed=0, size=24, channels=4, examples=24):
    A = np.random.default_rng(seed).normal(size=(examples, size)) * np.linspace(0.3, 1.5, size)
    return {"kernel": jnp.ones((size // channels, channels))}, jnp.asarray(A, jnp.float32), A.T @ A / examples


@pytest.mark.slow
def test_enumerated_basis_probes_give_the_exact_block_traces(dense):
    H, rows = dense
    with enable_x64():
        params, batch = network.as_float64(network.params_and_batch())
        zero = jax.tree.map(lambda x: np.zeros(x.shape), params)
        total = {p: 0.0 for p in KERNELS}
        for path in KERNELS:
            layer = path.split("/")[0]
            for index in itertools.product(*map(range, params[layer]["kernel"].shape)):
                zero[layer]["kernel"][index] = 1.0
                found = by_path(probe_channel_products(network.loss, params, zero, batch, policy=Policy("float64")))
                total = {p: total[p] + np.asarray(found[p]) for p in KERNELS}
                zero[layer]["kernel"][index] = 0.0
    for (path, channel), members in network.channels_of(rows).items():
        assert abs(total[path][channel] - np.trace(H[np.ix_(members, members)])) < 1e-8


@pytest.mark.slow
def test_rademacher_estimates_are_within_the_computed_bound(problem, dense):
    """Var(v_c . (H v)_c) is twice the squared off-diagonal of the symmetrised rows of c (Hutchinson, 1989)."""
    H, rows = dense
    n = 200
    estimate = channel_trace(network.loss, *problem, key=KEY, num_probes=n)
    mean, sem = by_path(estimate.mean), by_path(estimate.sem)
    groups = network.channels_of(rows)
    bound = stats.norm.isf(1e-5 / len(groups))
    for (path, channel), members in groups.items():
        S = np.zeros_like(H)
        S[members] = H[members] / 2
        S = S + S.T
        sigma = np.sqrt(2 * ((S**2).sum() - (np.diag(S) ** 2).sum()) / n)
        assert abs(mean[path][channel] - np.trace(H[np.ix_(members, members)])) < bound * sigma + 1e-6
        assert 0.6 < sem[path][channel] / sigma < 1.6
    sigma = np.sqrt(2 * ((H**2).sum() - (np.diag(H) ** 2).sum()) / n)
    assert abs(estimate.total() - np.trace(H)) < bound * sigma
    assert 0.7 < estimate.total_sem() / sigma < 1.4
    assert estimate.layer()["conv2/kernel"] == pytest.approx(float(mean["conv2/kernel"].sum()), rel=1e-5)
    assert estimate.layer_sem().keys() == set(KERNELS)


@pytest.mark.slow
def test_leaves_that_are_not_selected_are_none_and_not_perturbed(problem, dense):
    params, batch = problem
    estimate = channel_trace(
        network.loss, params, batch, key=KEY, num_probes=2, select=lambda path, leaf: path == "conv2/kernel"
    )
    paths = [path_name(p) for p, x in jax.tree_util.tree_leaves_with_path(estimate.mean) if x is not None]
    assert paths == ["conv2/kernel"]
    assert estimate.mean["conv1"]["kernel"] is None
    v = rademacher(jax.random.fold_in(KEY, 0), {"conv2/kernel": params["conv2"]["kernel"]})["conv2/kernel"]
    H, rows = dense
    members = [i for i, (path, _) in enumerate(rows) if path == "conv2/kernel"]
    one = channel_trace(
        network.loss, params, batch, key=KEY, num_probes=1, select=lambda path, leaf: path == "conv2/kernel"
    )
    v = np.asarray(v).ravel()
    products = (v * (H[np.ix_(members, members)] @ v)).reshape(-1, 3).sum(0)
    np.testing.assert_allclose(one.mean["conv2"]["kernel"], products, rtol=1e-4, atol=1e-5)
    assert np.isnan(one.sem["conv2"]["kernel"]).all()


def test_the_mean_is_the_equally_weighted_mean_of_the_probes_and_sem_has_ddof_1():
    params, batch, H = quadratic_problem()
    n = 9
    estimate = channel_trace(quadratic, params, batch, key=KEY, num_probes=n, probes_per_step=4)
    samples = []
    for i in range(n):
        v = np.asarray(rademacher(jax.random.fold_in(KEY, i), {"kernel": params["kernel"]})["kernel"], float)
        samples.append((v * (H @ v.ravel()).reshape(v.shape)).sum(0))
    np.testing.assert_allclose(estimate.mean["kernel"], np.mean(samples, 0), rtol=1e-4)
    np.testing.assert_allclose(estimate.sem["kernel"], stats.sem(samples, axis=0), rtol=1e-4)


@pytest.mark.slow
def test_coverage_of_95_percent_intervals(loop_on_device):
    """Student intervals cover the exact trace of every block and of all in 93-97 % of 400 runs, as the bound says."""
    params, batch, H = quadratic_problem()
    runs, probes = 400, 30
    t = stats.t.isf(0.025, probes - 1)
    blocks = np.diag(H).reshape(params["kernel"].shape).sum(0)
    inside = np.zeros(len(blocks) + 1)
    for key in jax.random.split(jax.random.key(3), runs):
        estimate = channel_trace(quadratic, params, batch, key=key, num_probes=probes, probes_per_step=probes)
        errors = np.append(np.abs(estimate.mean["kernel"] - blocks), abs(estimate.total() - np.trace(H)))
        inside += errors <= t * np.append(estimate.sem["kernel"], estimate.total_sem())
    low, high = stats.binom.interval(0.99, runs, 0.95)
    assert ((low <= inside) & (inside <= high)).all()
    assert ((inside / runs >= 0.93) & (inside / runs <= 0.97)).all()


@pytest.mark.slow
def test_probes_do_not_depend_on_what_else_is_selected_or_on_the_dtype():
    leaves = {"a": jnp.zeros((64, 3)), "b": jnp.zeros((5, 2))}
    both = rademacher(KEY, leaves)
    np.testing.assert_array_equal(both["a"], rademacher(KEY, {"a": leaves["a"]}, jnp.float16)["a"])
    with enable_x64():
        np.testing.assert_array_equal(both["a"], rademacher(KEY, {"a": jnp.zeros((64, 3), float)})["a"])
    assert set(np.unique(both["a"])) == {-1.0, 1.0}
    assert abs(float(both["a"].sum())) < 5 * np.sqrt(192)


@pytest.mark.slow
def test_resume_is_bit_identical_to_an_uninterrupted_run(problem):
    options = dict(key=KEY, policy=Policy("float16"))
    whole = channel_trace(network.loss, *problem, num_probes=7, probes_per_step=7, **options)
    part = channel_trace(network.loss, *problem, num_probes=3, probes_per_step=2, **options)
    assert part.count == 3
    resumed = channel_trace(network.loss, *problem, num_probes=7, state=part.state, **options)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        a, b = (
            jax.random.key_data(x) if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key) else x for x in (a, b)
        )
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def three_probes(problem):
    return channel_trace(network.loss, *problem, key=KEY, num_probes=3, product="jvp").state.moments


@pytest.mark.slow
@pytest.mark.parametrize(("product", "microbatch"), [("jvp", 2), ("jvp", 4), ("linearize", 2), ("remat", None)])
def test_every_loop_and_product_gives_the_same_traces(problem, three_probes, microbatch, product):
    prepared = prepare(
        network.loss,
        *problem,
        policy=Policy(),
        select=lambda p, x: x.ndim >= 2,
        channel_axis=-1,
        microbatch=microbatch,
    )
    run = Run(network.loss, prepared, product)
    on_device = advance_on_device(run, first_state(run, KEY, Policy()), jnp.int32(3))
    python = channel_trace(network.loss, *problem, key=KEY, num_probes=3, microbatch=microbatch, product=product)
    for other in (python.state, on_device):
        assert int(other.count) == 3
        assert other.origin.product == product
        for x, y in zip(jax.tree.leaves(three_probes), jax.tree.leaves(other.moments), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 5])
def test_microbatches_weigh_by_examples(problem, size):
    options = dict(key=KEY, num_probes=2)
    whole = channel_trace(network.loss, *problem, **options)
    parts = channel_trace(network.loss, *problem, microbatch=size, **options)
    for a, b in zip(jax.tree.leaves(whole.mean), jax.tree.leaves(parts.mean), strict=True):
        scale = max(1.0, float(jnp.abs(a).max()))
        np.testing.assert_allclose(a, b, atol=1e-6 * scale, rtol=0)


@pytest.mark.slow
def test_several_batches_are_one(problem):
    """Uneven batches from a loader give the trace of all their examples, as one batch would."""
    params, batch = problem
    loader = ({name: x[s] for name, x in batch.items()} for s in (slice(0, 2), slice(2, 5), slice(5, 6)))
    whole = channel_trace(network.loss, params, batch, key=KEY, num_probes=2)
    parts = channel_trace(network.loss, params, Batches(loader), key=KEY, num_probes=2, microbatch=2)
    for a, b in zip(jax.tree.leaves(whole.mean), jax.tree.leaves(parts.mean), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(jnp.abs(a).max())), rtol=0)
    with pytest.raises(ValueError, match="no batches"):
        channel_trace(network.loss, params, Batches(), key=KEY, num_probes=2)
    with pytest.raises(ValueError, match="differ in their structure"):
        channel_trace(network.loss, params, Batches([batch, batch["image"]]), key=KEY, num_probes=2)


@pytest.mark.slow
def test_one_compilation_per_shape():
    traced = []

    def loss(p, batch):
        traced.append(batch.shape)
        return quadratic(p, batch)

    params, batch, _ = quadratic_problem()
    channel_trace(loss, params, batch, key=KEY, num_probes=5, probes_per_step=2)
    once = len(traced)
    assert set(traced) == {(24, 24)}
    channel_trace(loss, params, batch + 1, key=jax.random.key(1), num_probes=9, probes_per_step=3)
    assert len(traced) == once
    channel_trace(loss, params, batch, key=KEY, num_probes=3, microbatch=10)
    products = [shape for shape in traced[once:] if shape in {(10, 24), (4, 24)}]
    assert {(10, 24), (4, 24)} == set(products)
    again = len(traced)
    channel_trace(loss, params, batch, key=KEY, num_probes=4, microbatch=10)
    assert len(traced) == again


@pytest.mark.parametrize("product", PRODUCTS)
def test_nothing_is_read_by_the_host_within_a_chunk_of_probes(monkeypatch, product):
    """However many probes a chunk has, the host reads the device equally often."""
    params, batch, _ = quadratic_problem()
    array = type(jnp.zeros(()))
    read = []
    for name in ("__array__", "__bool__", "__int__", "__float__", "__index__", "item", "tolist", "block_until_ready"):
        original = getattr(array, name)
        monkeypatch.setattr(array, name, lambda self, *a, f=original, **k: read.append(1) or f(self, *a, **k))

    def reads(probes):
        read.clear()
        channel_trace(quadratic, params, batch, key=KEY, num_probes=probes, probes_per_step=probes, product=product)
        return len(read)

    assert 0 < reads(1) == reads(2) == reads(40)
    read.clear()
    channel_trace(quadratic, params, batch, key=KEY, num_probes=40, probes_per_step=1, product=product)
    assert len(read) > reads(40) + 39


def test_channel_axis_by_path():
    params, batch, _ = quadratic_problem()
    last = channel_trace(quadratic, params, batch, key=KEY, num_probes=3)
    first = channel_trace(quadratic, params, batch, key=KEY, num_probes=3, channel_axis={"kernel": 0})
    assert last.mean["kernel"].shape == (4,) and first.mean["kernel"].shape == (6,)
    assert first.total() == pytest.approx(last.total(), rel=1e-5)


def test_rtol_and_until_stop_early_and_progress_is_told():
    params, batch, _ = quadratic_problem()
    seen = []
    estimate = channel_trace(
        quadratic,
        params,
        batch,
        key=KEY,
        num_probes=5000,
        rtol=0.1,
        probes_per_step=20,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert estimate.total_sem() <= 0.1 * estimate.total() and 16 <= estimate.count < 5000
    assert seen == [(i, 5000) for i in range(20, estimate.count + 1, 20)]
    counts = []
    stopped = channel_trace(
        quadratic,
        params,
        batch,
        key=KEY,
        num_probes=100,
        probes_per_step=10,
        until=lambda e: counts.append(e.count) or e.count >= 40,
    )
    assert stopped.count == 40 and counts == [20, 30, 40]


# Errors: each says what is wrong, and where.


def run(loss=quadratic, **changes):
    params, batch, _ = quadratic_problem()
    arguments = dict(params=params, batch=batch, key=KEY, num_probes=2) | changes
    params, batch = arguments.pop("params"), arguments.pop("batch")
    return channel_trace(loss, params, batch, **arguments)


def test_a_loss_that_is_not_scalar():
    with pytest.raises(TypeError, match="shape \\(24,\\)"):
        run(lambda p, b: b @ p["kernel"].ravel())


def test_a_loss_with_aux():
    with pytest.raises(TypeError, match=r"tuple.*auxiliary"):
        run(lambda p, b: (quadratic(p, b), b))


def test_integer_parameters():
    with pytest.raises(TypeError, match=r"'kernel'.*int32"):
        run(params={"kernel": jnp.ones((6, 4), jnp.int32)})


def test_no_kernels():
    with pytest.raises(ValueError, match=r"no parameter is selected.*'kernel'"):
        run(select=lambda path, leaf: False)


def test_a_loss_that_is_not_deterministic():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="not deterministic"):
        run(lambda p, b: quadratic(p, b) * float(rng.uniform(1, 2)))
    with pytest.raises(ValueError, match="not deterministic"):
        run(
            lambda p, b: (
                quadratic(p, b)
                * jax.pure_callback(lambda: np.float32(rng.uniform(1, 2)), jax.ShapeDtypeStruct((), jnp.float32))
            )
        )


def test_batch_leaves_of_different_length():
    with pytest.raises(ValueError, match=r"number of examples: \{'x': 3, 'y': 4\}"):
        run(batch={"x": jnp.zeros((3, 2)), "y": jnp.zeros(4)})
    with pytest.raises(ValueError, match="'y' is a scalar"):
        run(batch={"x": jnp.zeros((3, 2)), "y": jnp.zeros(())})


def test_nan_in_weights_and_batch_name_the_path(problem):
    params, batch = problem
    broken = jax.tree.map(lambda x: x, params)
    broken["norm2"]["scale"] = broken["norm2"]["scale"].at[1].set(jnp.nan)
    with pytest.raises(ValueError, match="params leaf 'norm2/scale'"):
        channel_trace(network.loss, broken, batch, key=KEY, num_probes=1)
    with pytest.raises(ValueError, match="batch leaf 'image'"):
        channel_trace(network.loss, params, batch | {"image": batch["image"] * jnp.inf}, key=KEY, num_probes=1)
    params, batch, _ = quadratic_problem()
    with pytest.raises(ValueError, match=r"'kernel'.* in float16"):
        run(params={"kernel": params["kernel"] * 1e6}, policy=Policy("float16"))


@pytest.mark.slow
def test_a_loss_that_is_not_a_mean_is_refused_when_chunked(problem):
    def summed(p, b):
        return quadratic(p, b) * b.shape[0]

    def train_mode(p, b):
        h = b @ p["kernel"].reshape(24, 1)
        return (((h - h.mean(0, keepdims=True)) / (h.std(0, keepdims=True) + 0.1)) ** 4).mean()

    for loss in (summed, train_mode):
        run(loss)
        with pytest.raises(ValueError, match="not a mean over independent examples"):
            run(loss, microbatch=10)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        (dict(num_probes=0), "num_probes"),
        (dict(probes_per_step=0), "probes_per_step"),
        (dict(microbatch=0), "microbatch"),
        (dict(rtol=0.0), "rtol"),
        (dict(channel_axis=2), "channel_axis 2 does not exist in 'kernel'"),
        (dict(channel_axis={"kernal": 0}), "kernal"),
        (dict(policy=Policy("float64")), "64-bit"),
    ],
)
def test_options_out_of_range(option, match):
    with pytest.raises(ValueError, match=match):
        run(**option)


def test_a_state_of_another_run_is_refused(problem):
    state = run().state
    with pytest.raises(ValueError, match="another key"):
        run(state=state, key=jax.random.key(99), num_probes=4)
    with pytest.raises(ValueError, match="conv1/kernel"):
        channel_trace(network.loss, *problem, key=KEY, num_probes=4, state=state)
    with pytest.raises(ValueError, match="has 2 probes already, more than num_probes=1"):
        run(state=state, num_probes=1)


@pytest.mark.parametrize(("was", "now"), [("float32", "float16"), ("float16", "float32"), ("float32", "bfloat16")])
def test_a_state_of_another_precision_is_refused(was, now):
    state = run(policy=Policy(was)).state
    with pytest.raises(ValueError, match=f"another policy: {was}, and now it is {now}"):
        run(policy=Policy(now), state=state, num_probes=4)


@pytest.mark.slow
@pytest.mark.parametrize(("was", "now"), [("hutchinson", "control_variate"), ("control_variate", "hutchinson")])
def test_a_state_of_another_method_is_refused(was, now):
    params, x, _ = quadratic_problem()
    given = {"params": params, "batch": (x, jnp.zeros((24, 1)))}
    given |= {"model": lambda p, x: x @ p["kernel"].ravel()[:, None], "head": squared_error}

    def loss(p, batch):
        return 2 * quadratic(p, batch[0])

    state = run(loss, method=was, **given).state
    with pytest.raises(ValueError, match=f"another method: {was}, and now it is {now}"):
        run(loss, method=now, state=state, num_probes=4, **given)


def test_a_state_goes_on_by_another_product_where_asked_and_says_so():
    first = run(product="linearize")
    kept, changed = (run(state=first.state, num_probes=4, product=product) for product in ("auto", "jvp"))
    assert first.product == kept.product == "linearize" and changed.product == "jvp"
    np.testing.assert_allclose(changed.mean["kernel"], kept.mean["kernel"], rtol=1e-5)


@pytest.mark.slow
def test_sums_that_overflow_are_an_error_and_not_an_infinite_standard_error():
    """The trace of one probe is near 1e22, which float32 holds, and its square is not."""

    def steep(p, batch):
        return jnp.float32(1e21) * (batch @ p["w"]).prod(1).mean()

    p, batch = {"w": jnp.ones((3, 2))}, jnp.ones((2, 3))
    with pytest.raises(FloatingPointError, match=r"overflow float32 \(squares/.*Policy\('float64'\)"):
        channel_trace(steep, p, batch, key=jax.random.key(0), num_probes=4)
    with enable_x64():
        found = channel_trace(
            lambda p, b: 1e21 * (b @ p["w"]).prod(1).mean(),
            {"w": jnp.ones((3, 2), jnp.float64)},
            batch.astype(jnp.float64),
            key=jax.random.key(0),
            num_probes=4,
            policy=Policy("float64"),
        )
    assert np.isfinite(found.total_sem())
