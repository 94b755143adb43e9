"""Grids, rounding and straight-through gradients against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehap_jax.quant import activation_grid, asymmetric_grid, dequantise, fake_quantise, quantise, symmetric_grid
from ehap_jax.quant.numerics import Grid

ends = st.floats(-1e3, 1e3, width=32)


def unit_grid(low=-127, high=127, zero_point=0.0):
    return Grid(jnp.float32(1.0), jnp.float32(zero_point), low, high)


def test_rounds_half_to_even():
    x = jnp.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantise(x, unit_grid()).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.slow
def test_weights_use_the_narrow_range_per_output_channel():
    w = jax.random.normal(jax.random.key(0), (3, 3, 5, 7))
    grid = symmetric_grid(w, axis=-1)
    q = np.asarray(quantise(w, grid))
    assert grid.scale.shape == (1, 1, 1, 7)
    np.testing.assert_array_equal(np.abs(q).max((0, 1, 2)), 127)
    np.testing.assert_allclose(grid.scale.ravel(), np.abs(w).max((0, 1, 2)) / 127, rtol=1e-6)
    assert np.abs(dequantise(jnp.asarray(q), grid) - w).max() <= 0.5 * float(grid.scale.max()) * (1 + 1e-5)


def test_one_scale_for_the_tensor_and_four_bits():
    w = jax.random.normal(jax.random.key(0), (5, 7))
    grid = symmetric_grid(w, bits=4)
    assert grid.scale.shape == (1, 1)
    assert float(jnp.abs(quantise(w, grid)).max()) == 7


@pytest.mark.parametrize("tiny", [0.0, 1e-40, 1e-37])
def test_a_dead_weight_channel_has_a_usable_scale(tiny):
    w = jnp.ones((4, 2)).at[:, 1].set(tiny)
    grid = symmetric_grid(w, axis=1)
    back = dequantise(quantise(w, grid), grid)
    assert np.all(np.asarray(grid.scale) > 0)
    np.testing.assert_allclose(back, w, atol=1e-36)


@pytest.mark.slow
@given(ends, ends)
@settings(max_examples=60, deadline=None)
def test_zero_is_exact_and_zero_points_are_integers(a, b):
    """For any range, signed, one-sided, reversed or empty, 0.0 survives and the range is covered to half a step."""
    low, high = min(a, b), max(a, b)
    grid = asymmetric_grid(jnp.float32(low), jnp.float32(high))
    zero = float(grid.zero_point)
    assert zero == round(zero) and 0 <= zero <= 255
    assert float(fake_quantise(jnp.float32(0.0), grid)) == 0.0
    wide = jnp.asarray([min(low, 0.0), max(high, 0.0)], jnp.float32)
    error = np.abs(np.asarray(fake_quantise(wide, grid) - wide))
    # Rounding the zero point moves both ends by at most half a step; a value there is half a step off at most.
    assert error.max() <= float(grid.scale) * 0.501 or high == low == 0


@pytest.mark.parametrize("seed", range(4))
def test_folding_a_scale_of_either_sign_leaves_the_narrow_integers(seed):
    """quantise(w·γ) is sign(γ)·quantise(w): folding first changes the scale alone, as the narrow grid is symmetric."""
    w = jax.random.normal(jax.random.key(seed), (3, 3, 4, 16))
    gamma = jax.random.normal(jax.random.key(seed + 100), (1, 1, 1, 16))
    assert float(gamma.min()) < 0 < float(gamma.max())
    before, after = symmetric_grid(w, axis=-1), symmetric_grid(w * gamma, axis=-1)
    np.testing.assert_array_equal(quantise(w * gamma, after), jnp.sign(gamma) * quantise(w, before))
    np.testing.assert_allclose(fake_quantise(w * gamma, after), gamma * fake_quantise(w, before), rtol=1e-5)


def test_signed_activations_against_numpy():
    x = np.random.default_rng(0).normal(-0.7, 1.0, 4096).astype(np.float32)
    low, high = x.min(), x.max()
    scale = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / scale), 0, 255)
    want = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    grid = asymmetric_grid(jnp.asarray(low), jnp.asarray(high))
    assert float(grid.zero_point) == zero and 0 < zero < 255
    np.testing.assert_array_equal(fake_quantise(jnp.asarray(x), grid), want)


def test_a_purely_negative_range_has_the_top_zero_point():
    grid = asymmetric_grid(jnp.float32(-5.1), jnp.float32(-2.0))
    assert float(grid.zero_point) == 255
    np.testing.assert_allclose(float(grid.scale), 5.1 / 255, rtol=1e-6)


def test_the_kinds_of_activation_grids():
    low, high = jnp.float32(-1.0), jnp.float32(3.0)
    unsigned, signed = (activation_grid(kind, low, high) for kind in ("unsigned", "symmetric"))
    x = jnp.array([-1.0, 3.0])
    assert quantise(x, unsigned).tolist() == [0, 255] and float(unsigned.zero_point) == 0
    assert quantise(x, signed).tolist() == [-42, 127] and float(signed.zero_point) == 0


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "unsigned"])
def test_straight_through_gradient_is_the_analytic_one(kind):
    """The contract: the gradient of f(fake(x)) is f'(fake(x)) inside the representable range and exactly 0 outside."""
    x = jax.random.normal(jax.random.key(0), (512,)) - 0.4
    grid = activation_grid(kind, jnp.float32(-1.5), jnp.float32(0.9))
    got = jax.grad(lambda x: jnp.sum(jnp.sin(3 * fake_quantise(x, grid))))(x)
    smallest, largest = (dequantise(jnp.float32(q), grid) for q in (grid.low, grid.high))
    half = 0.5 * grid.scale
    inside = np.asarray((x >= smallest - half) & (x <= largest + half))
    want = np.where(inside, 3 * np.cos(3 * np.asarray(x)), 0.0)
    cosine = float(got @ want / np.linalg.norm(got) / np.linalg.norm(want))
    assert cosine > 0.999
    assert 0 < (~inside).sum() < 400
    np.testing.assert_array_equal(np.asarray(got)[~inside], 0.0)
    assert np.all(np.asarray(got)[inside] == np.asarray(3 * jnp.cos(3 * fake_quantise(x, grid)))[inside])


@pytest.mark.slow
def test_forward_and_reverse_mode_agree():
    x = jax.random.normal(jax.random.key(0), (64,))
    grid = asymmetric_grid(jnp.float32(-1.0), jnp.float32(1.0))
    forward = jax.jvp(lambda x: fake_quantise(x, grid), (x,), (jnp.ones_like(x),))[1]
    np.testing.assert_array_equal(forward, jax.grad(lambda x: fake_quantise(x, grid).sum())(x))
    assert set(forward.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("which", ["low", "high"])
@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "unsigned"])
def test_learned_ranges_against_finite_differences(kind, which):
    """Straight through means: differentiate with every rounding's error held fixed. That function has differences."""
    x = jax.random.normal(jax.random.key(0), (256,)) - 0.4
    weights = jax.random.normal(jax.random.key(1), (256,))
    ends = {"low": jnp.float32(-1.5), "high": jnp.float32(0.9)}

    def loss(**changed):
        grid = activation_grid(kind, **(ends | changed), learned=True)
        return weights @ fake_quantise(x, grid, learned=True)

    got = float(jax.grad(lambda v: loss(**{which: v}))(ends[which]))
    want = frozen_rounding_difference(kind, np.asarray(x, float), np.asarray(weights, float), -1.5, 0.9, which)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    if (kind, which) != ("unsigned", "low") and (kind, which) != ("symmetric", "high"):
        assert abs(want) > 0.01


def frozen_rounding_difference(kind, x, weights, low, high, which, step=1e-6):
    """Central difference in float64 NumPy of the same formula with rounding errors and clipping decisions frozen."""

    def grid(low, high):
        if kind == "asymmetric":
            return (high - low) / 255, -low * 255 / (high - low), 0, 255
        if kind == "unsigned":
            return high / 255, 0.0, 0, 255
        return max(abs(low), abs(high)) / 127, 0.0, -127, 127

    scale, exact, smallest, largest = grid(low, high)
    zero_error = np.rint(exact) - exact
    steps = x / scale
    error = np.rint(steps) - steps
    q = np.rint(steps) + np.rint(exact)

    def loss(low, high):
        scale, exact, *_ = grid(low, high)
        inside = (x / scale + error) * scale
        under, over = ((end - (exact + zero_error)) * scale for end in (smallest, largest))
        return float(weights @ np.where(q < smallest, under, np.where(q > largest, over, inside)))

    shift = (step, 0.0) if which == "low" else (0.0, step)
    return (loss(low + shift[0], high + shift[1]) - loss(low - shift[0], high - shift[1])) / (2 * step)


def test_half_precision_is_rounded_in_float32():
    x = jnp.linspace(-1, 1, 401).astype(jnp.bfloat16)
    grid = asymmetric_grid(jnp.float32(-1.0), jnp.float32(1.0))
    assert fake_quantise(x, grid).dtype == jnp.bfloat16
    np.testing.assert_array_equal(quantise(x, grid), quantise(x.astype(jnp.float32), grid))
