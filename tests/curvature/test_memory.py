"""The choice between linearising once and differentiating anew, and what linearising keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.curvature import Policy, channel_trace, memory, product_memory
from ehap_jax.curvature.rematerialize import rematerialized
from tests.curvature import network

KEY = jax.random.key(2)


def deep(p, x):
    """Twelve layers; the parameters are small beside the activations."""
    for w in p["kernel"]:
        x = jnp.tanh(x @ w)
    return (x**2).sum(1).mean()


def deep_problem():
    rng = np.random.default_rng(0)
    params = {"kernel": tuple(jnp.asarray(rng.normal(size=(16, 16)) / 4, jnp.float32) for _ in range(12))}
    return params, jnp.asarray(rng.normal(size=(512, 16)), jnp.float32)


@pytest.fixture(scope="module")
def needs():
    """Bytes of every way on the deep network: nothing fits into one byte, and what there is is said."""
    with pytest.raises(
        ValueError, match=r"memory_budget=1: 'remat' needs least, \d+ bytes by the compiler.* microbatch="
    ):
        product_memory(deep, *deep_problem(), memory_budget=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda device: 2)
        found = product_memory(deep, *deep_problem())
    assert found.product == "remat" and found.budget == 1 and found.source == "compiler"
    return found.needs


@pytest.mark.slow
def test_each_way_needs_less_than_the_faster_one(needs):
    assert list(needs) == ["linearize", "jvp", "remat"]
    residuals = 12 * 512 * 16 * 4
    assert needs["linearize"] > needs["jvp"] > residuals
    assert needs["remat"] < 0.5 * needs["jvp"]  # 0.41 of it with JAX 0.10, 0.44 with 0.11


@pytest.mark.slow
def test_the_fastest_that_fits_is_chosen_and_its_bytes_are_told(needs):
    for way, expected in (("linearize", 1), ("jvp", 2), ("remat", 3)):
        found = product_memory(deep, *deep_problem(), memory_budget=needs[way])
        assert found.product == way and found.needs == dict(list(needs.items())[:expected])
        assert found.budget == needs[way]
    small = product_memory(deep, *deep_problem(), memory_budget=needs["remat"] - 1, microbatch=64)
    assert small.needs[small.product] <= needs["remat"] - 1
    estimate = channel_trace(deep, *deep_problem(), key=KEY, num_probes=1, memory_budget=needs["jvp"])
    assert estimate.product == "jvp"
    override = channel_trace(deep, *deep_problem(), key=KEY, num_probes=1, memory_budget=1, product="linearize")
    assert override.product == "linearize"
    assert 0 < memory.free_memory(jax.devices()[0]) < 2**50


@pytest.mark.slow
@pytest.mark.parametrize("bound", [False, True])
def test_what_the_compiler_says_is_compiled_once(bound):
    """Deciding compiles what is run, and the run compiles nothing again; also with weights bound to their device."""
    compiled = []

    def note(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            compiled.append(name)

    def loss(p, x):
        return deep(p, x) * 2

    params, batch = deep_problem()
    if bound:
        params = jax.device_put(params, jax.devices()[0])
    channel_trace(deep, params, batch, key=KEY, num_probes=2, microbatch=200)  # the parts that depend on no loss
    jax.monitoring.register_event_duration_secs_listener(note)
    found = product_memory(loss, params, batch, microbatch=200)
    deciding = len(compiled)
    channel_trace(loss, params, batch, key=KEY, num_probes=2, microbatch=200)
    assert found.product == "linearize"
    # The loss twice on 200 examples; its value on 200, on the 112 left, and on both shapes of two chunks together; for
    # both shapes of chunks the gradient linearised and applied.
    assert deciding == 1 + 4 + 2 * 2
    assert len(compiled) == deciding


@pytest.mark.slow
def test_without_word_from_the_compiler_an_estimate_decides_and_says_so(monkeypatch, needs):
    monkeypatch.setattr(memory, "_stats", lambda lowered: None)
    found = product_memory(deep, *deep_problem())
    assert found.source == "estimate" and found.product == "linearize"
    assert needs["jvp"] < found.needs["linearize"] < 2 * needs["linearize"]
    with pytest.raises(ValueError, match="by the estimate"):
        product_memory(deep, *deep_problem(), memory_budget=1)


@pytest.mark.slow
def test_the_estimate_is_no_less_than_what_the_compiler_says(monkeypatch):
    """Also of ReLUs, of whose residuals most are made again rather than kept."""

    def loss(p, x):
        for w in p["kernel"]:
            x = jax.nn.relu(x @ w)
        return (x**2).sum(1).mean()

    monkeypatch.setattr(memory, "free_memory", lambda device: 2)
    said = product_memory(loss, *deep_problem())
    monkeypatch.setattr(memory, "_stats", lambda lowered: None)
    estimated = product_memory(loss, *deep_problem())
    assert (said.source, estimated.source) == ("compiler", "estimate")
    assert said.needs.keys() == estimated.needs.keys() == {"linearize", "jvp", "remat"}
    assert all(size <= estimated.needs[way] for way, size in said.needs.items())


@pytest.mark.slow
def test_segments_give_the_same_derivatives():
    params, batch = network.params_and_batch()
    again = rematerialized(network.loss)
    assert again is rematerialized(network.loss)
    v = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

    def product(loss):
        return jax.jit(lambda p, v: jax.jvp(jax.value_and_grad(lambda p: loss(p, batch)), (p,), (v,)))(params, v)

    for a, b in zip(jax.tree.leaves(product(network.loss)), jax.tree.leaves(product(again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [dict(product="fast"), dict(memory_budget=0)])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        channel_trace(network.loss, *network.params_and_batch(), key=KEY, num_probes=1, **options)


@pytest.mark.slow
def test_going_on_keeps_the_product_whatever_memory_is_free_then():
    problem = network.params_and_batch()
    first = channel_trace(network.loss, *problem, key=KEY, num_probes=1, product="jvp")
    second = channel_trace(network.loss, *problem, key=KEY, num_probes=3, state=first.state)
    whole = channel_trace(network.loss, *problem, key=KEY, num_probes=3, product="jvp")
    assert second.product == "jvp"
    for a, b in zip(jax.tree.leaves(second.mean), jax.tree.leaves(whole.mean), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_lowered_loss_scale_makes_a_new_linearisation():
    """From a loss scale that overflows: the stale residuals are never used, and no probe is lost or counted twice."""

    def loss(p, batch):
        return 0.5 * ((batch @ p["kernel"]).astype(jnp.float32) ** 2).sum(1).mean()

    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.integers(-2, 3, (6, 3)), jnp.float32)}
    batch = jnp.asarray(rng.integers(-2, 3, (8, 6)), jnp.float32)
    estimates = [
        channel_trace(
            loss,
            params,
            batch,
            key=KEY,
            num_probes=5,
            policy=Policy("float16", 2.0**18),
            product=product,
            probes_per_step=3,
        )
        for product in ("linearize", "jvp", "remat")
    ]
    assert estimates[0].rejected == estimates[1].rejected
    for estimate in estimates:
        assert estimate.count == 5 and estimate.rejected > 1
        np.testing.assert_array_equal(estimate.mean["kernel"], estimates[0].mean["kernel"])
