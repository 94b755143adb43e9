"""Channel products against the Hessian-vector product itself, for every way in which a kernel is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax._compat import enable_x64
from ehap_jax.curvature import Policy, hvp, is_kernel
from ehap_jax.curvature.problem import prepare
from ehap_jax.curvature.products import add_linear_products, add_products, linearize, no_products


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def conv(x, kernel, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, padding="SAME", dimension_numbers=numbers, **options)


def loss(p, batch):
    """Kernels in convolutions of all kinds, in products on either side, used twice, penalised, scanned over."""
    h = jnp.tanh(conv(batch["x"], p["conv"], window_strides=(1, 1)))
    h = jnp.tanh(conv(h, p["strided"], window_strides=(2, 2)))
    h = jnp.tanh(conv(h, p["depthwise"], window_strides=(1, 1), feature_group_count=4))
    h = jnp.tanh(conv(h, p["dilated"], window_strides=(1, 1), rhs_dilation=(2, 2)))
    h = jnp.tanh(h + conv(h, p["twice"], window_strides=(1, 1)))
    h = jnp.tanh(h + conv(h, p["twice"], window_strides=(1, 1)))
    h = h.reshape(h.shape[0], -1)
    h = jnp.tanh(jnp.einsum("oi,ni->no", p["left"], h))
    h = jnp.tanh(jnp.einsum("nhi,hio->nho", h.reshape(-1, 2, 3), p["heads"]))
    h = jnp.tanh(h.reshape(h.shape[0], -1) @ p["penalised"])
    h = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h, p["stack"])[0]
    h = h * p["scaled"]
    each = jnp.logaddexp(h.sum(1), 0) * batch["y"]
    return each.mean() + 0.1 * (p["penalised"] ** 3).sum()


PARAMS = {
    "conv": 0.5 * normal(0, 3, 3, 2, 4),
    "strided": 0.4 * normal(1, 3, 3, 4, 4),
    "depthwise": 0.6 * normal(2, 3, 3, 1, 4),
    "dilated": 0.4 * normal(3, 3, 3, 4, 3),
    "twice": 0.4 * normal(4, 1, 1, 3, 3),
    "left": 0.5 * normal(5, 6, 12),
    "heads": 0.7 * normal(6, 2, 3, 2),
    "penalised": 0.7 * normal(7, 4, 3),
    "stack": 0.8 * normal(8, 2, 3, 3),
    "scaled": 1 + 0.2 * normal(9, 1, 3),
    "bias": normal(10, 3),
}
AXES = {"left": 0, "heads": 0, "stack": 2}
BATCH = {"x": normal(11, 3, 4, 4, 2), "y": np.array([1.0, -2.0, 0.5])}
TAPPED = {"conv", "strided", "depthwise", "dilated", "twice", "left", "heads"}


@pytest.fixture(scope="module")
def problem():
    with enable_x64():
        params, batch = jax.tree.map(jnp.asarray, (PARAMS, BATCH))
        axes = {path: AXES.get(path, -1) for path in PARAMS}
        prepared = prepare(
            loss, params, batch, policy=Policy("float64"), select=is_kernel, channel_axis=axes, microbatch=None
        )
        v = {path: jnp.sign(jnp.asarray(normal(20 + i, *x.shape))) for i, (path, x) in enumerate(params.items())}
        direction = {**v, "bias": jnp.zeros_like(v["bias"])}
        Hv = hvp(loss)(params, direction, batch)
        expected = prepared.layout.channel_sums({path: v[path] * Hv[path] for path in prepared.layout.paths})
    return prepared, v, expected


@pytest.mark.slow
@pytest.mark.parametrize("loss_scale, probe_scale", [(1.0, 1.0), (64.0, 0.25)])
@pytest.mark.parametrize("linear", [False, True])
def test_products_are_those_of_the_hessian(problem, linear, loss_scale, probe_scale):
    (layout, leaves, (chunk,), _), v, expected = problem
    with enable_x64():
        weight, scales = jnp.float64(0.5), (jnp.float64(loss_scale), jnp.float64(probe_scale))
        nothing = no_products(layout, leaves)
        if linear:
            line = linearize(loss, layout, leaves, chunk, scales[0])
            found = add_linear_products(layout, line, v, weight, scales, nothing)
        else:
            found = add_products(loss, layout, leaves, v, chunk, weight, scales, nothing)
        assert not found.any_bad
        for path in layout.paths:
            np.testing.assert_allclose(
                found.channels[path], 0.5 * expected[path], rtol=1e-11, atol=1e-12, err_msg=path, strict=True
            )


@pytest.mark.slow
def test_which_kernels_need_no_weight_gradient(problem):
    (layout, leaves, (chunk,), _), _, _ = problem
    with enable_x64():
        line = jax.eval_shape(lambda *a: linearize(loss, layout, *a), leaves, chunk, jnp.float64(1))
        at, _ = line.parts()
    assert {path for site in line.taps.sites for path in site.reads} == TAPPED
    assert at.by_path.keys() == set(layout.paths) - TAPPED


def test_no_array_is_kept_twice(problem):
    """The inputs of kernels are residuals of the derivative as well."""
    (layout, leaves, (chunk,), _), _, _ = problem
    with enable_x64():
        kept = linearize(loss, layout, leaves, chunk, jnp.float64(1)).kept
    assert len(kept.arrays) < len(kept.rest.outputs)
    assert len({x.unsafe_buffer_pointer() for x in kept.arrays}) == len(kept.arrays)


@pytest.mark.parametrize("where", ["x", "kernel"])
def test_what_is_not_finite_is_found(where):
    """A kernel whose gradient overflows is named, tapped or not."""

    def overflowing(p, x):
        return (jnp.exp(x @ p["first"]).sum(-1) * (p["second"] ** 2).sum()).mean()

    params = {"first": jnp.ones((1, 2)), "second": jnp.ones((1, 2))}
    x = jnp.full((2, 1), 100.0) if where == "x" else jnp.ones((2, 1))
    params["second"] = params["second"] * (1e30 if where == "kernel" else 1)
    prepared = prepare(
        overflowing, params, x, policy=Policy(), select=is_kernel, channel_axis=-1, microbatch=None, check_loss=False
    )
    one = jnp.float32(1)
    v = jax.tree.map(jnp.ones_like, params)
    nothing = no_products(prepared.layout, prepared.leaves)
    found = add_products(overflowing, prepared.layout, prepared.leaves, v, prepared.chunks[0], one, (one, one), nothing)
    assert found.any_bad and found.gradient_bad
    assert found.leaf_bad.tolist() == [True, where == "x"]
