"""The choice between linearising once and differentiating anew, and what linearising keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.curvature import Policy, channel_trace, is_kernel
from ehap_jax.curvature.memory import choose_method, free_memory, residual_bytes
from ehap_jax.curvature.problem import prepare
from ehap_jax.curvature.products import linearize
from tests.curvature import network

KEY = jax.random.key(2)


def prepared(policy=Policy(), microbatch=None):  # noqa: B008 (frozen)
    return prepare(
        network.loss,
        *network.params_and_batch(),
        policy=policy,
        select=is_kernel,
        channel_axis=-1,
        microbatch=microbatch,
    )


def test_residuals_are_counted_without_running_anything():
    problem = prepared()
    total, largest = residual_bytes(network.loss, problem)
    kept = linearize(network.loss, problem.layout, problem.leaves, problem.chunks[0], jnp.float32(1))
    assert total == largest == sum(x.nbytes for x in kept.arrays)
    chunked_total, chunked_largest = residual_bytes(network.loss, prepared(microbatch=2))
    assert chunked_largest < largest < 1.2 * chunked_total < 2 * total


def test_the_budget_decides_and_an_explicit_method_overrides():
    problem = prepared()
    total, largest = residual_bytes(network.loss, problem)
    assert choose_method("auto", total + largest, network.loss, problem) == "linearize"
    assert choose_method("auto", total + largest - 1, network.loss, problem) == "jvp"
    assert choose_method("linearize", 1, network.loss, problem) == "linearize"
    assert choose_method("jvp", 10**15, network.loss, problem) == "jvp"
    assert 0 < free_memory(jax.devices()[0]) < 2**50


@pytest.mark.parametrize("options", [dict(method="fast"), dict(memory_budget=0)])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        channel_trace(network.loss, *network.params_and_batch(), key=KEY, num_probes=1, **options)


def test_going_on_keeps_the_method_whatever_memory_is_free_then():
    problem = network.params_and_batch()
    first = channel_trace(network.loss, *problem, key=KEY, num_probes=1, memory_budget=1)
    assert not bool(first.state.linear)
    second = channel_trace(network.loss, *problem, key=KEY, num_probes=3, state=first.state)
    whole = channel_trace(network.loss, *problem, key=KEY, num_probes=3, method="jvp")
    for a, b in zip(jax.tree.leaves(second.mean), jax.tree.leaves(whole.mean), strict=True):
        np.testing.assert_array_equal(a, b)


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
            method=method,
            probes_per_step=3,
        )
        for method in ("linearize", "jvp")
    ]
    for estimate in estimates:
        assert estimate.count == 5 and estimate.rejected > 1
    assert estimates[0].rejected == estimates[1].rejected
    np.testing.assert_array_equal(estimates[0].mean["kernel"], estimates[1].mean["kernel"])
