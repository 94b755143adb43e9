"""Ranges against NumPy; freezing; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax.quant import (
    QuantRule,
    RangeState,
    activation_grid,
    check_calibrated,
    empty_range,
    fake_quant,
    fake_quantise,
    freeze_ranges,
    observe,
    range_parameters,
    with_range_parameters,
)

BATCHES = np.random.default_rng(0).normal(0.3, 1.0, (6, 200)).astype(np.float32)


def run(rule, batches=BATCHES):
    state = empty_range()
    for batch in batches:
        state = observe(state, jnp.asarray(batch), rule)
    return state


def averaged(values, decay):
    mean = values[0]
    for value in values[1:]:
        mean = decay * mean + (1 - decay) * value
    return mean


@pytest.mark.parametrize("decay", [0.99, 0.5])
def test_moving_average_against_numpy(decay):
    state = run(QuantRule(decay=decay))
    np.testing.assert_allclose(state.low, averaged([b.min() for b in BATCHES], decay), rtol=1e-5)
    np.testing.assert_allclose(state.high, averaged([b.max() for b in BATCHES], decay), rtol=1e-5)
    assert int(state.count) == 6
    assert float(state.high) != BATCHES[0].max()


def test_percentiles_against_numpy():
    state = run(QuantRule(observer="percentile", percentile=97.0, decay=0.9))
    for end, percent in ((state.low, 3.0), (state.high, 97.0)):
        np.testing.assert_allclose(end, averaged([np.percentile(b, percent) for b in BATCHES], 0.9), rtol=1e-4)


@pytest.mark.slow
def test_mse_range_rounds_better_than_the_extremes():
    batch = BATCHES[0].copy()
    batch[0] = 20.0  # one outlier
    rule = QuantRule(observer="mse", activation_bits=4)
    state = run(rule, [batch])

    def error(low, high):
        grid = activation_grid("asymmetric", jnp.float32(low), jnp.float32(high), bits=4)
        return float(np.mean((np.asarray(fake_quantise(jnp.asarray(batch), grid)) - batch) ** 2))

    tried = [error(batch.min() * i / 40, batch.max() * i / 40) for i in range(1, 41)]
    np.testing.assert_allclose(error(state.low, state.high), min(tried), rtol=1e-5)
    assert min(tried) < 0.97 * tried[-1] and float(state.high) < 20


@pytest.mark.slow
def test_residual_branches_of_unsigned_layers_are_observed_with_their_sign():
    def function(v, x):
        y = x @ v["a"]
        return (y + jnp.square(y)) @ v["b"]

    rule = QuantRule(activations="unsigned", observer="mse")
    quantized = fake_quant(function, (rule,))
    v = {"a": -jnp.eye(3), "b": jnp.eye(3)}
    x = jnp.linspace(0.0, 1.0, 6).reshape(2, 3)
    _, qstate = quantized.apply(v, quantized.init(v, x), x, update=True)
    assert float(qstate["a:out"].low) < -0.9
    assert all(float(qstate[name].low) == 0 for name in ("a", "b"))


def test_learned_ranges_start_at_the_first_batch_and_stay():
    state = run(QuantRule(observer="learned"))
    assert (float(state.low), float(state.high)) == (BATCHES[0].min(), BATCHES[0].max())


def test_freezing_stops_updates_without_compiling_again():
    compilations = []

    @jax.jit
    def step(state, batch):
        compilations.append(None)
        return observe(state, batch, QuantRule(decay=0.5))

    moving = step(empty_range(), jnp.asarray(BATCHES[0]))
    frozen = freeze_ranges({"a": moving})["a"]
    still = step(frozen, jnp.asarray(BATCHES[1]))
    assert (float(still.low), float(still.high), int(still.count)) == (float(moving.low), float(moving.high), 1)
    thawed = step(freeze_ranges({"a": still}, frozen=False)["a"], jnp.asarray(BATCHES[1]))
    assert float(thawed.high) != float(moving.high)
    assert len(compilations) == 1


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"calibration batch of shape \(0, 3\) is empty"):
        observe(empty_range(), jnp.zeros((0, 3)), QuantRule())


def test_no_gradient_reaches_the_range():
    gradient = jax.grad(lambda x: observe(empty_range(), x, QuantRule()).high)(jnp.arange(4.0))
    assert gradient.tolist() == [0, 0, 0, 0]


def state(low, high, count=1):
    return RangeState(jnp.float32(low), jnp.float32(high), jnp.int32(count), jnp.asarray(False))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (state(0, 0, count=0), "conv2: its range has never seen data"),
        (state(np.nan, 1), "conv2: its range .* is not finite"),
        (state(0, np.inf), "conv2: its range .* is not finite"),
        (state(0, 0), "conv2: its values are always 0.0"),
        (state(2, 2), "conv2: its values are always 2.0"),
        (state(2, 1), "conv2: its range .* is upside down"),
    ],
)
def test_bad_ranges_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        check_calibrated({"conv1": state(0, 1), "conv2": bad})


def test_unsigned_values_that_are_never_positive_are_a_single_point():
    """Their grid would make every one of them 0."""
    rule = QuantRule(activations="unsigned")
    dead = run(rule, -np.abs(BATCHES))
    with pytest.raises(ValueError, match=r"conv2:out: .*never positive.*QuantRule\('conv2', skip=True\)"):
        check_calibrated({"conv2:out": dead})
    alive = run(rule, np.concatenate([-np.abs(BATCHES[:1]), BATCHES[1:]]))
    check_calibrated({"conv2": alive, "signed": run(QuantRule(), -np.abs(BATCHES))})
    assert float(alive.low) == 0 < float(alive.high)


def test_good_ranges_pass():
    check_calibrated({"conv1": state(0, 1), "conv2": state(-2, -1)})


def test_range_parameters_round_trip():
    qstate = {"a": state(-1, 1), "b": state(0, 3)}
    doubled = jax.tree.map(lambda v: 2 * v, range_parameters(qstate))
    assert jax.tree.map(float, range_parameters(with_range_parameters(qstate, doubled))) == {"a": (-2, 2), "b": (0, 6)}
    with pytest.raises(KeyError, match="another network"):
        with_range_parameters(qstate, {"a": (jnp.float32(0), jnp.float32(1))})
