"""The transform as a whole: what it computes, its gradients, and how it composes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ehap_jax import allocate, random_scores, shrink, shrink_variables, trace_graph
from ehap_jax.models import ResNet, eval_apply
from ehap_jax.quant import (
    HAWQ,
    INT4_WEIGHTS,
    INT8,
    QuantRule,
    check_calibrated,
    fake_quant,
    freeze_ranges,
    quantize_weights,
    quantized_bytes,
    range_parameters,
    with_range_parameters,
)
from tests.pruning.invariant import jit, randomise
from tests.quant.networks import CHANNELS, apply, calibrate, make_images, make_variables, run

DENSE = {"kernel": jax.random.normal(jax.random.key(0), (6, 4)), "bias": jnp.array([0.5, -1.0, 0.0, 2.0])}
DENSE_X = jax.random.normal(jax.random.key(1), (8, 6)) + 0.5


def dense(v, x):
    return x @ v["kernel"] + v["bias"][None]


@pytest.fixture(scope="module")
def calibrated():
    """The small network, quantised and calibrated: (quantized, variables, qstate, x), with negative gammas."""
    variables, x = make_variables(gamma_sign=True), make_images()
    quantized, qstate = calibrate(apply, variables, x)
    return quantized, variables, qstate, x


@jit
def integers_of_the_network(variables, qstate, x):
    return quantize_weights(apply, variables, qstate, x)


def real(layer):
    """The kernel that the integers stand for."""
    return np.asarray(layer.integers, np.float32) * np.asarray(layer.scale)


# What it computes


@pytest.mark.slow
def test_a_dense_layer_is_within_the_bound_of_its_scales():
    """|y_q − y| ≤ Σ|x|·s_w/2 + Σ|w_q|·s_x/2 + s_x·s_w/2, per output; and it is not y."""
    quantized, qstate = calibrate(dense, DENSE, DENSE_X)
    y = np.asarray(run(quantized, DENSE, qstate, DENSE_X))
    layer = quantize_weights(dense, DENSE, qstate, DENSE_X)["kernel"]
    s_w, s_x = np.asarray(layer.scale), float(layer.input_scale)
    w_q = np.abs(np.asarray(layer.integers) * s_w).sum(0)
    bound = np.abs(DENSE_X).sum(1)[:, None] * s_w / 2 + w_q * s_x / 2 + s_x * s_w / 2
    error = np.abs(y - np.asarray(dense(DENSE, DENSE_X)))
    assert np.all(error <= bound * (1 + 1e-4))
    assert error.max() > 0.02 * bound.min()


def test_a_dense_layer_is_its_integers():
    """The fake-quantised layer is exactly integer arithmetic: (x_q − z)·w_q + b_q in int64, times s_x·s_w."""
    quantized, qstate = calibrate(dense, DENSE, DENSE_X)
    y = np.asarray(run(quantized, DENSE, qstate, DENSE_X))
    layer = quantize_weights(dense, DENSE, qstate, DENSE_X)["kernel"]
    zero = int(layer.input_zero_point)
    x_q = np.clip(np.rint(np.asarray(DENSE_X) / np.asarray(layer.input_scale)) + zero, 0, 255).astype(np.int64)
    total = (x_q - zero) @ np.asarray(layer.integers, np.int64) + np.asarray(layer.bias, np.int64)
    np.testing.assert_allclose(y, total * (float(layer.input_scale) * np.asarray(layer.scale, np.float64)), atol=2e-6)
    assert layer.integers.dtype == jnp.int8 and layer.bias.dtype == jnp.int32 and 0 < zero < 255


@pytest.mark.parametrize("seed", range(5))
def test_folding_then_quantising_is_quantising_with_the_folded_range(seed):
    """BatchNorm written after the conv, and the same network folded by hand in float64, have the same integers."""
    v, x = make_variables(seed, gamma_sign=True), make_images(seed)
    by_hand = {"head": v["head"]}
    for layer, norm in (("stem", "bn0"), ("a", "bn1"), ("b", "bn2")):
        bn = {name: np.asarray(value, np.float64) for name, value in v[norm].items()}
        scale = bn["gamma"] / np.sqrt(bn["var"] + 1e-5)
        by_hand[layer] = {"kernel": jnp.asarray(np.asarray(v[layer]["kernel"]) * scale, jnp.float32)}
        shift = jnp.asarray(bn["beta"] - bn["mean"] * scale, jnp.float32)
        one = jnp.ones(CHANNELS)  # what is left of the normalisation is the shift
        by_hand[norm] = {"gamma": one, "beta": shift, "mean": 0 * one, "var": one - 1e-5}
    (quantized, qstate), (_, by_hand_qstate) = calibrate(apply, v, x), calibrate(apply, by_hand, x)
    for name, (low, high) in range_parameters(qstate).items():
        np.testing.assert_allclose(by_hand_qstate[name][:2], (low, high), rtol=1e-5, err_msg=name)
    first, second = (integers_of_the_network(variables, qstate, x) for variables in (v, by_hand))
    for name, layer in first.items():
        np.testing.assert_allclose(layer.scale, second[name].scale, rtol=1e-5)
        np.testing.assert_array_equal(layer.integers, second[name].integers, err_msg=name)
    y, by_hand_y = (run(quantized, variables, qstate, x) for variables in (v, by_hand))
    np.testing.assert_allclose(y, by_hand_y, atol=1e-5 * float(jnp.abs(y).max()))


def test_the_small_network_stays_close(calibrated):
    quantized, variables, qstate, x = calibrated
    check_calibrated(qstate)
    y, want = run(quantized, variables, qstate, x), apply(variables, x)
    assert 0 < float(jnp.abs(y - want).max()) < 0.03 * float(jnp.abs(want).max())


def test_one_range_per_layer_named_after_its_kernel(calibrated):
    _, _, qstate, x = calibrated
    assert set(qstate) == {"stem/kernel", "a/kernel", "b/kernel", "b/kernel:out", "head/kernel", "head/kernel:pool"}
    assert float(qstate["stem/kernel"].low) == float(x.min()) < 0 == float(qstate["a/kernel"].low)


def test_layers_that_read_the_same_value_share_its_range():
    variables = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 4))}
    _, qstate = calibrate(lambda v, x: (x @ v["a"], x @ v["b"]), variables, jnp.ones((2, 3)))
    assert list(qstate) == ["a"]
    mixed = fake_quant(lambda v, x: (x @ v["a"], x @ v["b"]), (QuantRule("a", activation_bits=4), QuantRule("b")))
    assert list(mixed.init(variables, jnp.ones((2, 3)))) == ["a", "b"]


def test_layers_that_observe_differently_do_not_share_a_range():
    rules = (QuantRule("a", observer="percentile", percentile=90.0), QuantRule("b"))
    variables = {"a": DENSE["kernel"], "b": DENSE["kernel"]}
    _, qstate = calibrate(lambda v, x: (x @ v["a"], x @ v["b"]), variables, DENSE_X, rules)
    assert float(qstate["a"].high) < float(qstate["b"].high) == float(DENSE_X.max())


def test_a_kernel_made_of_equal_variables_has_a_stable_name():
    """Of a kernel and its mask the first in the alphabet, whatever the order of a set is in this process."""
    names = [f"{letter}{i}" for i in range(4) for letter in "zyx"]
    for name in names:
        variables = {name: DENSE["kernel"], "a": jnp.ones_like(DENSE["kernel"])}
        quantized = fake_quant(lambda v, x, name=name: x @ (v[name] * v["a"]))
        assert list(quantized.init(variables, DENSE_X)) == ["a"]


def test_integer_products_are_left_alone():
    variables = {"kernel": DENSE["kernel"], "table": jnp.ones((6, 4), jnp.int32)}

    def function(v, x):
        return dense({**v, "bias": DENSE["bias"]}, x), x.astype(jnp.int32) @ v["table"]

    quantized, qstate = calibrate(function, variables, DENSE_X)
    assert list(qstate) == ["kernel"]
    got, want = run(quantized, variables, qstate, DENSE_X)[1], function(variables, DENSE_X)[1]
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_grouped_and_depthwise_convolutions_have_a_scale_per_output_channel():
    x = jax.random.normal(jax.random.key(2), (2, 4, 4, 4))
    gamma = jnp.array([1.0, -2.0, 0.5, 3.0])

    def function(v, x):
        y = jax.lax.conv_general_dilated(
            x, v["kernel"], (1, 1), "SAME", feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y * v["gamma"].reshape(1, 1, 1, 4) + 1.0

    for groups in (2, 4):
        variables = {"kernel": jax.random.normal(jax.random.key(3), (3, 3, 4 // groups, 4)), "gamma": gamma}
        quantized, qstate = calibrate(function, variables, x)
        layer = quantize_weights(function, variables, qstate, x)["kernel"]
        want = np.asarray(variables["kernel"] * gamma.reshape(1, 1, 1, 4))
        assert layer.scale.shape == (1, 1, 1, 4)
        assert np.all(np.abs(real(layer) - want) <= np.asarray(layer.scale) * 0.5001)
        y, exact = run(quantized, variables, qstate, x), function(variables, x)
        assert float(jnp.abs(y - exact).max()) < 0.02 * float(jnp.abs(exact).max())


def test_a_tail_that_is_read_elsewhere_is_not_folded():
    def function(v, x):
        z = x @ v["kernel"]
        return z, z * 2.0 + v["bias"][None]

    quantized, qstate = calibrate(function, DENSE, DENSE_X)
    z, y = run(quantized, DENSE, qstate, DENSE_X)
    np.testing.assert_allclose(y, z * 2.0 + DENSE["bias"][None], atol=1e-6)
    assert quantize_weights(function, DENSE, qstate, DENSE_X)["kernel"].bias is None


def test_a_kernel_used_twice_has_a_range_per_use():
    variables, x = {"w": jnp.eye(3) * 2}, jnp.arange(6.0).reshape(2, 3)
    _, qstate = calibrate(lambda v, x: (x @ v["w"]) @ v["w"], variables, x)
    assert {name: float(state.high) for name, state in qstate.items()} == {"w": 5.0, "w#2": 10.0}


@pytest.mark.parametrize("tiny", [0.0, 1e-12, 1e-38])
def test_dead_channels_keep_their_bias(tiny):
    """A channel whose weights are (almost) zero outputs its bias, which int32 at s_x·s_w alone could not hold."""
    variables = {"kernel": DENSE["kernel"].at[:, 1].set(tiny), "bias": DENSE["bias"]}
    quantized, qstate = calibrate(dense, variables, DENSE_X)
    y = run(quantized, variables, qstate, DENSE_X)
    np.testing.assert_allclose(y[:, 1], -1.0, rtol=1e-5)
    layer = quantize_weights(dense, variables, qstate, DENSE_X)["kernel"]
    assert np.all(np.isfinite(layer.scale)) and np.all(np.asarray(layer.scale) > 0)
    assert abs(int(layer.bias[1])) <= 2**30
    gradient = jax.grad(lambda v: quantized.apply(v, qstate, DENSE_X, update=False)[0].sum())(variables)
    np.testing.assert_allclose(gradient["bias"], 8.0)
    assert np.all(np.isfinite(gradient["kernel"]))


@pytest.mark.slow
def test_bits_matter(calibrated):
    _, variables, _, x = calibrated
    want = apply(variables, x)

    def error(rules):
        quantized, qstate = calibrate(apply, variables, x, rules)
        return float(jnp.linalg.norm(run(quantized, variables, qstate, x) - want))

    assert 3 * error(INT8) < error(INT4_WEIGHTS)


def test_one_scale_per_kernel_is_too_coarse_for_small_channels():
    """A channel of a hundredth of the others' size: rounded to 0 with their scale, as good as they are with its own."""
    v = {**DENSE, "kernel": DENSE["kernel"] * jnp.array([[1.0, 0.01, 1.0, 1.0]]), "bias": jnp.zeros(4)}
    want = dense(v, DENSE_X)
    error = {}
    for per_channel in (True, False):
        quantized, qstate = calibrate(dense, v, DENSE_X, (QuantRule(weight_bits=4, per_channel=per_channel),))
        y = run(quantized, v, qstate, DENSE_X)
        error[per_channel] = jnp.linalg.norm(y - want, axis=0) / jnp.linalg.norm(want, axis=0)
    assert float(error[False][1]) == 1
    assert float(error[True].max()) < 0.15


def test_integers_lie_on_the_grid_and_reproduce_the_layer(calibrated):
    quantized, variables, qstate, x = calibrated
    layers = integers_of_the_network(variables, qstate, x)
    assert layers.keys() == qstate.keys() - {"b/kernel:out", "head/kernel:pool"}
    for layer in layers.values():
        largest = np.abs(np.asarray(layer.integers, int)).max(tuple(range(layer.integers.ndim - 1)))
        np.testing.assert_array_equal(largest, 127)  # narrow: every channel reaches ±127, none −128
    rounded = {k: (v | {"kernel": None} if k in ("stem", "a", "b", "head") else v) for k, v in variables.items()}
    for name, norm in (("stem", "bn0"), ("a", "bn1"), ("b", "bn2"), ("head", None)):
        layer = layers[f"{name}/kernel"]
        kernel = jnp.asarray(real(layer))
        if norm is not None:
            bn = variables[norm]
            kernel = kernel / (bn["gamma"] * jax.lax.rsqrt(bn["var"] + 1e-5)).reshape(1, 1, 1, -1)
        rounded[name]["kernel"] = kernel
    again = run(quantized, rounded, qstate, x)
    np.testing.assert_allclose(again, run(quantized, variables, qstate, x), atol=0.02)


# Gradients


@pytest.mark.slow
def test_gradients_match_the_float_network(calibrated):
    """Straight through: every parameter's gradient points where the float network's does."""
    quantized, variables, qstate, x = calibrated

    def loss(function, v):
        return jnp.sum(jnp.sin(function(v)))

    got = jit(jax.grad(lambda v: loss(lambda v: quantized.apply(v, qstate, x, update=False)[0], v)))(variables)
    want = jit(jax.grad(lambda v: loss(lambda v: apply(v, x), v)))(variables)
    flat = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: cosine(a, b), got, want))
    assert min(value for _, value in flat) > 0.98, flat


def cosine(a, b):
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_gradient_of_a_layer_is_analytic_with_asymmetric_activations_and_zero_where_clipped():
    """d/dx of Σ sin(y) is (cos(y)·wᵀ_q) where x is representable and exactly 0 elsewhere; d/dw is x_qᵀ·cos(y)."""
    quantized, qstate = calibrate(dense, DENSE, DENSE_X)
    narrow = {"kernel": qstate["kernel"]._replace(low=jnp.float32(-0.6), high=jnp.float32(1.1))}
    layer = quantize_weights(dense, DENSE, narrow, DENSE_X)["kernel"]

    def loss(v, x):
        return jnp.sum(jnp.sin(quantized.apply(v, narrow, x, update=False)[0]))

    got_w, got_x = jit(jax.grad(loss, argnums=(0, 1)))(DENSE, DENSE_X)
    scale, zero = float(layer.input_scale), int(layer.input_zero_point)
    q = np.rint(np.asarray(DENSE_X) / scale) + zero
    x_q = (np.clip(q, 0, 255) - zero) * scale
    w_q = real(layer)
    slope = np.cos(x_q @ w_q + np.asarray(layer.bias) * scale * np.asarray(layer.scale)[0])
    inside = (q >= 0) & (q <= 255)
    want_x = np.where(inside, slope @ w_q.T, 0)
    assert 5 < (~inside).sum() < 43 and (~inside & (np.asarray(DENSE_X) < 0)).any()
    np.testing.assert_array_equal(np.asarray(got_x)[~inside], 0.0)
    assert cosine(got_x, want_x) > 0.999
    assert cosine(got_w["kernel"], x_q.T @ slope) > 0.999
    assert cosine(got_w["bias"], slope.sum(0)) > 0.999


def test_learned_ranges_get_gradients_and_training_them_helps():
    rules = (QuantRule(activation_bits=3, observer="learned"),)
    x = DENSE_X.at[0, 0].set(9.0)  # an outlier that a 3-bit range had better clip
    quantized, qstate = calibrate(dense, DENSE, x, rules)
    want = dense(DENSE, DENSE_X)

    @jax.jit
    def loss(ranges):
        y = quantized.apply(DENSE, with_range_parameters(qstate, ranges), DENSE_X, update=False)[0]
        return jnp.mean((y - want) ** 2)

    ranges = range_parameters(qstate)
    before = float(loss(ranges))
    slope = jax.jit(jax.grad(loss))
    for i in range(100):
        ranges = jax.tree.map(lambda r, g: r - 3 / (1 + i / 20) * g, ranges, slope(ranges))  # noqa: B023
    assert float(loss(ranges)) < 0.65 * before


# Composition


@pytest.mark.slow
def test_jit_vmap_and_grad_compose(calibrated):
    quantized, variables, qstate, x = calibrated
    call = partial(quantized.apply, update=False)
    want = call(variables, qstate, x)[0]
    np.testing.assert_allclose(jit(call)(variables, qstate, x)[0], want, atol=1e-5)
    one_by_one = jit(jax.vmap(lambda one: call(variables, qstate, one[None])[0][0]))
    np.testing.assert_allclose(one_by_one(x), want, atol=1e-5)
    per_example = jit(jax.vmap(jax.grad(lambda one: call(variables, qstate, one[None])[0].sum())))(x)
    whole = jit(jax.grad(lambda x: call(variables, qstate, x)[0].sum()))(x)
    np.testing.assert_allclose(per_example, whole, atol=1e-4)


def test_updating_observes_before_rounding_and_freezing_never_recompiles():
    traces = []

    def counted(v, x):
        traces.append(None)
        return dense(v, x)

    quantized = fake_quant(counted, (QuantRule(decay=0.5),))
    step = jax.jit(partial(quantized.apply, update=True))
    qstate = quantized.init(DENSE, DENSE_X)
    y, first = step(DENSE, qstate, DENSE_X)
    np.testing.assert_allclose(y, dense(DENSE, DENSE_X), atol=0.1)  # the first batch already has its own range
    count = len(traces)
    frozen = step(DENSE, freeze_ranges(first), 3 * DENSE_X)[1]
    moved = step(DENSE, first, 3 * DENSE_X)[1]
    assert len(traces) == count
    assert float(frozen["kernel"].high) == float(first["kernel"].high)
    np.testing.assert_allclose(float(moved["kernel"].high), 2 * float(DENSE_X.max()), rtol=1e-5)


@pytest.mark.slow
def test_the_models_of_the_library_are_folded_whole():
    """ResNet-8 with both kinds of shortcut: every BatchNorm disappears, and the result stays close."""
    model = ResNet(8, 10, shortcut="B", widths=(4, 6, 8))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    variables = randomise(jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes))
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 3))
    function = eval_apply(model)
    quantized = fake_quant(function)
    y, qstate = jit(partial(quantized.apply, update=True))(variables, quantized.init(variables, x), x)
    want = jit(function)(variables, x)
    assert float(jnp.abs(y - want).max()) < 0.05 * float(jnp.abs(want).max())
    check_calibrated(qstate)
    kernels = [p for p in jax.tree.leaves(variables["params"]) if p.ndim > 1]
    biases = sum(k.shape[-1] for k in kernels)
    # Two 1x1 shortcuts read what the first 3x3 conv of their block reads.
    assert len(kernels) == 10 and len(qstate) == 8 + 5 + 1
    assert quantized_bytes(function, variables, x) == sum(k.size for k in kernels) + 8 * biases + 5 * 14


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["group", "union"])
def test_shrunk_networks_are_quantised_too(coupling):
    """Every layer of the smaller network keeps its fold, and the masked network's range at the input of each."""
    variables, x = make_variables(gamma_sign=True), make_images()
    graph = trace_graph(apply)(variables, x)
    plan = allocate(graph, random_scores(graph, key=jax.random.key(3)), channels=0.6, coupling=coupling)
    small, function = shrink_variables(variables, plan), shrink(apply, plan)
    quantized, qstate = calibrate(function, small, x)
    check_calibrated(qstate)
    assert {name.split(":")[0] for name in qstate} == {"stem/kernel", "a/kernel", "b/kernel", "head/kernel"}
    layers = jit(partial(quantize_weights, function))(small, qstate, x)
    assert {name: layer.integers.shape for name, layer in layers.items()} == {
        f"{name}/kernel": small[name]["kernel"].shape for name in ("stem", "a", "b", "head")
    }
    assert small["a"]["kernel"].shape != variables["a"]["kernel"].shape
    assert all(layer.bias is not None for layer in layers.values())
    y, want = run(quantized, small, qstate, x), jit(function)(small, x)
    assert float(jnp.abs(y - want).max()) < 0.04 * float(jnp.abs(want).max())


def test_equinox_style_single_examples_under_vmap_are_folded():
    """weight @ x + bias on one example, vmapped inside the function."""
    variables = {"weight": DENSE["kernel"].T, "bias": DENSE["bias"]}

    def single(v, x):
        return jax.vmap(lambda one: v["weight"] @ one + v["bias"])(x)

    quantized, qstate = calibrate(single, variables, DENSE_X)
    reference, reference_state = calibrate(dense, DENSE, DENSE_X)
    got = run(quantized, variables, qstate, DENSE_X)
    np.testing.assert_allclose(got, run(reference, DENSE, reference_state, DENSE_X), atol=1e-5)
    layer = quantize_weights(single, variables, qstate, DENSE_X)["weight"]
    assert layer.scale.shape == (4, 1) and layer.bias is not None


def test_rematerialised_and_bfloat16_networks(calibrated):
    plain, variables, qstate, x = calibrated
    remat = fake_quant(jax.checkpoint(apply))
    np.testing.assert_allclose(run(remat, variables, qstate, x), run(plain, variables, qstate, x), atol=1e-5)

    def low(v, x):
        y = x.astype(jnp.bfloat16) @ v["kernel"].astype(jnp.bfloat16)
        return y.astype(jnp.float32) * 2.0 + v["bias"][None]

    quantized, qstate = calibrate(low, DENSE, DENSE_X)
    y = run(quantized, DENSE, qstate, DENSE_X)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, low(DENSE, DENSE_X), atol=0.15)
    assert quantize_weights(low, DENSE, qstate, DENSE_X)["kernel"].bias is not None


# Residual sums


@pytest.mark.slow
def test_residual_branches_have_their_own_scales(calibrated):
    quantized, variables, qstate, x = calibrated
    # The shortcut is the value that conv a reads, so it has that range; the other branch has one of its own.
    assert float(qstate["b/kernel:out"].low) < 0 == float(qstate["a/kernel"].low)
    y = run(quantized, variables, qstate, x)
    plain, plain_state = calibrate(apply, variables, x, (QuantRule(residual_bits=None),))
    assert plain_state.keys() == qstate.keys() - {"b/kernel:out"}
    assert float(jnp.abs(y - run(plain, variables, plain_state, x)).max()) > 0
    coarse, coarse_state = calibrate(apply, variables, x, (QuantRule(residual_bits=3),))
    assert coarse_state.keys() == qstate.keys() | {"stem/kernel:out"}  # 3 bits there, 8 where conv a reads it
    want = apply(variables, x)
    assert jnp.linalg.norm(run(coarse, variables, coarse_state, x) - want) > 3 * jnp.linalg.norm(y - want)


def test_hawq_preset_keeps_sixteen_bits_on_residual_sums(calibrated):
    _, variables, _, x = calibrated
    quantized, qstate = calibrate(
        apply, variables, x, (QuantRule("stem/*", activations="symmetric", residual_bits=16), *HAWQ)
    )
    assert qstate.keys() == {
        "stem/kernel",
        "a/kernel",
        "b/kernel",
        "head/kernel",
        "stem/kernel:out",
        "b/kernel:out",
        "head/kernel:pool",
    }
    y = run(quantized, variables, qstate, x)
    assert float(jnp.abs(y - apply(variables, x)).max()) < 0.03 * float(jnp.abs(y).max())


# What is refused


def test_ranges_that_saw_nothing_are_an_error_and_never_a_scale():
    quantized = fake_quant(dense)
    qstate = quantized.init(DENSE, DENSE_X)
    with pytest.raises(ValueError, match=r"kernel.*has never seen data"):
        quantized.apply(DENSE, qstate, DENSE_X, update=False)
    assert np.all(np.isnan(jax.jit(partial(quantized.apply, update=False))(DENSE, qstate, DENSE_X)[0]))


def test_nan_is_seen_and_has_no_integers():
    quantized, qstate = calibrate(dense, DENSE, DENSE_X.at[0, 0].set(jnp.nan))
    assert np.all(np.isnan(run(quantized, DENSE, qstate, DENSE_X)))
    with pytest.raises(ValueError, match="kernel: its input range is not finite"):
        quantize_weights(dense, DENSE, qstate, DENSE_X)
    _, qstate = calibrate(dense, DENSE, DENSE_X)
    broken = {**DENSE, "kernel": DENSE["kernel"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="kernel: its folded kernel is not finite"):
        quantize_weights(dense, broken, qstate, DENSE_X)


def test_a_qstate_of_another_network_is_named(calibrated):
    _, _, qstate, _ = calibrated
    with pytest.raises(KeyError, match="missing \\['kernel'\\], unexpected \\['a/kernel'"):
        fake_quant(dense).apply(DENSE, qstate, DENSE_X, update=False)


def test_a_rule_that_matches_no_layer_lists_the_kernels():
    with pytest.raises(ValueError, match="'conv' matches no kernel; the kernels are: kernel"):
        fake_quant(dense, (QuantRule("conv"),)).init(DENSE, DENSE_X)


def test_layers_in_loops_and_custom_rules_are_refused_unless_skipped():
    def looped(v, x):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ v["loop"]), None), x @ v["kernel"], length=2)[0]

    @jax.custom_vjp
    def odd(w, x):
        return x @ w

    odd.defvjp(lambda w, x: (odd(w, x), (w, x)), lambda saved, ct: (saved[1].T @ ct, ct @ saved[0].T))
    variables = {"kernel": jnp.ones((6, 4)), "loop": jnp.ones((4, 4))}
    for function, word in ((looped, "scan"), (lambda v, x: odd(v["loop"], x @ v["kernel"]), "custom_vjp_call")):
        with pytest.raises(
            NotImplementedError,
            match=rf"loop cannot be quantised: it is .*inside a {word}.*QuantRule\('loop', skip=True\)",
        ):
            fake_quant(function).init(variables, DENSE_X)
        rules = (QuantRule("loop", skip=True), *INT8)
        quantized, qstate = calibrate(function, variables, DENSE_X, rules)
        assert list(qstate) == ["kernel"]
        y = run(quantized, variables, qstate, DENSE_X)
        np.testing.assert_allclose(y, function(variables, DENSE_X), atol=0.1)


def test_constant_activations_are_reported_outside_jit():
    _, qstate = calibrate(dense, DENSE, jnp.zeros((2, 6)))
    with pytest.raises(ValueError, match=r"kernel: its values are always 0.0.*QuantRule"):
        check_calibrated(qstate)


# Size


def test_bytes_count_what_is_stored():
    """int8 kernel 24, four float32 scales, four int32 biases, one float32 scale and one zero point byte."""
    assert quantized_bytes(dense, DENSE, DENSE_X) == 24 + 16 + 16 + 5
    assert quantized_bytes(dense, DENSE, DENSE_X, INT4_WEIGHTS) == 12 + 16 + 16 + 5
    assert quantized_bytes(dense, DENSE, DENSE_X, (QuantRule(per_channel=False),)) == 24 + 4 + 16 + 5
    assert quantized_bytes(dense, DENSE, DENSE_X, (QuantRule(skip=True),)) == 4 * (24 + 4)
    assert quantized_bytes(lambda v, x: x @ v["kernel"], {"kernel": DENSE["kernel"]}, DENSE_X) == 24 + 16 + 5


def test_bytes_keep_what_is_also_read_elsewhere():
    def tied(v, x):
        return jnp.concatenate([dense(v, x), jnp.broadcast_to(v["bias"][None], (8, 4))], axis=1)

    assert quantized_bytes(tied, DENSE, DENSE_X) == 24 + 16 + 16 + 5 + 4 * 4
    assert quantized_bytes(dense, {**DENSE, "unused": jnp.ones(3)}, DENSE_X) == 24 + 16 + 16 + 5 + 12
