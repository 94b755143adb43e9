"""The integer network: against integer arithmetic in NumPy, its certificates, and what it refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ehap_jax.quant import HAWQ, INT8, QuantRule, fake_quant, quantize_weights, rounded_activations, to_integer
from ehap_jax.quant import integer_arithmetic as arithmetic
from ehap_jax.quant.program import IntegerGrid, Integers, LayerStep, Target
from tests.pruning.invariant import jit
from tests.quant.networks import apply, calibrate, in_16_bits, make_images, make_variables, run


def dense(v, x):
    return x @ v["kernel"] + v["bias"][None]


DENSE = {"kernel": jax.random.normal(jax.random.key(0), (6, 4)), "bias": jnp.array([0.5, -1.0, 0.0, 2.0])}
DENSE_X = jax.random.normal(jax.random.key(1), (8, 6)) + 0.5


@jit
def everything(network, x):
    return network(x), network.tensors(x)


@pytest.fixture(scope="module")
def small():
    """(integer network, float variables, ranges, x, fake-quantised logits) of the small network."""
    variables, x = make_variables(gamma_sign=True), make_images()
    quantized, qstate = calibrate(apply, variables, x)
    network = to_integer(quantized, variables, qstate, example=x)
    return network, variables, qstate, x, run(quantized, variables, qstate, x)


# An implementation in NumPy that shares nothing but the weights


def numpy_conv(x, kernel):
    """int64, SAME padding of centred integers, 3×3, stride 1."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(
        np.einsum("nhwc,co->nhwo", padded[:, i : i + height, j : j + width], kernel[i, j].astype(np.int64))
        for i in range(3)
        for j in range(3)
    )


def numpy_requantise(total, multiplier, grid, relu=False):
    steps = np.rint(total.astype(np.float32) * multiplier)
    return np.clip(steps + grid.zero, grid.zero if relu else grid.low, grid.high).astype(np.int64)


def numpy_network(network, qstate_grids, layers, x):
    """Every quantised tensor of ``tests.quant.networks.apply``, and the logits."""
    grids, f = qstate_grids, np.float32

    def layer(name, q, out=None, relu=False):
        w, source = layers[name], grids[name]
        centred = q - source.zero
        total = (
            numpy_conv(centred, np.asarray(w.integers)) if q.ndim == 4 else centred @ np.asarray(w.integers, np.int64)
        )
        total = total + np.asarray(w.bias, np.int64)
        product = f(source.scale) * np.asarray(w.scale).reshape(-1)
        return total.astype(f) * product if out is None else numpy_requantise(total, product / f(out.scale), out, relu)

    t = {}
    first = grids["stem/kernel"]
    t["stem/kernel"] = np.clip(np.rint(np.asarray(x) / f(first.scale)) + first.zero, 0, 255).astype(np.int64)
    t["a/kernel"] = layer("stem/kernel", t["stem/kernel"], grids["a/kernel"], relu=True)
    t["b/kernel"] = layer("a/kernel", t["a/kernel"], grids["b/kernel"], relu=True)
    t["b/kernel:out"] = layer("b/kernel", t["b/kernel"], grids["b/kernel:out"])
    a, b, out = grids["a/kernel"], grids["b/kernel:out"], grids["head/kernel:pool"]
    total = (t["a/kernel"] - a.zero) * (a.scale / out.scale) + (t["b/kernel:out"] - b.zero) * (b.scale / out.scale)
    t["head/kernel:pool"] = np.clip(np.rint(total) + out.zero, out.zero, 255).astype(np.int64)
    pooled, head = t["head/kernel:pool"], grids["head/kernel"]
    multiplier = f(out.scale) / (f(head.scale) * f(36))
    t["head/kernel"] = numpy_requantise((pooled - out.zero).sum((1, 2)), multiplier, head)
    return t, layer("head/kernel", t["head/kernel"])


def test_every_tensor_is_integer_arithmetic(small):
    network, variables, qstate, x, _ = small
    logits, tensors = everything(network, x)
    layers = jit(lambda v, s: quantize_weights(apply, v, s, x))(variables, qstate)
    expected, expected_logits = numpy_network(network, dict(network.structure.grids), layers, x)
    assert tensors.keys() == expected.keys() == qstate.keys()
    for name, integers in expected.items():
        np.testing.assert_array_equal(np.asarray(tensors[name], np.int64), integers, err_msg=name)
        assert tensors[name].dtype == jnp.uint8 and len(np.unique(integers)) > 10
    np.testing.assert_array_equal(logits, expected_logits)


@pytest.mark.slow
def test_int8_and_float32_execution_give_the_same_integers(small):
    _, variables, qstate, x, _ = small
    quantized = fake_quant(apply)
    both = [
        everything(to_integer(quantized, variables, qstate, example=x, execution=how), x) for how in ("int8", "float32")
    ]
    for name, tensor in both[0][1].items():
        np.testing.assert_array_equal(tensor, both[1][1][name], err_msg=name)
    np.testing.assert_array_equal(both[0][0], both[1][0])
    mixed = to_integer(quantized, variables, qstate, example=x, execution={"a/kernel": "int8", "b/kernel": "float32"})
    assert dict(mixed.execution)["a/kernel"] == "int8" and dict(mixed.execution)["b/kernel"] == "float32"


def test_it_is_what_was_trained(small):
    """Fake quantisation rounds the same numbers to the same integers, but for ties (one step, 1 %)."""
    network, variables, qstate, x, fake = small
    logits, tensors = everything(network, x)
    trained = jit(partial(rounded_activations, fake_quant(apply)))(variables, qstate, x)
    for name, integers in trained.items():
        apart = np.abs(np.asarray(integers) - np.asarray(tensors[name], np.int32))
        assert apart.max() <= 1 and apart.mean() < 0.01, name
    assert float(jnp.abs(logits - fake).max()) < 0.01 * float(jnp.abs(fake).max())


def test_other_batch_sizes_closures_and_pytrees(small):
    network, _, _, x, _ = small
    logits, _ = everything(network, x)
    np.testing.assert_array_equal(jit(lambda n, x: n(x))(network, x[1:2]), logits[1:2])
    np.testing.assert_array_equal(jit(lambda x: network(x))(x), logits)  # weights are constants of the program
    leaves, tree = jax.tree.flatten(network)
    np.testing.assert_array_equal(everything(jax.tree.unflatten(tree, leaves), x)[0], logits)
    stored = {name: layer.kernel.dtype for name, layer in network.layers.items()}
    assert set(stored.values()) == {jnp.dtype("int8")} and network.variables == {}


@pytest.mark.slow
def test_sixteen_bit_sums():
    """HAWQ-V3: unsigned layer inputs, rounded from sums that have 16 bits."""
    variables, x = make_variables(), jnp.abs(make_images())
    quantized, qstate = calibrate(apply, variables, x, HAWQ)
    network = to_integer(quantized, variables, qstate, example=x)
    logits, tensors = everything(network, x)
    fake = run(quantized, variables, qstate, x)
    assert float(jnp.abs(logits - fake).max()) < 0.02 * float(jnp.abs(fake).max())
    for name, grid in network.structure.grids:
        assert grid.low <= int(tensors[name].min()) < int(tensors[name].max()) <= grid.high
    assert tensors["b/kernel:out"].dtype == jnp.uint16 and tensors["b/kernel"].dtype == jnp.uint8


@pytest.mark.slow
def test_every_range_names_its_integers():
    """Also where its values are joined from others, and where they are those of another range."""

    def function(v, x):
        y = jax.nn.relu(x @ v["a"])
        joined = jnp.concatenate([y, x @ v["b"], x[:, 4:]], axis=1)
        return joined @ v["c"], jnp.maximum(y, 0.0) @ v["d"], y @ v["d"]

    shapes = {"a": (6, 3), "b": (6, 4), "c": (9, 2), "d": (3, 2)}
    variables = {name: jax.random.normal(jax.random.key(len(name)), shape) for name, shape in shapes.items()}
    quantized, qstate = calibrate(function, variables, DENSE_X)
    tensors = everything(to_integer(quantized, variables, qstate, example=DENSE_X), DENSE_X)[1]
    fake = jit(partial(rounded_activations, quantized))(variables, qstate, DENSE_X)
    assert fake.keys() == qstate.keys() <= tensors.keys()
    for name, integers in fake.items():
        assert int(jnp.abs(integers - tensors[name].astype(jnp.int32)).max()) <= 1, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_stays_in_floating_point_keeps_its_16_bits(dtype):
    function, variables, x = in_16_bits(dtype)
    for rules in (INT8, (QuantRule("b", skip=True), *INT8)):  # the gate reads a layer's sums, or a layer a rounding
        quantized, qstate = calibrate(function, variables, x, rules)
        got = jit(lambda n, x: n(x))(to_integer(quantized, variables, qstate, example=x), x)
        assert got.dtype == dtype
        fake = run(quantized, variables, qstate, x).astype(jnp.float32)
        np.testing.assert_allclose(got.astype(jnp.float32), fake, atol=0.02 * float(jnp.abs(fake).max()))


FILLED = {
    "a pad that is clipped": ("asymmetric", lambda y: jnp.clip(jnp.pad(y, ((0, 0), (1, 1))), 0.5, 6.0)),
    "a pad under a ReLU": ("symmetric", lambda y: jax.nn.relu(jnp.pad(y, ((0, 0), (1, 1)), constant_values=-1.0))),
    "a pad beyond the data": ("asymmetric", lambda y: jnp.pad(jax.nn.relu(y), ((0, 0), (1, 1)), constant_values=-1.0)),
    "a gather that is clipped": (
        "asymmetric",
        lambda y: jnp.clip(jnp.take(y, np.array([9, 2, 0, 1, 9]), axis=1, mode="fill", fill_value=0), 0.5, 6.0),
    ),
    "a gather that fills": (
        "asymmetric",
        lambda y: jnp.take(jax.nn.relu(y), np.array([9, 2, 0, 1, 9]), axis=1, mode="fill", fill_value=-1.0),
    ),
    "a join with constants": (
        "symmetric",
        lambda y: jax.nn.relu(jnp.concatenate([jnp.full((8, 1), 0.7), y, jnp.full((8, 1), -1.0)], axis=1)),
    ),
}


@pytest.mark.parametrize(("kind", "filled"), FILLED.values(), ids=FILLED)
def test_numbers_among_the_data_are_rounded_and_clipped_with_them(kind, filled):
    def function(v, x):
        return filled(x @ v["a"]) @ v["b"]

    shapes = {"a": (6, 3), "b": (5, 2)}
    variables = {name: jax.random.normal(jax.random.key(len(shape)), shape) for name, shape in shapes.items()}
    quantized, qstate = calibrate(function, variables, DENSE_X, (QuantRule(activations=kind),))
    logits, tensors = everything(to_integer(quantized, variables, qstate, example=DENSE_X), DENSE_X)
    rounded = jit(partial(rounded_activations, quantized))(variables, qstate, DENSE_X)
    for name, integers in rounded.items():
        assert int(jnp.abs(integers - tensors[name].astype(jnp.int32)).max()) <= 1, name
    exact = function(variables, DENSE_X)
    for got in (logits, run(quantized, variables, qstate, DENSE_X)):
        np.testing.assert_allclose(got, exact, atol=0.03 * float(jnp.abs(exact).max()))


# Sums and pools


def test_sums_round_as_a_fused_multiply_add():
    """All 65,536 pairs: rint(fma(a, ra, fma(b, rb, fixed))), the fused operation computed in float64."""
    rng = np.random.default_rng(0)
    a, b = (q.reshape(-1) for q in np.meshgrid(np.arange(256), np.arange(256)))
    for _ in range(10):
        scales, zeros = np.exp(rng.uniform(-4, -2, 3)).astype(np.float32), rng.integers(0, 256, 3)
        grids = [IntegerGrid(float(s), int(z), 0, 255) for s, z in zip(scales, zeros, strict=True)]
        numbers = arithmetic.add_numbers(*grids)
        inner = (b * np.float64(numbers.b_ratio) + np.float64(numbers.fixed)).astype(np.float32)
        exact = (a * np.float64(numbers.a_ratio) + inner.astype(np.float64)).astype(np.float32)
        want = np.clip(np.rint(exact), 0, 255)
        target = Target(Integers("sum", grids[2], a.shape), 0, 255)
        stored = [arithmetic.store(jnp.asarray(q, jnp.int32), g) for q, g in zip((a, b), grids, strict=False)]
        got = arithmetic.add(stored[0], grids[0], stored[1], grids[1], target)
        np.testing.assert_array_equal(np.asarray(arithmetic.integers_of(got, grids[2])), want)
        negative = arithmetic.negated(grids[1])
        flipped = arithmetic.dequantise_from(arithmetic.store(255 - jnp.asarray(b, jnp.int32), negative), negative)
        np.testing.assert_array_equal(flipped, -arithmetic.dequantise_from(stored[1], grids[1]))


# Certificates


def grouped(v, x):
    """Three groups of 80 channels each, with strides, a dilated kernel and channels in front."""
    return lax.conv_general_dilated(x, v, (2, 1), ((1, 0), (2, 2)), rhs_dilation=(1, 2), feature_group_count=3)


def at_once(equation):
    return lambda v, x: jnp.einsum(equation, x, v)


LAYERS = {
    "dense": (at_once("bi,io->bo"), (1100, 3), (2, 1100)),
    "dense with two axes of outputs": (at_once("bi,ihd->bhd"), (1100, 3, 2), (2, 1100)),
    "dense over two axes, kernel first": (at_once("btf,otf->ob"), (3, 4, 270), (2, 4, 270)),
    "dense with a kernel per head": (at_once("bhi,hio->bho"), (2, 1100, 3), (2, 2, 1100)),
    "dense that sums over nothing": (at_once("bi,io->bio"), (4, 3), (2, 4)),
    "convolution in groups": (grouped, (6, 80, 5, 3), (1, 240, 7, 5)),
}


@pytest.fixture(scope="module", params=LAYERS)
def layer(request):
    """(integer network of one layer, its site, the grid it reads, its kernel): most weights are near the largest."""
    function, kernel_shape, x_shape = LAYERS[request.param]
    drawn = np.random.default_rng(0)
    v = jnp.asarray(
        drawn.uniform(0.6, 1.0, kernel_shape) * drawn.choice([1, -1], kernel_shape, p=[0.9, 0.1]), "float32"
    )
    x = jnp.asarray(drawn.uniform(-0.4, 1.0, x_shape), jnp.float32)
    quantized, qstate = calibrate(function, v, x)
    network = to_integer(quantized, v, qstate, example=x)
    (step,) = (step for step in network.structure.program(x).steps if isinstance(step, LayerStep))
    return network, step.site, step.source.grid, network.layers[step.site.name].kernel


def summed(site, grid, kernel, integers, parts=()):
    """The layer's sums of ``integers``, int64."""
    stored = arithmetic.store(jnp.asarray(integers, jnp.int32), grid)
    accumulate = jit(partial(arithmetic.accumulate, site.node, site.kernel_operand, grid=grid, parts=parts))
    return np.asarray(accumulate(stored, kernel=kernel), np.int64)


def test_certificates_are_reached_by_the_worst_input(layer):
    """x at the end of its range that the weight's sign asks for: no input makes the sum larger, and one reaches it."""
    network, site, grid, kernel = layer

    def plain(x):
        operands = [x]
        operands.insert(site.kernel_operand, kernel.astype(jnp.float32))
        return site.node.primitive.bind(*operands, **site.node.params)

    zeros = jnp.zeros(site.activation.shape)
    weights = np.asarray(jit(jax.jacrev(plain))(zeros)).reshape(-1, *zeros.shape)  # of every output, where x lies
    weights = np.concatenate([weights, -weights])
    up = np.where(weights > 0, grid.high, grid.low)
    reached = ((up - grid.zero) * weights).reshape(len(weights), -1).sum(1)
    worst = int(np.argmax(reached))
    largest = dict(network.certificates)[site.name].largest
    assert largest == reached[worst] == np.abs(summed(site, grid, kernel, up[worst])).max()


def test_sums_that_are_cut_in_float32_are_the_same_integers(layer):
    """The worst input for float32 is the largest numbers of one sign; odd sums need every bit."""
    network, site, grid, kernel = layer
    certificate, drawn = dict(network.certificates)[site.name], np.random.default_rng(1)
    if certificate.largest >= 2**24:
        assert len(certificate.float32_parts) > 1 and not certificate.float32_exact
    for integers in (
        grid.high - drawn.integers(0, 2, site.activation.shape),
        drawn.integers(0, 256, site.activation.shape),
    ):
        want = summed(site, grid, kernel, integers)
        got = summed(site, grid, kernel, integers, certificate.float32_parts)
        np.testing.assert_array_equal(got, want)


def test_parts_are_the_fewest():
    reaches = np.array([5, 5, 6, 16, 1, 1]).reshape(-1, 1, 1) * 2**20 - 1
    assert arithmetic.float32_parts(reaches) == (3, 1, 2)
    assert arithmetic.float32_parts(reaches + 1) == ()


@pytest.mark.slow
def test_a_network_may_sum_in_float32_what_float32_does_not_hold(monkeypatch):
    """As every convolution does by default where XLA cannot compile the ones of int8."""

    def function(v, x):
        y = lax.conv_general_dilated(x, v["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jax.nn.relu(y).mean(1) @ v["dense"]

    drawn = np.random.default_rng(2)
    v = {"conv": jnp.asarray(drawn.uniform(0.5, 1, (5, 200, 3)), "float32"), "dense": jnp.ones((3, 2))}
    x = jnp.asarray(drawn.uniform(0, 1, (2, 6, 200)), jnp.float32)
    quantized, qstate = calibrate(function, v, x)
    default = to_integer(quantized, v, qstate, example=x)
    assert dict(default.execution) == {"conv": "int8", "dense": "float32"}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elsewhere = to_integer(quantized, v, qstate, example=x)
    assert dict(elsewhere.execution) == {"conv": "float32", "dense": "int8"}
    assert len(dict(elsewhere.certificates)["conv"].float32_parts) == 2
    monkeypatch.undo()
    for got, want in zip(
        jax.tree.leaves(everything(elsewhere, x)), jax.tree.leaves(everything(default, x)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_float32_is_refused_where_one_channel_is_not_exact_and_int32_where_it_overflows():
    def function(v, x):
        return lax.conv_general_dilated(x, v["kernel"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    for taps, how, message in (
        (600, "float32", "single input channel are not exact"),
        (70_000, None, "int32 cannot hold"),
    ):
        v, x = {"kernel": jnp.ones((taps, 1, 1))}, jnp.linspace(0.0, 1.0, taps)[None, :, None]
        quantized, qstate = calibrate(function, v, x)
        with pytest.raises(ValueError, match=f"kernel: .*{message}"):
            to_integer(quantized, v, qstate, example=x, execution=how)
    quantized, qstate = calibrate(dense, DENSE, DENSE_X)
    with pytest.raises(ValueError, match="'fp4' for kernel"):
        to_integer(quantized, DENSE, qstate, example=DENSE_X, execution="fp4")
    with pytest.raises(ValueError, match="kernels, which are no layers here; they are kernel"):
        to_integer(quantized, DENSE, qstate, example=DENSE_X, execution={"kernels": "int8"})


# What is refused


def two_layers(v, x):
    return jnp.tanh(x @ v["one"]) @ v["two"]


def test_an_operation_without_an_integer_form_is_named_with_the_rule_that_skips_it():
    v = {"one": DENSE["kernel"], "two": DENSE["kernel"].T}
    quantized, qstate = calibrate(two_layers, v, DENSE_X)
    with pytest.raises(NotImplementedError, match=r"tanh at .*QuantRule\('two', skip=True\)"):
        to_integer(quantized, v, qstate, example=DENSE_X)
    rules = (QuantRule("two", skip=True), QuantRule())
    quantized, qstate = calibrate(two_layers, v, DENSE_X, rules)
    network = to_integer(quantized, v, qstate, example=DENSE_X)
    fake = quantized.apply(v, qstate, DENSE_X, update=False)[0]
    np.testing.assert_allclose(everything(network, DENSE_X)[0], fake, atol=1e-5)
    assert list(network.variables) == ["two"]


def test_sums_in_floating_point_are_an_error_that_says_residual_bits(small):
    _, variables, _, x, _ = small
    quantized, qstate = calibrate(apply, variables, x, (QuantRule(residual_bits=None),))
    with pytest.raises(NotImplementedError, match=r"add at .*residual_bits=8"):
        to_integer(quantized, variables, qstate, example=x)


def refusal(function, v, x, rules=INT8):
    quantized, qstate = calibrate(function, v, x, rules)
    with pytest.raises(NotImplementedError) as error:
        to_integer(quantized, v, qstate, example=x)
    return str(error.value)


@pytest.mark.slow
def test_refusals_name_the_rule_that_helps():
    """And no other: a bias per position, an add with 8 bits at its ends already, is not one of residual bits."""
    v = {"one": DENSE["kernel"], "two": DENSE["kernel"].T, "at": jnp.ones((8, 4)), "order": jnp.arange(4.0)}
    position = refusal(lambda v, x: jax.nn.relu(x @ v["one"] + v["at"]) @ v["two"], v, DENSE_X)
    assert "QuantRule('two', skip=True)" in position and "residual_bits" not in position
    joined = refusal(lambda v, x: jnp.concatenate([jnp.tanh(x @ v["one"]), x[:, :0]], axis=1) @ v["two"], v, DENSE_X)
    assert "QuantRule('two', skip=True)" in joined  # not after the tensor that is joined
    ordered = refusal(lambda v, x: (x @ v["one"])[:, v["order"].astype(jnp.int32)] @ v["two"], v, DENSE_X)
    assert "by indices that depend on variables" in ordered and "QuantRule('two', skip=True)" in ordered


def test_ranges_must_be_calibrated():
    quantized = fake_quant(dense)
    with pytest.raises(ValueError, match="never seen data"):
        to_integer(quantized, DENSE, quantized.init(DENSE, DENSE_X), example=DENSE_X)
    _, constant = calibrate(dense, DENSE, jnp.zeros((2, 6)))
    with pytest.raises(ValueError, match=r"always 0\.0"):
        to_integer(quantized, DENSE, constant, example=DENSE_X)
    _, broken = calibrate(dense, DENSE, DENSE_X.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="not finite"):
        to_integer(quantized, DENSE, broken, example=DENSE_X)
    with pytest.raises(ValueError, match="empty"):
        quantized.apply(DENSE, quantized.init(DENSE, DENSE_X), DENSE_X[:0], update=True)
