"""Low precision: the scales, equal probe weights, exact sums, and what happens when nothing helps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import Policy, channel_trace, probe_channel_products, probe_loop, rademacher
from ehap_jax.curvature.estimate import PRODUCTS
from tests.curvature import network

KEY = jax.random.key(11)


def square(p, batch):
    """Half the squared norm of the kernel: its Hessian is the identity."""
    return 0.5 * (p["kernel"].astype(jnp.float32) ** 2).sum() + 0.0 * batch.astype(jnp.float32).mean()


def integers(p, batch):
    """A quadratic form of small integers: nothing rounds in any policy."""
    return 0.5 * ((batch @ p["kernel"]).astype(jnp.float32) ** 2).sum(1).mean()


def integer_problem():
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.integers(-2, 3, (6, 3)), jnp.float32)
    return {"kernel": kernel}, jnp.asarray(rng.integers(-2, 3, (8, 6)), jnp.float32)


def channels(estimate):
    return np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(estimate.mean)])


@pytest.fixture(scope="module")
def problem():
    return network.params_and_batch()


@pytest.fixture(scope="module")
def float32(problem):
    return channel_trace(network.loss, *problem, key=KEY, num_probes=64)


@pytest.mark.slow
@pytest.mark.parametrize(("compute", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_the_same_probes_in_16_bit_agree_with_float32(problem, float32, compute, unit):
    """Errors stay within a few unit roundoffs of the size of one probe's products."""
    low = channel_trace(network.loss, *problem, key=KEY, num_probes=64, policy=Policy(compute))
    a, b = channels(float32), channels(low)
    spread = np.concatenate([np.asarray(x, np.float64) for x in jax.tree.leaves(float32.sem)]) * np.sqrt(64)
    assert np.abs(a - b).max() <= 4 * unit * spread.max()
    assert np.abs(a - b).max() > 0
    assert stats.pearsonr(a, b).statistic >= 1 - 10 * unit**2
    assert {x.dtype for x in jax.tree.leaves(low.mean)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_float16_finds_scales_with_room_and_rejects_nothing_more(problem):
    estimate = channel_trace(network.loss, *problem, key=KEY, num_probes=64, policy=Policy("float16"))
    loss_scale, probe_scale = float(estimate.state.loss_scale), float(estimate.state.probe_scale)
    assert np.log2(loss_scale).is_integer() and np.log2(probe_scale).is_integer()
    assert 2.0**4 <= loss_scale < 2.0**20
    assert estimate.rejected <= 1


@pytest.mark.slow
def test_scales_are_sought_chunk_by_chunk(problem, monkeypatch):
    """A scale that is too large costs one chunk, not the batch; that of the last chunk is right for all."""
    seen, real = [], probe_loop.one_probe

    def counted(run, linear, state):
        seen.append((len(run.problem.chunks), float(state.loss_scale)))
        return real(run, linear, state)

    monkeypatch.setattr(probe_loop, "one_probe", counted)
    params, batch = problem
    size = len(jax.tree.leaves(batch)[0])
    options = {"key": KEY, "num_probes": 1, "microbatch": -(-size // 3)}
    found = channel_trace(network.loss, params, batch, policy=Policy("float16"), **options)
    *search, (chunks, scale) = seen
    assert (chunks, scale) == (3, search[-1][1] / 4) and all(one == 1 for one, _ in search)
    scales = [scale for _, scale in search]
    lowered = np.log2(scales[0] / scales[-1]) / 2
    assert scales == sorted(scales, reverse=True) and len(search) == 3 + lowered and lowered >= 1
    given = channel_trace(network.loss, params, batch, policy=Policy("float16", loss_scale=scale), **options)
    np.testing.assert_array_equal(channels(found), channels(given))


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_results_are_bit_identical_under_either_scale_where_nothing_rounds(compute):
    params, batch = integer_problem()
    results = [
        channels(channel_trace(integers, params, batch, key=KEY, num_probes=4, policy=Policy(compute, s, p)))
        for s, p in [(1.0, 1.0), (2.0**6, 1.0), (1.0, 2.0**-3), (0.5, 16.0)]
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    exact = channels(channel_trace(integers, params, batch, key=KEY, num_probes=4))
    np.testing.assert_array_equal(results[0], exact)


def test_float32_is_bit_identical_under_either_scale(problem):
    results = [
        channels(channel_trace(network.loss, *problem, key=KEY, num_probes=2, policy=Policy("float32", s, p)))
        for s, p in [(1.0, 1.0), (2.0**12, 2.0**-3)]
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["float64", "float32", "bfloat16", "float16"])
def test_the_trace_of_a_million_identities_is_exact(compute):
    """In float16 the sum alone would be infinite, and in bfloat16 it would stop at 256."""
    n = 10**6
    with enable_x64(compute == "float64"):
        params = {"kernel": jnp.ones((n, 1), jnp.float32)}
        estimate = channel_trace(
            square, params, jnp.zeros(1, jnp.float32), key=KEY, num_probes=1, policy=Policy(compute)
        )
        assert estimate.total() == n
        assert np.asarray(estimate.mean["kernel"]).tolist() == [n]


@pytest.mark.slow
def test_a_rejected_probe_is_repeated_not_dropped():
    """The first loss scale overflows in float16; the same probes come through with a lower one, and are counted."""
    params, batch = integer_problem()
    policy = Policy("float16", loss_scale=2.0**18)
    estimate = channel_trace(integers, params, batch, key=KEY, num_probes=5, policy=policy, probes_per_step=2)
    exact = channel_trace(integers, params, batch, key=KEY, num_probes=5)
    assert estimate.rejected > 0 and estimate.count == 5
    assert float(estimate.state.loss_scale) == 2.0 ** (18 - estimate.rejected)
    assert float(estimate.state.probe_scale) == 1.0
    np.testing.assert_array_equal(channels(estimate), channels(exact))


def test_a_probe_too_large_lowers_the_probe_scale():
    params, batch = integer_problem()
    policy = Policy("float16", loss_scale=1.0, probe_scale=2.0**15)
    estimate = channel_trace(integers, params, batch, key=KEY, num_probes=3, policy=policy)
    assert float(estimate.state.loss_scale) == 1.0
    assert float(estimate.state.probe_scale) == 2.0 ** (15 - estimate.rejected) < 2.0**15
    np.testing.assert_array_equal(
        channels(estimate), channels(channel_trace(integers, params, batch, key=KEY, num_probes=3))
    )


def steep(p, batch):
    """Finite in float32, and beyond float16 at any scale in the second leaf only."""
    fine = (p["a"]["kernel"].astype(jnp.float32) ** 2).sum()
    return fine + 1e15 * (p["b"]["kernel"].astype(jnp.float32) ** 2).sum() + 0.0 * batch.astype(jnp.float32).sum()


def infinite(p, batch):
    """A finite loss with an infinite second derivative at 0."""
    return square({"kernel": p["a"]["kernel"]}, batch) + (jnp.abs(p["b"]["kernel"]) ** 1.5).sum()


@pytest.mark.slow
@pytest.mark.parametrize("loss_scale", [None, 1.0])
def test_an_exhausted_back_off_names_the_first_leaf(loss_scale):
    p = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(FloatingPointError, match=r"float16.*'b/kernel'"):
        channel_trace(
            steep, p, jnp.zeros(1), key=KEY, num_probes=1, policy=Policy("float16", loss_scale), probes_per_step=80
        )
    assert np.isfinite(channel_trace(steep, p, jnp.zeros(1), key=KEY, num_probes=1).total())


def chain(p, batch):
    h = batch @ p["z_first"] @ p["m"] @ p["a_last"]
    return (h.astype(jnp.float32) ** 2).sum(1).mean()


CHAIN = {name: jnp.eye(4) for name in ("z_first", "m", "a_last")}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("loss_scale", "last"), [(None, 2.0**20), (1.0, 0.5)])
def test_an_overflow_on_the_way_forward_is_called_one_and_placed(loss_scale, last, product):
    """No scale can help, so hardly any is tried, and the layer is that where it happens, not the alphabet's first."""
    p = CHAIN | {"z_first": 1e3 * jnp.eye(4), "m": 1e3 * jnp.eye(4)}
    policy, scale = Policy("float16", loss_scale), re.escape(f"loss scale {last:g} and")
    with pytest.raises(FloatingPointError, match=rf"{scale}.*activations overflow in float16.* is 'm'\. Use"):
        channel_trace(chain, p, jnp.eye(4), key=KEY, num_probes=1, policy=policy, product=product)
    with pytest.raises(FloatingPointError, match=r"activations overflow in float16.* is 'm'"):
        probe_channel_products(chain, p, p, jnp.eye(4), policy=Policy("float16"))


def test_the_layer_that_is_named_is_the_first_of_the_network():
    def loss(p, batch):
        return 1e30 * chain(p, batch)

    with pytest.raises(FloatingPointError, match="activations are finite, and the first layer concerned is 'z_first'"):
        channel_trace(loss, CHAIN, jnp.eye(4), key=KEY, num_probes=1, policy=Policy("float16"))


def test_a_product_that_is_not_finite_in_float32_is_an_error_at_once():
    p = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.zeros((2, 2))}}
    with pytest.raises(FloatingPointError, match=r"probe 0 is not finite in float32.*'b/kernel'"):
        channel_trace(infinite, p, jnp.zeros(1), key=KEY, num_probes=3)
    with pytest.raises(FloatingPointError, match=r"not finite in float32.*'b/kernel'"):
        probe_channel_products(infinite, p, p, jnp.zeros(1))


def released_ehap_trace(product, probes):
    """EHAP's released float16 loop: every probe is scaled once more by 2**-8, and nothing is ever unscaled."""
    scale, samples = 1.0, []
    for v in probes:
        samples.append(np.sum(v * product(np.float16(scale) * v.astype(np.float16)), dtype=np.float32))
        scale *= 2.0**-8
    return np.array(samples)


@pytest.mark.slow
def test_probes_have_equal_weights_unlike_the_released_float16_code():
    """Released: probe 1 has 99.6 % of the weight and all but a few are exactly zero. Here each counts 1/n."""
    n, params, batch = 40, {"kernel": jnp.ones((6, 3))}, jnp.eye(6)
    probes = [
        np.asarray(rademacher(jax.random.fold_in(KEY, i), {"kernel": params["kernel"]})["kernel"]) for i in range(n)
    ]
    samples = released_ehap_trace(lambda v: v / np.float16(6), probes)
    assert samples[0] / samples.sum() == pytest.approx(255 / 256, rel=1e-3)
    assert (samples == 0).sum() == n - 3

    # The same loss here: every probe, the last included, contributes the whole trace of 18/6.
    estimate = channel_trace(integers, params, batch, key=KEY, num_probes=n, policy=Policy("float16"))
    assert estimate.total() == pytest.approx(3.0, rel=1e-3)
    params, batch = integer_problem()
    estimate = channel_trace(integers, params, batch, key=KEY, num_probes=n, policy=Policy("float16"))
    each = [
        probe_channel_products(
            integers,
            params,
            rademacher(jax.random.fold_in(KEY, i), {"kernel": params["kernel"]}),
            batch,
            policy=Policy("float16"),
        )["kernel"]
        for i in range(n)
    ]
    np.testing.assert_allclose(estimate.mean["kernel"], np.mean(each, 0), rtol=1e-5)
    late = channel_trace(integers, params, batch, key=KEY, num_probes=n - 1, policy=Policy("float16"))
    last = np.asarray(each[-1]) - np.asarray(late.mean["kernel"])
    moved = np.asarray(estimate.mean["kernel"]) - np.asarray(late.mean["kernel"])
    np.testing.assert_allclose(moved, last / n, atol=1e-4)
    assert np.abs(moved).max() > 1e-3


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_a_softmax_in_16_bits_is_an_error(problem, compute):
    params, batch = problem

    def loss(p, batch):
        y = jax.nn.log_softmax(network.logits(p, batch["image"]))
        return -jnp.take_along_axis(y, batch["label"][:, None], axis=1).mean()

    with pytest.raises(TypeError, match=rf"comes back in {compute}.*logits\.astype\(jnp\.float32\)"):
        channel_trace(loss, params, batch, key=KEY, num_probes=1, policy=Policy(compute))


@pytest.mark.parametrize("arguments", [("float8",), ("float16", 3.0), ("float16", 1.0, 0.0), ("float16", -2.0)])
def test_a_policy_that_makes_no_sense_is_an_error(arguments):
    with pytest.raises(ValueError, match=r"compute must be one of|power of two"):
        Policy(*arguments)
